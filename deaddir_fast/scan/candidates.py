"""Which directions of a layer are worth a ray, and what is expected of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.scan.nulls import Null
from deaddir_fast.scan.spectra import Spectrum


@dataclass(frozen=True, eq=False)
class Candidate:
    """One direction in a layer's weight.

    Attributes:
        label: what it is.
        part: "inputs" (A w = 0), "outputs" (G v = 0), "nearly dead" or "live".
        always: whether it is null on made-up inputs too.
        u: (o, width), unit norm.
        predicted: order the factors imply: inf where A w = 0, 1 where neither factor vanishes; None
            where they do not tell.
        why: the reason, a sentence.
        spread: largest over smallest positive eigenvalue of the factor whose null space it is in:
            how much rounding can turn a null vector towards the least of the others.
    """

    label: str
    part: str
    always: bool
    u: Tensor
    predicted: float | None
    why: str
    spread: float = 1.0


def kernel_of_norm(layer: Layer, scale: Tensor, shift: Tensor | None) -> Tensor | None:
    """Unit w with A w = 0 for inputs a = γ ⊙ x̂ + β of mean-free x̂: γ⁻¹, and −Σ β/γ for the bias.

    A zero γ_i makes e_i itself the kernel. None where a constant is left over and there is no
    bias to take it up.
    """
    gamma = scale.detach().double().flatten()
    beta = torch.zeros_like(gamma) if shift is None else shift.detach().double().flatten()
    zero = gamma == 0
    w = torch.zeros_like(gamma)
    if bool(zero.any()):
        w[int(zero.nonzero()[0])] = 1.0
    else:
        w = 1 / gamma
    constant = float(w @ beta)
    if layer.bias is not None:
        w = torch.cat([w, w.new_tensor([-constant])])
    elif abs(constant) > 1e-12 * float(w.norm() * beta.norm() + 1e-300):
        return None
    return (w / w.norm()).cpu()


def candidates(
    layer: Layer,
    spectra: tuple[Spectrum, Spectrum],
    nulls: tuple[Null, Null] | None,
    kernel: tuple[str, Tensor] | None,
    *,
    class_shift: bool,
    most: int,
    generator: torch.Generator,
) -> list[Candidate]:
    """Directions to look at, the most telling first; a live one for comparison comes last.

    Args:
        layer: whose weight they are in.
        spectra: of A and G.
        nulls: their null spaces; None for grouped maps.
        kernel: name of the LayerNorm that feeds the layer, and its kernel w.
        class_shift: whether a shift of all outputs is invisible (the softmax head).
        most: how many, without the live one.
        generator: of the random combinations.
    """
    a, g = spectra
    if nulls is None or a.rank == 0 or g.rank == 0:
        return []
    top_w, top_v = a.high, g.high
    found: list[Candidate] = []
    if kernel is not None:
        name, w = kernel
        cosine = math.hypot(
            *(float((part.mT @ w).norm()) for part in (nulls[0].always, nulls[0].here))
        )
        found.append(
            Candidate(
                f"kernel γ⁻¹ of {name}", "inputs", True, torch.outer(top_v, w), math.inf,
                f"LayerNorm's outputs have no component along γ⁻¹; |cos| with the null space of A "
                f"is {cosine:.8f}",
            )
        )  # fmt: skip
    v = torch.full((g.dimension,), g.dimension**-0.5, dtype=torch.float64)
    if class_shift:
        found.append(
            Candidate("shift of all classes", "outputs", True, torch.outer(v, top_w), math.inf,
                      "a softmax does not see a common shift of its logits")
        )  # fmt: skip
    outputs = nulls[1].without(v) if class_shift else nulls[1]
    for always in (False, True):
        count = outputs.count(always)
        if count:
            # A generic direction of the subspace: flat or not, it speaks for all of it.
            mixed = outputs.random(always, a.dimension, generator)
            found.append(
                Candidate(
                    _counted("output direction", count, always), "outputs", always,
                    mixed / mixed.norm(), None,
                    "no gradient reaches these outputs" + ("" if always else " on the data"),
                )
            )  # fmt: skip
    inputs = nulls[0] if kernel is None else nulls[0].without(kernel[1])
    for always in (False, True):
        count = inputs.count(always)
        if count:
            mixed = inputs.random(always, g.dimension, generator)
            found.append(
                Candidate(
                    _counted("input direction", count, always), "inputs", always,
                    mixed.mT / mixed.norm(), math.inf,
                    "the layer's inputs have no component there"
                    + ("" if always else " on the data"),
                )
            )  # fmt: skip
    if layer.form != "one":
        found.append(
            Candidate("smallest positive pair of A and G", "nearly dead", False,
                      torch.outer(g.low, a.low), 1.0,
                      "the least curvature K-FAC gives a direction it does not call dead")
        )  # fmt: skip
    found = [replace(c, spread=_spread({"inputs": a, "outputs": g}.get(c.part))) for c in found]
    live = Candidate(
        "largest pair of A and G", "live", False, torch.outer(top_v, top_w), 1.0,
        "the most curvature K-FAC gives a direction",
    )  # fmt: skip
    return [*found[:most], live]


def _spread(spectrum: Spectrum | None) -> float:
    return spectrum.top / spectrum.bottom if spectrum is not None and spectrum.bottom > 0 else 1.0


def _counted(what: str, count: int, always: bool) -> str:
    where = "" if always else " on the data"
    return f"{what} never used{where}" if count == 1 else f"{count} {what}s never used{where}"


def to_parameters(layer: Layer, u: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{parameter: (p, *shape)} from directions (p, o, width) of a layer's matrix.

    ``layer.directions`` rearranges entries, so its transpose puts them back.
    """
    names = [n for n in (layer.weight, layer.bias) if n is not None]
    zero = {n: u.new_zeros(len(u), *state[n].shape) for n in names}
    _, back = torch.func.vjp(lambda d: layer.directions(d), zero)  # type: ignore[misc]
    return back(u)[0]
