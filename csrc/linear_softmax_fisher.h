// Fisher quadratic form of a linear read-out followed by a softmax; the logits are never stored.
//
//   z = W h + bias,   dz_p = W dh_p + dW_p h,   out_pn = Var_{y ~ softmax(z_n)} dz_pny
//   h (n, d), dh (p, n, d), W (c, d), bias (c,), dW (p, c, d)
//
// Bounds. 2 n c d (1 + p) FLOP, and 2 n c d p more with dW: bound by arithmetic from some tens of
// samples on. W is read once for each block of samples (some tens to hundreds of them). At 64 samples
// and more the whole runs at 88 to 90 % of the multiply-add rate in registers (fp32, AVX-512); with
// 16 samples at 65 %, with one at 5 %, as samples are the lanes.
//
// Samples are the lanes. h and dh are packed as column panels, a strip of classes of W as row panels;
// their product, one strip by one panel of samples, stays in the level-two cache. Softmax and
// moments run down its columns: maximum, weights, means and squares are all vectors of samples, and
// no sum ever crosses lanes. Strips join as in online_softmax.h.
//
// Scratch: packed inputs of one pass over samples, at most 32 MiB or one panel if that is larger,
// partial moments of about a MiB, and about a MiB a thread.
//
// Sums run in fp64 if an input is fp64, else in fp32 within a strip and in fp64 across strips. The
// result depends on values, shapes and instruction set, not on the number of threads: classes are
// cut into runs by shape, and runs join in order.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct LinearSoftmaxFisher {
  Array h, dh, W, bias, dW;  // contiguous; any mix of types; data of bias and dW may be null
  void* out = nullptr;       // (p, n), of the type of the sums
  int64_t n = 0, d = 0, c = 0, p = 0;
  int threads = 1;
};

// A sample without a class of positive probability gives NaN.
DDF_DECLARE(linear_softmax_fisher, LinearSoftmaxFisher)

}  // namespace ddf
