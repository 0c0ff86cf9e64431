// The weights e^(z - top) of a run of logits, relative to the largest of them.
#pragma once

#include <limits>

#include "exp.h"
#include "sweep.h"

namespace ddf::DDF_ISA {

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();

constexpr int64_t kRun = 2048;  // elements summed in T before fp64 takes over

template <class T>
struct Weights {
  T top = -kInf<T>;       // the largest logit; NaN is passed over, and shows in the mass
  int64_t likeliest = 0;  // where it is
  double mass = 0;        // sum of the weights; 0 if all logits are -inf
};

// Writes the weights, and 0 up to a whole number of vectors; asks for `next` meanwhile.
template <class T>
Weights<T> weigh(const T* __restrict z, int64_t count, T* __restrict weight, const Ahead& next) {
  constexpr int U = 2;
  Vector<T> best[U];
  Vector<Lane<T>> at[U] = {};
  for (int u = 0; u < U; ++u) best[u] = Vector<T>{} - kInf<T>;
  sweep<T, U>(count, [&](int64_t k, int u, auto lanes) {
    next.fetch(k, u);
    const Vector<T> v = keep_lanes<T>(load_lanes<T>(z + k, lanes), lanes, -kInf<T>);
    const auto above = v > best[u];
    best[u] = above ? v : best[u];
    at[u] = above ? Vector<Lane<T>>{} + static_cast<Lane<T>>(k) : at[u];
  });
  Weights<T> result;
  for (int u = 0; u < U; ++u)
    for (int l = 0; l < kLanes<T>; ++l)
      if (best[u][l] > result.top) {
        result.top = best[u][l];
        result.likeliest = at[u][l] + l;
      }

  const T finite = result.top == -kInf<T> ? T(0) : result.top;
  for (int64_t k0 = 0; k0 < count; k0 += kRun) {
    Vector<T> mass[U] = {};
    sweep<T, U>(smaller(kRun, count - k0), [&](int64_t k, int u, auto lanes) {
      next.fetch(count + k0 + k, u);
      const Vector<T> e = exponential<T>(load_lanes<T>(z + k0 + k, lanes) - finite).value;
      const Vector<T> w = keep_lanes<T>(e, lanes);
      store(weight + k0 + k, w);
      mass[u] += w;
    });
    result.mass += sum_all<T, U>(mass);
  }
  return result;
}

}  // namespace ddf::DDF_ISA
