#include "kron_quadratic_rank1.h"

#include "panels.h"
#include "parallel.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kDepth = 512;         // rows of A summed in registers at a time
constexpr int64_t kBlockPanels = 4;     // column panels of A packed at a time
constexpr double kSerialElements = 1e5;  // below this a second thread costs more than it gives

template <class T>
void run(const KronQuadraticRank1& c) {
  constexpr int64_t W = kWidth<T>, block = kBlockPanels * W;
  const int64_t i = c.i, p_wide = round_up(c.p, kRows), wide = round_up(i, W);
  const int64_t blocks = ceil_div(i, block), depths = ceil_div(i, kDepth);
  const double work = static_cast<double>(i) * static_cast<double>(i + c.p * i / 8);
  const int threads = work < kSerialElements ? 1 : c.threads;
  const int64_t scratch = smaller(block, wide) * smaller(kDepth, i);

  Buffer<T> rows(p_wide * i), plain(p_wide * wide), a(threads * scratch);
  Buffer<double> partial(blocks * depths * p_wide);
  for (int64_t p0 = 0; p0 < c.p; p0 += kRows)
    pack_across<T, kRows>(c.w, p0 * i, i, smaller(kRows, c.p - p0), i, rows.get() + p0 * i);
  for (int64_t p = 0; p < p_wide; ++p) {
    T* to = plain.get() + p * wide;
    const T* from = p < c.p ? widened<T>(c.w, p * i, i, to) : to;
    if (from != to) std::memcpy(to, from, static_cast<size_t>(i) * sizeof(T));
    for (int64_t k = p < c.p ? i : 0; k < wide; ++k) to[k] = T(0);
  }

  parallel_units(blocks * depths, threads, [&](int64_t unit, int thread) {
    const int64_t k0 = unit % depths * kDepth, depth = smaller(kDepth, i - k0);
    const int64_t c0 = unit / depths * block, columns = smaller(block, i - c0);
    T* packed = a.get() + thread * scratch;
    pack_block<T, W>(c.A, k0 * i + c0, i, columns, ceil_div(columns, W), depth, depth, packed);
    for (int64_t p0 = 0; p0 < c.p; p0 += kRows)
      with_rows(c.p - p0, [&](auto count) {
        constexpr int R = decltype(count)::value;
        Vector<T> sums[R] = {};
        for (int64_t w = 0; w < columns; w += W)
          multiply<T, R>(
              rows.get() + p0 * i + k0 * kRows, packed + w * depth, depth,
              [&](const Tile<T, R>& tile) {
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r)
                  for (int v = 0; v < 2; ++v) {
                    const int64_t at = c0 + w + v * kLanes<T>;
                    const Vector<T> term = tile[r][v] * load(plain.get() + (p0 + r) * wide + at);
                    sums[r] += w + W <= columns ? term : first_lanes<T>(term, i - at);
                  }
              });
        for (int r = 0; r < R; ++r)
          partial.get()[unit * p_wide + p0 + r] = sum_lanes<T>(sums[r]);
      });
  });
  for (int64_t p = 0; p < c.p; ++p) {
    double total = 0;
    for (int64_t unit = 0; unit < blocks * depths; ++unit)
      total += partial.get()[unit * p_wide + p];
    c.out[p] = total < 0 ? 0 : total;
  }
}

}  // namespace

void kron_quadratic_rank1(const KronQuadraticRank1& c) {
  if (c.p == 0) return;
  c.fp64 ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
