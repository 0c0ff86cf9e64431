// Reading a Python tensor without copying it and without any framework's headers.
//
// torch >= 2.10 offers the DLPack C exchange API (type(t).__dlpack_c_exchange_api__): a C function
// that fills in a DLTensor, about 0.05 us a tensor. Anything else that speaks DLPack or the buffer
// protocol (a NumPy array, say) goes through nb::ndarray, about 2 us. The exchange API checks
// neither device nor layout, so TensorView does.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>

#include "array.h"

namespace ddf {

class TensorView {
 public:
  // Throws TypeError or ValueError, naming `argument`, unless `object` is a contiguous CPU array
  // of fp64, fp32, bf16 or fp16 (or, asked for, of int32). Valid while `object` lives and the view
  // itself does.
  TensorView(nanobind::handle object, const char* argument, bool writable = false,
             bool integers = false);

  int ndim() const { return ndim_; }
  int64_t size(int dim) const { return shape_[dim]; }
  int64_t count() const;
  Array array() const { return {data_, type_}; }
  void* data() const { return data_; }
  Type type() const { return type_; }
  bool exchanged() const { return !fallback_; }  // through the C exchange API
  std::string describe() const;                  // "float32 (3, 4)"

 private:
  static constexpr int kMaxDims = 8;

  const char* argument_;
  void* data_ = nullptr;
  Type type_ = Type::f32;
  int ndim_ = 0;
  int64_t shape_[kMaxDims] = {};
  std::optional<nanobind::ndarray<nanobind::ro>> fallback_;
};

// An error about one argument: "a: expected CPU tensor, got ...".
nanobind::builtin_exception argument_error(const char* argument, const std::string& expected,
                                           const std::string& given);

}  // namespace ddf
