// Per block of rows or columns of several matrices the sum of w^2 and the sum of g w.
//
// Bounds. 4 FLOP an element; w and g are read once: bound by memory.
//
// Sums run in T over short runs and in fp64 over those; pieces of the matrices are summed in any
// order and joined in theirs. The result depends on values, shapes, blocks and instruction set, not
// on the number of threads.
#pragma once

#include "array.h"
#include "block_plan.h"
#include "isa.h"

namespace ddf {

struct BlockProducts {
  BlockCut cut;                // of cut_pieces
  const Array* ws = nullptr;        // of each matrix
  const Array* gs = nullptr;
  void* out = nullptr;              // (2, count) of fp64 or fp32
  double* sums = nullptr;           // (2, count) of zeros
  double* partial = nullptr;        // (slots, 2)
  int64_t count = 0;
  bool fp64 = false;
  int threads = 1;
};

DDF_DECLARE(block_products, BlockProducts)

}  // namespace ddf
