#include "bind.h"
#include "directional_curvature.h"
#include "directional_curvature_rank1.h"
#include "directional_scores.h"
#include "directional_scores_rank1.h"

namespace nb = nanobind;

namespace ddf {
namespace {

// What all take: a and g (n[, t], .).
template <class Args>
void read_samples(const TensorView& a, const TensorView& g, Args& args) {
  expect_dims(a, "a", a.ndim() == 2 || a.ndim() == 3, "shape (n, i) or (n, t, i)");
  expect_dims(g, "g", g.ndim() == a.ndim(), "as many dimensions as a");
  const int last = a.ndim() - 1;
  expect_size(g, "g", 0, a.size(0), "the samples of a");
  if (last == 2) expect_size(g, "g", 1, a.size(1), "the tokens of a");
  args.a = a.array();
  args.g = g.array();
  args.n = a.size(0);
  args.t = last == 2 ? a.size(1) : 1;
  args.i = a.size(last);
  args.o = g.size(last);
}

// What both full-rank operations take on: U (p, o, i).
template <class Args>
void read_full(const TensorView& U, Args& args) {
  expect_dims(U, "U", U.ndim() == 3, "shape (p, o, i)");
  expect_size(U, "U", 1, args.o, "the outputs of g");
  expect_size(U, "U", 2, args.i, "the inputs of a");
  args.U = U.array();
  args.p = U.size(0);
}

// What both rank-one operations take on: v (p, o) and w (p, i).
template <class Args>
void read_rank1(const TensorView& v, const TensorView& w, Args& args) {
  expect_dims(v, "v", v.ndim() == 2, "shape (p, o)");
  expect_dims(w, "w", w.ndim() == 2, "shape (p, i)");
  expect_size(w, "w", 0, v.size(0), "one row for each row of v");
  expect_size(v, "v", 1, args.o, "the outputs of g");
  expect_size(w, "w", 1, args.i, "the inputs of a");
  args.v = v.array();
  args.w = w.array();
  args.p = v.size(0);
}

// The curvatures (p,), computed in fp64 and rounded once.
template <class Args>
void write_curvature(void (*run)(const Args&), Args& args, const TensorView& out, const char* why,
                     int threads) {
  const Result result(out, args.p, why);
  expect_threads(threads);
  args.out = result.data();
  args.threads = threads;
  {
    nb::gil_scoped_release release;
    run(args);
  }
  result.write();
}

// The scores (p, n), in the type of the arithmetic.
template <class Args>
void write_scores(void (*run)(const Args&), Args& args, bool fp64, const TensorView& out,
                  const char* why, int threads) {
  expect_dims(out, "out", out.ndim() == 2, "shape (p, n)");
  expect_size(out, "out", 0, args.p, why);
  expect_size(out, "out", 1, args.n, "the samples of a");
  expect_type(out, "out", fp64);
  expect_threads(threads);
  args.out = out.data();
  args.threads = threads;
  nb::gil_scoped_release release;
  run(args);
}

template <class... Views>
bool any_fp64(const Views&... views) {
  return ((views.type() == Type::f64) || ...);
}

void bound_directional_curvature(nb::handle a_, nb::handle g_, nb::handle U_, nb::handle out_,
                                 int threads) {
  const TensorView a(a_, "a"), g(g_, "g"), U(U_, "U"), out(out_, "out", true);
  DirectionalCurvature args;
  read_samples(a, g, args);
  read_full(U, args);
  write_curvature(directional_curvature, args, out, "the directions of U", threads);
}

void bound_directional_scores(nb::handle a_, nb::handle g_, nb::handle U_, nb::handle out_,
                              int threads) {
  const TensorView a(a_, "a"), g(g_, "g"), U(U_, "U"), out(out_, "out", true);
  DirectionalScores args;
  read_samples(a, g, args);
  read_full(U, args);
  write_scores(directional_scores, args, any_fp64(a, g, U), out, "the directions of U", threads);
}

void bound_directional_curvature_rank1(nb::handle a_, nb::handle g_, nb::handle v_, nb::handle w_,
                                       nb::handle out_, int threads) {
  const TensorView a(a_, "a"), g(g_, "g"), v(v_, "v"), w(w_, "w"), out(out_, "out", true);
  DirectionalCurvatureRank1 args;
  read_samples(a, g, args);
  read_rank1(v, w, args);
  write_curvature(directional_curvature_rank1, args, out, "the rows of v", threads);
}

void bound_directional_scores_rank1(nb::handle a_, nb::handle g_, nb::handle v_, nb::handle w_,
                                    nb::handle out_, int threads) {
  const TensorView a(a_, "a"), g(g_, "g"), v(v_, "v"), w(w_, "w"), out(out_, "out", true);
  DirectionalScoresRank1 args;
  read_samples(a, g, args);
  read_rank1(v, w, args);
  write_scores(directional_scores_rank1, args, any_fp64(a, g, v, w), out, "the rows of v", threads);
}

}  // namespace

void bind_curvature(nb::module_& m) {
  m.def("directional_curvature", &bound_directional_curvature, nb::arg("a").none(),
        nb::arg("g").none(), nb::arg("U").none(), nb::arg("out").none(), nb::arg("threads"),
        "out[p] = mean_n (sum_t g[n, t] . U[p] a[n, t])^2 for a (n[, t], i), g (n[, t], o),\n"
        "U (p, o, i) and out (p,) of float64 or float32. Inputs of bfloat16 and float16 are\n"
        "widened to float32; arithmetic is float64 if any input is. The result does not depend\n"
        "on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("directional_curvature_rank1", &bound_directional_curvature_rank1, nb::arg("a").none(),
        nb::arg("g").none(), nb::arg("v").none(), nb::arg("w").none(), nb::arg("out").none(),
        nb::arg("threads"),
        "out[p] = mean_n (sum_t (g[n, t] . v[p]) (a[n, t] . w[p]))^2 for a (n[, t], i), g (n[, t], o),\n"
        "v (p, o), w (p, i) and out (p,) of float64 or float32. Types, threads and errors as for\n"
        "directional_curvature.");
  m.def("directional_scores", &bound_directional_scores, nb::arg("a").none(), nb::arg("g").none(),
        nb::arg("U").none(), nb::arg("out").none(), nb::arg("threads"),
        "out[p, n] = sum_t g[n, t] . U[p] a[n, t] for a (n[, t], i), g (n[, t], o), U (p, o, i) and\n"
        "out (p, n), float64 if an input is, else float32. Types, threads and errors as for\n"
        "directional_curvature.");
  m.def("directional_scores_rank1", &bound_directional_scores_rank1, nb::arg("a").none(),
        nb::arg("g").none(), nb::arg("v").none(), nb::arg("w").none(), nb::arg("out").none(),
        nb::arg("threads"),
        "out[p, n] = sum_t (g[n, t] . v[p]) (a[n, t] . w[p]) for a (n[, t], i), g (n[, t], o),\n"
        "v (p, o), w (p, i) and out (p, n), float64 if an input is, else float32. Types, threads and\n"
        "errors as for directional_curvature.");
}

}  // namespace ddf
