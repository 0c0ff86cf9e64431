// Inner pieces of the optimizer steps: scalars, moments, random bits, and writing a parameter.
//
// They follow deaddir_fast/ops/_adam.py in the order of operations (so that overflow, NaN and
// infinity come out alike) and bit for bit in the random bits. Loops over elements are plain ones
// that the compiler turns into vectors; an element's value depends on neither its place in a
// vector nor the cut of the work.
#pragma once

#include <cstdint>
#include <cstring>

#include "hyper.h"
#include "simd.h"

// The iterations of the next loop are independent, though its arrays may be the same ones.
#if defined(__clang__)
#define DDF_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DDF_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace ddf::DDF_ISA {

constexpr int64_t kBlock = 512;  // elements of 16-bit parameters that are widened at a time

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// The hyper-parameters, rounded once to the type of the arithmetic.
template <class T>
struct Scalars {
  T lr, eps, keep, rise1, rise2, fall2, scale1, unroot2;

  explicit Scalars(const Hyper& h)
      : lr(static_cast<T>(h.lr)),
        eps(static_cast<T>(h.eps)),
        keep(static_cast<T>(h.keep)),
        rise1(static_cast<T>(h.rise1)),
        rise2(static_cast<T>(h.rise2)),
        fall2(static_cast<T>(h.fall2)),
        scale1(static_cast<T>(h.scale1)),
        unroot2(static_cast<T>(1 / h.root2)) {}
};

template <class T>
inline T first_moment(T g, T m, const Scalars<T>& h) {
  return m + h.rise1 * (g - m);
}

template <class T>
inline T second_moment(T square, T v, const Scalars<T>& h) {
  return h.fall2 * v + h.rise2 * square;
}

// What Adam divides the bias-corrected first moment by.
template <class T>
inline T denominator(T v, const Scalars<T>& h) {
  return root(v) * h.unroot2 + h.eps;
}

// Updates m and v by the gradient; returns Adam's direction.
template <class T>
inline T update_moments(T g, T& m, T& v, const Scalars<T>& h) {
  m = first_moment(g, m, h);
  v = h.fall2 * v + h.rise2 * g * g;
  return m * h.scale1 / denominator(v, h);
}

inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline uint32_t mix(uint32_t x) {  // Wellons 2018, lowbias32
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 random bits for every element of one tensor, by its offset: see `random_bits` in ops/_adam.py.
class Noise {
 public:
  Noise(int64_t seed, int64_t step, int64_t tensor)
      : key_(mix(mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(step)) ^
                 static_cast<uint32_t>(tensor))) {}

  // The bits of `count` <= kBlock elements from `offset` on.
  void fill(int64_t offset, int64_t count, uint16_t* to) const {
    uint16_t bits[kBlock + 2];
    const int64_t first = offset / 2, pairs = (offset + count + 1) / 2 - first;
    for (int64_t done = 0; done < pairs;) {  // the upper half of the number of a pair is constant
      const uint64_t pair = static_cast<uint64_t>(first + done);
      const int64_t left = static_cast<int64_t>((uint64_t{1} << 32) - (pair & 0xffffffffu));
      const int64_t here = smaller(pairs - done, left);
      const uint32_t key = key_ ^ mix(static_cast<uint32_t>(pair >> 32));
      const uint32_t low = static_cast<uint32_t>(pair);
      uint16_t* at = bits + 2 * done;
      for (int64_t j = 0; j < here; ++j) {
        const uint32_t mixed = mix(key ^ (low + static_cast<uint32_t>(j)));
        at[2 * j] = static_cast<uint16_t>(mixed);
        at[2 * j + 1] = static_cast<uint16_t>(mixed >> 16);
      }
      done += here;
    }
    std::memcpy(to, bits + offset % 2, static_cast<size_t>(count) * sizeof *to);
  }

 private:
  uint32_t key_;
};

inline bool finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

inline uint16_t to_bf16(float f) {  // to nearest, ties to even
  const uint32_t bits = to_bits(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline uint16_t to_bf16(float f, uint16_t noise) {  // up or down at random, f in the mean
  const uint32_t bits = to_bits(f);
  const uint32_t rounded = (bits + noise) >> 16;
  return finite_bits(bits) ? static_cast<uint16_t>(rounded) : to_bf16(f);
}

inline uint16_t to_f16(float f) {  // to nearest, ties to even, past 65504 to infinity
  const uint32_t bits = to_bits(f), magnitude = bits & 0x7fffffffu;
  // Adding a power of two lets the addition round to the last bit of the result.
  const float held = (from_bits(magnitude) * 0x1p+112f) * 0x1p-110f;
  const uint32_t exponent = magnitude & 0x7f800000u;
  const uint32_t floor = exponent < 0x38800000u ? 0x38800000u : exponent;
  const uint32_t sum = to_bits(from_bits(floor + 0x07800000u) + held);
  const uint32_t rounded = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) |
                               (magnitude > 0x7f800000u ? 0x7e00u : rounded));
}

// Writes `count` <= kBlock values of 16-bit parameters, from `offset` of the tensor on. bf16 is
// rounded stochastically where there is noise.
inline void narrow(const float* values, void* w, Type type, int64_t offset, int64_t count,
                   const Noise* noise) {
  uint16_t* to = static_cast<uint16_t*>(w) + offset;
  if (type == Type::f16) {
    for (int64_t j = 0; j < count; ++j) to[j] = to_f16(values[j]);
  } else if (noise) {
    uint16_t bits[kBlock];
    noise->fill(offset, count, bits);
    for (int64_t j = 0; j < count; ++j) to[j] = to_bf16(values[j], bits[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = to_bf16(values[j]);
  }
}

}  // namespace ddf::DDF_ISA
