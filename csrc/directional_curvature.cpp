#include "directional_curvature.h"

#include "directional_scores.h"

namespace ddf::DDF_ISA {

void directional_curvature(const DirectionalCurvature& c) {
  DDF_ISA::directional_scores(
      {c.a, c.g, c.U, c.out, nullptr, c.n, c.t, c.i, c.o, c.p, c.threads});
  for (int64_t j = 0; j < c.p; ++j) c.out[j] /= static_cast<double>(c.n);
}

}  // namespace ddf::DDF_ISA
