// Variance of tangents under a softmax: the Fisher quadratic form of a categorical output.
//
//   out_pn = Var_{y ~ softmax(logits_n)} tangent_pny       logits (n, c), tangent (p, n, c)
//
// Bounds. b n c (p + 1) bytes, b bytes an element: each input is read from memory once. About
// 8 p n c FLOP and n c exponentials, half the time of the bytes on one core: bound by memory. In
// fp32 from memory one core reads 15 GB/s, two thirds of a plain sum (Zen 4, 256 x 32000, p = 4):
// the lines asked for ahead are as many as the core keeps in flight.
//
// Classes are taken some KiB at a time. The weights e^(z - max) of such a chunk are computed once
// for all directions; for each direction the chunk is looked at twice, the second time in the cache:
// for the mean relative to the likeliest class, then for the squares about that mean and what the
// rounding of the mean left. Chunks join as in online_softmax.h.
//
// Sums within a chunk run in fp64 if an input is fp64, else in fp32; across chunks in fp64. The
// result depends on values, shapes and instruction set, not on the number of threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct SoftmaxFisher {
  Array logits, tangent;  // contiguous; any mix of types
  void* out = nullptr;    // (p, n), of the type of the sums
  int64_t n = 0, c = 0, p = 0;
  int threads = 1;
};

// A sample without a class of positive probability gives NaN.
DDF_DECLARE(softmax_fisher, SoftmaxFisher)

}  // namespace ddf
