#include "gram.h"

#include "panels.h"
#include "parallel.h"

namespace ddf::DDF_ISA {
namespace {

// Both operands are panels of x, so one packed copy serves where tile rows divide tile columns.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 3;
#elif defined(__aarch64__)
constexpr int kTileRows = 4, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;
static_assert(kTileColumns<float> % kTileRows == 0 && kTileColumns<double> % kTileRows == 0);

constexpr int64_t kDepth = 512;       // rows of x summed in registers at a time
constexpr int64_t kRowPanels = 2;     // of a unit of work: with its column panels it stays in the
constexpr int64_t kColumnPanels = 3;  // level-two cache
constexpr int64_t kPackRows = 16;     // rows of x packed at a time
constexpr int64_t kMirror = 32;       // side of the squares in which the triangle is mirrored
constexpr double kSerialFlops = 2e6;  // below this a second thread costs more than it gives

template <class T>
class Triangle {  // where entries of the lower triangle lie
 public:
  explicit Triangle(const Gram& c)
      : out_(static_cast<T*>(c.out)), stride_(c.out_stride), packed_(c.packed) {}
  T* row(int64_t r) const { return out_ + (packed_ ? r * (r + 1) / 2 : r * stride_); }

 private:
  T* out_;
  int64_t stride_;
  bool packed_;
};

// to <- beta to + alpha v; with beta 0 nothing is read, so that NaN left in memory does not count.
template <class T>
void update(T& to, T v, T alpha, T beta) {
  to = beta == 0 ? alpha * v : beta * to + alpha * v;
}

// The tile at (r0, c0), as far as it lies in the lower triangle of an i x i matrix.
template <class T>
[[gnu::always_inline]] inline void write(const Tile<T, kTileRows, kTileVectors>& tile, int64_t r0, int64_t c0, int64_t i, T alpha,
           T beta, const Triangle<T>& out) {
  const int64_t rows = smaller(kTileRows, i - r0);
  if (c0 + kTileColumns<T> <= r0 + 1) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors && r < rows; ++v) {
        T* to = out.row(r0 + r) + c0 + v * kLanes<T>;
        const Vector<T> scaled = alpha * tile[r][v];
        store(to, beta == 0 ? scaled : beta * load(to) + scaled);
      }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T row[kTileColumns<T>];
    for (int v = 0; v < kTileVectors; ++v) store(row + v * kLanes<T>, tile[r][v]);
    T* to = out.row(r0 + r) + c0;
    const int64_t columns = smaller(kTileColumns<T>, r0 + r + 1 - c0);
    for (int64_t c = 0; c < columns; ++c) update(to[c], row[c], alpha, beta);
  }
}

// Rows k0 to k1 of a run of `depth` rows of x, spread over panels: to[panel, k, c]. Row by row, so
// that x is read in one stream.
template <class T>
void pack(const Gram& c, int64_t row0, int64_t depth, int64_t k0, int64_t k1, T* scratch, T* to) {
  constexpr int64_t W = kTileColumns<T>;
  for (int64_t k = k0; k < k1; ++k) {
    const T* from = widened<T>(c.x, (row0 + k) * c.i, c.i, scratch);
    for (int64_t c0 = 0; c0 < c.i; c0 += W) {
      T* row = to + c0 * depth + k * W;
      if (c0 + W <= c.i) {
        for (int v = 0; v < kTileVectors; ++v)
          store(row + v * kLanes<T>, load(from + c0 + v * kLanes<T>));
      } else {
        for (int64_t l = 0; l < W; ++l) row[l] = c0 + l < c.i ? from[c0 + l] : T(0);
      }
    }
  }
}

// The left operand of a unit of work: its row panels, weighted.
template <class T>
void weigh(const Gram& c, int64_t row0, int64_t depth, const T* from, T* to) {
  constexpr int64_t W = kTileColumns<T>;
  for (int64_t k = 0; k < depth; ++k) {
    T weight;
    weight = *widened<T>(c.weight, row0 + k, 1, &weight);
    for (int v = 0; v < kTileVectors; ++v)
      store(to + k * W + v * kLanes<T>, weight * load(from + k * W + v * kLanes<T>));
  }
}

// Copies the lower triangle to the upper one, squares of it at a time. A square is turned in a
// buffer: rows of out may lie a power of two apart and then share a set of the cache.
template <class T>
void mirror(const Gram& c, int threads) {
  T* out = static_cast<T*>(c.out);
  const int64_t squares = ceil_div(c.i, kMirror);
  parallel_units(squares, threads, [&](int64_t square, int) {
    T turned[kMirror][kMirror];
    const int64_t r0 = square * kMirror, rows = smaller(kMirror, c.i - r0);
    for (int64_t c0 = 0; c0 <= r0; c0 += kMirror) {
      const int64_t columns = smaller(kMirror, c.i - c0);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k) turned[k][r] = out[(r0 + r) * c.out_stride + c0 + k];
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t done = c0 < r0 ? 0 : smaller(rows, k);  // at or below the diagonal
        std::memcpy(out + (c0 + k) * c.out_stride + r0 + done, turned[k] + done,
                    static_cast<size_t>(rows - done) * sizeof(T));
      }
    }
  });
}

template <class T>
void run(const Gram& c) {
  constexpr int64_t W = kTileColumns<T>;
  constexpr int64_t block_rows = kRowPanels * W, block_columns = kColumnPanels * W;
  const T alpha = static_cast<T>(c.alpha), beta = static_cast<T>(c.beta);
  const double flops = static_cast<double>(c.n) * static_cast<double>(c.i) *
                       static_cast<double>(c.i + 1);
  const int threads = flops < kSerialFlops ? 1 : c.threads;
  const Triangle<T> out(c);
  const int64_t pass = smaller(kDepth, c.n), blocks = ceil_div(c.i, block_rows);
  // Blocks left of the diagonal in a row of blocks, and the one on it.
  const auto width = [&](int64_t b) {
    return ceil_div(smaller(c.i, (b + 1) * block_rows), block_columns);
  };
  int64_t units = 0;
  for (int64_t b = 0; b < blocks; ++b) units += width(b);

  Buffer<T> packed(round_up(c.i, W) * pass), scratch(threads * c.i);
  Buffer<T> weighted(c.weight.data ? threads * block_rows * pass : 0);
  for (int64_t row0 = 0; row0 < c.n; row0 += kDepth) {
    const int64_t depth = smaller(kDepth, c.n - row0);
    const T keep = row0 == 0 ? beta : T(1);
    parallel_units(ceil_div(depth, kPackRows), threads, [&](int64_t part, int thread) {
      const int64_t k0 = part * kPackRows, k1 = smaller(depth, k0 + kPackRows);
      pack<T>(c, row0, depth, k0, k1, scratch.get() + thread * c.i, packed.get());
    });
    parallel_units(units, threads, [&](int64_t unit, int thread) {
      int64_t b = blocks - 1, column = unit;  // the widest rows of blocks first
      while (column >= width(b)) column -= width(b--);
      const int64_t r_begin = b * block_rows, r_end = smaller(c.i, r_begin + block_rows);
      const T* left = packed.get() + r_begin * depth;
      if (c.weight.data) {
        T* to = weighted.get() + thread * block_rows * pass;
        for (int64_t r0 = r_begin; r0 < r_end; r0 += W)
          weigh<T>(c, row0, depth, packed.get() + r0 * depth, to + (r0 - r_begin) * depth);
        left = to;
      }
      const int64_t c_begin = column * block_columns;
      for (int64_t r0 = r_begin; r0 < r_end; r0 += kTileRows) {
        const int64_t panel = (r0 - r_begin) / W * W;  // r0 - r_begin - panel: row in its panel
        const T* rows = left + panel * depth + (r0 - r_begin - panel);
        const int64_t c_end = smaller(c_begin + block_columns, smaller(c.i, r0 + kTileRows));
        for (int64_t c0 = c_begin; c0 < c_end; c0 += W)
          multiply<T, kTileRows, kTileVectors, W>(
              rows, packed.get() + c0 * depth, depth,
              [&](const Tile<T, kTileRows, kTileVectors>& tile) {
                write<T>(tile, r0, c0, c.i, alpha, keep, out);
              });
      }
    });
  }
  if (c.n == 0)
    for (int64_t r = 0; r < c.i; ++r)
      for (int64_t k = 0; k <= r; ++k) update(out.row(r)[k], T(0), alpha, beta);
  if (!c.packed) mirror<T>(c, threads);
}

}  // namespace

void gram(const Gram& c) {
  const bool wide = c.x.type == Type::f64 || (c.weight.data && c.weight.type == Type::f64);
  wide ? run<double>(c) : run<float>(c);
}

}  // namespace ddf::DDF_ISA
