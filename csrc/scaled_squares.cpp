#include "scaled_squares.h"

#include "parallel.h"
#include "scaled_rows.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kUnitElements = 1 << 17;
constexpr int64_t kSerialElements = 1 << 16;  // below this a second thread costs more than it gives
constexpr int64_t kRun = 1024;                // elements summed before fp64 takes over, along rows
constexpr int64_t kRunRows = 64;              // and across them
constexpr int64_t kRowPanel = 1 << 16, kColumnPanel = kRun;

// How one matrix is cut into units of `rows` x `width` elements, and where its sums go.
struct Plan {
  ScaledSquares::Matrix x;
  int64_t rows, width, blocks, panels;
  int64_t partial, out;  // first entries
};

// Sum of squares of the scaled elements of a part of one row.
template <class T>
double squares(const T* w, T a, const T* col, int64_t count) {
  constexpr int U = 4;
  constexpr int64_t L = kLanes<T>;
  Vector<T> sum[U] = {};
  int64_t j = 0;
  for (; j + U * L <= count; j += U * L)
    for (int u = 0; u < U; ++u) {
      Vector<T> x = load(w + j + u * L) * a;
      if (col) x *= load(col + j + u * L);
      sum[u] += x * x;
    }
  T rest = 0;
  for (; j < count; ++j) {
    const T x = col ? w[j] * a * col[j] : w[j] * a;
    rest += x * x;
  }
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + static_cast<double>(rest);
}

template <class T>
void add_rows(const Plan& plan, Type type, int64_t block, int64_t panel, double* partial) {
  const auto& x = plan.x;
  const T *row = static_cast<const T*>(x.row), *col = static_cast<const T*>(x.col);
  const int64_t o1 = smaller(x.o, (block + 1) * plan.rows);
  const int64_t i0 = panel * plan.width, i1 = smaller(x.i, i0 + plan.width);
  T wide[kRun];
  for (int64_t o = block * plan.rows; o < o1; ++o) {
    double total = 0;
    for (int64_t i = i0; i < i1; i += kRun) {
      const int64_t n = smaller(kRun, i1 - i);
      const T* w = widened<T>({x.w, type}, o * x.i + i, n, wide);
      total += squares<T>(w, row ? row[o] : T(1), col ? col + i : nullptr, n);
    }
    partial[panel * x.o + o] = total;
  }
}

template <class T>
void add_columns(const Plan& plan, Type type, int64_t block, int64_t panel, double* partial) {
  const auto& x = plan.x;
  const T *row = static_cast<const T*>(x.row), *col = static_cast<const T*>(x.col);
  const int64_t o1 = smaller(x.o, (block + 1) * plan.rows);
  const int64_t i0 = panel * plan.width, n = smaller(plan.width, x.i - i0);
  double* total = partial + block * x.i + i0;
  for (int64_t j = 0; j < n; ++j) total[j] = 0;
  T wide[kColumnPanel], sum[kColumnPanel];
  for (int64_t o0 = block * plan.rows; o0 < o1; o0 += kRunRows) {
    for (int64_t j = 0; j < n; ++j) sum[j] = 0;
    for (int64_t o = o0; o < smaller(o1, o0 + kRunRows); ++o) {
      const T* w = widened<T>({x.w, type}, o * x.i + i0, n, wide);
      const T a = row ? row[o] : T(1);
      if (col) {
        for (int64_t j = 0; j < n; ++j) {
          const T scaled = w[j] * a * col[i0 + j];
          sum[j] += scaled * scaled;
        }
      } else {
        for (int64_t j = 0; j < n; ++j) sum[j] += (w[j] * a) * (w[j] * a);
      }
    }
    for (int64_t j = 0; j < n; ++j) total[j] += static_cast<double>(sum[j]);
  }
}

template <class T>
void run(const ScaledSquares& c) {
  const Buffer<Plan> plans(c.count);
  const Buffer<int64_t> first(c.count + 1);  // unit of each matrix
  int64_t units = 0, partials = 0, sums = 0, elements = 0;
  for (int64_t k = 0; k < c.count; ++k) {
    Plan plan{c.matrices[k], 0, 0, 0, 0, partials, sums};
    auto& x = plan.x;
    if (x.i == 1) x = {x.w, x.col, x.row, 1, x.o, !x.columns};  // long rows are faster
    plan.width = larger(1, smaller(x.i, x.columns ? kColumnPanel : kRowPanel));
    plan.rows = larger(1, kUnitElements / plan.width);
    plan.blocks = ceil_div(x.o, plan.rows);
    plan.panels = ceil_div(x.i, plan.width);
    plans.get()[k] = plan;
    first.get()[k] = units;
    units += plan.blocks * plan.panels;
    partials += x.columns ? plan.blocks * x.i : plan.panels * x.o;
    sums += x.columns ? x.i : x.o;
    elements += x.o * x.i;
  }
  const int threads = elements < kSerialElements ? 1 : c.threads;
  const Buffer<double> partial(partials);

  parallel_units(units, threads, [&](int64_t unit, int) {
    const int64_t k = last_not_above(first.get(), c.count, unit);
    const Plan& plan = plans.get()[k];
    const int64_t block = (unit - first.get()[k]) / plan.panels;
    const int64_t panel = (unit - first.get()[k]) % plan.panels;
    double* to = partial.get() + plan.partial;
    plan.x.columns ? add_columns<T>(plan, c.type, block, panel, to)
                   : add_rows<T>(plan, c.type, block, panel, to);
  });
  parallel_units(c.count, threads, [&](int64_t k, int) {
    const Plan& plan = plans.get()[k];
    const int64_t n = plan.x.columns ? plan.x.i : plan.x.o;
    const int64_t parts = plan.x.columns ? plan.blocks : plan.panels;
    double* total = partial.get() + plan.partial;
    T* out = static_cast<T*>(c.out) + plan.out;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = 0; j < n; ++j) total[j] += total[part * n + j];
    for (int64_t j = 0; j < n; ++j) out[j] = parts ? static_cast<T>(total[j]) : T(0);
  });
}

}  // namespace

void scaled_squares(const ScaledSquares& c) {
  c.type == Type::f64 ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
