#include "block_adam.h"

#include "block_lines.h"

namespace ddf::DDF_ISA {
namespace {

inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }

// One value for every element of a run.
template <class T>
struct Same {
  T value;
  T operator[](int64_t) const { return value; }
};

template <class T>
class Step {
 public:
  explicit Step(const BlockAdam& c)
      : c_(c),
        cut_(c.cut),
        h_(c.hyper),
        sign_(c.maximize ? T(-1) : T(1)),
        threads_(cut_.elements < kSerialElements ? 1 : c.threads) {}

  void run() const {
    const int64_t groups = cut_.group_count, room = cut_.largest;
    const Buffer<T> memory(2 * room * threads_);
    parallel_units(groups, threads_, [&](int64_t unit, int thread) {
      T* kept = memory.get() + 2 * room * thread;
      finish(cut_.groups[unit], kept, kept + room);
    });

    const int64_t first = groups ? cut_.groups[groups - 1].end : 0;
    const int64_t count = cut_.piece_count;
    parallel_units(count - first, threads_, [&](int64_t unit, int) {
      moments(cut_.pieces[first + unit], nullptr, nullptr);
    });
    join(first, count);
    parallel_units(count - first, threads_, [&](int64_t unit, int) {
      apply(cut_.pieces[first + unit], nullptr, nullptr);
    });
  }

 private:
  // What the moments need of a block, and what the new weights do.
  struct Tangent {
    T rho, along;
  };
  struct Move {
    T back, grow, step;
  };

  void finish(const BlockGroup& group, T* w0, T* u) const {
    int64_t at = 0;
    for (int64_t p = group.begin; p < group.end; ++p) {
      moments(cut_.pieces[p], w0 + at, u + at);
      at += elements(cut_.pieces[p]);
    }
    join(group.begin, group.end);
    at = 0;
    for (int64_t p = group.begin; p < group.end; ++p) {
      apply(cut_.pieces[p], w0 + at, u + at);
      at += elements(cut_.pieces[p]);
    }
  }

  static int64_t elements(const BlockPiece& piece) {
    return piece.lines * (piece.end - piece.begin);
  }

  // Adds the sums of pieces to those of their blocks, in order.
  void join(int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p) {
      const BlockPiece& piece = cut_.pieces[p];
      const int32_t* block = cut_.matrices[piece.matrix].block + piece.line;
      for (int64_t l = 0; l < piece.lines; ++l) c_.overlap[block[l]] += c_.partial[piece.slot + l];
    }
  }

  T value(const void* of, int64_t b) const { return static_cast<const T*>(of)[b]; }

  // A block without a norm is outside of the chart.
  bool inside(int64_t b) const { return value(c_.norms, b) > 0; }

  Tangent tangent(int64_t b) const {
    if (!inside(b)) return {T(1), T(0)};
    const T rho = value(c_.norms, b);
    return {rho, value(c_.inner, b) / (rho * rho)};
  }

  Move move(int64_t b) const {
    if (!inside(b)) return {T(0), T(1), h_.lr};
    const T rho = value(c_.norms, b);
    return {static_cast<T>(c_.overlap[b]) / (rho * rho), exponential(value(c_.radial, b)),
            h_.lr * value(c_.reach, b)};
  }

  // The moments of a run of elements; leaves its decayed weights and directions.
  template <class Each>
  [[gnu::always_inline]] void moments_run(int64_t k, int64_t at, int64_t count, const Each& rho,
                                          const Each& along, T* w0, T* u) const {
    T w_wide[kBlock], g_wide[kBlock];
    const T* w = widened<T>(c_.ws[k], at, count, w_wide);
    const T* g = widened<T>(c_.gs[k], at, count, g_wide);
    T* m = static_cast<T*>(c_.ms[k]) + at;
    T* v = static_cast<T*>(c_.vs[k]) + at;
    const Scalars<T> h = h_;
    const T sign = sign_;
    DDF_INDEPENDENT
    for (int64_t j = 0; j < count; ++j) {
      const T decayed = h.keep * w[j];
      const T input = rho[j] * (sign * g[j] - along[j] * decayed);
      T first = m[j], second = v[j];
      u[j] = update_moments(input, first, second, h);
      m[j] = first;
      v[j] = second;
      w0[j] = decayed;
    }
  }

  // The same of moments that are up to date.
  void again(int64_t k, int64_t at, int64_t count, T* w0, T* u) const {
    T w_wide[kBlock];
    const T* w = widened<T>(c_.ws[k], at, count, w_wide);
    const T* m = static_cast<const T*>(c_.ms[k]) + at;
    const T* v = static_cast<const T*>(c_.vs[k]) + at;
    const Scalars<T> h = h_;
    DDF_INDEPENDENT
    for (int64_t j = 0; j < count; ++j) {
      w0[j] = h.keep * w[j];
      u[j] = m[j] * h.scale1 / denominator(v[j], h);
    }
  }

  // The new weights of a run of elements.
  template <class Each>
  [[gnu::always_inline]] void apply_run(int64_t k, int64_t at, int64_t count, const Each& back,
                                        const Each& grow, const Each& step, const T* w0,
                                        const T* u) const {
    const Array& w = c_.ws[k];
    const bool direct = size_of(w.type) == int64_t(sizeof(T));
    T values[kBlock];
    T* to = direct ? static_cast<T*>(const_cast<void*>(w.data)) + at : values;
    DDF_INDEPENDENT
    for (int64_t j = 0; j < count; ++j)
      to[j] = grow[j] * w0[j] - step[j] * (u[j] - back[j] * w0[j]);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (direct) return;
      if (c_.seed < 0 || w.type != Type::bf16)
        return narrow(values, const_cast<void*>(w.data), w.type, at, count, nullptr);
      const Noise noise(c_.seed, c_.hyper.step, k);
      narrow(values, const_cast<void*>(w.data), w.type, at, count, &noise);
    }
  }

  // Moments and partial sums of a piece; where w0 and u are null they are not kept.
  void moments(const BlockPiece& piece, T* w0, T* u) const {
    const int64_t k = piece.matrix, columns = cut_.matrices[k].columns, lines = piece.lines;
    const int32_t* block = cut_.matrices[k].block + piece.line;
    double* sums = c_.partial + piece.slot;
    T w0_run[kBlock], u_run[kBlock];
    for (int64_t l = 0; l < lines; ++l) sums[l] = 0;
    if (cut_.matrices[k].dim == 0) {
      along_rows(piece, columns, [&](int64_t l, int64_t offset, int64_t at, int64_t count) {
        T* const x = w0 ? w0 + offset : w0_run;
        T* const y = u ? u + offset : u_run;
        const Tangent t = tangent(block[l]);
        moments_run(k, at, count, Same<T>{t.rho}, Same<T>{t.along}, x, y);
        sums[l] += dot_run<T>(x, y, count);
      });
      return;
    }
    T rho[kPanelColumns], along[kPanelColumns], sum[kPanelColumns];
    for (int64_t l = 0; l < lines; ++l) {
      const Tangent t = tangent(block[l]);
      rho[l] = t.rho;
      along[l] = t.along;
      sum[l] = 0;
    }
    down_columns(
        piece, columns,
        [&](int64_t first, int64_t offset, int64_t at, int64_t count) {
          T* const x = w0 ? w0 + offset : w0_run;
          T* const y = u ? u + offset : u_run;
          const T* const rhos = rho + first;
          const T* const alongs = along + first;
          moments_run(k, at, count, rhos, alongs, x, y);
          T* const to = sum + first;
          for (int64_t l = 0; l < count; ++l) to[l] += x[l] * y[l];
        },
        [&] {
          for (int64_t l = 0; l < lines; ++l) {
            sums[l] += sum[l];
            sum[l] = 0;
          }
        },
        [&](int64_t at, int64_t count) {
          prefetch(c_.gs[k], at, count);
          prefetch(c_.ws[k], at, count);
          ask_to_write(c_.ms[k], sizeof(T), at, count);
          ask_to_write(c_.vs[k], sizeof(T), at, count);
        });
  }

  // As prefetch, of what will be written.
  static void ask_to_write(const void* data, int64_t size, int64_t at, int64_t count) {
    const char* from = static_cast<const char*>(data) + at * size;
    for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(from + byte, 1, 3);
  }

  // New weights of a piece, from what was kept of it or else from the moments.
  void apply(const BlockPiece& piece, const T* w0, const T* u) const {
    const int64_t k = piece.matrix, columns = cut_.matrices[k].columns, lines = piece.lines;
    const int32_t* block = cut_.matrices[k].block + piece.line;
    T w0_run[kBlock], u_run[kBlock];
    if (cut_.matrices[k].dim == 0) {
      along_rows(piece, columns, [&](int64_t l, int64_t offset, int64_t at, int64_t count) {
        if (!w0) again(k, at, count, w0_run, u_run);
        const Move t = move(block[l]);
        apply_run(k, at, count, Same<T>{t.back}, Same<T>{t.grow}, Same<T>{t.step},
                  w0 ? w0 + offset : w0_run, u ? u + offset : u_run);
      });
      return;
    }
    T back[kPanelColumns], grow[kPanelColumns], step[kPanelColumns];
    for (int64_t l = 0; l < lines; ++l) {
      const Move t = move(block[l]);
      back[l] = t.back;
      grow[l] = t.grow;
      step[l] = t.step;
    }
    down_columns(
        piece, columns,
        [&](int64_t first, int64_t offset, int64_t at, int64_t count) {
          if (!w0) again(k, at, count, w0_run, u_run);
          const T* const backs = back + first;
          const T* const grows = grow + first;
          const T* const steps = step + first;
          apply_run(k, at, count, backs, grows, steps, w0 ? w0 + offset : w0_run,
                    u ? u + offset : u_run);
        },
        [] {},
        [&](int64_t at, int64_t count) {
          ask_to_write(c_.ws[k].data, size_of(c_.ws[k].type), at, count);
          if (w0) return;
          prefetch(static_cast<const T*>(c_.ms[k]) + at, count);
          prefetch(static_cast<const T*>(c_.vs[k]) + at, count);
        });
  }

  const BlockAdam& c_;
  const BlockCut& cut_;
  const Scalars<T> h_;
  const T sign_;
  const int threads_;
};

}  // namespace

void block_adam(const BlockAdam& c) { c.fp64 ? Step<double>(c).run() : Step<float>(c).run(); }

}  // namespace ddf::DDF_ISA
