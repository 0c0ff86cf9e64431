// Lists of tensors, as the optimizer steps take them.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "hyper.h"

namespace ddf {

// "ws[3]", without the cost of a std::string for every tensor that is right.
class Label {
 public:
  explicit Label(const char* list) {
    while (*list && end_ < kName) text_[end_++] = *list++;
  }
  const char* at(size_t k) {
    char digits[20];
    int count = 0;
    for (; k || !count; k /= 10) digits[count++] = static_cast<char>('0' + k % 10);
    int to = end_;
    text_[to++] = '[';
    while (count) text_[to++] = digits[--count];
    text_[to++] = ']';
    text_[to] = 0;
    return text_;
  }

 private:
  static constexpr int kName = 32;
  char text_[kName + 24];
  int end_ = 0;
};

struct Item {  // data is null where the list has None
  void* data = nullptr;
  int64_t rows = 0, cols = 1;
};

using Span = std::pair<const char*, const char*>;

// Two threads must not write the same parameter.
inline void expect_apart(std::vector<Span>& spans, const char* names) {
  std::sort(spans.begin(), spans.end());
  for (size_t k = 1; k < spans.size(); ++k)
    if (spans[k].first < spans[k - 1].second)
      throw argument_error(names, "memory of its own for every tensor", "two that overlap");
}

// Checked tensors of one list. Valid while the Python list keeps them.
class TensorList {
 public:
  enum Kind { read, written, indices };

  // All of one type, and of `ndim` dimensions (1 or 2); None among them only where ndim is 1.
  TensorList(nanobind::list list, const char* name, int ndim, Kind kind = read)
      : name_(name), label_(name) {
    items_.reserve(nanobind::len(list));
    for (nanobind::handle each : list) {
      if (ndim == 1 && each.is_none()) {
        items_.emplace_back();
        continue;
      }
      const char* label = label_.at(items_.size());
      TensorView view(each, label, kind == written, kind == indices);
      expect_dims(view, label, view.ndim() == ndim, ndim == 1 ? "1 dimension" : "2 dimensions");
      if (!any_) type_ = view.type();
      any_ = true;
      expect_dims(view, label, view.type() == type_, "the type of the others in its list");
      // The data of an empty tensor may be null, which means None here.
      static char nothing;
      items_.push_back({view.data() ? view.data() : &nothing, view.size(0),
                        ndim == 2 ? view.size(1) : 1});
      if (!view.exchanged()) kept_.push_back(std::move(view));
    }
  }

  size_t size() const { return items_.size(); }
  const Item& operator[](size_t k) const { return items_[k]; }
  bool any() const { return any_; }  // a tensor, not only None
  Type type() const { return type_; }

  void expect_length(size_t count) const {
    if (size() != count)
      throw argument_error(name_, std::to_string(count) + " entries", std::to_string(size()));
  }
  void expect_type(Type type, const char* why) {
    if (any_ && type_ != type) throw argument_error(name_, why, "another type");
  }
  void expect_rows(size_t k, int64_t rows, const char* why) {
    if (items_[k].data && items_[k].rows != rows) wrong_size(k, rows, "rows", items_[k].rows, why);
  }
  void expect_cols(size_t k, int64_t cols, const char* why) {
    if (items_[k].cols != cols) wrong_size(k, cols, "columns", items_[k].cols, why);
  }
  // Appends the memory of every tensor.
  void add_to(std::vector<Span>& spans) const {
    const int64_t size = type_ == Type::f64 ? 8 : type_ == Type::f32 ? 4 : 2;
    for (const Item& item : items_) {
      const char* begin = static_cast<const char*>(item.data);
      if (item.rows * item.cols) spans.emplace_back(begin, begin + item.rows * item.cols * size);
    }
  }
  // Indices below `count`.
  void expect_below(size_t k, int64_t count) {
    const int32_t* entries = static_cast<const int32_t*>(items_[k].data);
    if (!entries) return;
    bool ok = true;
    for (int64_t j = 0; j < items_[k].rows; ++j) ok &= entries[j] >= 0 && entries[j] < count;
    if (ok) return;
    int64_t j = 0;
    while (entries[j] >= 0 && entries[j] < count) ++j;
    throw argument_error(label_.at(k), "entries from 0 to " + std::to_string(count - 1),
                         std::to_string(entries[j]) + " at " + std::to_string(j));
  }

 private:
  [[noreturn]] void wrong_size(size_t k, int64_t expected, const char* what, int64_t given,
                               const char* why) {
    throw argument_error(label_.at(k),
                         std::to_string(expected) + " " + what + " (" + why + ")",
                         std::to_string(given));
  }

  const char* name_;
  Label label_;
  bool any_ = false;
  Type type_ = Type::f32;
  std::vector<Item> items_;
  std::vector<TensorView> kept_;
};

// Read here, in fp64, and combined as in deaddir_fast/ops/_adam.py.
inline Hyper read_hyper(nanobind::handle tensor) {
  const TensorView view(tensor, "hyper");
  expect_dims(view, "hyper", view.ndim() == 1 && view.size(0) == 8 && view.type() == Type::f64,
              "float64 (8,)");
  const double* h = static_cast<const double*>(view.data());
  Hyper out;
  out.lr = h[0];
  out.eps = h[3];
  out.keep = 1 - h[0] * h[4];
  out.rise1 = 1 - h[1];
  out.rise2 = 1 - h[2];
  out.fall2 = h[2];
  out.scale1 = 1 / h[5];
  out.root2 = std::sqrt(h[6]);
  out.step = static_cast<int64_t>(h[7]);
  return out;
}

inline Type state_type(Type parameters) {
  return parameters == Type::f64 ? Type::f64 : Type::f32;
}

}  // namespace ddf
