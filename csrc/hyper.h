// What an optimizer step uses of its hyper-parameters (deaddir_fast/ops/_adam.py), in fp64.
#pragma once

#include <cstdint>

namespace ddf {

struct Hyper {
  double lr, eps;
  double keep;    // 1 - lr weight_decay
  double rise1;   // 1 - beta1
  double rise2;   // 1 - beta2
  double fall2;   // beta2
  double scale1;  // 1 / bias_correction1
  double root2;   // sqrt(bias_correction2)
  int64_t step;   // number of the step, for the random bits
};

}  // namespace ddf
