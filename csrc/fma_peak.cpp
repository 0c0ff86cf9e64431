#include "fma_peak.h"

#include <chrono>

#include "parallel.h"
#include "simd.h"

namespace ddf::DDF_ISA {
namespace {

constexpr int64_t kSteps = 1 << 14;
constexpr int64_t kUnitsPerThread = 64;

// Decaying accumulators as a register tile has them: as many as hide the latency.
template <class T>
T spin(T decay) {
  Vector<T> acc[kRows][2];
  const Vector<T> x = Vector<T>{} + decay, y = Vector<T>{} + T(1e-3);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) acc[r][v] = Vector<T>{} + T(r + v);
  for (int64_t k = 0; k < kSteps; ++k) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r][0] = acc[r][0] * x + y;
      acc[r][1] = acc[r][1] * x + y;
    }
  }
  double sum = 0;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) sum += sum_lanes<T>(acc[r][v]);
  return static_cast<T>(sum);
}

template <class T>
double rate(int threads) {
  const int64_t units = kUnitsPerThread * threads;
  Buffer<T> sums(units);
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel_units(units, threads, [&](int64_t unit, int) {
      // The argument differs from unit to unit, so that no result can be reused.
      sums.get()[unit] = spin<T>(T(0.5) + T(unit) / T(4 * units));
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double flops = 2.0 * kRows * 2 * kLanes<T> * static_cast<double>(kSteps * units);
    const double here = flops / seconds.count();
    best = here > best ? here : best;
  }
  // Reading the sums keeps the loop that makes them.
  for (int64_t unit = 0; unit < units; ++unit)
    if (sums.get()[unit] != sums.get()[unit]) return 0;
  return best;
}

}  // namespace

void fma_peak(const FmaPeak& args) {
  *args.out = args.fp64 ? rate<double>(args.threads) : rate<float>(args.threads);
}

}  // namespace ddf::DDF_ISA
