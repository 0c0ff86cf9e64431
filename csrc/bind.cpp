// The only file that knows Python: arguments are checked here, kernels get plain pointers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "directional_curvature.h"
#include "isa.h"
#include "tensor_view.h"

#ifdef DDF_HAVE_OPENMP
#include <omp.h>
#endif

namespace nb = nanobind;

namespace ddf {
namespace {

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};

void expect_dims(const TensorView& x, const char* name, bool ok, const char* expected) {
  if (!ok) throw argument_error(name, expected, x.describe());
}

void expect_size(const TensorView& x, const char* name, int dim, int64_t size, const char* why) {
  if (x.size(dim) != size)
    throw argument_error(name,
                         "size " + std::to_string(size) + " in dimension " + std::to_string(dim) +
                             " (" + why + ")",
                         x.describe());
}

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
  if (threads < 1) throw argument_error("threads", "at least 1", std::to_string(threads));

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

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas)
    if (isa_usable(isa)) names.emplace_back(isa_name(isa));
  return names;
}

std::string use_isa(const std::string& name) {
  const std::string previous = isa_name(isa_current());
  for (Isa isa : kIsas)
    if (name == isa_name(isa) && isa_usable(isa)) {
      isa_select(isa);
      return previous;
    }
  std::string usable;
  for (const std::string& each : isas()) usable += (usable.empty() ? "" : ", ") + each;
  throw argument_error("name", "one of " + usable, "'" + name + "'");
}

bool uses_exchange(nb::handle tensor) { return TensorView(tensor, "tensor").exchanged(); }

nb::dict build_info() {
  nb::dict info;
  info["version"] = DDF_VERSION;
  info["compiler"] = DDF_COMPILER;
  info["isa"] = isa_name(isa_current());
  info["isas"] = isas();
#ifdef DDF_HAVE_OPENMP
  info["openmp"] = _OPENMP;
  info["max_threads"] = omp_get_max_threads();
#else
  info["openmp"] = nb::none();
  info["max_threads"] = 1;
#endif
  return info;
}

}  // namespace
}  // namespace ddf

NB_MODULE(_C, m) {
  m.doc() = "C++ CPU kernels of deaddir_fast. Arguments are contiguous CPU tensors.";
  m.def("directional_curvature", &ddf::bound_directional_curvature, nb::arg("a").none(),
        nb::arg("g").none(), nb::arg("U").none(), nb::arg("out").none(), nb::arg("threads"),
        "out[p] = mean_n (sum_t g[n, t] . U[p] a[n, t])^2 for a (n[, t], i), g (n[, t], o),\n"
        "U (p, o, i) and out (p,) of float64 or float32. Inputs of bfloat16 and float16 are\n"
        "widened to float32; arithmetic is float64 if any input is. The result does not depend\n"
        "on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("build_info", &ddf::build_info,
        "Version, compiler, instruction sets (in use and usable here), OpenMP version or None,\n"
        "and the thread count OpenMP would choose.");
  m.def("use_isa", &ddf::use_isa, nb::arg("name"),
        "Choose the instruction set of later calls; return the one in use before.");
  m.def("uses_exchange", &ddf::uses_exchange, nb::arg("tensor"),
        "Whether a tensor is read through the DLPack C exchange API (else through nb::ndarray).");
}
