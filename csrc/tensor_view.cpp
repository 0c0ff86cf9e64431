#include "tensor_view.h"

#include <nanobind/stl/string.h>

#include <typeinfo>

namespace nb = nanobind;

namespace ddf {
namespace {

// Layouts of the DLPack 1.x specification (dlpack.h: DLTensor, DLPackExchangeAPI).
struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DType dtype;
  int64_t* shape;
  int64_t* strides;  // may be null: contiguous
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_stream;
};

constexpr int kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

// Looked up once per type; the interpreter lock guards the table.
const ExchangeApi* exchange_api(PyTypeObject* type) {
  constexpr int capacity = 8;
  static PyTypeObject* types[capacity];
  static const ExchangeApi* apis[capacity];
  static int known = 0;
  for (int k = 0; k < known; ++k)
    if (types[k] == type) return apis[k];

  const ExchangeApi* api = nullptr;
  PyObject* object = reinterpret_cast<PyObject*>(type);
  if (PyObject* capsule = PyObject_GetAttrString(object, "__dlpack_c_exchange_api__")) {
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  if (!api) PyErr_Clear();
  if (api && (api->version.major != 1 || !api->tensor_from_object)) api = nullptr;
  if (known < capacity) {
    Py_INCREF(object);  // the table outlives any heap type
    types[known] = type;
    apis[known++] = api;
  }
  return api;
}

std::optional<Type> type_of(uint8_t code, uint8_t bits, uint16_t lanes) {
  if (lanes != 1) return std::nullopt;
  if (code == kFloat && bits == 64) return Type::f64;
  if (code == kFloat && bits == 32) return Type::f32;
  if (code == kFloat && bits == 16) return Type::f16;
  if (code == kBfloat && bits == 16) return Type::bf16;
  if (code == kInt && bits == 32) return Type::i32;
  return std::nullopt;
}

const char* type_name(Type type) {
  switch (type) {
    case Type::f64:
      return "float64";
    case Type::f32:
      return "float32";
    case Type::f16:
      return "float16";
    case Type::i32:
      return "int32";
    default:
      return "bfloat16";
  }
}

[[noreturn]] void wrong_type(const char* argument, bool integers, const std::string& given) {
  const std::string message = std::string(argument) + ": expected a CPU tensor of " +
                              (integers ? "int32" : "float64, float32, bfloat16 or float16") +
                              ", got " + given;
  throw nb::type_error(message.c_str());
}

std::string text(nb::handle object) { return nb::cast<std::string>(nb::str(object)); }

// "list", "Tensor of torch.int64"
std::string kind_of(nb::handle object) {
  const std::string name = text(object.type().attr("__name__"));
  return nb::hasattr(object, "dtype") ? name + " of " + text(object.attr("dtype")) : name;
}

// The pending Python error in one line; torch appends a C++ stack trace to some of its own.
std::string pending_error() {
  const nb::python_error error;
  const std::string message = text(error.value());
  return message.substr(0, message.find('\n'));
}

std::optional<nb::ndarray<nb::ro>> as_ndarray(nb::handle object, bool writable) {
  if (!nb::ndarray_check(object)) return std::nullopt;
  try {
    if (writable) nb::cast<nb::ndarray<>>(object);
    return nb::cast<nb::ndarray<nb::ro>>(object);
  } catch (const std::bad_cast&) {
    return std::nullopt;
  }
}

}  // namespace

nb::builtin_exception argument_error(const char* argument, const std::string& expected,
                                     const std::string& given) {
  const std::string message = std::string(argument) + ": expected " + expected + ", got " + given;
  return nb::value_error(message.c_str());
}

TensorView::TensorView(nb::handle object, const char* argument, bool writable, bool integers)
    : argument_(argument) {
  Tensor t{};
  int64_t fallback_strides[kMaxDims];
  if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    if (api->tensor_from_object(object.ptr(), &t))
      wrong_type(argument, integers, kind_of(object) + " (" + pending_error() + ")");
  } else {
    fallback_ = as_ndarray(object, writable);
    if (!fallback_)
      wrong_type(argument, integers,
                 (writable ? "unwritable or unreadable " : "unreadable ") + kind_of(object));
    const auto& array = *fallback_;
    if (array.ndim() > kMaxDims)
      throw argument_error(argument, "at most 8 dimensions", std::to_string(array.ndim()));
    for (size_t d = 0; d < array.ndim(); ++d) fallback_strides[d] = array.stride(d);
    t.data = const_cast<void*>(static_cast<const void*>(array.data()));  // offset applied
    t.device = {array.device_type(), array.device_id()};
    t.ndim = static_cast<int32_t>(array.ndim());
    t.dtype = {array.dtype().code, array.dtype().bits, array.dtype().lanes};
    t.shape = const_cast<int64_t*>(array.shape_ptr());
    t.strides = fallback_strides;
  }

  if (t.device.type != kCpu) wrong_type(argument, integers, kind_of(object) + " on another device");
  const auto type = type_of(t.dtype.code, t.dtype.bits, t.dtype.lanes);
  if (!type || (*type == Type::i32) != integers) wrong_type(argument, integers, kind_of(object));
  if (t.ndim > kMaxDims)
    throw argument_error(argument, "at most 8 dimensions", std::to_string(t.ndim));

  type_ = *type;
  ndim_ = t.ndim;
  data_ = static_cast<char*>(t.data) + t.byte_offset;
  for (int d = 0; d < ndim_; ++d) shape_[d] = t.shape[d];
  if (t.strides && count() > 0) {
    int64_t stride = 1;
    for (int d = ndim_ - 1; d >= 0; --d) {
      if (shape_[d] != 1 && t.strides[d] != stride)
        throw argument_error(argument, "a contiguous tensor", "a strided one, " + describe());
      stride *= shape_[d];
    }
  }
}

int64_t TensorView::count() const {
  int64_t product = 1;
  for (int d = 0; d < ndim_; ++d) product *= shape_[d];
  return product;
}

std::string TensorView::describe() const {
  std::string out = std::string(type_name(type_)) + " (";
  for (int d = 0; d < ndim_; ++d) out += (d ? ", " : "") + std::to_string(shape_[d]);
  return out + (ndim_ == 1 ? ",)" : ")");
}

}  // namespace ddf
