"""What gradient flow conserves because of a symmetry.

L(h θ) = L(θ) gives <T_X(θ), ∇L> = 0 for every orbit tangent T_X, hence <T_X(θ), θ'> = 0 along
θ' = −∇L. Where the field T_X is the gradient of a function Q_X this says that Q_X stays put
(Noether's theorem, with a Euclidean metric in place of a symplectic form; for linear networks
Arora, Cohen & Hazan 2018, for ReLU networks Du, Hu & Lee 2018). Steps of finite length, momentum,
adaptive scales and weight decay break it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State
from deaddir_fast.gauge.batch_norm import NormRescaling
from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.entries import blocks, squares
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.rescaling import Rescaling
from deaddir_fast.gauge.shift import ClassShift, Translation


def conserved(gauge: Gauge, state: State) -> Tensor | None:
    """The quantities that Euclidean gradient flow conserves because of a gauge, in fp64.

    - rescaling: (h,) Σ e ‖entries‖² over the slots of each unit, e their exponents: ‖in_j‖² (bias
      included) − ‖out_j‖²;
    - complex rescaling: (h,) Σ e |entries|² of each pair: |q_j|² − |k_j|². Nothing for its phases,
      see below;
    - GL blocks: (blocks, d, d) W_in W_inᵀ − W_outᵀ W_out (bias as a column of W_in). Tangents of
      symmetric X alone: those of rotations conserve no function of the parameters;
    - class shift, and the shift that a mean or a softmax takes away further inside: the sum over
      classes of the weight's rows (and of the bias), shape of the gauge;
    - translation that nothing takes back (attention key bias): the bias entries themselves;
    - translation b + v, c − W v: None. Its tangent has no component along W, so Q would be a
      function of b and c with ∂Q/∂c = −W ∂Q/∂b for every W. What holds is b' = Wᵀ c', at each
      moment;
    - rescaling through batch norms in evaluation mode: None. Its tangent has β' = −γ s μ beside
      γ' = −γ. As a one-form T it is not closed, dT = −s μ dγ ∧ dβ, and T ∧ dT is not zero either,
      so that no multiple of it is the differential of a function;
    - permutation: None, it has no tangents.

    Rotations (the phases of pairs, antisymmetric X of GL) conserve nothing either, for the same
    reason: T = Σ (w_1 dw_2 − w_2 dw_1) over two or more pairs. <T, θ'> = 0 is all there is.

    Args:
        gauge: as returned by ``find``.
        state: parameter name to tensor, of any floating dtype.

    Raises:
        ValueError: a parameter is missing from ``state``.
        TypeError: a kind of gauge that is none of these.
    """
    found = balance(gauge, state)
    return None if found is None else found[0]


def balance(gauge: Gauge, state: State) -> tuple[Tensor, Tensor] | None:
    """(Q, P): what is conserved, and the size of the parts it is a difference or a sum of."""
    if not isinstance(gauge, Gauge):
        raise _check.fail("gauge", gauge, "a Gauge", TypeError)
    gauge._check_state(state)
    if isinstance(gauge, NormRescaling | Permutation):
        return None
    if isinstance(gauge, Rescaling | ComplexRescaling):
        parts = [(s.exponent, squares(state[s.parameter], s, {})) for s in gauge.slots]
        device = parts[0][1].device
        terms = torch.stack([e * q.to(device) for e, q in parts])
        return terms.sum(0), terms.abs().sum(0)
    if isinstance(gauge, GeneralLinear):
        products = []
        for slot in gauge.slots:
            x = blocks(state[slot.parameter], slot, {}, gauge.shape)
            products.append((slot.exponent, x @ x.mT))
        device = products[0][1].device
        q = torch.stack([e * m.to(device) for e, m in products]).sum(0)
        traces = [m.diagonal(dim1=1, dim2=2).sum(1).to(device) for _, m in products]
        return q, torch.stack(traces).sum(0)
    if isinstance(gauge, ClassShift):
        w = state[gauge.weight].detach().double()
        q, p = (v.sum(gauge.class_axis).reshape(-1) for v in (w, w.abs()))
        if gauge.bias is not None:
            b = state[gauge.bias].detach().double()
            q = torch.cat([q, b.sum().reshape(1).to(q.device)])
            p = torch.cat([p, b.abs().sum().reshape(1).to(p.device)])
        return q, p
    if isinstance(gauge, Translation):
        if gauge.readers:
            return None
        b = state[gauge.source].detach()[gauge.entries].double()
        return b, b.abs()
    raise TypeError(f"gauge: nothing is known of {type(gauge).__name__} {gauge.name!r}")
