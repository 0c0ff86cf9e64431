// e^x of a vector, with what cancels in e^x - 1 - x kept apart.
//
// x = n ln 2 + r with |r| <= (ln 2) / 2 (Cody & Waite: ln 2 in two parts, n times the first one
// exact), e^r = 1 + r + r^2 q(r) with q minimax in relative error (Remez, 1e-8 in fp32 and 6e-18 in
// fp64 after rounding), times 2^n in two factors. Within 1 ulp, subnormal results included;
// e^-inf = 0, e^inf = inf, e^NaN = NaN; beyond the range 0 and inf.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "panels.h"

namespace ddf::DDF_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr float lowest = -104, highest = 89;  // beyond: 0 and inf
  static constexpr float subnormal = -80;              // below: 2^n may be subnormal
  static constexpr float round = 0x1.8p23f;            // adding it rounds to an integer
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float q[] = {0.5f,           0x1.555556p-3f, 0x1.5554e8p-5f,
                                0x1.11114cp-7f, 0x1.6d4364p-10f, 0x1.a072eep-13f};
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr double lowest = -746, highest = 710;
  static constexpr double subnormal = -700;
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double q[] = {0.5,
                                 0x1.5555555555557p-3,
                                 0x1.555555555554ep-5,
                                 0x1.11111111100cdp-7,
                                 0x1.6c16c16c1a0e0p-10,
                                 0x1.a01a01abf11d3p-13,
                                 0x1.a01a019049af8p-16,
                                 0x1.71de0211cf292p-19,
                                 0x1.27e510f14cecfp-22,
                                 0x1.af4e30366657cp-26,
                                 0x1.1f1a098668193p-29};
};

// a > b ? a : b and a < b ? a : b: b where one is NaN. The compiler takes a comparison and a blend
// for them, and a dozen instructions for p 2^n; AVX-512 has one for each, which halves the cost of
// an exponential. (The forms with a mask, as GCC 12 warns of its own header in the others.)
template <class T>
inline Vector<T> larger_of(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_max_ps(__mmask16(-1), a, b);
  else
    return _mm512_maskz_max_pd(__mmask8(-1), a, b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
inline Vector<T> smaller_of(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_min_ps(__mmask16(-1), a, b);
  else
    return _mm512_maskz_min_pd(__mmask8(-1), a, b);
#else
  return a < b ? a : b;
#endif
}

// p 2^n for n = log2_e x rounded, `rounded` the sum that rounded it.
template <class T>
inline Vector<T> times_power(Vector<T> p, Vector<T> x, Vector<T> rounded) {
  using K = ExpConstants<T>;
#if defined(__AVX512F__)
  (void)x;
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_scalef_ps(__mmask16(-1), p, rounded - K::round);
  else
    return _mm512_maskz_scalef_pd(__mmask8(-1), p, rounded - K::round);
#else
  // The low bits of `rounded` are n. The exponent of 2^n is moved away from the ends of its range,
  // and a second factor, a power of two, moves the product back.
  using U = typename K::Bits;
  using Bits = Vector<U>;
  const auto low = x < K::subnormal;
  Bits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits += low ? Bits{} + U(K::bias + 64) : Bits{} + U(K::bias - 1);
  bits <<= K::mantissa;
  Vector<T> power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power * (low ? Vector<T>{} + T(0x1p-64) : Vector<T>{} + T(2));
#endif
}

// e^r - 1 - r for |r| <= (ln 2) / 2, to an ulp or two.
template <class T>
[[gnu::always_inline]] inline Vector<T> small_excess(Vector<T> r) {
  using K = ExpConstants<T>;
  constexpr int degree = sizeof(K::q) / sizeof(T) - 1;
  Vector<T> q = Vector<T>{} + K::q[degree];
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) q = q * r + K::q[k];
  return r * r * q;
}

template <class T>
struct Exponential {
  Vector<T> value;   // e^x
  Vector<T> excess;  // e^x - 1 - x, to about 10 ulp; meant for x of at most some tens
};

template <class T>
[[gnu::always_inline]] inline Exponential<T> exponential(Vector<T> x) {
  using K = ExpConstants<T>;
  constexpr T log2_e = T(0x1.71547652b82fep0);
  const Vector<T> in = smaller_of<T>(Vector<T>{} + K::highest,
                                     larger_of<T>(Vector<T>{} + K::lowest, x));  // NaN stays
  const Vector<T> rounded = in * log2_e + K::round;
  const Vector<T> n = rounded - K::round;
  const Vector<T> r = (in - n * K::ln2_high) - n * K::ln2_low;
  const Vector<T> square = small_excess<T>(r);
  Exponential<T> e;
  e.value = times_power<T>((square + r) + T(1), in, rounded);
  e.excess = n == T(0) ? square : (e.value - T(1)) - x;
  return e;
}

}  // namespace ddf::DDF_ISA
