// Quadratic form of a square matrix along rows: out_p = w_p^T A w_p, at least 0. The form of a
// Kronecker block along v w^T is the product of two of them.
//
// Bounds. 2 p i^2 FLOP, b (i^2 + p i) bytes: A is read once for all p, so the form is bound by
// memory up to some tens of directions.
//
// Sums run in fp64 if an input is fp64, else in fp32 over kDepth rows of A and fp64 over those. The
// result depends on values, shapes and instruction set, not on the number of threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct KronQuadraticRank1 {
  Array A, w;             // (i, i) and (p, i) contiguous
  double* out = nullptr;  // (p,)
  int64_t p = 0, i = 0;
  bool fp64 = false;      // sum in fp64 whatever the inputs
  int threads = 1;
};

DDF_DECLARE(kron_quadratic_rank1, KronQuadraticRank1)

}  // namespace ddf
