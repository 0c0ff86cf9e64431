// The step of scaled_adam with a second moment shared by groups of rows and of columns.
//
//   v_ba <- moment of the mean of (g s)^2 over rows of group b and columns of group a
//
// Bounds. g read twice, w and m read and written: 24 bytes an element in fp32 from memory, 20 where
// the second reading of g finds it in cache, as it does for groups of up to a quarter million
// elements. About 17 FLOP an element: bound by memory.
//
// Means run in the type of the arithmetic over up to 64 rows and in fp64 beyond. The result depends
// on values, shapes, groups and instruction set, not on the number of threads.
#pragma once

#include "scaled_adam.h"

namespace ddf {

struct SharedMatrix : StepMatrix {  // v is (b, a)
  const int32_t *row_group, *col_group;  // (o,) below b and (i,) below a; null: own groups
  int64_t b, a;
};

struct SharedAdam {
  const SharedMatrix* matrices = nullptr;
  int64_t count = 0;
  Type type = Type::f32;
  Hyper hyper{};
  bool maximize = false;
  int64_t seed = -1;
  int threads = 1;
};

DDF_DECLARE(shared_adam, SharedAdam)

}  // namespace ddf
