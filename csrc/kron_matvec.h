// A Kronecker-factored matrix times vectors: out_p = L U_p R, divided by `denominator` if there is
// one.
//
//   kron_matvec   L = G, R = A
//   kron_solve    L = Q^T, R = P, denominator, then L = Q, R = P^T
//
// Bounds. 2 p o i (o + i) FLOP; b (2 p o i + o^2 + i^2) bytes: bound by arithmetic for o + i above
// some tens. Scratch: the factors once, some directions of U (16 MiB or one direction), and 4 panels
// of V a thread. Sums run in fp64 if any input is fp64, else in fp32; the result depends on values,
// shapes and instruction set, not on the number of threads.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct KronMatvec {
  Array left, right, U;            // (o, o), (i, i), (p, o, i) contiguous
  Array denominator;               // (o, i) of the type of the sums; data null: none
  void* out = nullptr;             // (p, o, i) of the type of the sums
  int64_t p = 0, o = 0, i = 0;
  bool left_transposed = false, right_transposed = false;
  int threads = 1;
};

DDF_DECLARE(kron_matvec, KronMatvec)

}  // namespace ddf
