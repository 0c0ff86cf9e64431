// Walks over the elements of a scaled matrix, and over parameters in their own type.
#pragma once

#include "adam.h"
#include "scaled_adam.h"

namespace ddf::DDF_ISA {

enum class Scaling { none, one, each };  // s is 1, one number, or one number times a vector

template <Scaling S>
struct Is {
  static constexpr Scaling value = S;
};

// The place of the last of `count` ascending numbers that is not above `x`.
inline int64_t last_not_above(const int64_t* numbers, int64_t count, int64_t x) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (numbers[middle] <= x ? low : high) = middle;
  }
  return low;
}

// Parameters and their gradients, fp64 and fp32 in place, 16-bit ones a block at a time.
template <class T>
struct Parameters {
  void* w;
  const void* g;
  Type type;
  const Noise* noise;  // for stochastic rounding, or null

  // body(j, n, w, g, out) for parts [j, j + n) of `count` elements from `at` on: `out` takes the
  // new w and may be w itself.
  template <class Body>
  void each(int64_t at, int64_t count, const Body& body) const {
    if constexpr (sizeof(T) == 4) {
      if (type != Type::f32) {
        T wide[kBlock], gradient[kBlock];
        for (int64_t j = 0; j < count; j += kBlock) {
          const int64_t n = smaller(kBlock, count - j);
          widened<T>({w, type}, at + j, n, wide);
          widened<T>({g, type}, at + j, n, gradient);
          body(j, n, wide, gradient, wide);
          narrow(wide, w, type, at + j, n, noise);
        }
        return;
      }
    }
    T* own = static_cast<T*>(w) + at;
    body(0, count, own, static_cast<const T*>(g) + at, own);
  }
};

constexpr int64_t kNarrow = 64;  // the scales of shorter rows are laid out element by element

// body(at, n, a, col, scaling) for spans of the elements [from, to) that have the scale a col[j].
template <class T, class Body>
inline void scaled_spans(const StepMatrix& x, int64_t from, int64_t to, const Body& body) {
  const T *row = static_cast<const T*>(x.row), *col = static_cast<const T*>(x.col);
  if (!row && !col) return body(from, to - from, T(1), col, Is<Scaling::none>{});
  if (x.i < kNarrow) {
    T s[kBlock];
    int64_t o = from / x.i, i = from % x.i;
    for (int64_t at = from; at < to; at += kBlock) {
      const int64_t n = smaller(kBlock, to - at);
      for (int64_t j = 0; j < n; ++j) {
        s[j] = (row ? row[o] : T(1)) * (col ? col[i] : T(1));
        if (++i == x.i) {
          i = 0;
          ++o;
        }
      }
      body(at, n, T(1), static_cast<const T*>(s), Is<Scaling::each>{});
    }
    return;
  }
  for (int64_t at = from; at < to;) {
    const int64_t o = at / x.i, i = at % x.i, n = smaller(x.i - i, to - at);
    const T a = row ? row[o] : T(1);
    if (col)
      body(at, n, a, col + i, Is<Scaling::each>{});
    else
      body(at, n, a, col, Is<Scaling::one>{});
    at += n;
  }
}

}  // namespace ddf::DDF_ISA
