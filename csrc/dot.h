// Many dot products of unit-stride rows at once: S rows of x with P rows of y in registers.
//
// One step is S + P vector loads and S P multiply-adds, and nothing is packed. Sums stay apart lane
// by lane; `sum_lanes` joins them when a product is complete.
#pragma once

#include "simd.h"

namespace ddf::DDF_ISA {

// By registers, as kRows: 6 x 4 accumulators of 32, 4 x 2 of 16.
constexpr int kDotRows = kRows >= 12 ? 6 : 4;
constexpr int kDotColumns = kRows >= 12 ? 4 : 2;

// Rows of `count` elements, `lines` times `stride` apart; the next row is `step` further on.
template <class T>
struct Rows {
  const T* data;
  int64_t step, stride;
};

// q[s * q_stride + p] += <x[s], y[p]> lane by lane, for `lines` lines of `count` elements.
template <class T, int S, int P>
void dot_tile(const Rows<T>& x, const Rows<T>& y, int64_t lines, int64_t count, Vector<T>* q,
              int64_t q_stride) {
  Vector<T> acc[S][P];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
    for (int p = 0; p < P; ++p) acc[s][p] = q[s * q_stride + p];
  const int64_t whole = count / kLanes<T> * kLanes<T>;
  for (int64_t l = 0; l < lines; ++l) {
    const T* __restrict xs = x.data + l * x.stride;
    const T* __restrict ys = y.data + l * y.stride;
    for (int64_t e = 0; e < whole; e += kLanes<T>) {
      Vector<T> v[P];
      for (int p = 0; p < P; ++p) v[p] = load(ys + p * y.step + e);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        const Vector<T> u = load(xs + s * x.step + e);
        for (int p = 0; p < P; ++p) acc[s][p] += u * v[p];
      }
    }
    if (whole == count) continue;
    Vector<T> v[P];
    for (int p = 0; p < P; ++p) v[p] = load_first(ys + p * y.step + whole, count - whole);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const Vector<T> u = load_first(xs + s * x.step + whole, count - whole);
      for (int p = 0; p < P; ++p) acc[s][p] += u * v[p];
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
    for (int p = 0; p < P; ++p) q[s * q_stride + p] = acc[s][p];
}

// The same for `rows` <= kDotRows rows of x and `columns` <= kDotColumns rows of y.
template <class T, int S = kDotRows, int P = kDotColumns>
void dot_rows(int64_t rows, int64_t columns, const Rows<T>& x, const Rows<T>& y, int64_t lines,
              int64_t count, Vector<T>* q, int64_t q_stride) {
  if (rows == S && columns == P)
    dot_tile<T, S, P>(x, y, lines, count, q, q_stride);
  else if constexpr (P > 1) {
    if (columns < P)
      dot_rows<T, S, P - 1>(rows, columns, x, y, lines, count, q, q_stride);
    else if constexpr (S > 1)
      dot_rows<T, S - 1, P>(rows, columns, x, y, lines, count, q, q_stride);
  } else if constexpr (S > 1) {
    dot_rows<T, S - 1, P>(rows, columns, x, y, lines, count, q, q_stride);
  }
}

}  // namespace ddf::DDF_ISA
