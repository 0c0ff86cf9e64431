#include "directional_scores.h"

#include "dot.h"
#include "panels.h"
#include "parallel.h"
#include "zero_scores.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kDepth = 512;              // outputs or tokens summed in registers at a time
constexpr int64_t kUnits = 64;               // units of work aimed at, so that threads stay busy
constexpr int64_t kPassBytes = 32 << 20;     // packed inputs held at a time
constexpr int64_t kSlotBytes = 32 << 20;     // partial sums held at a time
constexpr int64_t kBlockPanels = 4;          // column panels of U held in the L2 cache
constexpr int64_t kTilePanels = 2;           // column panels of a tile of M
constexpr int64_t kHeldTiles = 64;           // tiles of M held at a time, in the L2 cache
constexpr double kSerialFlops = 2e6;         // below this a second thread costs more than it gives
constexpr int64_t kContractOverhead = 6;     // stores and sums of the contracted form, in tokens

// ------------------------------------------------------------------------------ sums over tokens

// Rows arrive in order, `per_sample` of them to a sample; a sample may straddle two passes. Its
// score is squared and added, or written where scores are asked for.
template <class T>
class Samples {
 public:
  Samples(const DirectionalScores& c, int64_t per_sample)
      : open_(c.p),
        squares_(c.squares),
        out_(static_cast<T*>(c.out)),
        n_(c.n),
        per_sample_(per_sample) {
    for (int64_t j = 0; j < c.p; ++j) open_.get()[j] = 0.0;
    if (squares_) zero_scores<T>(c);
  }
  void add(int64_t p, int64_t row, double value) {
    double& open = open_.get()[p];
    open += value;
    if (per_sample_ == 1 || (row + 1) % per_sample_ == 0) {
      if (squares_)
        squares_[p] += open * open;
      else
        out_[p * n_ + row / per_sample_] = static_cast<T>(open);
      open = 0.0;
    }
  }

 private:
  Buffer<double> open_;
  double* squares_;
  T* out_;
  int64_t n_, per_sample_;
};

// ------------------------------------------------------------------------------ factorised form

// sums[r] += tile[r, :] a[r, :] over the first `columns` of a tile.
template <class T, int R>
[[gnu::always_inline]] inline void add_products(const Tile<T, R>& tile, const T* a, int64_t columns,
                                                Vector<T>* sums) {
  constexpr int64_t L = kLanes<T>;
  if (columns == kWidth<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      sums[r] += tile[r][0] * load(a + r * kWidth<T>) + tile[r][1] * load(a + r * kWidth<T> + L);
    return;
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v)
      sums[r] += first_lanes<T>(tile[r][v] * load(a + r * kWidth<T> + v * L), columns - v * L);
}

// Samples in panels of kRows: g depth-major, a in tiles to[column panel, s, l].
template <class T>
void pack_samples(const DirectionalScores& c, int64_t row0, int64_t rows, T* scratch, T* g_to,
                  T* a_to) {
  constexpr int64_t W = kWidth<T>;
  pack_across<T, kRows>(c.g, row0 * c.o, c.o, rows, c.o, g_to);
  for (int64_t s = 0; s < kRows; ++s) {
    const T* from = scratch;
    if (s < rows) from = widened<T>(c.a, (row0 + s) * c.i, c.i, scratch);
    for (int64_t c0 = 0; c0 < c.i; c0 += W) {
      T* to = a_to + c0 * kRows + s * W;
      const int64_t run = s < rows ? smaller(W, c.i - c0) : 0;
      std::memcpy(to, from + c0, static_cast<size_t>(run) * sizeof(T));
      for (int64_t l = run; l < W; ++l) to[l] = T(0);
    }
  }
}

template <class T>
void factorised(const DirectionalScores& c, int threads, Samples<T>& samples) {
  constexpr int64_t W = kWidth<T>, block = kBlockPanels * W;
  const int64_t rows = c.n * c.t, i = c.i, o = c.o;
  const int64_t i_wide = round_up(i, W), depths = ceil_div(o, kDepth), blocks = ceil_div(i, block);
  const int64_t slots = depths * blocks;

  const int64_t row_bytes = (i_wide + o) * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = larger(1, kPassBytes / row_bytes / kRows) * kRows;
  const int64_t pass = smaller(round_up(rows, kRows), fitting), pass_panels = pass / kRows;
  const int64_t p_block = smaller(c.p, larger(1, kSlotBytes / (8 * pass * slots)));
  const int64_t parts = smaller(pass_panels, ceil_div(kUnits, p_block * slots));

  Buffer<T> a_pack(pass * i_wide), g_pack(pass * o), rows_scratch(threads * i);
  Buffer<T> u_pack(threads * smaller(block, i_wide) * smaller(kDepth, o));
  Buffer<double> partial(p_block * slots * pass);

  for (int64_t row0 = 0; row0 < rows; row0 += pass) {
    const int64_t here = smaller(pass, rows - row0), panels = ceil_div(here, kRows);
    parallel_units(panels, threads, [&](int64_t panel, int thread) {
      const int64_t first = panel * kRows, count = smaller(kRows, here - first);
      pack_samples<T>(c, row0 + first, count, rows_scratch.get() + thread * i,
                      g_pack.get() + first * o, a_pack.get() + first * i_wide);
    });

    for (int64_t p0 = 0; p0 < c.p; p0 += p_block) {
      const int64_t p_here = smaller(p_block, c.p - p0);
      parallel_units(p_here * slots * parts, threads, [&](int64_t unit, int thread) {
        const int64_t part = unit % parts, slot = unit / parts % slots, p = unit / parts / slots;
        const int64_t k0 = slot % depths * kDepth, depth = smaller(kDepth, o - k0);
        const int64_t c0 = slot / depths * block, columns = smaller(block, i - c0);
        T* u = u_pack.get() + thread * smaller(block, i_wide) * smaller(kDepth, o);
        pack_block<T, W>(c.U, ((p0 + p) * o + k0) * i + c0, i, columns, ceil_div(columns, W), depth,
                         depth, u);

        double* q = partial.get() + (p * slots + slot) * pass;
        for (int64_t panel = cut(panels, parts, part); panel < cut(panels, parts, part + 1);
             ++panel) {
          const int64_t s0 = panel * kRows;
          with_rows(here - s0, [&](auto count) {
            constexpr int R = decltype(count)::value;
            Vector<T> products[R] = {};
            for (int64_t w = 0; w < columns; w += W) {
              const T* a = a_pack.get() + s0 * i_wide + (c0 + w) * kRows;
              prefetch(a, R * W);
              multiply<T, R>(g_pack.get() + s0 * o + k0 * kRows, u + w * depth, depth,
                             [&](const Tile<T, R>& tile) {
                               add_products<T, R>(tile, a, smaller(W, columns - w), products);
                             });
            }
            for (int r = 0; r < R; ++r) q[s0 + r] = sum_lanes<T>(products[r]);
          });
        }
      });
      parallel_units(p_here, threads, [&](int64_t p, int) {
        for (int64_t s = 0; s < here; ++s) {
          double q = 0.0;
          for (int64_t slot = 0; slot < slots; ++slot)
            q += partial.get()[(p * slots + slot) * pass + s];
          samples.add(p0 + p, row0 + s, q);
        }
      });
    }
  }
}

// ------------------------------------------------------------------------------ contracted form

// A tile of M: kRows outputs by kTileColumns inputs, row by row.
template <class T>
constexpr int64_t kTileColumns = kTilePanels * kWidth<T>;
template <class T>
constexpr int64_t kTile = kRows * kTileColumns<T>;

// Very long sequences are cut, so that the packed inputs of one row stay bounded: a run of tokens
// is a row of its own, and Samples joins the rows.
constexpr int64_t kRowTokens = 2048;

template <class T>
class Contraction {
 public:
  Contraction(const DirectionalScores& c, int threads)
      : c_(c),
        threads_(threads),
        cuts_(ceil_div(c.t, kRowTokens)),
        rows_(c.n * cuts_),
        tokens_(ceil_div(c.t, cuts_)),
        i_wide_(round_up(c.i, kTileColumns<T>)),
        o_wide_(round_up(c.o, kRows)),
        pass_(smaller(rows_, larger(1, kPassBytes / row_bytes()))),
        group_(smaller(pass_, tokens_ >= 32 ? 16 : 64)),
        height_(smaller(tiles_o(), larger(1, kHeldTiles / group_))),
        stacks_i_(ceil_div(c.i, kTileColumns<T>)),
        stacks_(stacks_i_ * ceil_div(tiles_o(), height_)),
        parts_(smaller(stacks_, ceil_div(kUnits, ceil_div(pass_, group_)))),
        a_(pass_ * tokens_ * i_wide_),
        g_(pass_ * tokens_ * o_wide_),
        m_(threads * group_ * height_ * kTile<T>),
        u_(threads * kDotColumns * kTile<T>),
        products_(threads * group_ * c.p * kLanes<T>),
        partial_(parts_ * pass_ * c.p) {}

  void run(Samples<T>& samples) {
    for (int64_t row0 = 0; row0 < rows_; row0 += pass_) {
      const int64_t here = smaller(pass_, rows_ - row0);
      parallel_units(here, threads_, [&](int64_t r, int) { pack(row0 + r, r); });
      parallel_units(ceil_div(here, group_) * parts_, threads_, [&](int64_t unit, int thread) {
        const int64_t r0 = unit / parts_ * group_;
        contract(row0, r0, smaller(group_, here - r0), unit % parts_, thread);
      });
      parallel_units(c_.p, threads_, [&](int64_t j, int) {
        for (int64_t s = 0; s < here; ++s) {
          double q = 0.0;
          for (int64_t part = 0; part < parts_; ++part)
            q += partial_.get()[(part * pass_ + s) * c_.p + j];
          samples.add(j, row0 + s, q);
        }
      });
    }
  }

 private:
  static constexpr int64_t W = kWidth<T>;

  int64_t row_bytes() const {
    return tokens_ * (i_wide_ + o_wide_) * static_cast<int64_t>(sizeof(T));
  }
  int64_t tiles_o() const { return o_wide_ / kRows; }

  // Tokens of row `row`: block `row % cuts` of sample `row / cuts`.
  int64_t first_token(int64_t row) const {
    return row / cuts_ * c_.t + cut(c_.t, cuts_, row % cuts_);
  }
  int64_t token_count(int64_t row) const { return first_token(row + 1) - first_token(row); }

  // The tokens of a row in panels: a (panel, t, kWidth), g (panel, t, kRows).
  void pack(int64_t row, int64_t slot) {
    const int64_t first = first_token(row), count = token_count(row), i = c_.i, o = c_.o;
    pack_block<T, W>(c_.a, first * i, i, i, i_wide_ / W, count, tokens_,
                     a_.get() + slot * tokens_ * i_wide_);
    pack_block<T, kRows>(c_.g, first * o, o, o, o_wide_ / kRows, count, tokens_,
                         g_.get() + slot * tokens_ * o_wide_);
  }

  // Tile of M = g^T a of one row at output r0, input c0.
  void outer(int64_t slot, int64_t count, int64_t r0, int64_t c0, T* to) const {
    const T* a = a_.get() + (slot * i_wide_ + c0) * tokens_;
    const T* g = g_.get() + (slot * o_wide_ + r0) * tokens_;
    for (int64_t w = 0; w < kTileColumns<T>; w += W)
      for (int64_t t0 = 0; t0 < count; t0 += kDepth)
        with_rows(c_.o - r0, [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          multiply<T, R>(g + t0 * kRows, a + w * tokens_ + t0 * W, smaller(kDepth, count - t0),
                         [&](const Tile<T, R>& tile) {
#pragma GCC unroll 16
                           for (int r = 0; r < R; ++r)
                             for (int v = 0; v < 2; ++v) {
                               T* at = to + r * kTileColumns<T> + w + v * kLanes<T>;
                               store(at, t0 == 0 ? tile[r][v] : load(at) + tile[r][v]);
                             }
                         });
        });
    // Padding must be an exact zero: it is 0 * inf = NaN where g is not finite.
    if (c0 + kTileColumns<T> > c_.i)
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t k = c_.i - c0; k < kTileColumns<T>; ++k) to[r * kTileColumns<T> + k] = T(0);
  }

  // Tiles of U for `directions` directions: where they lie, or a widened and padded copy.
  Rows<T> directions(int64_t p0, int64_t count, int64_t r0, int64_t rows, int64_t c0,
                     T* copy) const {
    const int64_t i = c_.i, columns = smaller(kTileColumns<T>, i - c0);
    constexpr Type own = sizeof(T) == 8 ? Type::f64 : Type::f32;
    if (c_.U.type == own && columns == kTileColumns<T>)
      return {static_cast<const T*>(c_.U.data) + (p0 * c_.o + r0) * i + c0, c_.o * i, i};
    for (int64_t d = 0; d < count; ++d)
      for (int64_t r = 0; r < rows; ++r) {
        T* row = copy + d * kTile<T> + r * kTileColumns<T>;
        const T* from = widened<T>(c_.U, ((p0 + d) * c_.o + r0 + r) * i + c0, columns, row);
        if (from != row) std::memcpy(row, from, static_cast<size_t>(columns) * sizeof(T));
        for (int64_t k = columns; k < kTileColumns<T>; ++k) row[k] = T(0);
      }
    return {copy, kTile<T>, kTileColumns<T>};
  }

  // The products of samples r0, r0 + 1, ... with all directions over one part of the stacks.
  void contract(int64_t row0, int64_t r0, int64_t samples, int64_t part, int thread) {
    const int64_t p = c_.p, m_step = height_ * kTile<T>;
    T* m = m_.get() + thread * group_ * m_step;  // tile h of sample s: m[s, h]
    T* copy = u_.get() + thread * kDotColumns * kTile<T>;
    auto* q = reinterpret_cast<Vector<T>*>(products_.get() + thread * group_ * p * kLanes<T>);
    for (int64_t j = 0; j < samples * p; ++j) q[j] = Vector<T>{};

    for (int64_t n = cut(stacks_, parts_, part); n < cut(stacks_, parts_, part + 1); ++n) {
      const int64_t h0 = n / stacks_i_ * height_, h1 = smaller(tiles_o(), h0 + height_);
      const int64_t c0 = n % stacks_i_ * kTileColumns<T>;
      const int64_t u_columns = smaller(kTileColumns<T>, c_.i - c0);
      for (int64_t s = 0; s < samples; ++s)
        for (int64_t h = h0; h < h1; ++h)
          outer(r0 + s, token_count(row0 + r0 + s), h * kRows, c0,
                m + s * m_step + (h - h0) * kTile<T>);
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t rows = smaller(kRows, c_.o - h * kRows);
        for (int64_t p0 = 0; p0 < p; p0 += kDotColumns) {
          const int64_t count = smaller(kDotColumns, p - p0);
          const Rows<T> u = directions(p0, count, h * kRows, rows, c0, copy);
          // The tiles of U come from memory; fetch the next ones while these are in use.
          const int64_t next = smaller(p, p0 + count + kDotColumns);
          const int64_t calls = ceil_div(samples, kDotRows);
          for (int64_t k = 0; k < calls; ++k) {
            const int64_t l0 = cut(rows, calls, k), l1 = cut(rows, calls, k + 1);
            for (int64_t d = p0 + count; d < next; ++d)
              for (int64_t l = l0; l < l1; ++l)
                prefetch(c_.U, (d * c_.o + h * kRows + l) * c_.i + c0, u_columns);
            const int64_t s = k * kDotRows;
            const T* tiles = m + s * m_step + (h - h0) * kTile<T>;
            dot_rows<T>(smaller(kDotRows, samples - s), count, {tiles, m_step, kTileColumns<T>}, u,
                        rows, kTileColumns<T>, q + s * p + p0, p);
          }
        }
      }
    }
    double* to = partial_.get() + (part * pass_ + r0) * p;
    for (int64_t j = 0; j < samples * p; ++j) to[j] = sum_lanes<T>(q[j]);
  }

  const DirectionalScores& c_;
  const int threads_;
  const int64_t cuts_, rows_, tokens_, i_wide_, o_wide_;
  const int64_t pass_, group_, height_;  // rows packed at a time; of a unit; tiles of M in a stack
  const int64_t stacks_i_, stacks_, parts_;
  Buffer<T> a_, g_, m_, u_, products_;
  Buffer<double> partial_;
};

template <class T>
void run(const DirectionalScores& c) {
  if (c.n == 0 || c.t == 0 || c.i == 0 || c.o == 0) return zero_scores<T>(c);
  const bool contract = c.t + c.p + kContractOverhead < c.t * c.p;
  const double flops = 2.0 * static_cast<double>(c.n) * static_cast<double>(c.o * c.i) *
                       static_cast<double>(contract ? c.t + c.p : c.t * c.p);
  const int threads = flops < kSerialFlops || c.threads < 1 ? 1 : c.threads;
  Samples<T> samples(c, contract ? ceil_div(c.t, kRowTokens) : c.t);
  if (contract)
    Contraction<T>(c, threads).run(samples);
  else
    factorised<T>(c, threads, samples);
}

}  // namespace

void directional_scores(const DirectionalScores& c) {
  if (c.p == 0) return;
  const bool wide = c.a.type == Type::f64 || c.g.type == Type::f64 || c.U.type == Type::f64;
  wide ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
