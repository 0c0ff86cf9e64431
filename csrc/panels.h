// Packed panels and the register tile that multiplies two of them.
//
// A row panel holds kRows rows of a left operand, a column panel kWidth columns of a right one;
// both lie depth-major, so that the inner loop reads two unit-stride streams:
//
//   rows[k * kRows + r],  columns[k * kWidth + c]
//
// One step of the loop is kRows broadcasts, two vector loads and 2 kRows multiply-adds. Both panels
// stream from the level-two cache at 4 (kRows + kWidth) bytes a step without slowing it down: at
// any depth from 64 on the tile runs at 97 to 99 % of the multiply-add rate in registers (12 x 32
// fp32, AVX-512). What a product does with the tile is passed in and inlined, so nothing has to be
// written that a reduction would read again.
//
// Panels are filled up with zeros. An absent row or column of a tile may therefore be 0 * inf = NaN:
// whoever takes the tile has to leave it out.
#pragma once

#include <type_traits>

#include "simd.h"

namespace ddf::DDF_ISA {

template <class T>
constexpr int kWidth = 2 * kLanes<T>;  // columns of a register tile

// The lanes at 0, 1, ... as integers, to compare positions with.
template <class T>
using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
inline Vector<Lane<T>> lane_index() {
  Vector<Lane<T>> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = l;
  return v;
}

// `v` with the lanes from `count` on set to 0.
template <class T>
inline Vector<T> first_lanes(Vector<T> v, int64_t count) {
  return lane_index<T>() < static_cast<Lane<T>>(count) ? v : Vector<T>{};
}

template <class T, int R, int V = 2>
using Tile = Vector<T>[R][V];

// done(tile) for tile = sum_k rows[k, :R] columns[k, :], R rows of a panel that holds `Stride` and
// all V vectors of columns.
template <class T, int R, int V = 2, int Stride = kRows, class Done>
[[gnu::always_inline]] inline void multiply(const T* __restrict rows, const T* __restrict columns,
                                            int64_t depth, Done&& done) {
  Tile<T, R, V> acc = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(columns + (k * V + v) * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T s = rows[k * Stride + r];
      for (int v = 0; v < V; ++v) acc[r][v] += s * x[v];
    }
  }
  done(acc);
}

// call(integral_constant R) with the smallest compiled R >= rows: a ragged tile costs less.
template <class Call>
[[gnu::always_inline]] inline void with_rows(int64_t rows, Call&& call) {
  if (rows * 4 <= kRows)
    call(std::integral_constant<int, (kRows + 3) / 4>{});
  else if (rows * 2 <= kRows)
    call(std::integral_constant<int, kRows / 2>{});
  else
    call(std::integral_constant<int, kRows>{});
}

// A square of 4 x 4 elements turned over: to[k * L + l] = from[l][k]. About a quarter of a cycle an
// element, where element by element takes one.
template <class T, int L>
[[gnu::always_inline]] inline void turn(const T* const from[4], T* to) {
#if defined(__clang__) || __GNUC__ >= 12
  using Four = typename LanesOf<T, 4>::type;
  Four row[4];
  for (int l = 0; l < 4; ++l) std::memcpy(&row[l], from[l], sizeof(Four));
  const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four turned[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int k = 0; k < 4; ++k) std::memcpy(to + k * L, &turned[k], sizeof(Four));
#else
  for (int l = 0; l < 4; ++l)
    for (int k = 0; k < 4; ++k) to[k * L + l] = from[l][k];
#endif
}

// One panel of a row-major matrix: to[k * L + l] = x[offset + l * stride + k], the depth contiguous.
// Lanes from `lanes` on are 0.
template <class T, int L>
void pack_across(const Array& x, int64_t offset, int64_t stride, int64_t lanes, int64_t depth,
                 T* __restrict to) {
  constexpr int64_t step = 64;
  T scratch[4][step];
  const T zeros[step] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += step) {
    const int64_t run = smaller(step, depth - k0);
    for (int64_t l0 = 0; l0 < L; l0 += 4) {
      const int64_t group = smaller(4, L - l0);  // four may not divide the panel
      const T* from[4];
      for (int64_t l = 0; l < group; ++l)
        from[l] = l0 + l < lanes
                      ? widened<T>(x, offset + (l0 + l) * stride + k0, run, scratch[l])
                      : zeros;
      T* column = to + k0 * L + l0;
      int64_t k = 0;
      for (; group == 4 && k + 4 <= run; k += 4) {
        const T* const here[4] = {from[0] + k, from[1] + k, from[2] + k, from[3] + k};
        turn<T, L>(here, column + k * L);
      }
      for (; k < run; ++k)
        for (int64_t l = 0; l < group; ++l) column[k * L + l] = from[l][k];
    }
  }
}

// One panel of a row-major matrix: to[k * L + l] = x[offset + k * stride + l], the lanes contiguous.
template <class T, int L>
void pack_along(const Array& x, int64_t offset, int64_t stride, int64_t lanes, int64_t depth,
                T* __restrict to) {
  T scratch[L];
  if (lanes == L) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = widened<T>(x, offset + k * stride, L, scratch);
      std::memcpy(to + k * L, from, L * sizeof(T));
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = widened<T>(x, offset + k * stride, lanes, scratch);
    for (int64_t l = 0; l < L; ++l) to[k * L + l] = l < lanes ? from[l] : T(0);
  }
}

// Neighbouring panels of a row-major matrix, `room` deep each:
// to[(panel * room + k) * L + l] = x[offset + k * stride + panel * L + l], 0 from `columns` on.
// Row by row, and rows ahead of their use: a row may lie in a page of its own.
template <class T, int L>
void pack_block(const Array& x, int64_t offset, int64_t stride, int64_t columns, int64_t panels,
                int64_t depth, int64_t room, T* __restrict to) {
  constexpr int64_t ahead = 8;
  T scratch[L];
  for (int64_t k = 0; k < depth; ++k) {
    if (k + ahead < depth) prefetch(x, offset + (k + ahead) * stride, columns);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t run = larger(0, smaller(L, columns - panel * L));
      T* row = to + (panel * room + k) * L;
      const T* from = widened<T>(x, offset + k * stride + panel * L, run, scratch);
      if (run == L) {
        std::memcpy(row, from, L * sizeof(T));
      } else {
        for (int64_t l = 0; l < L; ++l) row[l] = l < run ? from[l] : T(0);
      }
    }
  }
}

// `items` cut into `parts` runs as equal as can be: where run `part` begins.
constexpr int64_t cut(int64_t items, int64_t parts, int64_t part) { return items * part / parts; }

}  // namespace ddf::DDF_ISA
