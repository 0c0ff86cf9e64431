#include "shared_adam.h"

#include "parallel.h"
#include "scaled_rows.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kUnitElements = 1 << 15;    // of small groups in one unit of work, about
constexpr int64_t kCellElements = 1 << 18;    // a group below this is read twice by one thread
constexpr int64_t kLeastWidth = 512;          // columns of a part of a larger group
constexpr int64_t kSerialElements = 1 << 15;  // below this a second thread costs more than it gives
constexpr int64_t kRunRows = 64;              // rows summed before fp64 takes over

// Columns [j, j + n): all of group a, or (rising) of groups a, a + 1, ...
struct Piece {
  int64_t j, n, a;
  bool rising;
};

// One matrix. Its rows in the order of their groups: those of group b are order[start[b]],
// ..., order[start[b + 1] - 1], or row b itself where order is null. Without column groups the
// columns are independent and may be cut into panels.
struct Plan {
  SharedMatrix x;
  int64_t *order, *start;
  Piece* pieces;      // null without column groups
  int64_t* width_of;  // columns of each group
  int64_t count;      // of pieces
  int64_t width;      // of a panel

  int64_t begin(int64_t b) const { return order ? start[b] : b; }
  int64_t row(int64_t at) const { return order ? order[at] : at; }
  int64_t panels() const { return ceil_div(x.i, larger(1, width)); }
  int64_t first_col(int64_t panel) const { return panel * width; }
  int64_t cols(int64_t panel) const { return smaller(width, x.i - panel * width); }
  // Second moments of one group of rows in a panel, and the column of the first one in v.
  int64_t moments(int64_t panel) const { return pieces ? x.a : cols(panel); }
  int64_t lowest(int64_t panel) const { return pieces ? 0 : first_col(panel); }
  bool shared() const { return order || pieces; }
};

// The groups [b0, b1) of matrix k in one panel; or, of one large group, a part: the rows at places
// [r0, r1) of the order, with a slot for its sums. The first part knows how many there are.
struct Unit {
  int64_t k, panel, b0, b1, r0, r1, slot, parts;
};

void sort_rows(Plan& plan) {
  const SharedMatrix& x = plan.x;
  for (int64_t b = 0; b <= x.b; ++b) plan.start[b] = 0;
  for (int64_t o = 0; o < x.o; ++o) ++plan.start[x.row_group[o] + 1];
  for (int64_t b = 0; b < x.b; ++b) plan.start[b + 1] += plan.start[b];
  for (int64_t o = 0; o < x.o; ++o) plan.order[plan.start[x.row_group[o]]++] = o;
  for (int64_t b = x.b; b > 0; --b) plan.start[b] = plan.start[b - 1];
  if (x.b) plan.start[0] = 0;
}

void find_pieces(Plan& plan) {
  const SharedMatrix& x = plan.x;
  const int32_t* group = x.col_group;
  for (int64_t a = 0; a < x.a; ++a) plan.width_of[a] = 0;
  for (int64_t j = 0; j < x.i; ++j) ++plan.width_of[group[j]];
  plan.count = 0;
  for (int64_t j = 0; j < x.i;) {
    int64_t end = j + 1;
    const bool rising = end == x.i || group[end] != group[j];
    while (end < x.i && group[end] == group[end - 1] + rising) ++end;
    plan.pieces[plan.count++] = {j, end - j, group[j], rising};
    j = end;
  }
}

// What a thread works in.
template <class T>
struct Scratch {
  double* total;  // one entry a second moment
  T *under, *sum, *spread;  // one entry a second moment; a column; a column
};

template <class T>
class Step {
 public:
  Step(const SharedAdam& c) : c_(c), h_(c.hyper), sign_(c.maximize ? T(-1) : T(1)) {}

  // total_c = sum of (g s)^2 over rows r0 to r1 of the order and the columns of c.
  void add(const Plan& plan, int64_t panel, int64_t r0, int64_t r1, const Scratch<T>& s,
           double* total) const {
    const int64_t cols = plan.cols(panel), moments = plan.moments(panel);
    for (int64_t c = 0; c < moments; ++c) total[c] = 0;
    for (int64_t r = r0; r < r1; r += kRunRows) {
      for (int64_t j = 0; j < cols; ++j) s.sum[j] = 0;
      for (int64_t at = r; at < smaller(r1, r + kRunRows); ++at)
        add_row(plan, plan.row(at), plan.first_col(panel), cols, s.sum);
      if (plan.pieces)
        fold(plan, s.sum, total);
      else
        for (int64_t j = 0; j < cols; ++j) total[j] += static_cast<double>(s.sum[j]);
    }
  }

  // The second moments of group b by its sums.
  void finish(const Plan& plan, int64_t panel, int64_t b, const double* total) const {
    const double rows = static_cast<double>(plan.begin(b + 1) - plan.begin(b));
    T* v = static_cast<T*>(plan.x.v) + b * plan.x.a + plan.lowest(panel);
    const int64_t moments = plan.moments(panel);
    for (int64_t c = 0; c < moments; ++c) {
      const double cols = plan.pieces ? static_cast<double>(plan.width_of[c]) : 1;
      v[c] = second_moment(static_cast<T>(total[c] / (rows * cols)), v[c], h_);
    }
  }

  // First moments and parameters of rows r0 to r1 of the order, all of group b.
  void update(const Plan& plan, int64_t panel, int64_t b, int64_t r0, int64_t r1,
              const Scratch<T>& s, const Noise* noise) const {
    const SharedMatrix& x = plan.x;
    const T* v = static_cast<const T*>(x.v) + b * x.a + plan.lowest(panel);
    const int64_t moments = plan.moments(panel), cols = plan.cols(panel);
    for (int64_t c = 0; c < moments; ++c) s.under[c] = denominator(v[c], h_);
    const T* under = s.under;
    if (plan.pieces) {
      for (int64_t p = 0; p < plan.count; ++p) {
        const Piece& piece = plan.pieces[p];
        for (int64_t j = 0; j < piece.n; ++j)
          s.spread[piece.j + j] = s.under[piece.a + (piece.rising ? j : 0)];
      }
      under = s.spread;
    }
    const Parameters<T> parameters{x.w, x.g, c_.type, noise};
    T* m = static_cast<T*>(x.m);
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t from = plan.row(r) * x.i + plan.first_col(panel);
      scaled_row<T>(x, plan.row(r), plan.first_col(panel), [&](T a, const T* col, auto scaling) {
        parameters.each(from, cols, [&](int64_t j, int64_t n, const T* w, const T* g, T* out) {
          move<decltype(scaling)::value>(w, g, m + from + j, under + j, a, col ? col + j : col, n,
                                         out, h_, sign_);
        });
      });
    }
  }

  // Rows b0 to b1 of a matrix without groups.
  void plain(const Plan& plan, int64_t b0, int64_t b1, const Noise* noise) const {
    adam_elements<T>(plan.x, c_.type, b0 * plan.x.i, b1 * plan.x.i, sign_, h_, noise);
  }

 private:
  void add_row(const Plan& plan, int64_t o, int64_t j0, int64_t cols, T* sum) const {
    scaled_row<T>(plan.x, o, j0, [&](T a, const T* col, auto scaling) {
      constexpr Scaling S = decltype(scaling)::value;
      T wide[kBlock];
      const int64_t step = c_.type == Type::f16 || c_.type == Type::bf16 ? kBlock : cols;
      for (int64_t j = 0; j < cols; j += step) {
        const int64_t n = smaller(step, cols - j);
        const T* g = widened<T>({plan.x.g, c_.type}, o * plan.x.i + j0 + j, n, wide);
        add_squares<S>(g, a, col ? col + j : col, n, sum + j);
      }
    });
  }

  template <Scaling S>
  static void add_squares(const T* g, T a, const T* col, int64_t count, T* sum) {
    DDF_INDEPENDENT
    for (int64_t j = 0; j < count; ++j) {
      const T x = g[j] * scale_of<T, S>(a, col, j);
      sum[j] += x * x;
    }
  }

  static void fold(const Plan& plan, const T* sum, double* total) {
    for (int64_t p = 0; p < plan.count; ++p) {
      const Piece& piece = plan.pieces[p];
      const T* from = sum + piece.j;
      double* to = total + piece.a;
      if (piece.rising)
        for (int64_t j = 0; j < piece.n; ++j) to[j] += static_cast<double>(from[j]);
      else
        *to += sum_all(from, piece.n);
    }
  }

  static double sum_all(const T* x, int64_t count) {
    constexpr int64_t L = kLanes<T>, run = 64 * L;  // fp64 takes over after a run
    double total = 0;
    int64_t j = 0;
    while (j + L <= count) {
      Vector<T> lanes = {};
      for (const int64_t end = smaller(count, j + run); j + L <= end; j += L) lanes += load(x + j);
      total += sum_lanes<T>(lanes);
    }
    for (; j < count; ++j) total += static_cast<double>(x[j]);
    return total;
  }

  template <Scaling S>
  static void move(const T* w, const T* g, T* m, const T* under, T a, const T* col, int64_t count,
                   T* out, const Scalars<T> h, T sign) {
    DDF_INDEPENDENT
    for (int64_t j = 0; j < count; ++j) {
      const T s = scale_of<T, S>(a, col, j);
      m[j] = first_moment(sign * g[j] * s, m[j], h);
      out[j] = h.keep * w[j] - h.lr * s * (m[j] * h.scale1 / under[j]);
    }
  }

  const SharedAdam& c_;
  const Scalars<T> h_;
  const T sign_;
};

// Calls whole(unit) for runs of groups that one thread reads twice, part(unit) for each part of a
// larger group.
template <class Whole, class Part>
void cut(const Plan& plan, int64_t k, int64_t& slot, const Whole& whole, const Part& part) {
  for (int64_t panel = 0; panel < plan.panels(); ++panel) {
    const int64_t cols = plan.cols(panel);
    int64_t b0 = 0, elements = 0;
    for (int64_t b = 0; b < plan.x.b; ++b) {
      const int64_t r0 = plan.begin(b), r1 = plan.begin(b + 1), size = (r1 - r0) * cols;
      if (size > kCellElements && r1 - r0 > 1 && plan.shared()) {
        if (b0 < b) whole(Unit{k, panel, b0, b, 0, 0, 0, 0});
        b0 = b + 1;
        elements = 0;
        const int64_t rows = larger(1, kCellElements / cols), parts = ceil_div(r1 - r0, rows);
        for (int64_t p = 0; p < parts; ++p)
          part(Unit{k, panel, b, b + 1, r0 + p * rows, smaller(r1, r0 + (p + 1) * rows),
                    slot + p * plan.moments(panel), p ? 0 : parts});
        slot += parts * plan.moments(panel);
      } else if ((elements += size) >= kUnitElements) {
        whole(Unit{k, panel, b0, b + 1, 0, 0, 0, 0});
        b0 = b + 1;
        elements = 0;
      }
    }
    if (b0 < plan.x.b) whole(Unit{k, panel, b0, plan.x.b, 0, 0, 0, 0});
  }
}

template <class T>
void run(const SharedAdam& c) {
  int64_t numbers = 0, columns = 0, elements = 0;
  for (int64_t k = 0; k < c.count; ++k) {
    const SharedMatrix& x = c.matrices[k];
    numbers += x.o + x.b + 1 + x.i + x.a + 1;
    columns += x.o + x.i;
    elements += x.o * x.i;
  }
  const Buffer<Plan> plans(c.count);
  const Buffer<int64_t> table(numbers);
  const Buffer<Piece> pieces(columns);
  int64_t* free = table.get();
  Piece* free_piece = pieces.get();
  int64_t width = 0, moments = 0;
  for (int64_t k = 0; k < c.count; ++k) {
    SharedMatrix x = c.matrices[k];
    if (x.i == 1)  // long rows are faster
      x = {{x.w, x.m, x.v, x.g, x.col, x.row, 1, x.o}, x.col_group, x.row_group, x.a, x.b};
    Plan plan{x, nullptr, nullptr, nullptr, nullptr, 0, x.i};
    int64_t most = 1;  // rows of a group
    if (x.row_group) {
      plan.order = free;
      plan.start = free + x.o;
      free += x.o + x.b + 1;
      sort_rows(plan);
      for (int64_t b = 0; b < x.b; ++b) most = larger(most, plan.start[b + 1] - plan.start[b]);
    }
    if (x.col_group) {
      plan.width_of = free;
      free += x.a;
      plan.pieces = free_piece;
      free_piece += x.i;
      find_pieces(plan);
    } else if (x.row_group && most * x.i > kCellElements) {
      plan.width = smaller(x.i, larger(kLeastWidth, kCellElements / most / 64 * 64));
    }
    width = larger(width, plan.width);
    moments = larger(moments, plan.pieces ? x.a : plan.width);
    plans.get()[k] = plan;
  }

  int64_t wholes = 0, parts = 0, slots = 0;
  for (int64_t k = 0; k < c.count; ++k)
    cut(plans.get()[k], k, slots, [&](const Unit&) { ++wholes; }, [&](const Unit&) { ++parts; });
  const Buffer<Unit> whole(wholes), part(parts);
  const Buffer<double> sums(slots);
  wholes = parts = slots = 0;
  for (int64_t k = 0; k < c.count; ++k)
    cut(plans.get()[k], k, slots, [&](const Unit& unit) { whole.get()[wholes++] = unit; },
        [&](const Unit& unit) { part.get()[parts++] = unit; });

  const int threads = elements < kSerialElements ? 1 : c.threads;
  const int64_t aligned = round_up(width, 16), room = round_up(moments, 16);
  const Buffer<double> totals(threads * room);
  const Buffer<T> scratch(threads * (room + 2 * aligned));
  const auto scratch_of = [&](int thread) {
    T* at = scratch.get() + thread * (room + 2 * aligned);
    return Scratch<T>{totals.get() + thread * room, at, at + room, at + room + aligned};
  };
  const Step<T> step(c);

  parallel_units(wholes, threads, [&](int64_t at, int thread) {
    const Unit& unit = whole.get()[at];
    const Plan& plan = plans.get()[unit.k];
    const Noise noise(c.seed, c.hyper.step, unit.k);
    const Noise* random = c.seed >= 0 ? &noise : nullptr;
    if (!plan.shared()) return step.plain(plan, unit.b0, unit.b1, random);
    const Scratch<T> s = scratch_of(thread);
    for (int64_t b = unit.b0; b < unit.b1; ++b) {
      const int64_t r0 = plan.begin(b), r1 = plan.begin(b + 1);
      step.add(plan, unit.panel, r0, r1, s, s.total);
      step.finish(plan, unit.panel, b, s.total);
      step.update(plan, unit.panel, b, r0, r1, s, random);
    }
  });

  parallel_units(parts, threads, [&](int64_t at, int thread) {
    const Unit& unit = part.get()[at];
    step.add(plans.get()[unit.k], unit.panel, unit.r0, unit.r1, scratch_of(thread),
             sums.get() + unit.slot);
  });
  parallel_units(parts, threads, [&](int64_t at, int) {
    const Unit& unit = part.get()[at];
    const Plan& plan = plans.get()[unit.k];
    const int64_t n = plan.moments(unit.panel);
    double* total = sums.get() + unit.slot;
    for (int64_t p = 1; p < unit.parts; ++p)
      for (int64_t j = 0; j < n; ++j) total[j] += total[p * n + j];
    if (unit.parts) step.finish(plan, unit.panel, unit.b0, total);
  });
  parallel_units(parts, threads, [&](int64_t at, int thread) {
    const Unit& unit = part.get()[at];
    const Noise noise(c.seed, c.hyper.step, unit.k);
    step.update(plans.get()[unit.k], unit.panel, unit.b0, unit.r0, unit.r1, scratch_of(thread),
                c.seed >= 0 ? &noise : nullptr);
  });
}

}  // namespace

void shared_adam(const SharedAdam& c) { c.type == Type::f64 ? run<double>(c) : run<float>(c); }

}  // namespace ddf::DDF_ISA
