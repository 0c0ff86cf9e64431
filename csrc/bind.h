// Checks shared by the bindings. Their messages name the argument.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "tensor_view.h"

namespace ddf {

inline void expect_dims(const TensorView& x, const char* name, bool ok, const char* expected) {
  if (!ok) throw argument_error(name, expected, x.describe());
}

inline void expect_size(const TensorView& x, const char* name, int dim, int64_t size,
                        const char* why) {
  if (x.size(dim) != size)
    throw argument_error(name,
                         "size " + std::to_string(size) + " in dimension " + std::to_string(dim) +
                             " (" + why + ")",
                         x.describe());
}

inline void expect_threads(int threads) {
  if (threads < 1) throw argument_error("threads", "at least 1", std::to_string(threads));
}

// A result has the type of the arithmetic: fp64 if any input is, else fp32.
inline void expect_type(const TensorView& x, const char* name, bool fp64) {
  if (x.type() != (fp64 ? Type::f64 : Type::f32))
    throw argument_error(name, fp64 ? "float64, as an input is" : "float32, as no input is float64",
                         x.describe());
}

// Each family of operations adds its functions to the module.
void bind_curvature(nanobind::module_& m);
void bind_gram(nanobind::module_& m);
void bind_softmax(nanobind::module_& m);

}  // namespace ddf
