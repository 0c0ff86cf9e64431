#include "softmax_fisher.h"

#include "online_softmax.h"
#include "parallel.h"
#include "softmax_weights.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kChunkBytes = 16 << 10;    // of one array: long enough runs for the memory
constexpr int64_t kUnits = 32;               // units of work aimed at, so that threads stay busy
constexpr int64_t kUnitElements = 1 << 16;   // of several samples with few classes in one unit
constexpr int64_t kDirections = 8;           // at least, in a unit: they share the weights
constexpr double kSerialElements = 1 << 17;  // below this a second thread costs more than it gives

template <class T>
constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(T));

template <class T>
Moments<double> moments(const T* __restrict weight, const T* __restrict x, int64_t count,
                        const Weights<T>& part, const Ahead& next) {
  constexpr int U = 4;
  const double mass = nonzero<double>(part.mass);
  const T anchor = x[part.likeliest];
  Vector<T> sum[U] = {};
  sweep<T, U>(count, [&](int64_t k, int u, auto lanes) {
    next.fetch(k, u);
    sum[u] += load(weight + k) * (load_lanes<T>(x + k, lanes) - anchor);
  });
  const T mean = static_cast<T>(sum_all<T, U>(sum) / mass);
  Vector<T> rest[U] = {}, squares[U] = {};
  sweep<T, U>(count, [&](int64_t k, int u, auto lanes) {
    next.fetch(count + k, u);
    const Vector<T> y = (load_lanes<T>(x + k, lanes) - anchor) - mean;
    const Vector<T> wy = load(weight + k) * y;
    rest[u] += wy;
    squares[u] += wy * y;
  });
  const double left = sum_all<T, U>(rest);
  Moments<double> m;
  m.anchor = static_cast<double>(anchor);
  m.offset = static_cast<double>(mean) + left / mass;
  m.spread = sum_all<T, U>(squares) - left * left / mass;
  return m;
}

template <class T>
void run(const SoftmaxFisher& c) {
  const int64_t chunks = ceil_div(c.c, kChunk<T>);
  const int64_t parts = smaller(chunks, ceil_div(kUnits, c.n));
  const int64_t groups = smaller(ceil_div(c.p, kDirections), ceil_div(kUnits, c.n * parts));
  const int64_t elements = (c.p + 1) * c.c;
  const int64_t together =  // samples in one unit
      parts * groups > 1 ? 1 : smaller(ceil_div(c.n, kUnits), ceil_div(kUnitElements, elements));
  const int64_t batches = ceil_div(c.n, together);
  const int threads = static_cast<double>(c.n * elements) < kSerialElements ? 1 : c.threads;

  // A unit's own states where it sees all classes of a sample, else one for each part.
  const int64_t slots = parts > 1 ? parts * c.n : threads;
  Buffer<Mass<double>> masses(slots * groups);
  Buffer<Moments<double>> states(slots * c.p);
  Buffer<T> scratch(threads * 3 * kChunk<T>);
  T* out = static_cast<T*>(c.out);

  parallel_units(batches * parts * groups, threads, [&](int64_t unit, int thread) {
    const int64_t part = unit % parts, group = unit / parts % groups;
    const int64_t p0 = cut(c.p, groups, group), p1 = cut(c.p, groups, group + 1);
    const int64_t s0 = unit / parts / groups * together, s1 = smaller(c.n, s0 + together);
    T* weight = scratch.get() + thread * 3 * kChunk<T>;
    T* wide_z = weight + kChunk<T>;
    T* wide_x = wide_z + kChunk<T>;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t slot = parts > 1 ? s * parts + part : thread;
      Mass<double>& all = masses.get()[slot * groups + group];
      Moments<double>* state = states.get() + slot * c.p;
      all = {};
      for (int64_t p = p0; p < p1; ++p) state[p] = {};
      for (int64_t k = cut(chunks, parts, part); k < cut(chunks, parts, part + 1); ++k) {
        const int64_t c0 = k * kChunk<T>, count = smaller(kChunk<T>, c.c - c0);
        const auto at = [&](int64_t p) { return (p * c.n + s) * c.c + c0; };
        const T* z = widened<T>(c.logits, s * c.c + c0, count, wide_z);
        const Weights<T> here = weigh<T>(z, count, weight, Ahead(c.tangent, at(p0)));
        const Join<double> join(all, {static_cast<double>(here.top), here.mass});
        for (int64_t p = p0; p < p1; ++p) {
          const Ahead next = p + 1 < p1 ? Ahead(c.tangent, at(p + 1))
                                        : Ahead(c.logits, s * c.c + c0 + count);
          const T* x = widened<T>(c.tangent, at(p), count, wide_x);
          join(state[p], moments<T>(weight, x, count, here, next));
        }
      }
      if (parts == 1)
        for (int64_t p = p0; p < p1; ++p)
          out[p * c.n + s] = static_cast<T>(variance<double>(all, state[p]));
    }
  });
  if (parts == 1) return;
  for (int64_t s = 0; s < c.n; ++s)
    for (int64_t group = 0; group < groups; ++group) {
      Mass<double> all = masses.get()[s * parts * groups + group];
      Moments<double>* state = states.get() + s * parts * c.p;
      for (int64_t part = 1; part < parts; ++part) {
        const int64_t slot = s * parts + part;
        const Join<double> join(all, masses.get()[slot * groups + group]);
        for (int64_t p = cut(c.p, groups, group); p < cut(c.p, groups, group + 1); ++p)
          join(state[p], states.get()[slot * c.p + p]);
      }
      for (int64_t p = cut(c.p, groups, group); p < cut(c.p, groups, group + 1); ++p)
        out[p * c.n + s] = static_cast<T>(variance<double>(all, state[p]));
    }
}

}  // namespace

void softmax_fisher(const SoftmaxFisher& c) {
  if (c.n == 0 || c.p == 0) return;
  const bool wide = c.logits.type == Type::f64 || c.tangent.type == Type::f64;
  wide ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
