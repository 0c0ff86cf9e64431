#include "scaled_adam.h"

#include "parallel.h"
#include "scaled_rows.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kUnitElements = 1 << 15;
constexpr int64_t kSerialElements = 1 << 15;  // below this a second thread costs more than it gives

// w, g, m, v of some elements with scale `a`, or a col where it is there, or 1; `out` is the new w.
template <class T, Scaling S>
void step(const T* w, const T* g, T* m, T* v, T a, const T* col, int64_t count, T sign, T* out,
          const Scalars<T> h) {
  DDF_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) {
    const T s = S == Scaling::none ? T(1) : S == Scaling::one ? a : a * col[j];
    const T u = update_moments(sign * g[j] * s, m[j], v[j], h);
    out[j] = h.keep * w[j] - h.lr * s * u;
  }
}

template <class T>
void run(const ScaledAdam& c) {
  const Scalars<T> h(c.hyper);
  const T sign = c.maximize ? T(-1) : T(1);
  const Buffer<int64_t> first(c.count + 1);  // the first element of each matrix in one row of all
  first.get()[0] = 0;
  for (int64_t k = 0; k < c.count; ++k)
    first.get()[k + 1] = first.get()[k] + c.matrices[k].o * c.matrices[k].i;
  const int64_t total = first.get()[c.count];
  const int threads = total < kSerialElements ? 1 : c.threads;

  parallel_units(ceil_div(total, kUnitElements), threads, [&](int64_t unit, int) {
    const int64_t begin = unit * kUnitElements, end = smaller(total, begin + kUnitElements);
    for (int64_t k = last_not_above(first.get(), c.count, begin);
         k < c.count && first.get()[k] < end; ++k) {
      const StepMatrix& x = c.matrices[k];
      const Noise noise(c.seed, c.hyper.step, k);
      const Parameters<T> parameters{x.w, x.g, c.type, c.seed >= 0 ? &noise : nullptr};
      T *m = static_cast<T*>(x.m), *v = static_cast<T*>(x.v);
      const int64_t from = larger(begin, first.get()[k]) - first.get()[k];
      const int64_t to = smaller(end, first.get()[k + 1]) - first.get()[k];
      scaled_spans<T>(x, from, to, [&](int64_t at, int64_t n, T a, const T* col, auto scaling) {
        parameters.each(at, n, [&](int64_t j, int64_t some, const T* w, const T* g, T* out) {
          const T* s = col ? col + j : nullptr;
          step<T, decltype(scaling)::value>(w, g, m + at + j, v + at + j, a, s, some, sign, out, h);
        });
      });
    }
  });
}

}  // namespace

void scaled_adam(const ScaledAdam& c) { c.type == Type::f64 ? run<double>(c) : run<float>(c); }

}  // namespace ddf::DDF_ISA
