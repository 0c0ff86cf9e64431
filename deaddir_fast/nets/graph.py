"""Capture a model's forward pass as a flat graph of ATen calls.

Everything this package propagates through a network (dual numbers, differences, Taylor
polynomials) is a rule per ATen operation applied to this graph, so that one capture serves any
``nn.Module``: no module types are special, in-place updates are functionalised, composite
operations are decomposed into few primitives, and parameters appear as placeholders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.nets.attention import whole_attention

aten = torch.ops.aten

# Kept whole because a rule on the whole operation is both cheaper and more accurate.
_KEEP = (aten._softmax.default, aten._log_softmax.default, aten.addmm.default, aten.baddbmm.default)

# Broken up although core ATen keeps them: their parts have simple exact rules.
_SPLIT = (
    aten.native_batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit,
    aten._fused_rms_norm,
    aten.gelu,
    aten.silu,
    aten.softplus,
    aten.mish,
    aten.elu,
    aten.celu,
    aten.hardtanh,
    aten.hardswish,
    aten.hardsigmoid,
    aten.leaky_relu,
    aten.logsumexp,
    aten._scaled_dot_product_flash_attention_for_cpu,
)


def _var(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    dims = list(range(x.ndim)) if dim is None or dim == [] else [d % x.ndim for d in dim]
    count = 1
    for d in dims:
        count *= x.shape[d]
    centred = x - x.mean(dims, keepdim=True)
    free = count - (1.0 if correction is None else correction)
    return (centred * centred).sum(dims, keepdim=keepdim) / free


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim)) if dim is None or dim == [] else list(dim)
    return _var(x, dims, correction=correction, keepdim=keepdim), x.mean(dims, keepdim=keepdim)


def _std(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    return _var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.ndim - len(shape), x.ndim))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    out = centred * scale
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, scale


def _group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    split = x.reshape(n, groups, channels // groups * size)
    out, mean, scale = _layer_norm(split, (split.shape[-1],), None, None, eps)
    out = out.reshape(x.shape)
    broadcast = (1, channels) + (1,) * (x.ndim - 2)
    out = out if weight is None else out * weight.reshape(broadcast)
    out = out if bias is None else out + bias.reshape(broadcast)
    return out, mean.reshape(n, groups), scale.reshape(n, groups)


_OWN = {
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}


@cache
def _decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    table.update(get_decompositions([op for op in _SPLIT if op is not None]))
    table.update(_OWN)
    for op in _KEEP:
        table.pop(op, None)
    return table


def model_output(value: Any) -> Tensor:
    """The output tensor of a model: a tensor, or that of a Hugging Face style output.

    Of the latter ``logits``, or ``last_hidden_state`` where there are none.
    """
    if isinstance(value, Tensor):
        return value
    for key in ("logits", "last_hidden_state"):
        found = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        if isinstance(found, Tensor):
            return found
    raise _check.fail(
        "model",
        value,
        "a forward that returns a tensor or an output with `logits` or `last_hidden_state`",
        TypeError,
    )


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def call_plainly(model: nn.Module, inputs: Any) -> Tensor:
    """Run ``model`` as it is; ``inputs`` is a tensor, a tuple or a dict."""
    args, kwargs = arguments(inputs)
    return model_output(model(*args, **kwargs))


def call_model(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Run ``model`` with some parameters replaced; ``inputs`` is a tensor, a tuple or a dict."""
    args, kwargs = arguments(inputs)
    return model_output(functional_call(model, dict(parameters), args, kwargs))


def batch_size(inputs: Any) -> int:
    """Number of samples n: the common leading extent of all tensors in ``inputs``."""
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    if not leaves:
        raise _check.fail(
            "inputs", inputs, "a tensor, or a tuple or dict holding tensors", TypeError
        )
    if any(x.ndim == 0 for x in leaves):
        raise ValueError(
            "inputs: expected every tensor to lead with a sample dimension, got a scalar"
        )
    sizes = {x.shape[0] for x in leaves}
    if len(sizes) != 1:
        raise ValueError(f"inputs: expected one common number of samples, got {sorted(sizes)}")
    return sizes.pop()


def slice_batch(inputs: Any, start: int, stop: int) -> Any:
    """Samples ``start:stop`` of every tensor in ``inputs``."""
    return pytree.tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) else x, inputs)


@contextmanager
def readable_attention() -> Iterator[None]:
    """Attention as plain matrix products and softmax: fused kernels have no forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def recorded() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` is true: models that ask read no values of tensors.

    Hugging Face models otherwise look into their masks for a faster kernel.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextmanager
def _shared_shapes() -> Iterator[None]:
    """One fake mode describes all values of a recording; torch makes one per value otherwise."""
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


def check_deterministic(model: nn.Module) -> None:
    """Refuse a model whose output is random or depends on the batch it is in.

    Raises:
        ValueError: naming the first dropout or batch norm that is in training mode.
    """
    for name, module in model.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            random = module.dropout > 0
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (random or batch):
            kind = type(module).__name__
            raise ValueError(
                f"model: expected a deterministic per-sample function, but {name or 'the model'} "
                f"({kind}) is in training mode; call model.eval() first"
            )


@dataclass(frozen=True)
class Capture:
    """A forward pass as ATen calls.

    Attributes:
        graph: a ``torch.fx`` graph; ``placeholder`` nodes come in the order parameters, then input
            tensors; every ``call_function`` is an ``OpOverload`` or ``operator.getitem``.
        names: parameter names in placeholder order.
        parameters: their values, detached.
        module: holds lifted constants as attributes (``get_attr`` nodes).
        last_use: for each node the nodes whose value is not needed after it ran.
    """

    graph: fx.Graph
    module: fx.GraphModule
    names: tuple[str, ...]
    parameters: dict[str, Tensor]
    last_use: dict[fx.Node, tuple[fx.Node, ...]] = field(repr=False)

    def bind(self, inputs: Any) -> list[Tensor]:
        """The input tensors in placeholder order."""
        return [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]

    def replay(self, inputs: Any) -> Tensor:
        """The output at the captured parameters."""
        (output,) = pytree.tree_leaves(
            self.module(list(self.parameters.values()), self.bind(inputs))
        )
        return output

    def names_no_extent(self) -> bool:
        """Whether nothing in the graph is tied to a number of samples.

        So where no call takes an integer but dimensions and all constants are parameters.
        """
        parameters = [x for x, _ in self.module.named_parameters()]
        return all(
            node.op in ("placeholder", "output")
            or (node.op == "get_attr" and node.target in parameters)
            or _takes_no_extent(node)
            for node in self.graph.nodes
        )


def _takes_no_extent(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = (x.name for x in node.target._schema.arguments)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    other = [value for name, value in given.items() if name not in ("dim", "dims")]
    return not any(isinstance(x, int) and type(x) is not bool for x in pytree.tree_leaves(other))


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _last_uses(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    seen: set[fx.Node] = set()
    dead: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in reversed(list(graph.nodes)):
        fresh = tuple(a for a in node.all_input_nodes if a not in seen)
        seen.update(fresh)
        dead[node] = fresh
    return dead


def capture(
    model: nn.Module,
    inputs: Any,
    *,
    names: Sequence[str] | None = None,
    keep_attention: bool = False,
) -> Capture:
    """Trace ``model`` on ``inputs`` with the named parameters as placeholders.

    Args:
        model: any module whose control flow depends on shapes only.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments); the sample dimension
            leads everywhere.
        names: parameters to expose; all of ``model.named_parameters()`` by default. The others
            are constants of the graph.
        keep_attention: record ``F.scaled_dot_product_attention`` as one ``deaddir::attention``
            (:mod:`deaddir_fast.nets.attention`) rather than as matrix products and softmax.

    Raises:
        ValueError: for an unknown parameter name, a model in training mode with dropout or batch
            norm, or a forward that reads the value of a tensor.
    """
    check_deterministic(model)
    available = {k: v.detach() for k, v in model.named_parameters()}
    if names is None:
        names = tuple(available)
    for name in names:
        if name not in available:
            raise ValueError(f"names: no parameter called {name!r} in the model")
    chosen = {k: available[k] for k in names}
    leaves, spec = pytree.tree_flatten(inputs)
    slots = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def forward(values: list[Tensor], tensors: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for slot, x in zip(slots, tensors, strict=True):
            filled[slot] = x
        state = dict(zip(chosen, values, strict=True))
        with whole_attention() if keep_attention else nullcontext():
            return call_model(model, state, pytree.tree_unflatten(filled, spec))

    example = (list(chosen.values()), [leaves[i].detach() for i in slots])
    try:
        with torch.no_grad(), readable_attention(), recorded(), _shared_shapes():
            module = make_fx(functionalize(forward), decomposition_table=_decompositions())(
                *example
            )
            if any(_mutates(node) for node in module.graph.nodes):
                # Decompositions may themselves mutate temporaries: once more, without them.
                module = make_fx(functionalize(module))(*example)
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise ValueError(
            "model: expected a forward whose control flow depends neither on the data nor on the "
            "parameters; it reads the value of a tensor"
        ) from error
    module.graph.eliminate_dead_code()
    return Capture(module.graph, module, tuple(chosen), chosen, _last_uses(module.graph))
