"""Recurrent modules: their steps are inside fused kernels, where no row can be seen."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from deaddir_fast.nets.layers.base import Adapter
from deaddir_fast.nets.layers.registry import Unsupported, register


@register(nn.RNNBase, nn.RNNCellBase)
def recurrent(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Recurrent modules are left out.

    Raises:
        Unsupported: always.
    """
    raise Unsupported("the steps of a recurrent module are not seen from outside")


@register(nn.Bilinear)
def bilinear(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """A map of two inputs is left out.

    Raises:
        Unsupported: always.
    """
    raise Unsupported("a bilinear map is not a linear map of rows")
