#include "block_plan.h"

#include <algorithm>

namespace ddf {
namespace {

constexpr int64_t kRowPiece = 32768;  // elements of a piece of rows
constexpr int64_t kPanelRows = 64;    // of a piece of columns
// Of a group: what it keeps of each element fits in the second cache.
constexpr int64_t kRowGroup = 16384;
constexpr int64_t kColumnGroup = 32768;
// Columns of a group at least. Memory gives up most of its rate where it is read in short runs
// (measured: a third with 16 columns), so that two looks at whole rows beat one at narrow panels.
constexpr int64_t kNarrowest = 256;

int64_t lines_of(const BlockMatrix& a) { return a.dim == 0 ? a.rows : a.columns; }
int64_t length_of(const BlockMatrix& a) { return a.dim == 0 ? a.columns : a.rows; }
bool panels(const BlockMatrix& a) { return a.dim == 1 && a.rows > 1; }

// A column of rows, one element each, is as well a row of columns, which is read in vectors.
void turn_vectors(std::vector<BlockMatrix>& matrices) {
  for (BlockMatrix& a : matrices)
    if (a.dim == 0 && a.columns == 1) a = {1, a.rows, 1, a.block};
}

void add(BlockPlan& plan, int64_t matrix, int64_t line, int64_t lines, int64_t begin, int64_t end) {
  plan.pieces.push_back({matrix, line, lines, begin, end, plan.slots});
  plan.slots += lines;
}

// Neighbouring lines of one matrix in pieces; panels of columns in the order of their memory.
void cut(BlockPlan& plan, int64_t matrix, int64_t first, int64_t last) {
  const BlockMatrix& a = plan.matrices[static_cast<size_t>(matrix)];
  const int64_t length = length_of(a);
  const int64_t run = a.dim == 0 ? kRowPiece : kPanelRows;
  const int64_t lines =
      a.dim == 0 ? std::max<int64_t>(1, kRowPiece / std::max<int64_t>(1, length)) : kPanelColumns;
  for (int64_t begin = 0; begin < length; begin += run)
    for (int64_t line = first; line < last; line += lines)
      add(plan, matrix, line, std::min(lines, last - line), begin, std::min(length, begin + run));
}

// Ordinal numbers of groups for blocks, in the order in which `chosen` matrices meet them.
class Grouping {
 public:
  Grouping(const BlockPlan& plan, int64_t count)
      : plan_(plan), size_(static_cast<size_t>(count)), group_(static_cast<size_t>(count), kNone) {
    for (const BlockMatrix& a : plan.matrices)
      for (int64_t l = 0; l < lines_of(a); ++l) size_[index(a, l)] += length_of(a);
    for (bool wanted : {true, false})
      for (const BlockMatrix& a : plan.matrices)
        if (panels(a) == wanted) meet(a, wanted);
  }
  int64_t groups() const { return groups_; }
  // Of the block of a line; a negative number if the block is in none.
  int64_t of(const BlockMatrix& a, int64_t line) const { return group_[index(a, line)]; }

 private:
  static constexpr int64_t kNone = -2, kLarge = -1;

  static size_t index(const BlockMatrix& a, int64_t line) {
    return static_cast<size_t>(a.block[line]);
  }

  void meet(const BlockMatrix& a, bool wide) {
    int64_t elements = 0, blocks = 0;
    for (int64_t l = 0; l < lines_of(a); ++l) {
      const size_t b = index(a, l);
      if (group_[b] != kNone) continue;
      const int64_t size = size_[b];
      if (size * (wide ? kNarrowest : 1) > kColumnGroup) {
        group_[b] = kLarge;
        continue;
      }
      if (blocks == 0 || elements + size > (wide ? kColumnGroup : kRowGroup)) {
        ++groups_;
        elements = blocks = 0;
      }
      group_[b] = groups_ - 1;
      elements += size;
      ++blocks;
    }
  }

  const BlockPlan& plan_;
  std::vector<int64_t> size_, group_;
  int64_t groups_ = 0;
};

}  // namespace

BlockCut BlockPlan::cut() const {
  return {matrices.data(),
          pieces.data(),
          groups.data(),
          static_cast<int64_t>(pieces.size()),
          static_cast<int64_t>(groups.size()),
          elements,
          largest};
}

BlockPlan cut_pieces(std::vector<BlockMatrix> matrices) {
  turn_vectors(matrices);
  BlockPlan plan;
  plan.matrices = std::move(matrices);
  for (size_t k = 0; k < plan.matrices.size(); ++k) {
    const BlockMatrix& a = plan.matrices[k];
    plan.elements += a.rows * a.columns;
    cut(plan, static_cast<int64_t>(k), 0, lines_of(a));
  }
  return plan;
}

BlockPlan cut_groups(std::vector<BlockMatrix> matrices, int64_t count) {
  turn_vectors(matrices);
  BlockPlan plan;
  plan.matrices = std::move(matrices);
  const Grouping grouping(plan, count);

  // Runs of lines, sorted by group and within it by matrix and line: a counting sort.
  struct Run {
    int64_t matrix, line, lines;
  };
  std::vector<Run> runs, sorted;
  std::vector<int64_t> owner;
  std::vector<int64_t> start(static_cast<size_t>(grouping.groups()) + 1);
  std::vector<Run> large;
  for (size_t k = 0; k < plan.matrices.size(); ++k) {
    const BlockMatrix& a = plan.matrices[k];
    plan.elements += a.rows * a.columns;
    if (length_of(a) == 0) continue;
    for (int64_t l = 0; l < lines_of(a);) {
      const int64_t group = grouping.of(a, l), first = l;
      while (l < lines_of(a) && grouping.of(a, l) == group) ++l;
      const Run run = {static_cast<int64_t>(k), first, l - first};
      if (group < 0) {
        large.push_back(run);
      } else {
        runs.push_back(run);
        owner.push_back(group);
        ++start[static_cast<size_t>(group) + 1];
      }
    }
  }
  for (size_t g = 1; g < start.size(); ++g) start[g] += start[g - 1];
  sorted.resize(runs.size());
  std::vector<int64_t> next(start);
  for (size_t r = 0; r < runs.size(); ++r)
    sorted[static_cast<size_t>(next[static_cast<size_t>(owner[r])]++)] = runs[r];

  for (size_t g = 0; g + 1 < start.size(); ++g) {
    BlockGroup group = {static_cast<int64_t>(plan.pieces.size()), 0, 0};
    for (int64_t r = start[g]; r < start[g + 1]; ++r) {
      const Run& run = sorted[static_cast<size_t>(r)];
      const BlockMatrix& a = plan.matrices[static_cast<size_t>(run.matrix)];
      const int64_t most = a.dim == 0 ? run.lines : kPanelColumns;
      for (int64_t l = 0; l < run.lines; l += most)
        add(plan, run.matrix, run.line + l, std::min(most, run.lines - l), 0, length_of(a));
      group.elements += run.lines * length_of(a);
    }
    group.end = static_cast<int64_t>(plan.pieces.size());
    if (group.end == group.begin) continue;
    plan.largest = std::max(plan.largest, group.elements);
    plan.groups.push_back(group);
  }
  for (const Run& run : large) cut(plan, run.matrix, run.line, run.line + run.lines);
  return plan;
}

}  // namespace ddf
