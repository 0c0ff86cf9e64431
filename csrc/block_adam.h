// The tangential Adam step of blocks of rows or columns of several matrices; see
// deaddir_fast/ops/block_adam.py.
//
// Bounds. About 25 FLOP an element, bound by memory. Groups of small blocks are finished one by one:
// decayed weight and direction of their elements wait in the second cache for the products <u, w0>,
// so w, m, v are read and written and g is read once. Large blocks are streamed twice; the second
// look reads w, m, v again and forms the direction anew.
//
// The result depends on values, shapes, blocks and instruction set, not on the number of threads.
#pragma once

#include "array.h"
#include "block_plan.h"
#include "hyper.h"
#include "isa.h"

namespace ddf {

struct BlockAdam {
  BlockCut cut;              // of cut_groups
  const Array* ws = nullptr;        // of each matrix; written
  const Array* gs = nullptr;
  void* const* ms = nullptr;        // of the type of the arithmetic; written
  void* const* vs = nullptr;
  const void* norms = nullptr;      // (count,) of that type, as are the three below
  const void* inner = nullptr;
  const void* radial = nullptr;
  const void* reach = nullptr;
  double* overlap = nullptr;        // (count,) of zeros
  double* partial = nullptr;        // (slots,)
  Hyper hyper = {};
  bool maximize = false;
  int64_t seed = -1;
  bool fp64 = false;
  int threads = 1;
};

DDF_DECLARE(block_adam, BlockAdam)

}  // namespace ddf
