// Gram matrix: out = beta out + alpha x^T diag(weight) x, square (both triangles) or packed.
//
// Bounds. n i (i + 1) FLOP for one triangle; b (n i) + 4 or 8 (2 i^2) bytes, b bytes an element of x
// (half the second term packed). Only tiles that touch the lower triangle are computed, about
// (1 + 30 / i) / 2 of a full product; the upper one is copied, so the result is symmetric to the
// last bit. Rows of x are packed once for the left and once for the right operand, some hundred at
// a time, so that the panels stay in the cache.
//
// Sums run in fp64 if x or the weight is fp64, else in fp32, in runs of kDepth rows. They depend on
// values, shapes and instruction set, not on the number of threads: how the triangle is cut into
// units of work does not touch the order in which an entry is summed.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct Gram {
  Array x, weight;         // (n, i) and (n,) contiguous; weight.data null: all ones
  void* out = nullptr;     // of the type of the sums; (i, i) with row stride out_stride, or packed
  int64_t n = 0, i = 0, out_stride = 0;
  double alpha = 1, beta = 0;
  bool packed = false;
  int threads = 1;
};

// Reads only the lower triangle of out, and nothing of it if beta is 0.
DDF_DECLARE(gram, Gram)

}  // namespace ddf
