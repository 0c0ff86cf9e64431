// Each operation, sent to the instruction set in use.
#include "directional_curvature.h"
#include "isa.h"

namespace ddf {

void directional_curvature(const DirectionalCurvature& args) {
  switch (isa_current()) {
#ifdef DDF_HAVE_AVX512
    case Isa::avx512:
      return avx512::directional_curvature(args);
#endif
#ifdef DDF_HAVE_AVX2
    case Isa::avx2:
      return avx2::directional_curvature(args);
#endif
    default:
      return portable::directional_curvature(args);
  }
}

}  // namespace ddf
