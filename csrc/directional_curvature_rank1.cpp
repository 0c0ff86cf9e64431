#include "directional_curvature_rank1.h"

#include <limits>

#include "panels.h"
#include "parallel.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kDepth = 256;         // inputs or outputs summed in registers at a time
constexpr int64_t kUnitTokens = 384;    // tokens of a unit of work, about
constexpr int64_t kPartTokens = 8192;   // longer samples are cut into parts
constexpr double kSerialFlops = 2e6;    // below this a second thread costs more than it gives

// Row stride of a block of rows: off a power of two, so that rows do not share a set of the cache.
template <class T>
constexpr int64_t kStride = kDepth + 64 / static_cast<int64_t>(sizeof(T));

// out[r, :] (+)= sum_k rows[r, k] columns[k, :] for R rows and V vectors of directions.
template <class T, int R, int V>
void project_tile(const T* __restrict rows, const T* __restrict columns, int64_t depth, bool add,
                  T* __restrict out) {
  Vector<T> acc[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(columns + k * kWidth<T> + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T s = rows[r * kStride<T> + k];
      for (int v = 0; v < V; ++v) acc[r][v] += s * x[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      T* at = out + r * kWidth<T> + v * kLanes<T>;
      store(at, add ? load(at) + acc[r][v] : acc[r][v]);
    }
}

// One side: features x (tokens, size) against directions in column panels (panel, size, kWidth).
template <class T>
struct Side {
  Side(const Array& features, const Array& directions, int64_t columns, int64_t p)
      : x(features), size(columns), panels(ceil_div(p, kWidth<T>)),
        packed(panels * kWidth<T> * columns) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t p0 = panel * kWidth<T>;
      pack_across<T, kWidth<T>>(directions, p0 * columns, columns, smaller(kWidth<T>, p - p0),
                                columns, packed.get() + p0 * columns);
    }
  }

  // to[panel, r, l] = x[token0 + r] . direction; rows from `rows` on are left as they are.
  void project(int64_t token0, int64_t rows, int64_t p, T* scratch, T* to) const {
    for (int64_t k0 = 0; k0 < size; k0 += kDepth) {
      const int64_t depth = smaller(kDepth, size - k0);
      for (int64_t r = 0; r < rows; ++r) {
        T* row = scratch + r * kStride<T>;
        const T* from = widened<T>(x, (token0 + r) * size + k0, depth, row);
        if (from != row) std::memcpy(row, from, static_cast<size_t>(depth) * sizeof(T));
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t p0 = panel * kWidth<T>;
        const T* columns = packed.get() + p0 * size + k0 * kWidth<T>;
        T* out = to + panel * kRows * kWidth<T>;
        with_rows(rows, [&](auto count) {
          if (p - p0 <= kLanes<T>)
            project_tile<T, count, 1>(scratch, columns, depth, k0 > 0, out);
          else
            project_tile<T, count, 2>(scratch, columns, depth, k0 > 0, out);
        });
      }
    }
  }

  const Array& x;
  const int64_t size, panels;
  Buffer<T> packed;
};

template <class T>
void run(const DirectionalCurvatureRank1& c) {
  constexpr int64_t W = kWidth<T>;
  const double flops = 2.0 * static_cast<double>(c.n * c.t) * static_cast<double>(c.p) *
                       static_cast<double>(c.i + c.o);
  const int threads = flops < kSerialFlops ? 1 : c.threads;
  const Side<T> input(c.a, c.w, c.i, c.p), output(c.g, c.v, c.o, c.p);

  // A unit is some samples, or one of several parts of a long one.
  const int64_t parts = ceil_div(c.t, kPartTokens);
  const int64_t group = parts > 1 ? 1 : larger(1, kUnitTokens / c.t);
  const int64_t units = ceil_div(c.n, group) * parts;
  const int64_t tile = input.panels * kRows * W;
  Buffer<T> rows(threads * kRows * kStride<T>), x(threads * tile), y(threads * tile);
  Buffer<double> open(threads * c.p), partial(units * c.p);

  for (int64_t k = 0; k < threads * kRows * kStride<T>; ++k) rows.get()[k] = T(0);
  parallel_units(units, threads, [&](int64_t unit, int thread) {
    const int64_t part = unit % parts, n0 = unit / parts * group;
    const int64_t n1 = smaller(c.n, n0 + group);
    const int64_t begin = n0 * c.t + cut(c.t, parts, part);
    const int64_t end = parts > 1 ? n0 * c.t + cut(c.t, parts, part + 1) : n1 * c.t;
    T* scratch = rows.get() + thread * kRows * kStride<T>;
    T* xs = x.get() + thread * tile;
    T* ys = y.get() + thread * tile;
    double* q = open.get() + thread * c.p;
    double* to = partial.get() + unit * c.p;
    for (int64_t j = 0; j < c.p; ++j) q[j] = to[j] = 0;

    for (int64_t token0 = begin; token0 < end; token0 += kRows) {
      const int64_t here = smaller(kRows, end - token0);
      output.project(token0, here, c.p, scratch, xs);
      input.project(token0, here, c.p, scratch, ys);
      for (int64_t r = 0; r < here; ++r) {
        const bool last = parts == 1 && (token0 + r + 1) % c.t == 0;
        for (int64_t p0 = 0; p0 < c.p; p0 += W) {
          const int64_t at = p0 * kRows + r * W;
          for (int64_t l = 0; l < smaller(W, c.p - p0); ++l)
            q[p0 + l] += static_cast<double>(xs[at + l]) * static_cast<double>(ys[at + l]);
        }
        if (!last) continue;
        for (int64_t j = 0; j < c.p; ++j) {
          to[j] += q[j] * q[j];
          q[j] = 0;
        }
      }
    }
    if (parts > 1)
      for (int64_t j = 0; j < c.p; ++j) to[j] = q[j];
  });

  for (int64_t j = 0; j < c.p; ++j) {
    double total = 0;
    for (int64_t unit = 0; unit < units; unit += parts) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial.get()[(unit + part) * c.p + j];
      total += parts > 1 ? sum * sum : sum;
    }
    c.out[j] = total / static_cast<double>(c.n);
  }
}

}  // namespace

void directional_curvature_rank1(const DirectionalCurvatureRank1& c) {
  if (c.n == 0 || c.t == 0 || c.i == 0 || c.o == 0) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (int64_t j = 0; j < c.p; ++j) c.out[j] = c.n == 0 ? nan : 0.0;
  } else if (c.p > 0) {
    const bool wide = c.a.type == Type::f64 || c.g.type == Type::f64 || c.v.type == Type::f64 ||
                      c.w.type == Type::f64;
    wide ? run<double>(c) : run<float>(c);
  }
}

}  // namespace ddf::DDF_ISA
