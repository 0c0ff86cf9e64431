// The arithmetic rate of this machine: independent multiply-adds in registers, nothing else.
//
// Benchmarks state their share of it. It is measured because data sheets leave out clock, virtual
// machines and neighbours.
#pragma once

#include "isa.h"

namespace ddf {

struct FmaPeak {
  bool fp64 = false;
  int threads = 1;
  double* out = nullptr;  // FLOP per second, all threads together
};

DDF_DECLARE(fma_peak, FmaPeak)

}  // namespace ddf
