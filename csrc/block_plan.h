// How matrices that are divided into blocks of rows or columns are cut into units of work.
//
// A line is a row (dimension 0) or a column (1) and belongs to one block, which may have lines in
// several matrices. Lines are cut into pieces: neighbours of one matrix, a range of each. Every line
// of a piece has a slot for a partial sum, so that sums can be joined in the order of the slots: the
// cut depends on shapes and blocks alone. Plain code, shared by all instruction sets.
#pragma once

#include <cstdint>
#include <vector>

namespace ddf {

constexpr int64_t kPanelColumns = 4096;  // lines of a piece of columns at most

struct BlockMatrix {
  int64_t rows = 0, columns = 0;
  int dim = 0;
  const int32_t* block = nullptr;  // of every line
};

struct BlockPiece {
  int64_t matrix = 0;
  int64_t line = 0, lines = 0;  // [line, line + lines)
  int64_t begin = 0, end = 0;   // of each line
  int64_t slot = 0;             // of the first line
};

// Pieces that hold all lines of their blocks: one thread can finish them while they are in cache.
struct BlockGroup {
  int64_t begin = 0, end = 0;  // pieces
  int64_t elements = 0;
};

// What a kernel sees of a plan: no containers, whose code must not be compiled per instruction set.
struct BlockCut {
  const BlockMatrix* matrices = nullptr;
  const BlockPiece* pieces = nullptr;  // those of the groups first
  const BlockGroup* groups = nullptr;
  int64_t piece_count = 0, group_count = 0;
  int64_t elements = 0;  // of all matrices
  int64_t largest = 0;   // of a group
};

struct BlockPlan {
  std::vector<BlockMatrix> matrices;  // a single column of rows is read as a row of columns
  std::vector<BlockPiece> pieces;
  std::vector<BlockGroup> groups;
  int64_t slots = 0, elements = 0, largest = 0;

  BlockCut cut() const;
};

// All lines in pieces, in the order of the matrices: no groups.
BlockPlan cut_pieces(std::vector<BlockMatrix> matrices);

// Small blocks in groups, in the order in which the columns of the matrices (or else the rows) meet
// them, so that lines of a group are neighbours; large ones in further pieces.
BlockPlan cut_groups(std::vector<BlockMatrix> matrices, int64_t count);

}  // namespace ddf
