#include "kron_quadratic.h"

#include "two_sided.h"

namespace ddf::DDF_ISA {
namespace {

constexpr double kSerialFlops = 2e6;  // below this a second thread costs more than it gives

// sums += the squares of the rows of a tile.
template <class T, int R>
[[gnu::always_inline]] inline void add_squares(const Tile<T, R>& tile, int64_t rows,
                                               Vector<T>* sums) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    if (rows >= R || r < rows)
      for (int v = 0; v < 2; ++v) sums[v] += tile[r][v] * tile[r][v];
}

// sums += the rows of a tile times those of U, which start at `offset`.
template <class T, int R>
[[gnu::always_inline]] inline void add_products(const Tile<T, R>& tile, int64_t rows, const Array& U, int64_t offset,
                  int64_t stride, int64_t columns, Vector<T>* sums) {
  constexpr int64_t W = kWidth<T>;
  T padded[W] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= rows) continue;
    const T* u = widened<T>(U, offset + r * stride, smaller(W, columns), padded);
    if (columns < W && u != padded) {
      std::memcpy(padded, u, static_cast<size_t>(columns) * sizeof(T));
      u = padded;
    }
    for (int v = 0; v < 2; ++v) sums[v] += tile[r][v] * load(u + v * kLanes<T>);
  }
}

template <class T, bool Square>
void run(const KronQuadratic& c) {
  constexpr int64_t W = kWidth<T>, block_columns = TwoSidedProduct<T>::kBlockColumns;
  const double flops = 2.0 * static_cast<double>(c.p * c.o) * static_cast<double>(c.i) *
                       static_cast<double>(c.o + c.i);
  // L_G^T U L_A, triangular, or G U A^T.
  TwoSided product{c.G, c.A, c.U, c.p, c.o, c.i, Square, !Square, Square};
  product.threads = flops < kSerialFlops ? 1 : c.threads;
  TwoSidedProduct<T> products(product);
  const int64_t blocks = products.blocks();
  Buffer<double> partial(c.p * blocks);
  products.run([&](int64_t p, int64_t block, auto&& tiles) {
    double lanes[block_columns] = {};
    tiles([&](const auto& tile, auto rows, int64_t r0, int64_t c0) {
      Vector<T> sums[2] = {};
      if constexpr (Square)
        add_squares<T, rows>(tile, c.o - r0, sums);
      else
        add_products<T, rows>(tile, c.o - r0, c.U, (p * c.o + r0) * c.i + c0, c.i, c.i - c0, sums);
      T row[W];
      store(row, sums[0]);
      store(row + kLanes<T>, sums[1]);
      double* to = lanes + (c0 - block * block_columns);
      for (int64_t l = 0; l < W; ++l) to[l] += static_cast<double>(row[l]);
    });
    double total = 0;
    for (int64_t l = 0; l < smaller(block_columns, c.i - block * block_columns); ++l)
      total += lanes[l];
    partial.get()[p * blocks + block] = total;
  });
  for (int64_t p = 0; p < c.p; ++p) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += partial.get()[p * blocks + block];
    c.out[p] = total < 0 ? 0 : total;
  }
}

}  // namespace

void kron_quadratic(const KronQuadratic& c) {
  if (c.p == 0) return;
  if (c.o == 0 || c.i == 0) {
    for (int64_t p = 0; p < c.p; ++p) c.out[p] = 0;
    return;
  }
  const bool wide = c.A.type == Type::f64 || c.G.type == Type::f64 || c.U.type == Type::f64;
  if (c.square)
    wide ? run<double, true>(c) : run<float, true>(c);
  else
    wide ? run<double, false>(c) : run<float, false>(c);
}

}  // namespace ddf::DDF_ISA
