// The random bits of stochastic rounding, as the steps draw them. For tests.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ddf {

struct RandomBits {
  int64_t seed = 0, step = 0, tensor = 0;  // tensor: its place in the list
  int64_t offset = 0, count = 0;
  uint16_t* out = nullptr;
};

DDF_DECLARE(random_bits, RandomBits)

}  // namespace ddf
