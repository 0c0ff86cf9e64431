#include <optional>

#include "bind.h"
#include "linear_softmax_fisher.h"
#include "softmax_fisher.h"
#include "softmax_kl.h"

namespace nb = nanobind;

namespace ddf {
namespace {

// Logits (n, c), a stack (p, n, c) over them, and out (p, n).
void expect_categorical(const TensorView& logits, const TensorView& stack, const char* name,
                        const TensorView& out) {
  expect_dims(logits, "logits", logits.ndim() == 2 && logits.size(1) > 0, "shape (n, c), c >= 1");
  expect_dims(stack, name, stack.ndim() == 3, "3 dimensions, the last two (n, c)");
  expect_size(stack, name, 1, logits.size(0), "the samples of logits");
  expect_size(stack, name, 2, logits.size(1), "the classes of logits");
  expect_dims(out, "out", out.ndim() == 2, "2 dimensions");
  expect_size(out, "out", 0, stack.size(0), name);
  expect_size(out, "out", 1, logits.size(0), "the samples of logits");
  expect_type(out, "out", logits.type() == Type::f64 || stack.type() == Type::f64);
}

void bound_softmax_fisher(nb::handle logits_, nb::handle tangent_, nb::handle out_, int threads) {
  const TensorView logits(logits_, "logits"), tangent(tangent_, "tangent"), out(out_, "out", true);
  expect_categorical(logits, tangent, "tangent", out);
  expect_threads(threads);
  SoftmaxFisher args;
  args.logits = logits.array();
  args.tangent = tangent.array();
  args.out = out.data();
  args.n = logits.size(0);
  args.c = logits.size(1);
  args.p = tangent.size(0);
  args.threads = threads;
  nb::gil_scoped_release release;
  softmax_fisher(args);
}

void bound_softmax_kl(nb::handle logits_, nb::handle logits_t_, nb::handle out_, int threads) {
  const TensorView logits(logits_, "logits"), logits_t(logits_t_, "logits_t");
  const TensorView out(out_, "out", true);
  expect_categorical(logits, logits_t, "logits_t", out);
  expect_threads(threads);
  SoftmaxKl args;
  args.logits = logits.array();
  args.logits_t = logits_t.array();
  args.out = out.data();
  args.n = logits.size(0);
  args.c = logits.size(1);
  args.q = logits_t.size(0);
  args.threads = threads;
  nb::gil_scoped_release release;
  softmax_kl(args);
}

void bound_linear_softmax_fisher(nb::handle h_, nb::handle dh_, nb::handle W_, nb::handle bias_,
                                 nb::handle dW_, nb::handle out_, int threads) {
  const TensorView h(h_, "h"), dh(dh_, "dh"), W(W_, "W"), out(out_, "out", true);
  std::optional<TensorView> bias, dW;
  if (!bias_.is_none()) bias.emplace(bias_, "bias");
  if (!dW_.is_none()) dW.emplace(dW_, "dW");
  expect_dims(h, "h", h.ndim() == 2, "shape (n, d)");
  expect_dims(dh, "dh", dh.ndim() == 3, "shape (p, n, d)");
  expect_dims(W, "W", W.ndim() == 2 && W.size(0) > 0, "shape (c, d), c >= 1");
  const int64_t n = h.size(0), d = h.size(1), c = W.size(0), p = dh.size(0);
  expect_size(dh, "dh", 1, n, "the samples of h");
  expect_size(dh, "dh", 2, d, "the features of h");
  expect_size(W, "W", 1, d, "the features of h");
  bool fp64 = h.type() == Type::f64 || dh.type() == Type::f64 || W.type() == Type::f64;
  if (bias) {
    expect_dims(*bias, "bias", bias->ndim() == 1, "shape (c,)");
    expect_size(*bias, "bias", 0, c, "the classes of W");
    fp64 |= bias->type() == Type::f64;
  }
  if (dW) {
    expect_dims(*dW, "dW", dW->ndim() == 3, "shape (p, c, d)");
    expect_size(*dW, "dW", 0, p, "the directions of dh");
    expect_size(*dW, "dW", 1, c, "the classes of W");
    expect_size(*dW, "dW", 2, d, "the features of h");
    fp64 |= dW->type() == Type::f64;
  }
  expect_dims(out, "out", out.ndim() == 2, "shape (p, n)");
  expect_size(out, "out", 0, p, "the directions of dh");
  expect_size(out, "out", 1, n, "the samples of h");
  expect_type(out, "out", fp64);
  expect_threads(threads);

  LinearSoftmaxFisher args;
  args.h = h.array();
  args.dh = dh.array();
  args.W = W.array();
  if (bias) args.bias = bias->array();
  if (dW) args.dW = dW->array();
  args.out = out.data();
  args.n = n;
  args.d = d;
  args.c = c;
  args.p = p;
  args.threads = threads;
  nb::gil_scoped_release release;
  linear_softmax_fisher(args);
}

}  // namespace

void bind_softmax(nb::module_& m) {
  m.def("softmax_fisher", &bound_softmax_fisher, nb::arg("logits").none(),
        nb::arg("tangent").none(), nb::arg("out").none(), nb::arg("threads"),
        "out[p, n] = variance of tangent[p, n] under softmax(logits[n]) for logits (n, c), tangent\n"
        "(p, n, c) and out (p, n) of float64 if an input is, else float32. The result does not\n"
        "depend on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("softmax_kl", &bound_softmax_kl, nb::arg("logits").none(), nb::arg("logits_t").none(),
        nb::arg("out").none(), nb::arg("threads"),
        "out[q, n] = KL(softmax(logits[n]) || softmax(logits_t[q, n])) for logits (n, c), logits_t\n"
        "(q, n, c) and out (q, n) of float64 if an input is, else float32. The result does not\n"
        "depend on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("linear_softmax_fisher", &bound_linear_softmax_fisher, nb::arg("h").none(),
        nb::arg("dh").none(), nb::arg("W").none(), nb::arg("bias").none(), nb::arg("dW").none(),
        nb::arg("out").none(), nb::arg("threads"),
        "out[p, n] = variance of W dh[p, n] + dW[p] h[n] under softmax(W h[n] + bias) for h (n, d),\n"
        "dh (p, n, d), W (c, d), bias (c,) or None, dW (p, c, d) or None, and out (p, n) of float64\n"
        "if an input is, else float32. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes.");
}

}  // namespace ddf
