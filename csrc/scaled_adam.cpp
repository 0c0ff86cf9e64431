#include "scaled_adam.h"

#include "parallel.h"
#include "scaled_rows.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kUnitElements = 1 << 15;
constexpr int64_t kSerialElements = 1 << 15;  // below this a second thread costs more than it gives

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
      adam_elements<T>(x, c.type, larger(begin, first.get()[k]) - first.get()[k],
                       smaller(end, first.get()[k + 1]) - first.get()[k], sign, h,
                       c.seed >= 0 ? &noise : nullptr);
    }
  });
}

}  // namespace

void scaled_adam(const ScaledAdam& c) { c.type == Type::f64 ? run<double>(c) : run<float>(c); }

}  // namespace ddf::DDF_ISA
