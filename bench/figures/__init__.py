"""Figures drawn from measurements made then and there: ``python -m bench.figures [names]``.

Every module here whose name does not start with an underscore is a figure. It has

    SIZE = (width, height)                    in inches
    def measure(quick: bool) -> dict          numbers, as JSON has them; quick: coarse, for tests
    def draw(figure: Figure, measured: dict)  on an empty matplotlib Figure, from the JSON alone

and the first line of its docstring is its caption. Nothing else is to be registered.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Entry:
    """One figure."""

    name: str
    caption: str
    size: tuple[float, float]
    measure: Callable[[bool], dict[str, Any]]
    draw: Callable[[Figure, dict[str, Any]], None]


def names() -> tuple[str, ...]:
    """All figures, by the names of their modules."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"))


def load(name: str) -> Entry:
    """Import one figure; a module that breaks breaks only itself."""
    module = importlib.import_module(f"{__name__}.{name}")
    caption = (module.__doc__ or name).strip().splitlines()[0]
    return Entry(name, caption, module.SIZE, module.measure, module.draw)
