#include "kron_matvec.h"

#include "two_sided.h"

namespace ddf::DDF_ISA {
namespace {

constexpr double kSerialFlops = 2e6;  // below this a second thread costs more than it gives

template <class T, int R>
[[gnu::always_inline]] inline void write(const Tile<T, R>& tile, int64_t rows, int64_t columns, int64_t stride,
           const T* denominator, T* to) {
  if (columns >= kWidth<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2 && r < rows; ++v) {
        const int64_t at = r * stride + v * kLanes<T>;
        store(to + at, denominator ? tile[r][v] / load(denominator + at) : tile[r][v]);
      }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T row[kWidth<T>];
    store(row, tile[r][0]);
    store(row + kLanes<T>, tile[r][1]);
    for (int64_t c = 0; c < columns; ++c)
      to[r * stride + c] = denominator ? row[c] / denominator[r * stride + c] : row[c];
  }
}

template <class T>
void run(const KronMatvec& c) {
  const double flops = 2.0 * static_cast<double>(c.p * c.o) * static_cast<double>(c.i) *
                       static_cast<double>(c.o + c.i);
  TwoSided product{c.left, c.right, c.U, c.p, c.o, c.i, c.left_transposed, c.right_transposed};
  product.threads = flops < kSerialFlops ? 1 : c.threads;
  T* out = static_cast<T*>(c.out);
  const T* denominator = static_cast<const T*>(c.denominator.data);
  TwoSidedProduct<T>(product).run([&](int64_t p, int64_t, auto&& tiles) {
    tiles([&](const auto& tile, auto rows, int64_t r0, int64_t c0) {
      const int64_t at = r0 * c.i + c0;
      write<T, rows>(tile, smaller(rows, c.o - r0), c.i - c0, c.i,
                     denominator ? denominator + at : nullptr, out + p * c.o * c.i + at);
    });
  });
}

}  // namespace

void kron_matvec(const KronMatvec& c) {
  if (c.p == 0 || c.o == 0 || c.i == 0) return;
  const bool wide =
      c.left.type == Type::f64 || c.right.type == Type::f64 || c.U.type == Type::f64;
  wide ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
