// Looking at the lines of a piece (block_plan.h): sums along rows, and down columns side by side.
#pragma once

#include "adam.h"
#include "block_plan.h"
#include "parallel.h"
#include "sweep.h"

namespace ddf::DDF_ISA {

// Rows and elements of a panel of columns that are asked for ahead of their use.
constexpr int64_t kRowsInFlight = 8, kInFlight = 4096;
constexpr int64_t kSumRows = 128;           // of a panel, summed in T; further ones in fp64
constexpr int64_t kSerialElements = 16384;  // below this a second thread costs more than it gives

// The sum of x y over a run of elements.
template <class T>
inline double dot_run(const T* x, const T* y, int64_t count) {
  constexpr int U = 4;
  Vector<T> acc[U] = {};
  sweep<T, U>(count, [&](int64_t k, int u, auto lanes) {
    acc[u] += load_lanes<T>(x + k, lanes) * load_lanes<T>(y + k, lanes);
  });
  return sum_all<T, U>(acc);
}

// body(line, offset, at, count) for runs of at most kBlock neighbours of each row of a piece: `at`
// is the place of the run in the matrix, `offset` in the piece.
template <class Body>
[[gnu::always_inline]] inline void along_rows(const BlockPiece& piece, int64_t columns,
                                              Body&& body) {
  const int64_t length = piece.end - piece.begin;
  for (int64_t l = 0; l < piece.lines; ++l)
    for (int64_t e = 0; e < length; e += kBlock)
      body(l, l * length + e, (piece.line + l) * columns + piece.begin + e,
           smaller(kBlock, length - e));
}

// body(line, offset, at, count) for runs of at most kBlock neighbours of each row of a panel of
// columns, from `line` of the piece on; `sums()` after every kSumRows rows and after the last;
// ahead(at, count) for rows to come, where they do not follow in memory.
template <class Body, class Sums, class Ahead>
[[gnu::always_inline]] inline void down_columns(const BlockPiece& piece, int64_t columns,
                                                Body&& body, Sums&& sums, Ahead&& ahead) {
  const int64_t lines = piece.lines;
  const int64_t rows = larger(1, smaller(kRowsInFlight, kInFlight / lines));
  for (int64_t r = piece.begin; r < piece.end; ++r) {
    const int64_t offset = (r - piece.begin) * lines, at = r * columns + piece.line;
    if (lines < columns && r + rows < piece.end) ahead(at + rows * columns, lines);
    for (int64_t l = 0; l < lines; l += kBlock)
      body(l, offset + l, at + l, smaller(kBlock, lines - l));
    if ((r - piece.begin + 1) % kSumRows == 0 || r + 1 == piece.end) sums();
  }
}

}  // namespace ddf::DDF_ISA
