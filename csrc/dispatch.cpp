// Each operation, sent to the instruction set in use.
#include "block_adam.h"
#include "block_products.h"
#include "directional_curvature.h"
#include "directional_curvature_rank1.h"
#include "directional_scores.h"
#include "directional_scores_rank1.h"
#include "fma_peak.h"
#include "gram.h"
#include "isa.h"
#include "kron_matvec.h"
#include "kron_quadratic.h"
#include "kron_quadratic_rank1.h"
#include "linear_softmax_fisher.h"
#include "random_bits.h"
#include "scaled_adam.h"
#include "scaled_squares.h"
#include "shared_adam.h"
#include "softmax_fisher.h"
#include "softmax_kl.h"

#ifdef DDF_HAVE_AVX512
#define DDF_CASE_AVX512(name) \
  case Isa::avx512:           \
    return avx512::name(args);
#else
#define DDF_CASE_AVX512(name)
#endif
#ifdef DDF_HAVE_AVX2
#define DDF_CASE_AVX2(name) \
  case Isa::avx2:           \
    return avx2::name(args);
#else
#define DDF_CASE_AVX2(name)
#endif
#define DDF_DISPATCH(name, Args)     \
  void name(const Args& args) {      \
    switch (isa_current()) {         \
      DDF_CASE_AVX512(name)          \
      DDF_CASE_AVX2(name)            \
      default:                       \
        return portable::name(args); \
    }                                \
  }

namespace ddf {

DDF_DISPATCH(block_adam, BlockAdam)
DDF_DISPATCH(block_products, BlockProducts)
DDF_DISPATCH(directional_curvature, DirectionalCurvature)
DDF_DISPATCH(directional_curvature_rank1, DirectionalCurvatureRank1)
DDF_DISPATCH(directional_scores, DirectionalScores)
DDF_DISPATCH(directional_scores_rank1, DirectionalScoresRank1)
DDF_DISPATCH(fma_peak, FmaPeak)
DDF_DISPATCH(gram, Gram)
DDF_DISPATCH(kron_matvec, KronMatvec)
DDF_DISPATCH(kron_quadratic, KronQuadratic)
DDF_DISPATCH(kron_quadratic_rank1, KronQuadraticRank1)
DDF_DISPATCH(linear_softmax_fisher, LinearSoftmaxFisher)
DDF_DISPATCH(random_bits, RandomBits)
DDF_DISPATCH(scaled_adam, ScaledAdam)
DDF_DISPATCH(scaled_squares, ScaledSquares)
DDF_DISPATCH(shared_adam, SharedAdam)
DDF_DISPATCH(softmax_fisher, SoftmaxFisher)
DDF_DISPATCH(softmax_kl, SoftmaxKl)

}  // namespace ddf
