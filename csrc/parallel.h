// A parallel loop over independent units of work.
//
// Determinism is the caller's: a unit writes only its own slots, and how the work is cut into
// units depends on shapes alone. Then neither the number of threads nor the order in which units
// are picked up can change a bit of the result. `body(unit, thread)` must not throw; `thread` is
// below the number of threads asked for and serves to find per-thread scratch.
#pragma once

#include <cstdint>

#ifdef DDF_HAVE_OPENMP
#include <omp.h>
#endif

#ifndef DDF_ISA
#error "parallel.h is for files compiled once per instruction set; see isa.h"
#endif

namespace ddf::DDF_ISA {

template <class Body>
void parallel_units(int64_t units, int threads, const Body& body) {
#ifdef DDF_HAVE_OPENMP
  if (threads > 1 && units > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t unit = 0; unit < units; ++unit) body(unit, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (int64_t unit = 0; unit < units; ++unit) body(unit, 0);
}

}  // namespace ddf::DDF_ISA
