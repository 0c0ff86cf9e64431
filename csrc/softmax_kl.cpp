#include "softmax_kl.h"

#include <cmath>

#include "parallel.h"
#include "softmax_weights.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kUnits = 16;              // units of work aimed at, so that threads stay busy
constexpr int64_t kUnitElements = 1 << 15;  // of several samples with few classes in one unit
constexpr double kSerialElements = 1 << 16;  // below this a second thread costs more than it gives
constexpr double kFar = 3e19;               // about e^45: a sum above it may be about to overflow
constexpr double kNear = 0.34;              // below (ln 2) / 2: e^y - 1 - y is one polynomial

template <class T>
struct Range {
  T low, high;
};

// One row of logits with its weights, and room for the range of the moves of each run of classes.
template <class T>
struct Base : Weights<T> {
  const T* z;
  const T* weight;
  Range<T>* ranges;
};

// The move of one class relative to anchor and mean, and where e^y would overflow or p is 0, what to
// take the exponential of instead. Masked: logits of -inf are possible and an absent class counts
// e^(its new logit - shift), a class that loses its mass counts as unmoved.
template <class T, bool Masked>
struct Move {
  Vector<T> y, exponent;
  Vector<Lane<T>> absent;

  Move(Vector<T> z, Vector<T> moved, T top, T anchor, T mean) {
    Vector<T> delta = moved - z;
    if constexpr (Masked) {
      absent = z == -kInf<T>;
      delta = (absent | (moved == -kInf<T>)) ? Vector<T>{} : delta;
    }
    y = (delta - anchor) - mean;
    exponent = (z - top) + y;
    if constexpr (Masked) exponent = absent ? ((moved - top) - anchor) - mean : exponent;
  }
};

template <class T>
struct Row {
  const SoftmaxKl& c;
  int64_t offset;  // of the row in logits_t
  T* scratch;      // kRun elements

  const T* run(int64_t k0) const {
    return widened<T>(c.logits_t, offset + k0, smaller(kRun, c.c - k0), scratch);
  }
};

// E_p[delta], relative to the likeliest class. Not finite where a logit is not. Where all are finite
// (not Masked) the ranges are found too.
template <class T, bool Masked>
double mean_of(const Base<T>& base, const Row<T>& row, T anchor, const Ahead& next) {
  constexpr int U = 4;
  double total = 0;
  for (int64_t k0 = 0; k0 < row.c.c; k0 += kRun) {
    const T *moved = row.run(k0), *z = base.z + k0, *weight = base.weight + k0;
    Vector<T> sum[U] = {}, low[U], high[U];
    for (int u = 0; u < U; ++u) {
      low[u] = Vector<T>{} + kInf<T>;
      high[u] = Vector<T>{} - kInf<T>;
    }
    sweep<T, U>(smaller(kRun, row.c.c - k0), [&](int64_t k, int u, auto lanes) {
      next.fetch(k0 + k, u);
      const Move<T, Masked> move(load_lanes<T>(z + k, lanes), load_lanes<T>(moved + k, lanes),
                                 base.top, anchor, T(0));
      sum[u] += load(weight + k) * move.y;
      if constexpr (!Masked) {
        low[u] = smaller_of<T>(keep_lanes<T>(move.y, lanes, kInf<T>), low[u]);
        high[u] = larger_of<T>(keep_lanes<T>(move.y, lanes, -kInf<T>), high[u]);
      }
    });
    total += sum_all<T, U>(sum);
    if constexpr (!Masked) {
      Range<T> range{kInf<T>, -kInf<T>};
      for (int u = 0; u < U; ++u)
        for (int l = 0; l < kLanes<T>; ++l) {
          if (low[u][l] < range.low) range.low = low[u][l];
          if (high[u][l] > range.high) range.high = high[u][l];
        }
      base.ranges[k0 / kRun] = range;
    }
  }
  return total / base.mass;
}

// log E_p[e^y] by its largest term; the sum is far from 1.
template <class T>
double far_log(const Base<T>& base, const Row<T>& row, T anchor, T mean) {
  constexpr int U = 2;
  Vector<T> top[U];
  for (int u = 0; u < U; ++u) top[u] = Vector<T>{} - kInf<T>;
  const auto each = [&](auto&& body) {
    for (int64_t k0 = 0; k0 < row.c.c; k0 += kRun) {
      const T *moved = row.run(k0), *z = base.z + k0;
      sweep<T, U>(smaller(kRun, row.c.c - k0), [&](int64_t k, int u, auto lanes) {
        const Move<T, true> move(load_lanes<T>(z + k, lanes), load_lanes<T>(moved + k, lanes),
                                 base.top, anchor, mean);
        body(keep_lanes<T>(move.exponent, lanes, -kInf<T>), u);
      });
    }
  };
  each([&](Vector<T> exponent, int u) { top[u] = larger_of<T>(exponent, top[u]); });
  T most = -kInf<T>;
  for (int u = 0; u < U; ++u)
    for (int l = 0; l < kLanes<T>; ++l) most = top[u][l] > most ? top[u][l] : most;
  if (most == kInf<T>) return kInf<double>;
  double total = 0;
  each([&](Vector<T> exponent, int) {
    total += sum_lanes<T>(exponential<T>(exponent - most).value);
  });
  return static_cast<double>(most) + std::log(total / base.mass);
}

template <class T, bool Masked>
double divergence(const Base<T>& base, const Row<T>& row, T anchor, T mean, const Ahead& next) {
  constexpr int U = 1;
  double excess = 0, rest = 0;
  Vector<Lane<T>> lost = {};
  for (int64_t k0 = 0; k0 < row.c.c; k0 += kRun) {
    const T *moved = row.run(k0), *z = base.z + k0, *weight = base.weight + k0;
    const int64_t count = smaller(kRun, row.c.c - k0);
    Vector<T> sum[U] = {}, left[U] = {};
    if (!Masked && base.ranges[k0 / kRun].low - mean > -kNear &&
        base.ranges[k0 / kRun].high - mean < kNear) {  // the same values as below
      sweep<T, U>(count, [&](int64_t k, int u, auto lanes) {
        next.fetch(row.c.c + k0 + k, u);
        const Move<T, Masked> move(load_lanes<T>(z + k, lanes), load_lanes<T>(moved + k, lanes),
                                   base.top, anchor, mean);
        const Vector<T> w = load(weight + k);  // 0 where a lane does not count
        sum[u] += w * small_excess<T>(move.y);
        left[u] += w * move.y;
      });
    } else {
      sweep<T, U>(count, [&](int64_t k, int u, auto lanes) {
        next.fetch(row.c.c + k0 + k, u);
        const Vector<T> from = load_lanes<T>(z + k, lanes), to = load_lanes<T>(moved + k, lanes);
        const Move<T, Masked> move(from, to, base.top, anchor, mean);
        const Vector<T> w = load(weight + k);
        auto large = move.y > T(1);
        if constexpr (Masked) {
          large |= move.absent;
          lost |= (to == -kInf<T>) & ~move.absent;
        }
        const Exponential<T> e = exponential<T>(large ? move.exponent : move.y);
        Vector<T> term = large ? e.value - w * (move.y + T(1)) : w * e.excess;
        sum[u] += keep_lanes<T>(term, lanes);
        left[u] += w * move.y;
      });
    }
    excess += sum_all<T, U>(sum);
    rest += sum_all<T, U>(left);
  }
  const double x = excess / base.mass, m = rest / base.mass;
  double value;
  if (x > kFar) {
    value = far_log<T>(base, row, anchor, mean) - m;
  } else {  // log(1 + x + m) - m without taking m from itself
    const double u = m / (1 + x);
    value = std::log1p(x) - u * (x + u * (0.5 - u / 3));
    value = value < 0 ? 0 : value;  // NaN stays
  }
  if constexpr (Masked) {
    for (int l = 0; l < kLanes<T>; ++l)
      if (lost[l]) return value + kInf<double>;
  }
  return value;
}

template <class T>
double divergence(const Base<T>& base, const Row<T>& row, bool& masked, const Ahead& next) {
  T there;
  there = *widened<T>(row.c.logits_t, row.offset + base.likeliest, 1, &there);
  if (!masked) {
    const T anchor = there - base.z[base.likeliest];
    const double mean = mean_of<T, false>(base, row, anchor, next);
    if (std::isfinite(mean))
      return divergence<T, false>(base, row, anchor, static_cast<T>(mean), next);
    masked = true;
  }
  const bool moves = base.top != -kInf<T> && there != -kInf<T>;
  const T anchor = moves ? there - base.z[base.likeliest] : T(0);
  const double mean = mean_of<T, true>(base, row, anchor, next);
  return divergence<T, true>(base, row, anchor, static_cast<T>(mean), next);
}

template <class T>
void run(const SoftmaxKl& c) {
  constexpr Type own = sizeof(T) == 8 ? Type::f64 : Type::f32;
  const int64_t groups = smaller(c.q, ceil_div(kUnits, c.n));
  const int64_t elements = (c.q + 1) * c.c;
  const int64_t together =  // samples in one unit
      groups > 1 ? 1 : smaller(ceil_div(c.n, kUnits), ceil_div(kUnitElements, elements));
  const int threads = static_cast<double>(c.n * elements) < kSerialElements ? 1 : c.threads;
  const int64_t wide = round_up(c.c, kLanes<T>);
  const bool widen = c.logits.type != own;
  const int64_t size = wide + kRun + (widen ? wide : 0), runs = ceil_div(c.c, kRun);
  Buffer<T> scratch(threads * size);
  Buffer<Range<T>> ranges(threads * runs);
  T* out = static_cast<T*>(c.out);

  parallel_units(ceil_div(c.n, together) * groups, threads, [&](int64_t unit, int thread) {
    const int64_t group = unit % groups;
    const int64_t q0 = cut(c.q, groups, group), q1 = cut(c.q, groups, group + 1);
    const int64_t s0 = unit / groups * together, s1 = smaller(c.n, s0 + together);
    T* weight = scratch.get() + thread * size;
    T* run = weight + wide;
    for (int64_t s = s0; s < s1; ++s) {
      const T* z = widened<T>(c.logits, s * c.c, c.c, run + kRun);
      const Base<T> base{weigh<T>(z, c.c, weight, Ahead(c.logits_t, (q0 * c.n + s) * c.c)), z,
                         weight, ranges.get() + thread * runs};
      bool masked = base.top == -kInf<T>;
      for (int64_t q = q0; q < q1; ++q) {
        const Ahead next = q + 1 < q1 ? Ahead(c.logits_t, ((q + 1) * c.n + s) * c.c)
                                      : Ahead(c.logits, (s + 1) * c.c);
        const Row<T> row{c, (q * c.n + s) * c.c, run};
        out[q * c.n + s] = static_cast<T>(divergence<T>(base, row, masked, next));
      }
    }
  });
}

}  // namespace

void softmax_kl(const SoftmaxKl& c) {
  if (c.n == 0 || c.q == 0) return;
  const bool wide = c.logits.type == Type::f64 || c.logits_t.type == Type::f64;
  wide ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
