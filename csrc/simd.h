// What a kernel needs to know of its instruction set: vector width, register tile, conversions.
//
// Vectors are the compiler's own (GCC and Clang vector extensions), so one source serves AVX-512,
// AVX2, SSE2 and NEON. Everything here lives in the DDF_ISA namespace; see isa.h for why.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "array.h"

#ifndef DDF_ISA
#error "simd.h is for files compiled once per instruction set; see isa.h"
#endif

namespace ddf::DDF_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 12;  // rows of a register tile: 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 6;  // 6 x 2 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRows = 12;
#else
constexpr int kVectorBytes = 16;
constexpr int kRows = 6;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
constexpr int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }
constexpr int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t larger(int64_t x, int64_t y) { return x < y ? y : x; }

template <class T>
inline Vector<T> load(const T* from) {  // any alignment
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
inline Vector<T> load_first(const T* from, int64_t count) {  // the lanes from `count` on are 0
  T x[kLanes<T>] = {};
  std::memcpy(x, from, static_cast<size_t>(count) * sizeof(T));
  return load(x);
}

template <class T, int Count>
struct LanesOf {
  typedef T type __attribute__((vector_size(Count * sizeof(T))));
};

template <class T, int Count>
inline double sum_pairs(typename LanesOf<T, Count>::type v) {  // pairwise, in a fixed order
  if constexpr (Count == 2) {
    return static_cast<double>(v[0] + v[1]);
  } else {
    typename LanesOf<T, Count / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return sum_pairs<T, Count / 2>(half[0] + half[1]);
  }
}

template <class T>
inline double sum_lanes(Vector<T> v) {
  return sum_pairs<T, kLanes<T>>(v);
}

// Uninitialised cache-line aligned storage. A std::vector would leave shared template code behind.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count ? count : 1) * sizeof(T),
                                             std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float from_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

inline float from_f16(uint16_t h) {  // exact, also with denormals flushed
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  uint32_t bits;
  if (rest < 0x0400u) {  // zero or subnormal: rest * 2^-24
    const float f = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &f, sizeof bits);
  } else if (rest < 0x7c00u) {
    bits = (rest << 13) + 0x38000000u;
  } else {
    bits = (rest << 13) | 0x7f800000u;
  }
  return from_bits(sign | bits);
}

// `count` elements of `x` from `offset`, as T: the array itself where it already is of type T,
// otherwise converted into `scratch` (widening only; a narrower T is never asked for).
template <class T>
inline const T* widened(const Array& x, int64_t offset, int64_t count, T* scratch) {
  constexpr Type own = sizeof(T) == 8 ? Type::f64 : Type::f32;
  if (x.type == own) return static_cast<const T*>(x.data) + offset;
  if (x.type == Type::f32) {
    const float* from = static_cast<const float*>(x.data) + offset;
    for (int64_t k = 0; k < count; ++k) scratch[k] = static_cast<T>(from[k]);
  } else if (x.type == Type::bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
    for (int64_t k = 0; k < count; ++k) scratch[k] = static_cast<T>(from_bf16(from[k]));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
    for (int64_t k = 0; k < count; ++k) scratch[k] = static_cast<T>(from_f16(from[k]));
  }
  return scratch;
}

// Ask for `count` elements ahead of their use.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(from + k, 0, 3);
}

inline int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Ask for `count` elements of `x` from `offset` ahead of their use.
inline void prefetch(const Array& x, int64_t offset, int64_t count) {
  const int64_t size = size_of(x.type);
  const char* from = static_cast<const char*>(x.data) + offset * size;
  for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

}  // namespace ddf::DDF_ISA
