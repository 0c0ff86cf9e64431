// The module. Only bind*.cpp and tensor_view know Python: arguments are checked there, kernels get
// plain pointers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bind.h"
#include "fma_peak.h"
#include "isa.h"
#include "tensor_view.h"

#ifdef DDF_HAVE_OPENMP
#include <omp.h>
#endif

namespace nb = nanobind;

namespace ddf {
namespace {

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};

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

double bound_fma_peak(int threads, bool fp64) {
  expect_threads(threads);
  double rate = 0;
  nb::gil_scoped_release release;
  fma_peak({fp64, threads, &rate});
  return rate;
}

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
  ddf::bind_adam(m);
  ddf::bind_block(m);
  ddf::bind_curvature(m);
  ddf::bind_gram(m);
  ddf::bind_kron(m);
  ddf::bind_softmax(m);
  m.def("build_info", &ddf::build_info,
        "Version, compiler, instruction sets (in use and usable here), OpenMP version or None,\n"
        "and the thread count OpenMP would choose.");
  m.def("fma_peak", &ddf::bound_fma_peak, nb::arg("threads"), nb::arg("fp64") = false,
        "FLOP/s of independent multiply-adds in registers on `threads` threads, measured now.");
  m.def("use_isa", &ddf::use_isa, nb::arg("name"),
        "Choose the instruction set of later calls; return the one in use before.");
  m.def("uses_exchange", &ddf::uses_exchange, nb::arg("tensor"),
        "Whether a tensor is read through the DLPack C exchange API (else through nb::ndarray).");
}
