// Scores of the samples of one layer along rank-one directions U = v w^T, or their sums of squares.
//
//   score_pn = sum_t (g_nt . v_p) (a_nt . w_p)     a (n, t, i), g (n, t, o), v (p, o), w (p, i)
//
// directional_scores_rank1 writes them, directional_curvature_rank1 only their mean squares.
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

struct DirectionalScoresRank1 {
  Array a, g, v, w;              // contiguous; any mix of types
  double* squares = nullptr;     // (p,), sums of squared scores over n; or, where it is null,
  void* out = nullptr;           // (p, n) scores, of the type of the sums. Written whole
  int64_t n = 0, t = 1, i = 0, o = 0, p = 0;
  int threads = 1;
};

// A sum over no samples, tokens, inputs or outputs is 0.
DDF_DECLARE(directional_scores_rank1, DirectionalScoresRank1)

}  // namespace ddf
