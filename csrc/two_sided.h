// Left and right products of stacked matrices, L U_p R, with what becomes of them passed in.
//
// For each direction and each block of columns, V = U_p R[:, block] is computed into the cache; then
// every tile of L V is handed over while it is in registers. Nothing of the size of U is written but
// what the caller writes. 2 p o i (o + i) FLOP; with triangular factors only the depth where
// they are not zero, half of it.
#pragma once

#include "panels.h"
#include "parallel.h"

namespace ddf::DDF_ISA {

struct TwoSided {
  Array left, right, U;  // (o, o), (i, i), (p, o, i)
  int64_t p = 0, o = 0, i = 0;
  bool left_transposed = false, right_transposed = false;
  // The factors in use are zero where the depth is below the row (left) or the column (right).
  bool triangular = false;
  int threads = 1;
};

template <class T>
class TwoSidedProduct {
 public:
  static constexpr int64_t W = kWidth<T>;
  static constexpr int64_t kBlockColumns = 4 * W;

  explicit TwoSidedProduct(const TwoSided& c)
      : c_(c),
        o_wide_(round_up(c.o, kRows)),
        pass_(smaller(c.p, larger(1, kPassBytes / (o_wide_ * c.i * int64_t(sizeof(T)))))),
        left_(o_wide_ * c.o),
        right_(round_up(c.i, W) * c.i),
        u_(pass_ * o_wide_ * c.i),
        v_(c.threads * kBlockColumns * o_wide_) {
    parallel_units(o_wide_ / kRows, c.threads, [&](int64_t panel, int) { pack_left(panel); });
    parallel_units(ceil_div(c.i, W), c.threads, [&](int64_t panel, int) { pack_right(panel); });
  }

  int64_t blocks() const { return ceil_div(c_.i, kBlockColumns); }

  // Calls done(p, block, tiles) for each direction and block of columns; tiles(consumer) then calls
  // consumer(tile, R, r0, c0) for every tile of it, at output r0 and input c0. `tile` is Tile<T, R>
  // with R >= the rows that exist.
  template <class Done>
  void run(Done&& done) {
    for (int64_t p0 = 0; p0 < c_.p; p0 += pass_) {
      const int64_t here = smaller(pass_, c_.p - p0), panels = o_wide_ / kRows;
      parallel_units(here * panels, c_.threads, [&](int64_t unit, int) {
        const int64_t p = unit / panels, r0 = unit % panels * kRows;
        pack_across<T, kRows>(c_.U, ((p0 + p) * c_.o + r0) * c_.i, c_.i, smaller(kRows, c_.o - r0),
                              c_.i, u_.get() + (p * o_wide_ + r0) * c_.i);
      });
      parallel_units(here * blocks(), c_.threads, [&](int64_t unit, int thread) {
        const int64_t p = unit / blocks(), block = unit % blocks();
        T* v = v_.get() + thread * kBlockColumns * o_wide_;
        first(u_.get() + p * o_wide_ * c_.i, block * kBlockColumns, v);
        done(p0 + p, block, [&](auto&& consumer) { second(block * kBlockColumns, v, consumer); });
      });
    }
  }

 private:
  static constexpr int64_t kDepth = 512;  // inputs summed in registers at a time
  static_assert(kDepth >= kBlockColumns);  // each depth has a part below every column of a block
  static constexpr int64_t kPassBytes = 16 << 20;

  void pack_left(int64_t panel) {
    const int64_t r0 = panel * kRows, o = c_.o, rows = smaller(kRows, o - r0);
    T* to = left_.get() + r0 * o;
    if (c_.left_transposed)
      pack_along<T, kRows>(c_.left, r0, o, rows, o, to);
    else
      pack_across<T, kRows>(c_.left, r0 * o, o, rows, o, to);
  }

  void pack_right(int64_t panel) {
    const int64_t c0 = panel * W, i = c_.i, columns = smaller(W, i - c0);
    T* to = right_.get() + c0 * i;
    if (c_.right_transposed)
      pack_across<T, W>(c_.right, c0 * i, i, columns, i, to);
    else
      pack_along<T, W>(c_.right, c0, i, columns, i, to);
  }

  // V = U R for a block of columns, in panels v[panel, r, l].
  void first(const T* u, int64_t c_begin, T* v) const {
    const int64_t i = c_.i, o = c_.o, c_end = smaller(i, c_begin + kBlockColumns);
    const int64_t begin = c_.triangular ? c_begin : 0;
    for (int64_t d0 = begin; d0 < i; d0 += kDepth)
      for (int64_t r0 = 0; r0 < o; r0 += kRows)
        for (int64_t c0 = c_begin; c0 < c_end; c0 += W) {
          const int64_t k0 = c_.triangular ? larger(d0, c0) : d0;
          const int64_t depth = smaller(i, d0 + kDepth) - k0;
          T* to = v + (c0 - c_begin) * o_wide_ + r0 * W;
          const bool add = d0 > begin;
          with_rows(o - r0, [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            multiply<T, R>(u + r0 * i + k0 * kRows, right_.get() + c0 * i + k0 * W, depth,
                           [&](const Tile<T, R>& tile) {
#pragma GCC unroll 16
                             for (int r = 0; r < R; ++r)
                               for (int h = 0; h < 2; ++h) {
                                 T* at = to + r * W + h * kLanes<T>;
                                 store(at, add ? load(at) + tile[r][h] : tile[r][h]);
                               }
                           });
          });
        }
  }

  // The tiles of L V.
  template <class Consumer>
  void second(int64_t c_begin, const T* v, Consumer&& consumer) const {
    const int64_t o = c_.o, c_end = smaller(c_.i, c_begin + kBlockColumns);
    for (int64_t r0 = 0; r0 < o; r0 += kRows)
      for (int64_t c0 = c_begin; c0 < c_end; c0 += W) {
        const T* panel = v + (c0 - c_begin) * o_wide_;
        const int64_t k0 = c_.triangular ? r0 : 0;
        with_rows(o - r0, [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          multiply<T, R>(left_.get() + r0 * o + k0 * kRows, panel + k0 * W, o - k0,
                         [&](const Tile<T, R>& tile) { consumer(tile, rows, r0, c0); });
        });
      }
  }

  const TwoSided& c_;
  const int64_t o_wide_, pass_;  // directions packed at a time
  Buffer<T> left_, right_, u_, v_;
};

}  // namespace ddf::DDF_ISA
