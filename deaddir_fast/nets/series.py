"""Truncated power series in one variable t whose coefficients are tensors.

A :class:`Series` holds u(t) = u_0 + u_1 t + ... + u_K t^K. Coefficients known to be zero are
``None`` and cost nothing. Products convolve; elementary functions v = phi(u) follow the recurrence
of the differential equation they satisfy (Griewank & Walther 2008, *Evaluating Derivatives*,
chapter 13), so every function costs O(K^2) products of tensors, whatever it is composed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Coefficient = Tensor | None
Unary = Callable[[Tensor], Tensor]


class Series:
    """Coefficients ``c[0..K]`` of t^0..t^K; ``c[0]`` is a tensor, the others a tensor or ``None``.

    All coefficients have the shape of the value they expand.
    """

    __slots__ = ("c",)

    def __init__(self, c: Sequence[Coefficient]):
        self.c = list(c)

    @property
    def order(self) -> int:
        """K, the last power kept."""
        return len(self.c) - 1

    @property
    def base(self) -> Tensor:
        """The value at t = 0."""
        value = self.c[0]
        assert value is not None, "a series has a base value"
        return value

    def map(self, function: Unary) -> Series:
        """Apply a linear function to every coefficient."""
        return Series([None if x is None else function(x) for x in self.c])

    def with_base(self, base: Tensor) -> Series:
        """The same series with another constant term."""
        return Series([base, *self.c[1:]])


def constant(value: Tensor, order: int) -> Series:
    """The series that does not depend on t."""
    return Series([value] + [None] * order)


def _plus(total: Coefficient, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _expand(x: Coefficient, shape: torch.Size) -> Coefficient:
    return x if x is None or x.shape == shape else x.expand(shape)


def add(a: Series, b: Series, alpha: float = 1.0) -> Series:
    """a + alpha b, with broadcasting."""
    shape = torch.broadcast_shapes(a.base.shape, b.base.shape)
    out: list[Coefficient] = []
    for x, y in zip(a.c, b.c, strict=True):
        if y is not None and alpha != 1:
            y = y * alpha
        out.append(_expand(y if x is None else x if y is None else x + y, shape))
    return Series(out)


def linear(function: Callable[..., Tensor], *series: Series) -> Series:
    """A map that is linear in all arguments jointly; missing coefficients count as zeros."""
    out: list[Coefficient] = []
    for parts in zip(*(s.c for s in series), strict=True):
        if all(x is None for x in parts):
            out.append(None)
            continue
        filled = [
            torch.zeros_like(s.base) if x is None else x for s, x in zip(series, parts, strict=True)
        ]
        out.append(function(*filled))
    return Series(out)


def bilinear(
    function: Callable[[Tensor, Tensor], Tensor], a: Series, b: Series, *, stack: bool = True
) -> Series:
    """A map linear in each argument: coefficients convolve.

    The factor with fewer non-zero coefficients is looped over; those of the other factor go
    through one batched call each time (``stack``), so a layer on a straight ray of weights costs
    two matrix products of K stacked inputs instead of 2K small ones.
    """
    order = a.order
    swap = sum(x is not None for x in a.c) > sum(x is not None for x in b.c)
    few, many = (b.c, a.c) if swap else (a.c, b.c)
    out: list[Coefficient] = [None] * (order + 1)

    def call(x: Tensor, y: Tensor) -> Tensor:
        return function(y, x) if swap else function(x, y)

    for i, x in enumerate(few):
        if x is None:
            continue
        # The base value has no direction dimension: kept apart, it is not copied per direction.
        first = many[0]
        if first is not None:
            out[i] = _plus(out[i], call(x, first))
        live = [j for j in range(1, order + 1 - i) if many[j] is not None]
        if stack and len(live) > 1:
            block = torch.stack([many[j] for j in live])  # type: ignore[misc]  # live: not None
            terms = torch.vmap(call, in_dims=(None, 0))(x, block).unbind(0)
        else:
            terms = tuple(call(x, many[j]) for j in live)  # type: ignore[arg-type]  # as above
        for j, term in zip(live, terms, strict=True):
            out[i + j] = _plus(out[i + j], term)
    return Series(out)


def multiply(a: Series, b: Series) -> Series:
    """a b, elementwise with broadcasting."""
    shape = torch.broadcast_shapes(a.base.shape, b.base.shape)
    product = bilinear(torch.mul, a, b, stack=False)
    return Series([_expand(x, shape) for x in product.c])


def square(a: Series) -> Series:
    """a^2, each cross product formed once."""
    out: list[Coefficient] = []
    for k in range(a.order + 1):
        total: Coefficient = None
        for i in range(k // 2 + 1):
            x, y = a.c[i], a.c[k - i]
            if x is not None and y is not None:
                term = x * y
                total = _plus(total, term if 2 * i == k else 2 * term)
        out.append(total)
    return Series(out)


def divide(a: Series, b: Series) -> Series:
    """a / b, elementwise with broadcasting."""
    shape = torch.broadcast_shapes(a.base.shape, b.base.shape)
    out: list[Coefficient] = []
    for k in range(a.order + 1):
        total = a.c[k]
        for j in range(1, k + 1):
            x, y = b.c[j], out[k - j]
            if x is not None and y is not None:
                total = -(x * y) if total is None else total - x * y
        out.append(None if total is None else _expand(total / b.base, shape))
    return Series(out)


class _Chain:
    """Builds v from v' = w u' while w itself may depend on the coefficients found so far."""

    def __init__(self, u: Series, start: Tensor):
        self.u = u
        self.v: list[Coefficient] = [start]

    def next(self, w: Sequence[Coefficient]) -> Coefficient:
        """v_k = (1/k) sum_{j=1..k} j u_j w_{k-j}."""
        k = len(self.v)
        total: Coefficient = None
        for j in range(1, k + 1):
            x, y = self.u.c[j], w[k - j]
            if x is not None and y is not None:
                total = _plus(total, (j / k) * (x * y))
        self.v.append(total)
        return total


def primitive(u: Series, start: Tensor, w: Series) -> Series:
    """v with v(0) = ``start`` and dv/dt = w du/dt."""
    chain = _Chain(u, start)
    for _ in range(u.order):
        chain.next(w.c)
    return Series(chain.v)


def exp(u: Series) -> Series:
    """e^u."""
    chain = _Chain(u, u.base.exp())
    for _ in range(u.order):
        chain.next(chain.v)
    return Series(chain.v)


def expm1(u: Series) -> Series:
    """e^u - 1."""
    return exp(u).with_base(u.base.expm1())


def _log(u: Series, start: Tensor) -> Series:
    out: list[Coefficient] = [start]
    for k in range(1, u.order + 1):
        total = u.c[k]
        for j in range(1, k):
            x, y = u.c[k - j], out[j]
            if x is not None and y is not None:
                term = (j / k) * (x * y)
                total = -term if total is None else total - term
        out.append(None if total is None else total / u.base)
    return Series(out)


def log(u: Series) -> Series:
    """log u."""
    return _log(u, u.base.log())


def log1p(u: Series) -> Series:
    """log(1 + u)."""
    return _log(u.with_base(1 + u.base), u.base.log1p())


def tanh(u: Series) -> Series:
    """tanh u, from v' = (1 - v^2) u'."""
    # 1 - tanh^2 as a product: exact where tanh saturates.
    slope = 4 * (2 * u.base).sigmoid() * (-2 * u.base).sigmoid()
    return _quadratic_flow(u, u.base.tanh(), 0.0, slope)


def sigmoid(u: Series) -> Series:
    """1 / (1 + e^-u), from v' = (v - v^2) u'."""
    v = u.base.sigmoid()
    return _quadratic_flow(u, v, 1.0, v * (-u.base).sigmoid())


def _quadratic_flow(u: Series, start: Tensor, slope: float, w0: Tensor) -> Series:
    """v' = (const + slope v - v^2) u'; ``w0``: the bracket at t = 0, free of cancellation."""
    chain = _Chain(u, start)
    w: list[Coefficient] = [w0]
    for k in range(1, u.order + 1):
        chain.next(w)
        total: Coefficient = None
        for i in range(k // 2 + 1):
            x, y = chain.v[i], chain.v[k - i]
            if x is not None and y is not None:
                term = x * y
                total = _plus(total, term if 2 * i == k else 2 * term)
        last = chain.v[k]
        if total is not None:
            total = -total
        if slope and last is not None:
            total = _plus(total, slope * last)
        w.append(total)
    return Series(chain.v)


def erf(u: Series) -> Series:
    """erf u, from v' = 2 / sqrt(pi) exp(-u^2) u'."""
    density = exp(square(u).map(torch.neg)).map(lambda x: x * (2 / math.sqrt(math.pi)))
    return primitive(u, u.base.erf(), density)


def _circular(u: Series, s0: Tensor, c0: Tensor, sign: float) -> tuple[Series, Series]:
    """s' = c u', c' = sign s u'."""
    s, c = _Chain(u, s0), _Chain(u, c0)
    for _ in range(u.order):
        s.next(c.v)
        total = c.next(s.v)
        if total is not None and sign < 0:
            c.v[-1] = -total
    return Series(s.v), Series(c.v)


def sin_cos(u: Series) -> tuple[Series, Series]:
    """sin u and cos u."""
    return _circular(u, u.base.sin(), u.base.cos(), -1.0)


def sinh_cosh(u: Series) -> tuple[Series, Series]:
    """sinh u and cosh u."""
    return _circular(u, u.base.sinh(), u.base.cosh(), 1.0)


def power(u: Series, exponent: float) -> Series:
    """u^a: by repeated squaring for whole a >= 0 (valid where u_0 = 0), else from u v' = a v u'."""
    if exponent >= 0 and float(exponent).is_integer():
        return _whole_power(u, int(exponent))
    return flow_power(u, u.base.pow(exponent), exponent)


def _whole_power(u: Series, n: int) -> Series:
    if n == 0:
        return constant(torch.ones_like(u.base), u.order)
    if n == 1:
        return u
    half = square(_whole_power(u, n // 2))
    return multiply(half, u) if n % 2 else half


def flow_power(u: Series, start: Tensor, exponent: float) -> Series:
    """u^a with the base value supplied (an accurate ``sqrt``, ``rsqrt``, ...); needs u_0 != 0."""
    out: list[Coefficient] = [start]
    for k in range(1, u.order + 1):
        total: Coefficient = None
        for j in range(1, k + 1):
            x, y = u.c[j], out[k - j]
            if x is not None and y is not None:
                total = _plus(total, ((exponent * j - (k - j)) / k) * (x * y))
        out.append(None if total is None else total / u.base)
    return Series(out)


def reciprocal(u: Series) -> Series:
    """1 / u."""
    return flow_power(u, u.base.reciprocal(), -1.0)


def sqrt(u: Series) -> Series:
    """Square root; needs u_0 > 0."""
    return flow_power(u, u.base.sqrt(), 0.5)


def rsqrt(u: Series) -> Series:
    """1 / sqrt(u); needs u_0 > 0."""
    return flow_power(u, u.base.rsqrt(), -0.5)


def softmax(u: Series, dim: int) -> Series:
    """Softmax over ``dim``; entries of -inf have weight zero."""
    base = torch.softmax(u.base, dim)
    if u.base.shape[dim] == 0:
        return constant(base, u.order)
    # v' = v (u' - <v, u'>): every intermediate is an average under v, so nothing can overflow.
    out: list[Coefficient] = [base]
    mean: list[Coefficient] = []
    for k in range(1, u.order + 1):
        # mean_m = coefficient m of <v, u'>, for m = k - 1.
        mean.append(_mean_slope(u, out, k - 1, dim))
        total: Coefficient = None
        for j in range(1, k + 1):
            slope = u.c[j]
            y = out[k - j]
            if y is None:
                continue
            centre = mean[j - 1]
            if slope is None and centre is None:
                continue
            if slope is None:
                centred = -centre  # type: ignore[operator]  # one of the two is a tensor
            else:
                centred = j * slope if centre is None else j * slope - centre
            total = _plus(total, (centred * y) / k)
        out.append(total)
    return Series(out)


def _mean_slope(u: Series, v: list[Coefficient], m: int, dim: int) -> Coefficient:
    total: Coefficient = None
    for j in range(1, m + 2):
        x, y = u.c[j], v[m + 1 - j]
        if x is not None and y is not None:
            total = _plus(total, j * (x * y).sum(dim, keepdim=True))
    return total


def log_softmax(u: Series, dim: int) -> Series:
    """u - logsumexp(u) over ``dim``; (log sum e^u)' = <softmax(u), u'>."""
    v = softmax(u, dim)
    out: list[Coefficient] = [torch.log_softmax(u.base, dim)]
    for k in range(1, u.order + 1):
        mean = _mean_slope(u, v.c, k - 1, dim)
        x = u.c[k]
        if mean is None:
            out.append(x)
            continue
        mean = (mean / k).expand(u.base.shape)
        out.append(-mean if x is None else x - mean)
    return Series(out)


def _narrow(u: Series, dim: int, start: int, size: int) -> Series:
    return u.map(lambda x: x.narrow(dim, start, size))


def product(u: Series, dim: int) -> Series:
    """Product over one dimension, halving it each time."""
    while u.base.shape[dim] > 1:
        size = u.base.shape[dim]
        half = size // 2
        pair = multiply(
            _narrow(u, dim, 0, half),
            _narrow(u, dim, half, half),
        )
        if size % 2:
            u = linear(lambda a, b: torch.cat([a, b], dim), pair, _narrow(u, dim, size - 1, 1))
        else:
            u = pair
    return u
