#include <optional>
#include <vector>

#include "bind.h"
#include "kron_matvec.h"
#include "kron_quadratic.h"
#include "kron_quadratic_rank1.h"

namespace nb = nanobind;

namespace ddf {
namespace {

void expect_square(const TensorView& x, const char* name, int64_t size, const char* why) {
  expect_dims(x, name, x.ndim() == 2, "a square matrix");
  expect_size(x, name, 0, size, why);
  expect_size(x, name, 1, size, why);
}

void bound_kron_matvec(nb::handle out_, nb::handle left_, nb::handle right_, nb::handle U_,
                       bool left_transposed, bool right_transposed, nb::handle denominator_,
                       int threads) {
  const TensorView U(U_, "U"), left(left_, "left"), right(right_, "right");
  const TensorView out(out_, "out", true);
  expect_dims(U, "U", U.ndim() == 3, "shape (p, o, i)");
  expect_square(left, "left", U.size(1), "the outputs of U");
  expect_square(right, "right", U.size(2), "the inputs of U");
  const bool fp64 =
      U.type() == Type::f64 || left.type() == Type::f64 || right.type() == Type::f64;
  expect_dims(out, "out", out.ndim() == 3, "the shape of U");
  for (int dim = 0; dim < 3; ++dim) expect_size(out, "out", dim, U.size(dim), "the shape of U");
  expect_type(out, "out", fp64);
  std::optional<TensorView> denominator;
  if (!denominator_.is_none()) {
    denominator.emplace(denominator_, "denominator");
    expect_dims(*denominator, "denominator", denominator->ndim() == 2, "shape (o, i)");
    expect_size(*denominator, "denominator", 0, U.size(1), "the outputs of U");
    expect_size(*denominator, "denominator", 1, U.size(2), "the inputs of U");
    expect_type(*denominator, "denominator", fp64);
  }
  expect_threads(threads);

  KronMatvec args;
  args.left = left.array();
  args.right = right.array();
  args.U = U.array();
  if (denominator) args.denominator = denominator->array();
  args.out = out.data();
  args.p = U.size(0);
  args.o = U.size(1);
  args.i = U.size(2);
  args.left_transposed = left_transposed;
  args.right_transposed = right_transposed;
  args.threads = threads;
  nb::gil_scoped_release release;
  kron_matvec(args);
}

void bound_kron_quadratic(nb::handle A_, nb::handle G_, nb::handle U_, nb::handle out_, bool square,
                          int threads) {
  const TensorView A(A_, "A"), G(G_, "G"), U(U_, "U"), out(out_, "out", true);
  expect_dims(U, "U", U.ndim() == 3, "shape (p, o, i)");
  expect_square(A, "A", U.size(2), "the inputs of U");
  expect_square(G, "G", U.size(1), "the outputs of U");
  const Result result(out, U.size(0), "the directions of U");
  expect_threads(threads);
  KronQuadratic args;
  args.A = A.array();
  args.G = G.array();
  args.U = U.array();
  args.out = result.data();
  args.p = U.size(0);
  args.o = U.size(1);
  args.i = U.size(2);
  args.square = square;
  args.threads = threads;
  {
    nb::gil_scoped_release release;
    kron_quadratic(args);
  }
  result.write();
}

void bound_kron_quadratic_rank1(nb::handle A_, nb::handle G_, nb::handle v_, nb::handle w_,
                                nb::handle out_, int threads) {
  const TensorView A(A_, "A"), G(G_, "G"), v(v_, "v"), w(w_, "w"), out(out_, "out", true);
  expect_dims(v, "v", v.ndim() == 2, "shape (p, o)");
  expect_dims(w, "w", w.ndim() == 2, "shape (p, i)");
  expect_size(w, "w", 0, v.size(0), "one row for each row of v");
  expect_square(A, "A", w.size(1), "the inputs of w");
  expect_square(G, "G", v.size(1), "the outputs of v");
  const Result result(out, v.size(0), "the rows of v");
  expect_threads(threads);
  KronQuadraticRank1 input, output;
  std::vector<double> other(static_cast<size_t>(v.size(0)));
  input.p = output.p = v.size(0);
  input.threads = output.threads = threads;
  input.fp64 = output.fp64 = A.type() == Type::f64 || G.type() == Type::f64 ||
                             v.type() == Type::f64 || w.type() == Type::f64;
  input.A = A.array();
  input.w = w.array();
  input.i = w.size(1);
  input.out = result.data();
  output.A = G.array();
  output.w = v.array();
  output.i = v.size(1);
  output.out = other.data();
  {
    nb::gil_scoped_release release;
    kron_quadratic_rank1(input);
    kron_quadratic_rank1(output);
  }
  for (size_t p = 0; p < other.size(); ++p) result.data()[p] *= other[p];
  result.write();
}

}  // namespace

void bind_kron(nb::module_& m) {
  m.def("kron_matvec", &bound_kron_matvec, nb::arg("out").none(), nb::arg("left").none(),
        nb::arg("right").none(), nb::arg("U").none(), nb::arg("left_transposed"),
        nb::arg("right_transposed"), nb::arg("denominator").none(), nb::arg("threads"),
        "out[p] = left U[p] right, elementwise over `denominator` (o, i) unless it is None, for left\n"
        "(o, o), right (i, i), U and out (p, o, i); either factor may be taken transposed. out is\n"
        "float64 if an input is, else float32. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("kron_quadratic", &bound_kron_quadratic, nb::arg("A").none(), nb::arg("G").none(),
        nb::arg("U").none(), nb::arg("out").none(), nb::arg("square"), nb::arg("threads"),
        "out[p] = sum((G U[p] A^T) * U[p]), or with `square`, for lower triangular A and G, the sum\n"
        "of squares of G^T U[p] A; at least 0. A (i, i), G (o, o), U (p, o, i), out (p,) of float64 or\n"
        "float32. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("kron_quadratic_rank1", &bound_kron_quadratic_rank1, nb::arg("A").none(),
        nb::arg("G").none(), nb::arg("v").none(), nb::arg("w").none(), nb::arg("out").none(),
        nb::arg("threads"),
        "out[p] = (w[p]^T A w[p]) (v[p]^T G v[p]), each factor at least 0, for A (i, i), G (o, o),\n"
        "v (p, o), w (p, i), out (p,) of float64 or float32. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes.");
}

}  // namespace ddf
