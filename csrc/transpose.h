// A row panel packed by transposing squares in registers.
//
// The scalar loop of pack_across takes about 1.8 cycles an element. Where a panel is used for a few
// dozen samples only, or once as a dW is, that shows; squares of 16-byte vectors take a third.
#pragma once

#include "panels.h"

namespace ddf::DDF_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DDF_TRANSPOSE 1
#endif
#endif

#ifdef DDF_TRANSPOSE
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));

// to[k * L + r] = from[r * stride + k] for a square of 4 or 2 rows and columns.
template <int L>
inline void transpose_square(const float* from, int64_t stride, float* to) {
  Float4 a, b, c, d;
  std::memcpy(&a, from, sizeof a);
  std::memcpy(&b, from + stride, sizeof b);
  std::memcpy(&c, from + 2 * stride, sizeof c);
  std::memcpy(&d, from + 3 * stride, sizeof d);
  const Float4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Float4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Float4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Float4 cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Float4 column[4] = {__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5),
                            __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
                            __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
                            __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
  for (int k = 0; k < 4; ++k) std::memcpy(to + k * L, &column[k], sizeof column[k]);
}

template <int L>
inline void transpose_square(const double* from, int64_t stride, double* to) {
  Double2 a, b;
  std::memcpy(&a, from, sizeof a);
  std::memcpy(&b, from + stride, sizeof b);
  const Double2 column[2] = {__builtin_shufflevector(a, b, 0, 2),
                             __builtin_shufflevector(a, b, 1, 3)};
  for (int k = 0; k < 2; ++k) std::memcpy(to + k * L, &column[k], sizeof column[k]);
}
#endif

// pack_across for a panel of kRows rows, faster where all are there and need no widening.
template <class T>
void pack_rows(const Array& x, int64_t offset, int64_t stride, int64_t rows, int64_t depth,
               T* __restrict to) {
#ifdef DDF_TRANSPOSE
  constexpr int L = kRows, side = 16 / static_cast<int>(sizeof(T)), squares = L / side * side;
  if (rows == L && x.type == (sizeof(T) == 8 ? Type::f64 : Type::f32)) {
    const T* from = static_cast<const T*>(x.data) + offset;
    int64_t k = 0;
    for (; k + side <= depth; k += side) {
#pragma GCC unroll 8
      for (int r = 0; r < squares; r += side)
        transpose_square<L>(from + r * stride + k, stride, to + k * L + r);
      for (int r = squares; r < L; ++r)
        for (int j = 0; j < side; ++j) to[(k + j) * L + r] = from[r * stride + k + j];
    }
    for (; k < depth; ++k)
      for (int r = 0; r < L; ++r) to[k * L + r] = from[r * stride + k];
    return;
  }
#endif
  pack_across<T, kRows>(x, offset, stride, rows, depth, to);
}

}  // namespace ddf::DDF_ISA
