// Looking at the lines of a piece (block_plan.h): sums along rows, and down columns side by side.
#pragma once

#include "adam.h"
#include "block_plan.h"
#include "parallel.h"
#include "sweep.h"

namespace ddf::DDF_ISA {

constexpr int64_t kRowsInFlight = 8;      // of a panel of columns, asked for ahead of their use
constexpr int64_t kSumRows = 128;         // of a panel of columns, summed in T; further ones in fp64
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

// body(offset, at, count) for each row of a panel of `lines` <= kBlock columns; `sums(lines)` after
// every kSumRows of them and after the last.
template <class Body, class Sums>
[[gnu::always_inline]] inline void down_columns(const BlockPiece& piece, int64_t columns,
                                                Body&& body, Sums&& sums) {
  for (int64_t r = piece.begin; r < piece.end; ++r) {
    body((r - piece.begin) * piece.lines, r * columns + piece.line, r + kRowsInFlight < piece.end);
    if ((r - piece.begin + 1) % kSumRows == 0 || r + 1 == piece.end) sums();
  }
}

}  // namespace ddf::DDF_ISA
