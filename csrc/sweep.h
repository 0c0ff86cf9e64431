// Loops over a run of elements in vectors, the last one perhaps not full.
#pragma once

#include "panels.h"

namespace ddf::DDF_ISA {

// How many lanes of a vector count: all of them, known to the compiler, or an int.
template <class T>
using AllLanes = std::integral_constant<int, kLanes<T>>;

template <class T>
inline Vector<T> load_lanes(const T* from, AllLanes<T>) {
  return load(from);
}
template <class T>
inline Vector<T> load_lanes(const T* from, int count) {  // the others are 0
  return load_first(from, count);
}

template <class T>
inline Vector<T> keep_lanes(Vector<T> v, AllLanes<T>, T = T(0)) {
  return v;
}
template <class T>
inline Vector<T> keep_lanes(Vector<T> v, int count, T other = T(0)) {
  return lane_index<T>() < static_cast<Lane<T>>(count) ? v : Vector<T>{} + other;
}

// body(k, u, lanes) for the vector at each k; u counts 0 ... U - 1 over and over, and is a constant
// after unrolling: the accumulator to use, so that U sums are in flight.
template <class T, int U, class Body>
[[gnu::always_inline]] inline void sweep(int64_t count, Body&& body) {
  constexpr int64_t L = kLanes<T>;
  int64_t k = 0;
  for (; k + U * L <= count; k += U * L)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) body(k + u * L, u, AllLanes<T>{});
  for (; k + L <= count; k += L) body(k, 0, AllLanes<T>{});
  if (k < count) body(k, 0, static_cast<int>(count - k));
}

template <class T, int U>
inline double sum_all(const Vector<T> (&acc)[U]) {
  Vector<T> sum = acc[0];
  for (int u = 1; u < U; ++u) sum += acc[u];
  return sum_lanes<T>(sum);
}

// A run of elements to be read next, asked for in the course of two looks at as many others: memory
// then works all the time, and no faster than it can.
class Ahead {
 public:
  Ahead(const Array& x, int64_t offset)
      : size_(size_of(x.type)),
        from_(static_cast<const char*>(x.data) + offset * size_) {}
  // At element k of the first look, or at k + count of the second, with u as in `sweep`.
  [[gnu::always_inline]] void fetch(int64_t k, int u) const {
    if (u * kVectorBytes % 128 == 0) __builtin_prefetch(from_ + k * size_ / 2, 0, 2);
  }

 private:
  int64_t size_;
  const char* from_;
};

}  // namespace ddf::DDF_ISA
