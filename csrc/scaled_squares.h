// Sums of squares of the scaled rows or columns of several matrices.
//
//   out_o = sum_i (row_o w_oi col_i)^2      or, by columns, over o      w (o, i), row (o,), col (i,)
//
// Bounds. w read once, b bytes an element; 3 FLOP an element: bound by memory.
//
// Sums run in the type of the arithmetic (fp64 for fp64, else fp32) over a run of elements and in
// fp64 across runs. The result depends on values, shapes and instruction set, not on the number of
// threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct ScaledSquares {
  struct Matrix {
    const void *w, *row, *col;  // row or col may be null: ones
    int64_t o, i;
    bool columns;  // one sum a column, not one a row
  };
  const Matrix* matrices = nullptr;
  int64_t count = 0;
  Type type = Type::f32;  // of w; row, col and out are of the type of the arithmetic
  void* out = nullptr;    // the sums of every matrix in order
  int threads = 1;
};

// A sum over nothing is 0.
DDF_DECLARE(scaled_squares, ScaledSquares)

}  // namespace ddf
