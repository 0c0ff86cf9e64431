"""What the figures share beyond the package's own plot style."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from deaddir_fast.scan.plots import CHAIN_COLOURS, DEAD, GREY, INK, LIVE

COLOURS = CHAIN_COLOURS
MARK: dict[str, Any] = {"ls": "", "marker": "o", "ms": 3.6, "mfc": "white", "mew": 0.9}

__all__ = ["COLOURS", "DEAD", "GREY", "INK", "LIVE", "MARK", "array", "note"]


def array(values: Any) -> np.ndarray:
    """Numbers from JSON, where "inf" and "nan" are strings."""
    return np.array(values, dtype=float)


def note(ax: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """A remark at axes coordinates, small and grey unless told otherwise."""
    style = {"fontsize": 8.5, "color": GREY, "ha": "left", "va": "bottom", "linespacing": 1.35}
    ax.text(x, y, text, transform=ax.transAxes, **(style | options))
