#include <nanobind/stl/vector.h>

#include <vector>

#include "bind_lists.h"
#include "block_adam.h"
#include "block_plan.h"
#include "block_products.h"

namespace nb = nanobind;

namespace ddf {
namespace {

// Matrices of a list and the blocks of their lines, checked; ids are below `count`.
std::vector<BlockMatrix> divided(const TensorList& ws, TensorList& blocks,
                                 const std::vector<int>& dims, int64_t count) {
  blocks.expect_length(ws.size());
  if (dims.size() != ws.size())
    throw argument_error("dims", std::to_string(ws.size()) + " entries",
                         std::to_string(dims.size()));
  std::vector<BlockMatrix> matrices;
  for (size_t k = 0; k < ws.size(); ++k) {
    const int dim = dims[k];
    if (dim != 0 && dim != 1) throw argument_error("dims", "0 or 1", std::to_string(dim));
    if (!blocks[k].data) throw argument_error("blocks", "an int32 vector for each matrix", "None");
    blocks.expect_rows(k, dim == 0 ? ws[k].rows : ws[k].cols, "one for every line of the matrix");
    blocks.expect_below(k, count);
    matrices.push_back(
        {ws[k].rows, ws[k].cols, dim, static_cast<const int32_t*>(blocks[k].data)});
  }
  return matrices;
}

void expect_like(TensorList& xs, const TensorList& ws) {
  xs.expect_length(ws.size());
  for (size_t k = 0; k < ws.size(); ++k) {
    xs.expect_rows(k, ws[k].rows, "as its matrix in ws");
    xs.expect_cols(k, ws[k].cols, "as its matrix in ws");
  }
}

std::vector<Array> arrays(const TensorList& xs) {
  std::vector<Array> out;
  for (size_t k = 0; k < xs.size(); ++k) out.push_back({xs[k].data, xs.type()});
  return out;
}

std::vector<void*> pointers(const TensorList& xs) {
  std::vector<void*> out;
  for (size_t k = 0; k < xs.size(); ++k) out.push_back(xs[k].data);
  return out;
}

void bound_block_products(nb::list ws_, nb::list gs_, nb::list blocks_, std::vector<int> dims,
                          nb::handle out_, int threads) {
  const TensorList ws(ws_, "ws", 2);
  TensorList gs(gs_, "gs", 2), blocks(blocks_, "blocks", 1, TensorList::indices);
  const TensorView out(out_, "out", true);
  expect_dims(out, "out", out.ndim() == 2 && out.size(0) == 2, "shape (2, count)");
  expect_like(gs, ws);
  gs.expect_type(ws.type(), "the type of ws");
  const bool fp64 = ws.type() == Type::f64;
  expect_type(out, "out", fp64);
  expect_threads(threads);
  const int64_t count = out.size(1);
  const BlockPlan plan = cut_pieces(divided(ws, blocks, dims, count));
  const std::vector<Array> w = arrays(ws), g = arrays(gs);
  std::vector<double> sums(static_cast<size_t>(2 * count));
  std::vector<double> partial(static_cast<size_t>(2 * plan.slots));

  BlockProducts args;
  args.cut = plan.cut();
  args.ws = w.data();
  args.gs = g.data();
  args.out = out.data();
  args.sums = sums.data();
  args.partial = partial.data();
  args.count = count;
  args.fp64 = fp64;
  args.threads = threads;
  nb::gil_scoped_release release;
  block_products(args);
}

void bound_block_adam(nb::list ws_, nb::list gs_, nb::list ms_, nb::list vs_, nb::list blocks_,
                      std::vector<int> dims, nb::handle norms_, nb::handle inner_,
                      nb::handle radial_, nb::handle reach_, nb::handle hyper_, bool maximize,
                      int64_t seed, int threads) {
  const TensorList ws(ws_, "ws", 2, TensorList::written);
  TensorList gs(gs_, "gs", 2), ms(ms_, "ms", 2, TensorList::written),
      vs(vs_, "vs", 2, TensorList::written), blocks(blocks_, "blocks", 1, TensorList::indices);
  const bool fp64 = ws.type() == Type::f64;
  for (TensorList* each : {&gs, &ms, &vs}) expect_like(*each, ws);
  gs.expect_type(ws.type(), "the type of ws");
  for (TensorList* each : {&ms, &vs})
    each->expect_type(state_type(ws.type()), "float64 where ws is, else float32");
  const TensorView norms(norms_, "norms"), inner(inner_, "inner"), radial(radial_, "radial"),
      reach(reach_, "reach");
  expect_dims(norms, "norms", norms.ndim() == 1, "shape (count,)");
  const int64_t count = norms.size(0);
  const TensorView* vectors[] = {&norms, &inner, &radial, &reach};
  const char* names[] = {"norms", "inner", "radial", "reach"};
  for (int k = 0; k < 4; ++k) {
    expect_dims(*vectors[k], names[k], vectors[k]->ndim() == 1, "shape (count,)");
    expect_size(*vectors[k], names[k], 0, count, "one entry for each block");
    if (ws.any()) expect_type(*vectors[k], names[k], fp64);
  }
  expect_threads(threads);
  BlockAdam args;
  args.hyper = read_hyper(hyper_);
  const BlockPlan plan = cut_groups(divided(ws, blocks, dims, count), count);
  const std::vector<Array> w = arrays(ws), g = arrays(gs);
  const std::vector<void*> m = pointers(ms), v = pointers(vs);
  std::vector<double> overlap(static_cast<size_t>(count));
  std::vector<double> partial(static_cast<size_t>(plan.slots));

  args.cut = plan.cut();
  args.ws = w.data();
  args.gs = g.data();
  args.ms = m.data();
  args.vs = v.data();
  args.norms = norms.data();
  args.inner = inner.data();
  args.radial = radial.data();
  args.reach = reach.data();
  args.overlap = overlap.data();
  args.partial = partial.data();
  args.maximize = maximize;
  args.seed = seed;
  args.fp64 = fp64;
  args.threads = threads;
  nb::gil_scoped_release release;
  block_adam(args);
}

}  // namespace

void bind_block(nb::module_& m) {
  m.def("block_products", &bound_block_products, nb::arg("ws"), nb::arg("gs"), nb::arg("blocks"),
        nb::arg("dims"), nb::arg("out").none(), nb::arg("threads"),
        "out = per block the sum of w^2 and of g w, for lists of matrices ws, gs whose rows (dims 0)\n"
        "or columns (1) belong to the blocks of int32 vectors; out (2, count) is float64 if ws is,\n"
        "else float32. The result does not depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes, or a block is none.");
  m.def("block_adam", &bound_block_adam, nb::arg("ws"), nb::arg("gs"), nb::arg("ms"), nb::arg("vs"),
        nb::arg("blocks"), nb::arg("dims"), nb::arg("norms").none(), nb::arg("inner").none(),
        nb::arg("radial").none(), nb::arg("reach").none(), nb::arg("hyper").none(),
        nb::arg("maximize"), nb::arg("seed"), nb::arg("threads"),
        "The step of deaddir_fast.ops.block_adam on lists of matrices, in place. The result does not\n"
        "depend on `threads`.\n"
        "TypeError, ValueError: an argument is not of these types or shapes, or a block is none.");
}

}  // namespace ddf
