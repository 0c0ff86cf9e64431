// One AdamW step on several matrices, in the coordinates w / s with s_oi = row_o col_i.
//
//   m, v <- moments of g s       w <- (1 - lr wd) w - lr s m' / (sqrt(v') + eps)      w, g (o, i)
//
// Bounds. w, m, v read and written and g read once: 28 bytes an element in fp32, 22 with 16-bit
// parameters; about 15 FLOP an element, a root and a division among them: bound by memory.
//
// An element's result depends on its values alone, and on the instruction set.
#pragma once

#include <cstdint>

#include "array.h"
#include "hyper.h"
#include "isa.h"

namespace ddf {

struct StepMatrix {
  void *w, *m, *v;               // written
  const void *g, *row, *col;     // row or col may be null: ones
  int64_t o, i;
};

struct ScaledAdam {
  const StepMatrix* matrices = nullptr;
  int64_t count = 0;
  Type type = Type::f32;  // of w and g; m, v, row and col are fp64 for fp64, else fp32
  Hyper hyper{};
  bool maximize = false;
  int64_t seed = -1;  // of the stochastic rounding of bf16; none below 0
  int threads = 1;
};

DDF_DECLARE(scaled_adam, ScaledAdam)

}  // namespace ddf
