#include "linear_softmax_fisher.h"

#include <initializer_list>

#include "online_softmax.h"
#include "panels.h"
#include "parallel.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kStripPanels = 8;          // row panels of a strip of classes
constexpr int64_t kStrip = kStripPanels * kRows;
constexpr int64_t kDepth = 512;              // features summed in registers at a time
constexpr int64_t kHeldBytes = 512 << 10;    // of products held at a time, in the L2 cache
constexpr int64_t kDirections = 20;          // at most, computed with one set of logits
constexpr int64_t kPassBytes = 32 << 20;     // packed features held at a time
constexpr int64_t kUnits = 64;               // units of work aimed at, so that threads stay busy
constexpr double kSerialFlops = 2e6;         // below this a second thread costs more than it gives

using Wide = Vector<double>;

// What is known of one panel of samples so far; of one direction there.
template <class T>
struct State {
  static constexpr int64_t kVectors = kWidth<T> / kLanes<double>;
  Mass<Wide> mass[kVectors];
};
template <class T>
struct Tangent {
  Moments<Wide> moments[State<T>::kVectors];
};

// V vectors of samples at a row of a strip or of their own.
template <class T, int V>
struct Lanes {
  Vector<T> v[V];
  Lanes() : v{} {}
  explicit Lanes(const T* from) {
    for (int k = 0; k < V; ++k) v[k] = load(from + k * kLanes<T>);
  }
  // The doubles of samples from `first` on.
  Wide wide(int64_t first) const {
    T x[V * kLanes<T>];
    std::memcpy(x, v, sizeof x);
    Wide y;
    for (int l = 0; l < kLanes<double>; ++l) y[l] = static_cast<double>(x[first + l]);
    return y;
  }
};

// The weights e^(z - top) of a strip, in place of its logits.
template <class T, int V>
struct StripWeights {
  Lanes<T, V> top, mass;
  Vector<Lane<T>> likeliest[V];

  StripWeights(T* __restrict z, int64_t rows) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    for (int k = 0; k < V; ++k) {
      top.v[k] = Vector<T>{} - inf;
      likeliest[k] = Vector<Lane<T>>{};
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int k = 0; k < V; ++k) {
        const Vector<T> x = load(z + (r * V + k) * kLanes<T>);
        const auto above = x > top.v[k];  // never where x is NaN: that shows in the weights
        top.v[k] = above ? x : top.v[k];
        likeliest[k] = above ? Vector<Lane<T>>{} + static_cast<Lane<T>>(r) : likeliest[k];
      }
    Vector<T> finite[V];
    for (int k = 0; k < V; ++k) finite[k] = top.v[k] == -inf ? Vector<T>{} : top.v[k];
    for (int64_t r = 0; r < rows; ++r)
      for (int k = 0; k < V; ++k) {
        T* at = z + (r * V + k) * kLanes<T>;
        const Vector<T> w = exponential<T>(load(at) - finite[k]).value;
        mass.v[k] += w;
        store(at, w);
      }
  }
};

// Joins the tangents of a strip to their moments.
template <class T, int V>
void join_tangent(const StripWeights<T, V>& weights, const T* __restrict weight, const T* __restrict x,
                  int64_t rows, const Join<Wide>* joins, Moments<Wide>* moments) {
  T anchors[V * kLanes<T>];
  for (int k = 0; k < V; ++k)
    for (int l = 0; l < kLanes<T>; ++l)
      anchors[k * kLanes<T> + l] = x[(weights.likeliest[k][l] * V + k) * kLanes<T> + l];
  const Lanes<T, V> anchor(anchors);
  Lanes<T, V> mean, squares;
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < V; ++k) {
      const int64_t at = (r * V + k) * kLanes<T>;
      mean.v[k] += load(weight + at) * (load(x + at) - anchor.v[k]);
    }
  for (int k = 0; k < V; ++k)
    mean.v[k] /= weights.mass.v[k] == T(0) ? Vector<T>{} + T(1) : weights.mass.v[k];
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < V; ++k) {
      const int64_t at = (r * V + k) * kLanes<T>;
      const Vector<T> y = (load(x + at) - anchor.v[k]) - mean.v[k];
      squares.v[k] += load(weight + at) * y * y;
    }
  for (int64_t j = 0; j < V * kLanes<T> / kLanes<double>; ++j) {
    const int64_t first = j * kLanes<double>;
    joins[j](moments[j], {anchor.wide(first), mean.wide(first), squares.wide(first)});
  }
}

// Joins one strip, logits and then the tangents of `p` directions, to the moments of its samples.
template <class T, int V>
void join_strip(T* strips, int64_t stride, const Array& bias, int64_t c0, int64_t rows, int64_t p,
                State<T>& state, Tangent<T>* tangents) {
  constexpr int64_t wide = V * kLanes<T> / kLanes<double>;
  if (bias.data) {
    T scratch[kStrip];
    const T* add = widened<T>(bias, c0, rows, scratch);
    for (int64_t r = 0; r < rows; ++r)
      for (int k = 0; k < V; ++k) {
        T* at = strips + (r * V + k) * kLanes<T>;
        store(at, load(at) + add[r]);
      }
  }
  const StripWeights<T, V> weights(strips, rows);
  Join<Wide> joins[wide];
  for (int64_t j = 0; j < wide; ++j)
    joins[j] = Join<Wide>(state.mass[j], {weights.top.wide(j * kLanes<double>),
                                          weights.mass.wide(j * kLanes<double>)});
  for (int64_t q = 0; q < p; ++q)
    join_tangent<T, V>(weights, strips, strips + (q + 1) * stride, rows, joins,
                       tangents[q].moments);
}

// One strip of products: to[class, sample] (+)= rows columns.
template <class T, int V>
void multiply_strip(const T* rows, const T* columns, int64_t depth, int64_t classes, bool add,
                    T* to) {
  for (int64_t r0 = 0; r0 < classes; r0 += kRows)
    with_rows(classes - r0, [&](auto count) {
      constexpr int R = decltype(count)::value;
      multiply<T, R, V>(rows + r0 * depth, columns, depth, [&](const Tile<T, R, V>& tile) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          for (int k = 0; k < V; ++k) {
            T* at = to + ((r0 + r) * V + k) * kLanes<T>;
            store(at, add ? load(at) + tile[r][k] : tile[r][k]);
          }
      });
    });
}

template <class T>
void run(const LinearSoftmaxFisher& c, int64_t p0, int64_t p1) {
  constexpr int64_t W = kWidth<T>, L = kLanes<T>;
  constexpr int64_t strip_size = kStrip * W;
  constexpr int64_t held = kHeldBytes / (strip_size * static_cast<int64_t>(sizeof(T)));
  const int64_t d = c.d, p = p1 - p0, stacked = p + 1;
  const int64_t depths = larger(1, ceil_div(d, kDepth)), deepest = ceil_div(d, depths);

  const int64_t panel_bytes = W * larger(1, d) * stacked * static_cast<int64_t>(sizeof(T));
  const int64_t pass_panels = smaller(ceil_div(c.n, W), larger(1, kPassBytes / panel_bytes));
  const int64_t block = smaller(pass_panels, larger(1, held / stacked));  // panels
  const int64_t blocks = ceil_div(pass_panels, block);
  const int64_t strips = ceil_div(c.c, kStrip);
  const int64_t runs = smaller(strips, ceil_div(kUnits, blocks));
  const double flops = 2.0 * static_cast<double>(c.n * c.c) * static_cast<double>(d + 8) *
                       static_cast<double>(c.dW.data ? stacked + p : stacked);
  const int threads = flops < kSerialFlops ? 1 : c.threads;

  Buffer<T> columns(pass_panels * stacked * d * W);  // [panel, h or direction, feature, sample]
  Buffer<State<T>> states(runs * pass_panels);
  Buffer<Tangent<T>> tangents(runs * pass_panels * p);
  const int64_t scratch_size = kStrip * deepest + block * stacked * strip_size;
  Buffer<T> scratch(threads * scratch_size);
  T* out = static_cast<T*>(c.out);

  for (int64_t n0 = 0; n0 < c.n; n0 += pass_panels * W) {
    const int64_t here = smaller(pass_panels * W, c.n - n0), panels = ceil_div(here, W);
    // Half a panel is enough for the last samples.
    const auto narrow = [&](int64_t panel) { return here - panel * W <= L; };
    parallel_units(panels * stacked, threads, [&](int64_t unit, int) {
      const int64_t panel = unit / stacked, j = unit % stacked;
      const int64_t s = n0 + panel * W, count = smaller(W, here - panel * W);
      const Array& x = j ? c.dh : c.h;
      const int64_t offset = (j ? (p0 + j - 1) * c.n + s : s) * d;
      T* to = columns.get() + unit * d * W;
      if (narrow(panel))
        pack_across<T, L>(x, offset, d, count, d, to);
      else
        pack_across<T, W>(x, offset, d, count, d, to);
    });

    const int64_t blocks_here = ceil_div(panels, block);
    parallel_units(blocks_here * runs, threads, [&](int64_t unit, int thread) {
      const int64_t run = unit / blocks_here, panel0 = unit % blocks_here * block;
      const int64_t panel1 = smaller(panels, panel0 + block);
      T* rows = scratch.get() + thread * scratch_size;
      T* products = rows + kStrip * deepest;  // [panel, h or direction, class, sample]
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        states.get()[run * pass_panels + panel] = {};
        for (int64_t q = 0; q < p; ++q)
          tangents.get()[(run * pass_panels + panel) * p + q] = {};
      }
      // Operand 0 is W, for logits and tangents; operand 1 + q is dW_q, for tangent q alone.
      for (int64_t strip = cut(strips, runs, run); strip < cut(strips, runs, run + 1); ++strip) {
        const int64_t c0 = strip * kStrip, classes = smaller(kStrip, c.c - c0);
        for (int64_t depth_index = 0; depth_index < depths; ++depth_index) {
          const int64_t k0 = cut(d, depths, depth_index);
          const int64_t depth = cut(d, depths, depth_index + 1) - k0;
          for (int64_t operand = 0; operand <= (c.dW.data ? p : 0); ++operand) {
            const Array& w = operand ? c.dW : c.W;
            const int64_t first = operand ? (p0 + operand - 1) * c.c + c0 : c0;
            for (int64_t r0 = 0; r0 < classes; r0 += kRows)
              pack_across<T, kRows>(w, (first + r0) * d + k0, d, smaller(kRows, classes - r0),
                                    depth, rows + r0 * depth);
            const int64_t products_here = operand ? 1 : stacked;
            for (int64_t panel = panel0; panel < panel1; ++panel)
              for (int64_t j = 0; j < products_here; ++j) {
                const int64_t width = narrow(panel) ? L : W;
                const T* column = columns.get() + (panel * stacked + j) * d * W + k0 * width;
                T* to = products + ((panel - panel0) * stacked + (operand ? operand : j)) *
                                       strip_size;
                const bool add = depth_index > 0 || operand > 0;
                if (narrow(panel))
                  multiply_strip<T, 1>(rows, column, depth, classes, add, to);
                else
                  multiply_strip<T, 2>(rows, column, depth, classes, add, to);
              }
          }
        }
        for (int64_t panel = panel0; panel < panel1; ++panel) {
          T* product = products + (panel - panel0) * stacked * strip_size;
          State<T>& state = states.get()[run * pass_panels + panel];
          Tangent<T>* tangent = tangents.get() + (run * pass_panels + panel) * p;
          if (narrow(panel))
            join_strip<T, 1>(product, strip_size, c.bias, c0, classes, p, state, tangent);
          else
            join_strip<T, 2>(product, strip_size, c.bias, c0, classes, p, state, tangent);
        }
      }
    });

    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t j = 0; j < State<T>::kVectors; ++j) {
        Mass<Wide> all = states.get()[panel].mass[j];
        Tangent<T>* tangent = tangents.get() + panel * p;
        for (int64_t run = 1; run < runs; ++run) {
          const int64_t slot = run * pass_panels + panel;
          const Join<Wide> join(all, states.get()[slot].mass[j]);
          for (int64_t q = 0; q < p; ++q)
            join(tangent[q].moments[j], tangents.get()[slot * p + q].moments[j]);
        }
        for (int64_t q = 0; q < p; ++q) {
          const Wide value = variance<Wide>(all, tangent[q].moments[j]);
          const int64_t s = panel * W + j * kLanes<double>;
          for (int64_t l = 0; l < kLanes<double> && s + l < here; ++l)
            out[(p0 + q) * c.n + n0 + s + l] = static_cast<T>(value[l]);
        }
      }
  }
}

template <class T>
void grouped(const LinearSoftmaxFisher& c) {
  const int64_t groups = ceil_div(c.p, kDirections);
  for (int64_t group = 0; group < groups; ++group)
    run<T>(c, cut(c.p, groups, group), cut(c.p, groups, group + 1));
}

}  // namespace

void linear_softmax_fisher(const LinearSoftmaxFisher& c) {
  if (c.n == 0 || c.p == 0) return;
  bool wide = false;  // an absent array has the type f32; a present one without elements counts
  for (const Array* x : {&c.h, &c.dh, &c.W, &c.bias, &c.dW}) wide |= x->type == Type::f64;
  wide ? grouped<double>(c) : grouped<float>(c);
}

}  // namespace ddf::DDF_ISA
