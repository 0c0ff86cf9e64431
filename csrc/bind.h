// Checks shared by the bindings. Their messages name the argument.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

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

// A result of one number an item, computed in fp64 and rounded once to the type of `out`.
class Result {
 public:
  Result(const TensorView& out, int64_t size, const char* why)
      : out_(out), values_(static_cast<size_t>(size)) {
    expect_dims(out, "out", out.ndim() == 1, "shape (p,)");
    expect_size(out, "out", 0, size, why);
    if (out.type() != Type::f64 && out.type() != Type::f32)
      throw argument_error("out", "float64 or float32", out.describe());
  }
  double* data() const { return values_.data(); }
  void write() const {
    for (size_t p = 0; p < values_.size(); ++p) {
      if (out_.type() == Type::f64)
        static_cast<double*>(out_.data())[p] = values_[p];
      else
        static_cast<float*>(out_.data())[p] = static_cast<float>(values_[p]);
    }
  }

 private:
  const TensorView& out_;
  mutable std::vector<double> values_;
};

// Each family of operations adds its functions to the module.
void bind_adam(nanobind::module_& m);
void bind_block(nanobind::module_& m);
void bind_curvature(nanobind::module_& m);
void bind_gram(nanobind::module_& m);
void bind_kron(nanobind::module_& m);
void bind_softmax(nanobind::module_& m);

}  // namespace ddf
