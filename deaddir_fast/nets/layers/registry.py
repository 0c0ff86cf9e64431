"""Which modules are layers: a builder for each family, found by type or by its look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from deaddir_fast.nets.layers.base import Adapter

#: build(name of the module, module, names of its parameters) -> adapter
Build = Callable[[str, nn.Module, Mapping[str, str]], Adapter]


class Unsupported(Exception):
    """A module that looks like a layer but is not computed as one; says why."""


_BY_TYPE: dict[type[nn.Module], Build] = {}
_BY_LOOK: list[tuple[Callable[[nn.Module], bool], Build]] = []
_LAST: list[tuple[Callable[[nn.Module], bool], Build]] = []


def register(*types: type[nn.Module]) -> Callable[[Build], Build]:
    """Decorator: this builder makes adapters for these types and their subclasses."""

    def decorate(build: Build) -> Build:
        for kind in types:
            _BY_TYPE[kind] = build
        return build

    return decorate


def register_look(
    looks: Callable[[nn.Module], bool], *, last: bool = False
) -> Callable[[Build], Build]:
    """Decorator: this builder makes adapters for modules of which ``looks`` is true.

    With ``last`` only where no other builder does.
    """

    def decorate(build: Build) -> Build:
        (_LAST if last else _BY_LOOK).append((looks, build))
        return build

    return decorate


def _builder(module: nn.Module) -> Build | None:
    for kind in type(module).__mro__:
        if kind in _BY_TYPE:
            return _BY_TYPE[kind]
    return next((build for looks, build in (*_BY_LOOK, *_LAST) if looks(module)), None)


@dataclass(frozen=True)
class Skipped:
    """Parameters no layer stands for.

    Attributes:
        name, type: of the module that holds them.
        parameters: how many numbers.
        why: the reason, a phrase.
    """

    name: str
    type: str
    parameters: int
    why: str


def adapters(model: nn.Module) -> tuple[dict[str, Adapter], list[Skipped]]:
    """Adapters of all modules of a model, and the modules with parameters that have none.

    Returns:
        {module name: adapter} in the order of ``named_modules``, and what is left out. A module
        that occurs several times is named once; a parameter that two modules hold has one name.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Adapter] = {}
    skipped: list[Skipped] = []
    rest: list[tuple[str, nn.Module, str]] = []
    covered: dict[nn.Module, set[str]] = {}  # what adapters of the modules around it stand for
    for name, module in model.named_modules():
        own = {
            key: canonical[id(p)]
            for key, p in module.named_parameters(remove_duplicate=False)
            if id(p) in canonical
        }
        done = covered.get(module, set())
        if not set(own.values()) - done:
            continue
        build = _builder(module)
        why = "no rule for this type"
        if build is not None:
            try:
                adapter = build(name, module, own)
            except Unsupported as reason:
                why = str(reason)
            else:
                found[name] = adapter
                done = {p for layer in adapter.layers for p in (layer.weight, layer.bias) if p}
                why = "beside the parameters that its layers have"
                for part in module.modules():
                    covered.setdefault(part, set()).update(done)
        if any(id(p) in canonical for p in module.parameters(recurse=False)):
            rest.append((name, module, why))
    # A parameter that a layer of another module has too (a bias held twice) is accounted for; the
    # survey sees to it that nothing else uses it.
    layers = (layer for adapter in found.values() for layer in adapter.layers)
    known = {p for layer in layers for p in (layer.weight, layer.bias) if p}
    for name, module, why in rest:
        left = {
            key: p
            for key, p in module.named_parameters(recurse=False)
            if canonical.get(id(p)) not in known
        }
        if left:
            label = name or "(model)"
            label = f"{label}.{', '.join(left)}" if name in found else label
            count = sum(p.numel() for p in left.values())
            skipped.append(Skipped(label, type(module).__name__, count, why))
    return found, skipped
