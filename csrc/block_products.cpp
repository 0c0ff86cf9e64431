#include "block_products.h"

#include "block_lines.h"

namespace ddf::DDF_ISA {
namespace {

template <class T>
void sum_rows(const Array& w, const Array& g, int64_t columns, const BlockPiece& piece,
              double* sums) {
  T w_wide[kBlock], g_wide[kBlock];
  for (int64_t l = 0; l < 2 * piece.lines; ++l) sums[l] = 0;
  along_rows(piece, columns, [&](int64_t l, int64_t, int64_t at, int64_t count) {
    const T* x = widened<T>(w, at, count, w_wide);
    const T* y = widened<T>(g, at, count, g_wide);
    sums[2 * l] += dot_run<T>(x, x, count);
    sums[2 * l + 1] += dot_run<T>(x, y, count);
  });
}

template <class T>
void sum_columns(const Array& w, const Array& g, int64_t columns, const BlockPiece& piece,
                 double* sums) {
  const int64_t lines = piece.lines;
  T w_wide[kBlock], g_wide[kBlock], squares[kPanelColumns], products[kPanelColumns];
  for (int64_t l = 0; l < lines; ++l) squares[l] = products[l] = 0;
  for (int64_t l = 0; l < 2 * lines; ++l) sums[l] = 0;
  down_columns(
      piece, columns,
      [&](int64_t first, int64_t, int64_t at, int64_t count) {
        const T* x = widened<T>(w, at, count, w_wide);
        const T* y = widened<T>(g, at, count, g_wide);
        T* const xx = squares + first;
        T* const xy = products + first;
        for (int64_t l = 0; l < count; ++l) {
          xx[l] += x[l] * x[l];
          xy[l] += x[l] * y[l];
        }
      },
      [&] {
        for (int64_t l = 0; l < lines; ++l) {
          sums[2 * l] += squares[l];
          sums[2 * l + 1] += products[l];
          squares[l] = products[l] = 0;
        }
      },
      [&](int64_t at, int64_t count) {
        prefetch(w, at, count);
        prefetch(g, at, count);
      });
}

template <class T>
void run(const BlockProducts& c) {
  const BlockCut& cut = c.cut;
  const int threads = cut.elements < kSerialElements ? 1 : c.threads;
  parallel_units(cut.piece_count, threads, [&](int64_t unit, int) {
    const BlockPiece& piece = cut.pieces[unit];
    const BlockMatrix& a = cut.matrices[piece.matrix];
    double* sums = c.partial + 2 * piece.slot;
    (a.dim == 0 ? sum_rows<T> : sum_columns<T>)(c.ws[piece.matrix], c.gs[piece.matrix], a.columns,
                                                piece, sums);
  });
  for (int64_t p = 0; p < cut.piece_count; ++p) {
    const BlockPiece& piece = cut.pieces[p];
    const int32_t* block = cut.matrices[piece.matrix].block + piece.line;
    const double* sums = c.partial + 2 * piece.slot;
    for (int64_t l = 0; l < piece.lines; ++l) {
      c.sums[block[l]] += sums[2 * l];
      c.sums[c.count + block[l]] += sums[2 * l + 1];
    }
  }
  for (int64_t b = 0; b < 2 * c.count; ++b) static_cast<T*>(c.out)[b] = static_cast<T>(c.sums[b]);
}

}  // namespace

void block_products(const BlockProducts& c) { c.fp64 ? run<double>(c) : run<float>(c); }

}  // namespace ddf::DDF_ISA
