// Instruction sets the kernels are compiled for, and the one in use.
//
// Every kernel file is compiled once per instruction set, with DDF_ISA naming the namespace its
// code lives in (CMakeLists.txt). The choice is made at run time, so one binary serves every
// machine of an architecture. Code that several such objects share must not be an inline function
// or template outside the DDF_ISA namespace: the linker keeps one copy of it, perhaps the one with
// instructions this machine lacks.
#pragma once

namespace ddf {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);
bool isa_usable(Isa isa);    // compiled in and supported by this processor
Isa isa_current();           // the best usable one unless isa_select chose another
void isa_select(Isa isa);    // precondition: isa_usable(isa)

}  // namespace ddf

// Declares `void name(const Args&)`, once for the instruction set in use and once for each.
#define DDF_DECLARE(name, Args)       \
  void name(const Args& args);        \
  namespace portable {                \
  void name(const Args& args);        \
  }                                   \
  namespace avx2 {                    \
  void name(const Args& args);        \
  }                                   \
  namespace avx512 {                  \
  void name(const Args& args);        \
  }
