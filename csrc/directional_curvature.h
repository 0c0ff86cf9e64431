// Directional curvature of one layer: the Fisher quadratic form along full-rank directions.
//
//   out_p = mean_n ( sum_t g_nt^T U_p a_nt )^2        a (n, t, i), g (n, t, o), U (p, o, i)
//
// The scores of directional_scores.h, squared and summed as they come; bounds, scratch and order of
// sums are stated there.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct DirectionalCurvature {
  Array a, g, U;                 // contiguous; any mix of types
  double* out = nullptr;         // (p,), written whole
  int64_t n = 0, t = 1, i = 0, o = 0, p = 0;
  int threads = 1;
};

// Arithmetic is fp64 if any input is, else fp32 with fp64 sums over tiles, tokens and samples.
// The mean over no samples is NaN; a sum over no tokens, inputs or outputs is 0.
DDF_DECLARE(directional_curvature, DirectionalCurvature)

}  // namespace ddf
