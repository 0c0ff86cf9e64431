"""Taylor rules of all ATen operations, and the one call that applies them."""

from __future__ import annotations

from typing import Any

# Importing a family registers its rules.
from deaddir_fast.nets import jet_elementary, jet_linear, jet_piecewise, jet_products
from deaddir_fast.nets.jet_context import RULES, Context
from deaddir_fast.nets.jet_fallback import nested_jvp

FAMILIES = (jet_linear, jet_products, jet_elementary, jet_piecewise)


def propagate(context: Context, op: Any, args: Any, kwargs: Any) -> Any:
    """Apply the rule of one operation, or nested jvp."""
    found = RULES.get(op)
    if found is None:
        return nested_jvp(context, op, args, kwargs)
    return found(context, *args, **kwargs)
