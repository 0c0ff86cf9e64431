// Directional curvature of one layer along rank-one directions U = v w^T:
//
//   out_p = mean_n ( sum_t (g_nt . v_p) (a_nt . w_p) )^2     a (n, t, i), g (n, t, o), v (p, o), w (p, i)
//
// Bounds. 2 n t p (i + o) FLOP; b n t (i + o) bytes: bound by memory for p below some tens. a and g
// are read once for all p and nothing is packed: rows meet rows, some of each in registers.
//
// Sums run in fp64 if any input is fp64, else in fp32 over inputs and outputs and fp64 over tokens and
// samples. The result depends on values, shapes and instruction set, not on the number of threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct DirectionalCurvatureRank1 {
  Array a, g, v, w;              // contiguous; any mix of types
  double* out = nullptr;         // (p,)
  int64_t n = 0, t = 1, i = 0, o = 0, p = 0;
  int threads = 1;
};

// The mean over no samples is NaN; a sum over no tokens, inputs or outputs is 0.
DDF_DECLARE(directional_curvature_rank1, DirectionalCurvatureRank1)

}  // namespace ddf
