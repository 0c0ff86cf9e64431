#include "directional_curvature.h"

#include <limits>

#include "parallel.h"
#include "simd.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kDepth = 256;              // inputs or tokens summed in registers at a time
constexpr int64_t kUnits = 64;               // units of work aimed at, so that threads stay busy
constexpr int64_t kPassBytes = 32 << 20;     // packed inputs held at a time
constexpr int64_t kSlotBytes = 32 << 20;     // partial sums held at a time
constexpr int64_t kBlockPanels = 16;         // panels of samples a cached block of U is used for
constexpr int64_t kTileBytes = 6 << 10;      // of one tile of M, so that a few fit the L1 cache
constexpr int64_t kHeldTiles = 64;           // tiles of M held at a time, in the L2 cache
constexpr double kSerialFlops = 2e6;         // below this a second thread costs more than it gives
constexpr int64_t kContractOverhead = 6;     // stores and sums of the contracted form, in tokens

template <class T>
constexpr int kWidth = 2 * kLanes<T>;  // columns of a register tile
// Row stride of a tile of U: a constant, so that the tile needs one address register, and off a
// power of two, so that its rows do not fall into one set of the cache.
template <class T>
constexpr int64_t kTileStride = kDepth + 64 / static_cast<int64_t>(sizeof(T));

// ------------------------------------------------------------------------------ register tiles

// q[s] += sum_r g[r, s] * sum_k u[r, k] a[k, s] for R rows of U and V vectors of samples.
template <class T, int R, int V>
void factorised_tile(const T* __restrict u, const T* __restrict a, int64_t depth,
                     const T* __restrict g, double* __restrict q) {
  Vector<T> acc[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(a + k * kWidth<T> + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T s = u[r * kTileStride<T> + k];
      for (int v = 0; v < V; ++v) acc[r][v] += s * x[v];
    }
  }
  Vector<T> sum[V] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[v] += acc[r][v] * load(g + r * kWidth<T> + v * kLanes<T>);
  for (int v = 0; v < V; ++v)
    for (int l = 0; l < kLanes<T>; ++l) q[v * kLanes<T> + l] += static_cast<double>(sum[v][l]);
}

template <class T, int R = kRows>
void factorised_rows(int rows, int vectors, const T* u, const T* a, int64_t depth, const T* g,
                     double* q) {
  if (rows == R) {
    if (vectors == 1)
      factorised_tile<T, R, 1>(u, a, depth, g, q);
    else
      factorised_tile<T, R, 2>(u, a, depth, g, q);
  } else if constexpr (R > 1) {
    factorised_rows<T, R - 1>(rows, vectors, u, a, depth, g, q);
  }
}

// m[r, :] = sum_t g[t, r] a[t, :], R rows by one panel of inputs; added to m where asked.
template <class T, int R>
void outer_tile(const T* __restrict g, const T* __restrict a, int64_t tokens, bool add,
                T* __restrict m, int64_t stride) {
  Vector<T> acc[R][2] = {};
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      acc[r][0] = load(m + r * stride);
      acc[r][1] = load(m + r * stride + kLanes<T>);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const Vector<T> x0 = load(a + t * kWidth<T>);
    const Vector<T> x1 = load(a + t * kWidth<T> + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T s = g[t * kRows + r];
      acc[r][0] += s * x0;
      acc[r][1] += s * x1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(m + r * stride, acc[r][0]);
    store(m + r * stride + kLanes<T>, acc[r][1]);
  }
}

template <class T, int R = kRows>
void outer_rows(int rows, const T* g, const T* a, int64_t tokens, bool add, T* m,
                int64_t stride) {
  if (rows == R)
    outer_tile<T, R>(g, a, tokens, add, m, stride);
  else if constexpr (R > 1)
    outer_rows<T, R - 1>(rows, g, a, tokens, add, m, stride);
}

constexpr int kDotSamples = 4;
constexpr int kDotDirections = kRows >= 12 ? 4 : 2;  // by registers, as kRows

// q[s, p] += <m[s], u[p]> over `count` elements, a multiple of the vector length.
template <class T, int S, int P>
void dot_tile(const T* __restrict m, const T* __restrict u, int64_t tile, int64_t count,
              double* __restrict q, int64_t stride) {
  Vector<T> acc[S][P] = {};
  for (int64_t e = 0; e < count; e += kLanes<T>) {
    Vector<T> y[P];
    for (int p = 0; p < P; ++p) y[p] = load(u + p * tile + e);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const Vector<T> x = load(m + s * tile + e);
      for (int p = 0; p < P; ++p) acc[s][p] += x * y[p];
    }
  }
  for (int s = 0; s < S; ++s)
    for (int p = 0; p < P; ++p) q[s * stride + p] += sum_lanes<T>(acc[s][p]);
}

template <class T, int S = kDotSamples, int P = kDotDirections>
void dot_group(int samples, int directions, const T* m, const T* u, int64_t tile, int64_t count,
               double* q, int64_t stride) {
  if (samples == S && directions == P)
    dot_tile<T, S, P>(m, u, tile, count, q, stride);
  else if constexpr (P > 1) {
    if (directions < P)
      dot_group<T, S, P - 1>(samples, directions, m, u, tile, count, q, stride);
    else if constexpr (S > 1)
      dot_group<T, S - 1, P>(samples, directions, m, u, tile, count, q, stride);
  } else if constexpr (S > 1) {
    dot_group<T, S - 1, P>(samples, directions, m, u, tile, count, q, stride);
  }
}

// ------------------------------------------------------------------------------ sums over samples

// Rows arrive in order, `per_sample` of them to a sample; a sample may straddle two passes.
class SampleSums {
 public:
  SampleSums(int64_t p, int64_t per_sample) : open_(p), squares_(p), per_sample_(per_sample) {
    for (int64_t j = 0; j < p; ++j) open_.get()[j] = squares_.get()[j] = 0.0;
  }
  void add(int64_t p, int64_t row, double value) {
    double& open = open_.get()[p];
    open += value;
    if (per_sample_ == 1 || (row + 1) % per_sample_ == 0) {
      squares_.get()[p] += open * open;
      open = 0.0;
    }
  }
  double squares(int64_t p) const { return squares_.get()[p]; }

 private:
  Buffer<double> open_, squares_;
  int64_t per_sample_;
};

// `items` cut into `parts` runs as equal as can be: where run `part` begins.
constexpr int64_t cut(int64_t items, int64_t parts, int64_t part) { return items * part / parts; }

// ------------------------------------------------------------------------------ factorised form

// A panel of samples, input-major: to[k, s] = x[row0 + s, k], absent samples 0.
template <class T>
void pack_samples(const Array& x, int64_t row0, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t W = kWidth<T>;
  constexpr int64_t step = 64;
  T scratch[step];
  for (int64_t k0 = 0; k0 < columns; k0 += step) {
    const int64_t run = smaller(step, columns - k0);
    for (int64_t s = 0; s < W; ++s) {
      if (s < rows) {
        const T* from = widened<T>(x, (row0 + s) * columns + k0, run, scratch);
        for (int64_t k = 0; k < run; ++k) to[(k0 + k) * W + s] = from[k];
      } else {
        for (int64_t k = 0; k < run; ++k) to[(k0 + k) * W + s] = T(0);
      }
    }
  }
}

template <class T>
void factorised(const DirectionalCurvature& c, int threads, SampleSums& sums) {
  constexpr int64_t W = kWidth<T>;
  constexpr int64_t block = kBlockPanels * W;
  const int64_t rows = c.n * c.t, i = c.i, o = c.o;
  const int64_t depths = ceil_div(i, kDepth), tiles = ceil_div(o, kRows);

  const int64_t row_bytes = (i + o) * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = larger(1, kPassBytes / row_bytes / block) * block;
  const int64_t pass = smaller(round_up(rows, W), fitting);
  const int64_t blocks = ceil_div(pass, block);
  const int64_t p_block = smaller(c.p, larger(1, kSlotBytes / (8 * pass)));
  const int64_t row_parts = smaller(tiles, ceil_div(kUnits, blocks * p_block));
  const int64_t depth_parts = smaller(depths, ceil_div(kUnits, blocks * p_block * row_parts));
  const int64_t slots = row_parts * depth_parts;

  Buffer<T> a_pack(pass * i), g_pack(pass * o), u_tiles(threads * kRows * kTileStride<T>);
  Buffer<double> partial(p_block * slots * pass);

  for (int64_t row0 = 0; row0 < rows; row0 += pass) {
    const int64_t here = smaller(pass, rows - row0), panels = ceil_div(here, W);
    parallel_units(panels, threads, [&](int64_t panel, int) {
      const int64_t first = panel * W, count = smaller(W, here - first);
      pack_samples<T>(c.a, row0 + first, count, i, a_pack.get() + first * i);
      pack_samples<T>(c.g, row0 + first, count, o, g_pack.get() + first * o);
    });
    const int64_t blocks_here = ceil_div(panels, kBlockPanels);

    for (int64_t p0 = 0; p0 < c.p; p0 += p_block) {
      const int64_t p_here = smaller(p_block, c.p - p0);
      parallel_units(p_here * slots * blocks_here, threads, [&](int64_t unit, int thread) {
        const int64_t b = unit % blocks_here, slot = unit / blocks_here % slots;
        const int64_t p = unit / blocks_here / slots;
        const int64_t rp = slot % row_parts, dp = slot / row_parts;
        const int64_t panel0 = b * kBlockPanels, panel1 = smaller(panels, panel0 + kBlockPanels);
        double* q = partial.get() + (p * slots + slot) * pass;
        for (int64_t s = panel0 * W; s < panel1 * W; ++s) q[s] = 0.0;
        T* u = u_tiles.get() + thread * kRows * kTileStride<T>;

        for (int64_t d = cut(depths, depth_parts, dp); d < cut(depths, depth_parts, dp + 1); ++d) {
          const int64_t k0 = d * kDepth, depth = smaller(kDepth, i - k0);
          for (int64_t t = cut(tiles, row_parts, rp); t < cut(tiles, row_parts, rp + 1); ++t) {
            const int64_t o0 = t * kRows, r = smaller(kRows, o - o0);
            for (int64_t j = 0; j < r; ++j) {
              T* row = u + j * kTileStride<T>;
              const T* from = widened<T>(c.U, ((p0 + p) * o + o0 + j) * i + k0, depth, row);
              if (from != row) std::memcpy(row, from, static_cast<size_t>(depth) * sizeof(T));
            }
            const int64_t next = smaller(kRows, o - o0 - r);  // rows to fetch meanwhile
            for (int64_t panel = panel0; panel < panel1; ++panel) {
              const int64_t k = panel - panel0, calls = panel1 - panel0;
              for (int64_t l = cut(next, calls, k); l < cut(next, calls, k + 1); ++l)
                prefetch(c.U, ((p0 + p) * o + o0 + r + l) * i + k0, depth);
              const int vectors = here - panel * W <= kLanes<T> ? 1 : 2;
              factorised_rows<T>(static_cast<int>(r), vectors, u,
                                 a_pack.get() + (panel * i + k0) * W, depth,
                                 g_pack.get() + (panel * o + o0) * W, q + panel * W);
            }
          }
        }
      });
      parallel_units(p_here, threads, [&](int64_t p, int) {
        for (int64_t s = 0; s < here; ++s) {
          double q = 0.0;
          for (int64_t slot = 0; slot < slots; ++slot)
            q += partial.get()[(p * slots + slot) * pass + s];
          sums.add(p0 + p, row0 + s, q);
        }
      });
    }
  }
}

// ------------------------------------------------------------------------------ contracted form

// Columns in panels of `width`, token-major: to[panel, t, l] = x[row0 + t, panel * width + l].
// `tokens` is the stride between panels; `scratch` holds a row. Absent columns are 0.
template <class T>
void pack_tokens(const Array& x, int64_t row0, int64_t count, int64_t tokens, int64_t columns,
                 int64_t width, T* scratch, T* to) {
  for (int64_t t = 0; t < count; ++t) {
    const T* from = widened<T>(x, (row0 + t) * columns, columns, scratch);
    for (int64_t c0 = 0; c0 < columns; c0 += width) {
      T* row = to + c0 * tokens + t * width;
      const int64_t run = smaller(width, columns - c0);
      std::memcpy(row, from + c0, static_cast<size_t>(run) * sizeof(T));
      for (int64_t l = run; l < width; ++l) row[l] = T(0);
    }
  }
}

// Very long sequences are cut, so that the packed inputs of one row stay bounded: a run of tokens
// is a row of its own, and SampleSums joins the rows.
constexpr int64_t kRowTokens = 2048;

template <class T>
void contracted(const DirectionalCurvature& c, int threads, SampleSums& sums) {
  constexpr int64_t W = kWidth<T>;
  constexpr int64_t panel_bytes = kRows * W * static_cast<int64_t>(sizeof(T));
  constexpr int64_t tile_panels = larger(1, kTileBytes / panel_bytes);
  constexpr int64_t tile_columns = tile_panels * W, tile = kRows * tile_columns;
  const int64_t i = c.i, o = c.o, p = c.p;
  const int64_t cuts = ceil_div(c.t, kRowTokens), rows = c.n * cuts, tokens = ceil_div(c.t, cuts);
  const int64_t i_wide = round_up(i, W), o_wide = round_up(o, kRows);

  // A stack is `height` tiles of M one below the other, for `group` samples. Many tokens want a
  // high stack, which reads a and g from the cache again; few want many samples, which share U.
  const int64_t row_bytes = tokens * (i_wide + o_wide) * static_cast<int64_t>(sizeof(T));
  const int64_t pass = smaller(rows, larger(1, kPassBytes / row_bytes));
  const int64_t group = smaller(pass, tokens >= 64 ? 8 : 32), groups = ceil_div(pass, group);
  const int64_t tiles_o = ceil_div(o, kRows);
  const int64_t height = smaller(tiles_o, kHeldTiles / group);
  const int64_t stacks_i = ceil_div(i, tile_columns);
  const int64_t stacks = stacks_i * ceil_div(tiles_o, height);
  const int64_t parts = smaller(stacks, ceil_div(kUnits, groups));

  Buffer<T> a_pack(pass * tokens * i_wide), g_pack(pass * tokens * o_wide);
  const int64_t scratch_size = larger(larger(i, o), (group * height + kDotDirections) * tile);
  Buffer<T> scratch(threads * scratch_size);
  Buffer<double> partial(parts * pass * p);

  for (int64_t row0 = 0; row0 < rows; row0 += pass) {
    const int64_t here = smaller(pass, rows - row0);
    // Tokens of row `row`: block `row % cuts` of sample `row / cuts`.
    const auto first_token = [&](int64_t row) {
      return row / cuts * c.t + cut(c.t, cuts, row % cuts);
    };
    parallel_units(here, threads, [&](int64_t r, int thread) {
      const int64_t first = first_token(row0 + r), count = first_token(row0 + r + 1) - first;
      T* row = scratch.get() + thread * scratch_size;
      pack_tokens<T>(c.a, first, count, tokens, i, W, row, a_pack.get() + r * tokens * i_wide);
      pack_tokens<T>(c.g, first, count, tokens, o, kRows, row, g_pack.get() + r * tokens * o_wide);
    });

    const int64_t groups_here = ceil_div(here, group);
    parallel_units(groups_here * parts, threads, [&](int64_t unit, int thread) {
      const int64_t part = unit % parts, r0 = unit / parts * group;
      const int64_t samples = smaller(group, here - r0);
      T* u = scratch.get() + thread * scratch_size;
      T* m = u + kDotDirections * tile;  // m[h, s]: tile h of the stack of sample s
      double* q = partial.get() + (part * pass + r0) * p;
      for (int64_t j = 0; j < samples * p; ++j) q[j] = 0.0;

      for (int64_t n = cut(stacks, parts, part); n < cut(stacks, parts, part + 1); ++n) {
        const int64_t h0 = n / stacks_i * height, h1 = smaller(tiles_o, h0 + height);
        const int64_t i0 = n % stacks_i * tile_columns, columns = smaller(tile_columns, i - i0);
        const int64_t wide = round_up(columns, W);  // row stride within the tile

        for (int64_t s = 0; s < samples; ++s) {
          const int64_t row = r0 + s;
          const int64_t count = first_token(row0 + row + 1) - first_token(row0 + row);
          const T* a = a_pack.get() + (row * i_wide + i0) * tokens;
          const T* g = g_pack.get() + row * o_wide * tokens;
          for (int64_t t0 = 0; t0 < count; t0 += kDepth) {
            const int64_t depth = smaller(kDepth, count - t0);
            for (int64_t h = h0; h < h1; ++h) {
              const int r = static_cast<int>(smaller(kRows, o - h * kRows));
              const T* gh = g + h * kRows * tokens + t0 * kRows;
              T* to = m + ((h - h0) * group + s) * tile;
              for (int64_t w = 0; w < wide; w += W)
                outer_rows<T>(r, gh, a + w * tokens + t0 * W, depth, t0 > 0, to + w, wide);
              // Padding must be an exact zero: it is 0 * inf = NaN where g is not finite.
              for (int64_t j = 0; columns < wide && j < r; ++j)
                for (int64_t k = columns; k < wide; ++k) to[j * wide + k] = T(0);
            }
          }
        }
        for (int64_t h = h0; h < h1; ++h) {
          const int64_t r = smaller(kRows, o - h * kRows);
          for (int64_t p0 = 0; p0 < p; p0 += kDotDirections) {
            const int64_t directions = smaller(kDotDirections, p - p0);
            for (int64_t d = 0; d < directions; ++d)
              for (int64_t j = 0; j < r; ++j) {
                T* row = u + d * tile + j * wide;
                const T* from =
                    widened<T>(c.U, ((p0 + d) * o + h * kRows + j) * i + i0, columns, row);
                if (from != row) std::memcpy(row, from, static_cast<size_t>(columns) * sizeof(T));
                for (int64_t k = columns; k < wide; ++k) row[k] = T(0);
              }
            // The tiles of U come from memory; fetch the next ones while these are in use.
            const int64_t next = smaller(kDotDirections, p - p0 - directions) * r;
            const int64_t calls = ceil_div(samples, kDotSamples);
            for (int64_t k = 0; k < calls; ++k) {
              for (int64_t l = cut(next, calls, k); l < cut(next, calls, k + 1); ++l) {
                const int64_t d = p0 + directions + l / r, j = h * kRows + l % r;
                prefetch(c.U, (d * o + j) * i + i0, columns);
              }
              const int64_t s = k * kDotSamples;
              dot_group<T>(static_cast<int>(smaller(kDotSamples, samples - s)),
                           static_cast<int>(directions), m + ((h - h0) * group + s) * tile, u,
                           tile, r * wide, q + s * p + p0, p);
            }
          }
        }
      }
    });
    parallel_units(p, threads, [&](int64_t j, int) {
      for (int64_t s = 0; s < here; ++s) {
        double q = 0.0;
        for (int64_t part = 0; part < parts; ++part)
          q += partial.get()[(part * pass + s) * p + j];
        sums.add(j, row0 + s, q);
      }
    });
  }
}

template <class T>
void run(const DirectionalCurvature& c) {
  const bool contract = c.t + c.p + kContractOverhead < c.t * c.p;
  const double flops = 2.0 * static_cast<double>(c.n) * static_cast<double>(c.o * c.i) *
                       static_cast<double>(contract ? c.t + c.p : c.t * c.p);
  const int threads = flops < kSerialFlops || c.threads < 1 ? 1 : c.threads;
  SampleSums sums(c.p, contract ? ceil_div(c.t, kRowTokens) : c.t);
  contract ? contracted<T>(c, threads, sums) : factorised<T>(c, threads, sums);
  for (int64_t j = 0; j < c.p; ++j) c.out[j] = sums.squares(j) / static_cast<double>(c.n);
}

}  // namespace

void directional_curvature(const DirectionalCurvature& c) {
  if (c.n == 0 || c.t == 0 || c.i == 0 || c.o == 0) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const double value = c.n == 0 ? nan : 0.0;
    for (int64_t j = 0; j < c.p; ++j) c.out[j] = value;
  } else if (c.p > 0) {
    const bool wide = c.a.type == Type::f64 || c.g.type == Type::f64 || c.U.type == Type::f64;
    wide ? run<double>(c) : run<float>(c);
  }
}

}  // namespace ddf::DDF_ISA
