// Moments of tangents under a softmax, from parts of its classes.
//
// A part knows its largest logit and mass, and of each tangent the value at the likeliest class, the
// mean relative to that, and the weighted squares about the mean. Two parts join by the pairwise
// update of Chan, Golub & LeVeque (1983): every term of the spread is positive, and means are only
// ever compared as differences, so neither a large common value nor a class of probability nearly
// one costs digits. Everything is fp64, so that errors do not grow with the number of parts.
//
// V is double, or Vector<double> where lanes are samples.
#pragma once

#include <cmath>
#include <limits>

#include "exp.h"

namespace ddf::DDF_ISA {

inline double exponential_of(double x) { return std::exp(x); }
inline Vector<double> exponential_of(Vector<double> x) { return exponential<double>(x).value; }

// The largest logit as something to subtract: of classes that are all masked (-inf) it is 0, so
// that their weights are 0 and not NaN.
template <class V>
inline V finite_top(V top) {
  return top == -std::numeric_limits<double>::infinity() ? V{} : top;
}

template <class V>
inline V nonzero(V mass) {
  return mass == 0.0 ? V{} + 1.0 : mass;
}

template <class V>
struct Mass {
  V top = V{} - std::numeric_limits<double>::infinity();  // the largest logit
  V mass = V{};                                           // sum of e^(z - top)
};

template <class V>
struct Moments {
  V anchor = V{};  // the tangent at the likeliest class
  V offset = V{};  // its mean, minus the anchor
  V spread = V{};  // sum of e^(z - top) (tangent - mean)^2
};

// Joins `part` to `all`: first the masses, then with the result every tangent.
template <class V>
class Join {
 public:
  Join() = default;
  Join(Mass<V>& all, const Mass<V>& part) {
    all_first_ = all.top >= part.top;
    const V top = all_first_ ? all.top : part.top, finite = finite_top<V>(top);
    all_scale_ = exponential_of(all.top - finite);
    part_scale_ = exponential_of(part.top - finite);
    all_mass_ = all.mass * all_scale_;
    const V part_mass = part.mass * part_scale_;
    all.top = top;
    all.mass = all_mass_ + part_mass;
    all_share_ = all_mass_ / nonzero<V>(all.mass);
    part_share_ = part_mass / nonzero<V>(all.mass);
  }

  void operator()(Moments<V>& all, const Moments<V>& part) const {
    const V step = (part.anchor - all.anchor) + (part.offset - all.offset);
    all.spread = all.spread * all_scale_ + part.spread * part_scale_ +
                 step * step * all_mass_ * part_share_;
    all.offset = all_first_ ? all.offset + step * part_share_ : part.offset - step * all_share_;
    all.anchor = all_first_ ? all.anchor : part.anchor;
  }

 private:
  decltype(V{} >= V{}) all_first_;
  V all_scale_, part_scale_, all_mass_, all_share_, part_share_;
};

// Rounding may leave a spread of nearly nothing below 0. NaN stays.
template <class V>
inline V variance(const Mass<V>& all, const Moments<V>& x) {
  const V value = x.spread / all.mass;
  return value < 0.0 ? V{} : value;
}

}  // namespace ddf::DDF_ISA
