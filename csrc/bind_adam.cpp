#include <nanobind/stl/vector.h>

#include "bind_lists.h"
#include "random_bits.h"
#include "scaled_adam.h"
#include "scaled_squares.h"
#include "shared_adam.h"

namespace nb = nanobind;

namespace ddf {
namespace {

void bound_scaled_squares(nb::list ws_, nb::list rows_, nb::list cols_, nb::list dims,
                          nb::handle out_, int threads) {
  const TensorList ws(ws_, "ws", 2);
  TensorList rows(rows_, "rows", 1), cols(cols_, "cols", 1);
  const TensorView out(out_, "out", true);
  const size_t count = ws.size();
  rows.expect_length(count);
  cols.expect_length(count);
  if (nb::len(dims) != count)
    throw argument_error("dims", std::to_string(count) + " entries", std::to_string(nb::len(dims)));
  rows.expect_type(state_type(ws.type()), "float64 where ws is, else float32");
  cols.expect_type(state_type(ws.type()), "float64 where ws is, else float32");
  expect_threads(threads);
  std::vector<ScaledSquares::Matrix> matrices(count);
  int64_t sums = 0;
  size_t k = 0;
  for (nb::handle dim_ : dims) {
    const int64_t dim = nb::cast<int64_t>(dim_);
    if (dim != 0 && dim != 1) throw argument_error("dims", "0 or 1", std::to_string(dim));
    rows.expect_rows(k, ws[k].rows, "the rows of its matrix");
    cols.expect_rows(k, ws[k].cols, "the columns of its matrix");
    matrices[k] = {ws[k].data, rows[k].data, cols[k].data, ws[k].rows, ws[k].cols, dim == 1};
    sums += dim == 1 ? ws[k].cols : ws[k].rows;
    ++k;
  }
  expect_dims(out, "out", out.ndim() == 1, "1 dimension");
  expect_size(out, "out", 0, sums, "the sums of all matrices");
  expect_type(out, "out", ws.type() == Type::f64);

  ScaledSquares args;
  args.matrices = matrices.data();
  args.count = static_cast<int64_t>(count);
  args.type = ws.type();
  args.out = out.data();
  args.threads = threads;
  nb::gil_scoped_release release;
  scaled_squares(args);
}

// What both steps take.
struct StepLists {
  TensorList ws, gs, ms, vs, rows, cols;

  StepLists(nb::list ws_, nb::list gs_, nb::list ms_, nb::list vs_, nb::list rows_, nb::list cols_)
      : ws(ws_, "ws", 2, TensorList::written),
        gs(gs_, "gs", 2),
        ms(ms_, "ms", 2, TensorList::written),
        vs(vs_, "vs", 2, TensorList::written),
        rows(rows_, "rows", 1),
        cols(cols_, "cols", 1) {
    for (const TensorList* each : {&gs, &ms, &vs, &rows, &cols}) each->expect_length(ws.size());
    gs.expect_type(ws.type(), "the type of ws");
    for (TensorList* each : {&ms, &vs, &rows, &cols})
      each->expect_type(state_type(ws.type()), "float64 where ws is, else float32");
    for (size_t k = 0; k < ws.size(); ++k) {
      for (TensorList* each : {&gs, &ms}) {
        each->expect_rows(k, ws[k].rows, "those of ws");
        each->expect_cols(k, ws[k].cols, "those of ws");
      }
      rows.expect_rows(k, ws[k].rows, "the rows of its matrix");
      cols.expect_rows(k, ws[k].cols, "the columns of its matrix");
    }
    std::vector<Span> spans;
    spans.reserve(3 * ws.size());
    for (const TensorList* each : {&ws, &ms, &vs}) each->add_to(spans);
    expect_apart(spans, "ws, ms, vs");
  }

  StepMatrix matrix(size_t k) const {
    return {ws[k].data,   ms[k].data,   vs[k].data, gs[k].data,
            rows[k].data, cols[k].data, ws[k].rows, ws[k].cols};
  }
};

void bound_scaled_adam(nb::list ws, nb::list gs, nb::list ms, nb::list vs, nb::list rows,
                       nb::list cols, nb::handle hyper, bool maximize, int64_t seed, int threads) {
  StepLists lists(ws, gs, ms, vs, rows, cols);
  std::vector<StepMatrix> matrices(lists.ws.size());
  for (size_t k = 0; k < matrices.size(); ++k) {
    lists.vs.expect_rows(k, lists.ws[k].rows, "those of ws");
    lists.vs.expect_cols(k, lists.ws[k].cols, "those of ws");
    matrices[k] = lists.matrix(k);
  }
  expect_threads(threads);
  ScaledAdam args;
  args.matrices = matrices.data();
  args.count = static_cast<int64_t>(matrices.size());
  args.type = lists.ws.type();
  args.hyper = read_hyper(hyper);
  args.maximize = maximize;
  args.seed = seed;
  args.threads = threads;
  nb::gil_scoped_release release;
  scaled_adam(args);
}

void bound_shared_adam(nb::list ws, nb::list gs, nb::list ms, nb::list vs, nb::list rows,
                       nb::list cols, nb::list row_groups_, nb::list col_groups_, nb::handle hyper,
                       bool maximize, int64_t seed, int threads) {
  StepLists lists(ws, gs, ms, vs, rows, cols);
  TensorList row_groups(row_groups_, "row_groups", 1, TensorList::indices);
  TensorList col_groups(col_groups_, "col_groups", 1, TensorList::indices);
  std::vector<SharedMatrix> matrices(lists.ws.size());
  row_groups.expect_length(matrices.size());
  col_groups.expect_length(matrices.size());
  for (size_t k = 0; k < matrices.size(); ++k) {
    const Item &w = lists.ws[k], &v = lists.vs[k];
    row_groups.expect_rows(k, w.rows, "the rows of its matrix");
    col_groups.expect_rows(k, w.cols, "the columns of its matrix");
    if (!row_groups[k].data) lists.vs.expect_rows(k, w.rows, "those of ws");
    if (!col_groups[k].data) lists.vs.expect_cols(k, w.cols, "those of ws");
    row_groups.expect_below(k, v.rows);
    col_groups.expect_below(k, v.cols);
    matrices[k] = {lists.matrix(k), static_cast<const int32_t*>(row_groups[k].data),
                   static_cast<const int32_t*>(col_groups[k].data), v.rows, v.cols};
  }
  expect_threads(threads);
  SharedAdam args;
  args.matrices = matrices.data();
  args.count = static_cast<int64_t>(matrices.size());
  args.type = lists.ws.type();
  args.hyper = read_hyper(hyper);
  args.maximize = maximize;
  args.seed = seed;
  args.threads = threads;
  nb::gil_scoped_release release;
  shared_adam(args);
}

std::vector<int> bound_random_bits(int64_t seed, int64_t step, int64_t tensor, int64_t offset,
                                   int64_t count) {
  if (offset < 0) throw argument_error("offset", "at least 0", std::to_string(offset));
  if (count < 0) throw argument_error("count", "at least 0", std::to_string(count));
  std::vector<uint16_t> bits(static_cast<size_t>(count));
  random_bits({seed, step, tensor, offset, count, bits.data()});
  return {bits.begin(), bits.end()};
}

}  // namespace

void bind_adam(nb::module_& m) {
  m.def("scaled_squares", &bound_scaled_squares, nb::arg("ws"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("dims"), nb::arg("out").none(), nb::arg("threads"),
        "out = for every matrix w (o, i) in turn its sums over i (dims 0) or o (1) of\n"
        "(row_o w_oi col_i)^2, rows (o,) and cols (i,) or None and out of float64 where ws is, else\n"
        "float32. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("scaled_adam", &bound_scaled_adam, nb::arg("ws"), nb::arg("gs"), nb::arg("ms"),
        nb::arg("vs"), nb::arg("rows"), nb::arg("cols"), nb::arg("hyper").none(),
        nb::arg("maximize"), nb::arg("seed"), nb::arg("threads"),
        "One AdamW step on ws by gs, moments ms and vs, in the coordinates w / (row_o col_i); hyper\n"
        "as in ops/_adam.py. bf16 is rounded stochastically where seed >= 0. The result does not\n"
        "depend on `threads`. TypeError, ValueError: an argument is not of these types or shapes.");
  m.def("shared_adam", &bound_shared_adam, nb::arg("ws"), nb::arg("gs"), nb::arg("ms"),
        nb::arg("vs"), nb::arg("rows"), nb::arg("cols"), nb::arg("row_groups"),
        nb::arg("col_groups"), nb::arg("hyper").none(), nb::arg("maximize"), nb::arg("seed"),
        nb::arg("threads"),
        "scaled_adam with vs (b, a), moments of means over groups: row_groups int32 (o,) below b and\n"
        "col_groups int32 (i,) below a, or None. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes, or a group is outside.");
  m.def("random_bits", &bound_random_bits, nb::arg("seed"), nb::arg("step"), nb::arg("tensor"),
        nb::arg("offset"), nb::arg("count"),
        "Random bits of stochastic rounding for `count` elements of a tensor from `offset` on.");
}

}  // namespace ddf
