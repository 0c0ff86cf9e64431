// A contiguous array of one of the types the kernels read. Knows nothing of Python.
#pragma once

#include <cstdint>

namespace ddf {

enum class Type { f64, f32, f16, bf16, i32 };  // the last one for indices alone

struct Array {
  const void* data = nullptr;
  Type type = Type::f32;
};

}  // namespace ddf
