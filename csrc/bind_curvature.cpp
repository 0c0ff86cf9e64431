#include <vector>

#include "bind.h"
#include "directional_curvature.h"

namespace nb = nanobind;

namespace ddf {
namespace {

void bound_directional_curvature(nb::handle a_, nb::handle g_, nb::handle U_, nb::handle out_,
                                 int threads) {
  const TensorView a(a_, "a"), g(g_, "g"), U(U_, "U"), out(out_, "out", true);
  expect_dims(a, "a", a.ndim() == 2 || a.ndim() == 3, "shape (n, i) or (n, t, i)");
  expect_dims(g, "g", g.ndim() == a.ndim(), "as many dimensions as a");
  expect_dims(U, "U", U.ndim() == 3, "shape (p, o, i)");
  expect_dims(out, "out", out.ndim() == 1, "shape (p,)");
  const int last = a.ndim() - 1;
  expect_size(g, "g", 0, a.size(0), "the samples of a");
  if (last == 2) expect_size(g, "g", 1, a.size(1), "the tokens of a");
  expect_size(U, "U", 1, g.size(last), "the outputs of g");
  expect_size(U, "U", 2, a.size(last), "the inputs of a");
  expect_size(out, "out", 0, U.size(0), "the directions of U");
  if (out.type() != Type::f64 && out.type() != Type::f32)
    throw argument_error("out", "float64 or float32", out.describe());
  expect_threads(threads);

  std::vector<double> result(static_cast<size_t>(U.size(0)));
  DirectionalCurvature args;
  args.a = a.array();
  args.g = g.array();
  args.U = U.array();
  args.out = result.data();
  args.n = a.size(0);
  args.t = last == 2 ? a.size(1) : 1;
  args.i = a.size(last);
  args.o = g.size(last);
  args.p = U.size(0);
  args.threads = threads;
  {
    nb::gil_scoped_release release;
    directional_curvature(args);
  }
  for (size_t p = 0; p < result.size(); ++p) {
    if (out.type() == Type::f64)
      static_cast<double*>(out.data())[p] = result[p];
    else
      static_cast<float*>(out.data())[p] = static_cast<float>(result[p]);
  }
}

}  // namespace

void bind_curvature(nb::module_& m) {
  m.def("directional_curvature", &bound_directional_curvature, nb::arg("a").none(),
        nb::arg("g").none(), nb::arg("U").none(), nb::arg("out").none(), nb::arg("threads"),
        "out[p] = mean_n (sum_t g[n, t] . U[p] a[n, t])^2 for a (n[, t], i), g (n[, t], o),\n"
        "U (p, o, i) and out (p,) of float64 or float32. Inputs of bfloat16 and float16 are\n"
        "widened to float32; arithmetic is float64 if any input is. The result does not depend\n"
        "on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
}

}  // namespace ddf
