// Divergence between categorical outputs, exact near zero.
//
//   out_qn = KL(softmax(logits_n) || softmax(logits_t_qn))     logits (n, c), logits_t (q, n, c)
//
// With p = softmax(logits), delta = logits_t - logits and y = delta minus about its mean under p,
//
//   KL = log E_p[e^y] - E_p[y] = log(1 + X + m) - m,   X = E_p[e^y - 1 - y],  m = E_p[y]
//
// X is a sum of positive terms, and m only what the rounding of the mean left, so the second look
// at a row corrects itself: a value of 1e-30 has all its digits.
//
// Bounds. b n c (q + 1) bytes, b bytes an element, from memory; about 40 q n c FLOP, most of them in
// the exponential, or 25 where a run of classes moves so little that one polynomial does. Both
// bounds are near each other on one core (Zen 4, fp32: 10 GB/s with the polynomial, 7 without). A
// row, its base and its weights are looked at again in the level-two cache.
//
// Sums run in fp64 if an input is fp64, else in fp32 with fp64 across runs of classes. The result
// depends on values, shapes and instruction set, not on the number of threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct SoftmaxKl {
  Array logits, logits_t;  // contiguous; any mix of types
  void* out = nullptr;     // (q, n), of the type of the sums
  int64_t n = 0, c = 0, q = 0;
  int threads = 1;
};

// -inf in logits is a class of probability 0; if a class with probability loses it, out is inf.
DDF_DECLARE(softmax_kl, SoftmaxKl)

}  // namespace ddf
