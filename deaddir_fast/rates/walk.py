"""A captured forward pass with its values, for passes that follow something through it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deaddir_fast.nets.graph import Capture, capture
from deaddir_fast.rates.ops import MOVES, SAME


@dataclass
class Walk:
    """Values of every node on example inputs, and which nodes are parameters moved about.

    Attributes:
        capture: the graph.
        values: concrete value of every node (a tensor, or a tuple where an operation returns one).
        parameter: node -> (parameter name, its entry numbers laid out like the node's value), for
            parameters and what data movement makes of them.
        sources: placeholders that hold input tensors.
    """

    capture: Capture
    values: dict[fx.Node, Any] = field(default_factory=dict)
    parameter: dict[fx.Node, tuple[str, Tensor]] = field(default_factory=dict)
    sources: list[fx.Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.capture.graph.nodes)

    @property
    def output(self) -> fx.Node:
        """The node of the model's output tensor."""
        last = self.nodes[-1]
        return last.all_input_nodes[0]

    def value(self, x: Any) -> Any:
        """Arguments with nodes replaced by their values."""
        return pytree.tree_map(lambda a: self.values[a] if isinstance(a, fx.Node) else a, x)

    def linear(self, node: fx.Node) -> Callable[[Tensor], Any]:
        """The operation as a function of its first argument in fp64, the others as they were."""
        target: Any = node.target
        # Traced strides need not be those of a new tensor: a view becomes a reshape.
        target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
        rest, kwargs = self.value(node.args[1:]), dict(self.value(node.kwargs))
        if target is torch.ops.aten._to_copy.default:
            return lambda x: x.clone()
        if target is torch.ops.aten.neg.default:
            return lambda x: x.clone()
        kwargs.pop("dtype", None)
        return lambda x: target(x, *rest, **kwargs)


def floating(value: Any) -> bool:
    """Whether a value is a tensor of real numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def walk(model: nn.Module, inputs: Any) -> Walk:
    """Capture ``model`` on ``inputs`` and run it once."""
    captured = capture(model, inputs)
    run = Walk(captured)
    tensors = iter([*captured.parameters.items(), *((None, x) for x in captured.bind(inputs))])
    with torch.no_grad():
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                name, value = next(tensors)
                run.values[node] = value
                if name is not None:
                    numbers = torch.arange(value.numel()).reshape(value.shape)
                    run.parameter[node] = (name, numbers)
                else:
                    run.sources.append(node)
            elif node.op == "get_attr":
                run.values[node] = operator.attrgetter(node.target)(captured.module)
            elif node.op != "output":
                run.values[node] = node.target(*run.value(node.args), **run.value(node.kwargs))
                _follow_parameter(run, node)
    return run


def _follow_parameter(run: Walk, node: fx.Node) -> None:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    if source not in run.parameter:
        return
    name, numbers = run.parameter[source]
    if node.target in SAME:
        run.parameter[node] = (name, numbers)
    elif node.target in MOVES and isinstance(run.values[node], Tensor):
        run.parameter[node] = (name, run.linear(node)(numbers))
