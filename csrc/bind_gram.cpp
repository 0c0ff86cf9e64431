#include <optional>

#include "bind.h"
#include "gram.h"

namespace nb = nanobind;

namespace ddf {
namespace {

void bound_gram(nb::handle out_, nb::handle x_, nb::handle weight_, double alpha, double beta,
                bool packed, int threads) {
  const TensorView x(x_, "x"), out(out_, "out", true);
  std::optional<TensorView> weight;
  if (!weight_.is_none()) weight.emplace(weight_, "weight");
  expect_dims(x, "x", x.ndim() == 2, "shape (n, i)");
  const int64_t n = x.size(0), i = x.size(1);
  if (weight) {
    expect_dims(*weight, "weight", weight->ndim() == 1, "shape (n,)");
    expect_size(*weight, "weight", 0, n, "the rows of x");
  }
  if (packed) {
    expect_dims(out, "out", out.ndim() == 1, "shape (i (i + 1) / 2,)");
    expect_size(out, "out", 0, i * (i + 1) / 2, "the lower triangle of x^T x");
  } else {
    expect_dims(out, "out", out.ndim() == 2, "shape (i, i)");
    expect_size(out, "out", 0, i, "the columns of x");
    expect_size(out, "out", 1, i, "the columns of x");
  }
  expect_type(out, "out", x.type() == Type::f64 || (weight && weight->type() == Type::f64));
  expect_threads(threads);

  Gram args;
  args.x = x.array();
  if (weight) args.weight = weight->array();
  args.out = out.data();
  args.n = n;
  args.i = i;
  args.out_stride = i;
  args.alpha = alpha;
  args.beta = beta;
  args.packed = packed;
  args.threads = threads;
  nb::gil_scoped_release release;
  gram(args);
}

}  // namespace

void bind_gram(nb::module_& m) {
  m.def("gram", &bound_gram, nb::arg("out").none(), nb::arg("x").none(), nb::arg("weight").none(),
        nb::arg("alpha"), nb::arg("beta"), nb::arg("packed"), nb::arg("threads"),
        "out = beta out + alpha x^T diag(weight) x for x (n, i), weight (n,) or None, and out (i, i)\n"
        "or, packed, the (i (i + 1) / 2,) rows of its lower triangle. out is float64 if an input is,\n"
        "else float32; only its lower triangle is read, and nothing if beta is 0. The result does\n"
        "not depend on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
}

}  // namespace ddf
