#include "directional_curvature_rank1.h"

#include "directional_scores_rank1.h"

namespace ddf::DDF_ISA {

void directional_curvature_rank1(const DirectionalCurvatureRank1& c) {
  DDF_ISA::directional_scores_rank1(
      {c.a, c.g, c.v, c.w, c.out, nullptr, c.n, c.t, c.i, c.o, c.p, c.threads});
  for (int64_t j = 0; j < c.p; ++j) c.out[j] /= static_cast<double>(c.n);
}

}  // namespace ddf::DDF_ISA
