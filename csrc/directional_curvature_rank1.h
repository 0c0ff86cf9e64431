// Directional curvature of one layer along rank-one directions U = v w^T:
//
//   out_p = mean_n ( sum_t (g_nt . v_p) (a_nt . w_p) )^2     a (n, t, i), g (n, t, o), v (p, o), w (p, i)
//
// The scores of directional_scores_rank1.h, squared and summed as they come; bounds and order of sums
// are stated there.
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
