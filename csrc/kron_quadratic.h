// Quadratic form of a Kronecker-factored block along full-rank directions, in two forms:
//
//   square = false   out_p = sum_oi (G U_p A^T)_oi (U_p)_oi           G, A as they are
//   square = true    out_p = sum_oi (L_G^T U_p L_A)_oi^2              G = L_G L_G^T, A = L_A L_A^T
//
// Bounds. 2 p o i (o + i) FLOP, or half of it with the triangular factors, whose zeros are skipped;
// b (p o i + o^2 + i^2) bytes. The second form is a sum of squares: it cannot be negative, and what
// rounding leaves of a product that cancels is squared. Neither writes anything of the size of U: one product lives in the
// cache, the other in registers, where it is reduced.
//
// Sums run in fp64 if any input is fp64, else in fp32 within a tile and fp64 over tiles. The result
// depends on values, shapes and instruction set, not on the number of threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct KronQuadratic {
  Array A, G, U;          // (i, i), (o, o), (p, o, i) contiguous; lower triangular L_A, L_G if square
  double* out = nullptr;  // (p,)
  int64_t p = 0, o = 0, i = 0;
  bool square = false;
  int threads = 1;
};

// Values below 0 become 0; NaN stays.
DDF_DECLARE(kron_quadratic, KronQuadratic)

}  // namespace ddf
