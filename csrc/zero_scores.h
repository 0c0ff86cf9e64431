// The result of directional_scores and directional_scores_rank1 where there is nothing to sum.
#pragma once

#include <cstdint>

#ifndef DDF_ISA
#error "zero_scores.h is for files compiled once per instruction set; see isa.h"
#endif

namespace ddf::DDF_ISA {

// Sets what is asked for to zero: sums of squares (p,), or the scores (p, n) as T.
template <class T, class Args>
void zero_scores(const Args& c) {
  if (c.squares)
    for (int64_t j = 0; j < c.p; ++j) c.squares[j] = 0.0;
  else
    for (int64_t k = 0; k < c.p * c.n; ++k) static_cast<T*>(c.out)[k] = T(0);
}

}  // namespace ddf::DDF_ISA
