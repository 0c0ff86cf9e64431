#include "isa.h"

#include <atomic>

namespace ddf {
namespace {

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
#ifdef DDF_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef DDF_HAVE_AVX512
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool supported(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(DDF_HAVE_AVX2) || defined(DDF_HAVE_AVX512)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (isa == Isa::avx2) return true;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

Isa best() {
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (isa_usable(isa)) return isa;
  return Isa::portable;
}

std::atomic<int>& selected() {
  static std::atomic<int> value{static_cast<int>(best())};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_usable(Isa isa) { return compiled(isa) && supported(isa); }

Isa isa_current() { return static_cast<Isa>(selected().load(std::memory_order_relaxed)); }

void isa_select(Isa isa) { selected().store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace ddf
