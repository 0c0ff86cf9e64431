#include "random_bits.h"

#include "adam.h"

namespace ddf::DDF_ISA {

void random_bits(const RandomBits& c) {
  const Noise noise(c.seed, c.step, c.tensor);
  for (int64_t at = 0; at < c.count; at += kBlock)
    noise.fill(c.offset + at, smaller(kBlock, c.count - at), c.out + at);
}

}  // namespace ddf::DDF_ISA
