#include "directional_scores_rank1.h"

#include "dot.h"
#include "parallel.h"
#include "zero_scores.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kUnitTokens = 384;    // tokens of a unit of work, about
constexpr int64_t kPartTokens = 8192;   // longer samples are cut into parts
constexpr double kSerialFlops = 2e6;    // below this a second thread costs more than it gives

// Rows of a matrix as T: where they lie, or widened into `copy`.
template <class T>
Rows<T> rows_of(const Array& x, int64_t first, int64_t count, int64_t size, T* copy) {
  return {widened<T>(x, first * size, count * size, copy), size, 0};
}

template <class T>
void run(const DirectionalScoresRank1& c) {
  if (c.n == 0 || c.t == 0 || c.i == 0 || c.o == 0) return zero_scores<T>(c);
  const int64_t i = c.i, o = c.o, p = c.p;
  const double flops = 2.0 * static_cast<double>(c.n * c.t) * static_cast<double>(p) *
                       static_cast<double>(i + o);
  const int threads = flops < kSerialFlops ? 1 : c.threads;
  constexpr Type own = sizeof(T) == 8 ? Type::f64 : Type::f32;
  Buffer<T> v_copy(c.v.type == own ? 0 : p * o), w_copy(c.w.type == own ? 0 : p * i);
  const Rows<T> v = rows_of(c.v, 0, p, o, v_copy.get()), w = rows_of(c.w, 0, p, i, w_copy.get());
  const bool squared = c.squares != nullptr;
  T* const out = static_cast<T*>(c.out);

  // A unit is some samples, or one of several parts of a long one.
  const int64_t parts = ceil_div(c.t, kPartTokens);
  const int64_t group = parts > 1 ? 1 : larger(1, kUnitTokens / c.t);
  const int64_t units = ceil_div(c.n, group) * parts;
  const int64_t row = kDotRows * (i + o);
  Buffer<T> copies(threads * row);
  Buffer<double> open(threads * p), partial(units * p);

  parallel_units(units, threads, [&](int64_t unit, int thread) {
    const int64_t part = unit % parts, n0 = unit / parts * group;
    const int64_t n1 = smaller(c.n, n0 + group);
    const int64_t begin = n0 * c.t + c.t * part / parts;
    const int64_t end = parts > 1 ? n0 * c.t + c.t * (part + 1) / parts : n1 * c.t;
    T* copy = copies.get() + thread * row;
    double* q = open.get() + thread * p;  // the sum over the tokens so far of the open sample
    double* to = partial.get() + unit * p;
    for (int64_t j = 0; j < p; ++j) q[j] = to[j] = 0;

    for (int64_t token0 = begin; token0 < end; token0 += kDotRows) {
      const int64_t here = smaller(kDotRows, end - token0);
      const Rows<T> g = rows_of(c.g, token0, here, o, copy);
      const Rows<T> a = rows_of(c.a, token0, here, i, copy + kDotRows * o);
      for (int64_t p0 = 0; p0 < p; p0 += kDotColumns) {
        const int64_t columns = smaller(kDotColumns, p - p0);
        Vector<T> output[kDotRows * kDotColumns] = {}, input[kDotRows * kDotColumns] = {};
        dot_rows<T>(here, columns, g, {v.data + p0 * o, o, 0}, 1, o, output, kDotColumns);
        dot_rows<T>(here, columns, a, {w.data + p0 * i, i, 0}, 1, i, input, kDotColumns);
        for (int64_t r = 0; r < here; ++r) {
          const int64_t after = token0 + r + 1, complete = after / c.t;
          const bool last = parts == 1 && complete * c.t == after;
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t at = r * kDotColumns + j;
            double& sum = q[p0 + j];
            sum += sum_lanes<T>(output[at]) * sum_lanes<T>(input[at]);
            if (!last) continue;
            if (squared)
              to[p0 + j] += sum * sum;
            else
              out[(p0 + j) * c.n + complete - 1] = static_cast<T>(sum);
            sum = 0;
          }
        }
      }
    }
    if (parts > 1)
      for (int64_t j = 0; j < p; ++j) to[j] = q[j];
  });

  if (!squared && parts == 1) return;
  for (int64_t j = 0; j < c.p; ++j) {
    double total = 0;
    for (int64_t unit = 0; unit < units; unit += parts) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial.get()[(unit + part) * c.p + j];
      if (!squared) out[j * c.n + unit / parts] = static_cast<T>(sum);
      total += parts > 1 ? sum * sum : sum;
    }
    if (squared) c.squares[j] = total;
  }
}

}  // namespace

void directional_scores_rank1(const DirectionalScoresRank1& c) {
  if (c.p == 0) return;
  const bool wide = c.a.type == Type::f64 || c.g.type == Type::f64 || c.v.type == Type::f64 ||
                    c.w.type == Type::f64;
  wide ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
