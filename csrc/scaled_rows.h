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

template <class T, Scaling S>
inline T scale_of(T a, const T* col, int64_t j) {
  return S == Scaling::none ? T(1) : S == Scaling::one ? a : a * col[j];
}

// body(a, col, scaling) for row o from column j0 on: its elements have the scale a col[j].
template <class T, class Body>
inline void scaled_row(const StepMatrix& x, int64_t o, int64_t j0, const Body& body) {
  const T *row = static_cast<const T*>(x.row), *col = static_cast<const T*>(x.col);
  const T a = row ? row[o] : T(1);
  if (col)
    body(a, col + j0, Is<Scaling::each>{});
  else if (row)
    body(a, col, Is<Scaling::one>{});
  else
    body(a, col, Is<Scaling::none>{});
}

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
    scaled_row<T>(x, o, i, [&](T a, const T* c, auto scaling) { body(at, n, a, c, scaling); });
    at += n;
  }
}

// w, g, m, v of some elements with one scaling; `out` takes the new w and may be w.
template <Scaling S, class T>
inline void adam_span(const T* w, const T* g, T* m, T* v, T a, const T* col, int64_t count, T* out,
                      T sign, const Scalars<T> h) {
  DDF_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) {
    const T s = scale_of<T, S>(a, col, j);
    const T u = update_moments(sign * g[j] * s, m[j], v[j], h);
    out[j] = h.keep * w[j] - h.lr * s * u;
  }
}

// The step of the elements [from, to) of a matrix whose v has one entry an element.
template <class T>
void adam_elements(const StepMatrix& x, Type type, int64_t from, int64_t to, T sign,
                   const Scalars<T>& h, const Noise* noise) {
  if (from >= to) return;
  const Parameters<T> parameters{x.w, x.g, type, noise};
  T *m = static_cast<T*>(x.m), *v = static_cast<T*>(x.v);
  scaled_spans<T>(x, from, to, [&](int64_t at, int64_t n, T a, const T* col, auto scaling) {
    constexpr Scaling S = decltype(scaling)::value;
    parameters.each(at, n, [&](int64_t j, int64_t some, const T* w, const T* g, T* out) {
      adam_span<S>(w, g, m + at + j, v + at + j, a, col ? col + j : col, some, out, sign, h);
    });
  });
}

}  // namespace ddf::DDF_ISA
