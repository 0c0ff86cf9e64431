"""Kronecker factors of a network's Fisher, layer by layer, in memory and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast._files import replace_file
from deaddir_fast.fisher.accumulate import unpack

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Sums from which the factors A and G of one layer follow.

    Unpacks as ``A, G, count``. With F the exact block of the layer's weight (o, i), trailing bias
    column included, A ⊗ G approximates F (K-FAC, Martens & Grosse 2015; with shared weights in the
    expand or reduce form of Eschenhagen et al. 2023), exactly where inputs and gradients are
    independent.

    Attributes:
        name, kind: of the layer ("linear", "conv", "embedding", "norm", ...).
        weight, bias: names of its parameters.
        form: of A: "matrix"; "diagonal" (embeddings: token frequencies); "one" (norms: A = 1 and G
            is the exact block of the scale and shift).
        output_form: of G: "matrix", or "diagonal" for the head of a large vocabulary, whose G is
            never formed (use ``dd.ops.linear_softmax_fisher`` for its quadratic forms).
        inputs, outputs: i and o. ``groups``: number of independent maps, 1 for most.
        A_sum: packed triangle(s) of Σ a aᵀ without the trailing 1, or the diagonal of counts.
        A_ones: Σ a, for the trailing 1; empty where no layer with this A has a bias.
        G_sum: packed triangle(s) of Σ g gᵀ, or its diagonal.
        rows: number of rows a summed, over samples and tokens.
        samples: number of samples.
        shares_inputs_with: an earlier layer with the same A, or None.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    form: str
    output_form: str
    inputs: int
    outputs: int
    groups: int
    A_sum: Tensor = field(repr=False)
    A_ones: Tensor = field(repr=False)
    G_sum: Tensor = field(repr=False)
    rows: int
    samples: int
    shares_inputs_with: str | None = None

    @property
    def A(self) -> Tensor:
        """Mean of a aᵀ over samples and tokens.

        (width, width) with a trailing 1 where there is a bias; (i,) token frequencies of an
        embedding; (1, 1) for a norm; (groups, width, width) with groups.
        """
        if self.form == "one":
            return self.G_sum.new_ones(1, 1)
        rows = max(1, self.rows)
        if self.form == "diagonal":
            return self.A_sum / rows
        if self.groups > 1:
            blocks = [
                self._with_ones(packed, ones, rows)
                for packed, ones in zip(self.A_sum, self.A_ones, strict=True)
            ]
            return torch.stack(blocks)
        return self._with_ones(self.A_sum, self.A_ones, rows)

    def _with_ones(self, packed: Tensor, ones: Tensor, rows: int) -> Tensor:
        square = unpack(packed, self.inputs) / rows
        if self.bias is None:
            return square
        edge = (ones / rows).to(square.dtype)
        out = square.new_ones(self.inputs + 1, self.inputs + 1)
        out[:-1, :-1] = square
        out[-1, :-1] = out[:-1, -1] = edge
        return out

    @property
    def G(self) -> Tensor:
        """Mean over samples of Σ_t g gᵀ: (o, o), (groups, o, o), or (o,) if a diagonal."""
        samples = max(1, self.samples)
        if self.output_form == "diagonal":
            return self.G_sum / samples
        if self.groups > 1:
            return torch.stack([unpack(p, self.outputs) for p in self.G_sum]) / samples
        return unpack(self.G_sum, self.outputs) / samples

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.samples

    def __iter__(self) -> Iterator[Any]:
        return iter((self.A, self.G, self.count))

    def __getitem__(self, index: int) -> Any:
        return (self.A, self.G, self.count)[index]

    def __len__(self) -> int:
        return 3

    def __repr__(self) -> str:
        return (
            f"LayerFactors({self.name!r}, {self.kind}, inputs={self.inputs}, "
            f"outputs={self.outputs}, rows={self.rows}, samples={self.samples})"
        )

    def heads(self, count: int) -> tuple[Tensor, ...]:
        """Diagonal blocks of G, one for each of ``count`` heads of equal width."""
        if self.output_form != "matrix" or count < 1 or self.outputs % count:
            raise _check.fail("count", count, f"a divisor of the {self.outputs} outputs")
        width, g = self.outputs // count, self.G
        return tuple(g[k : k + width, k : k + width] for k in range(0, self.outputs, width))


class KronFactors(Mapping[str, LayerFactors]):
    """Factors of all layers: ``factors[name]`` unpacks as (A, G, count).

    Attributes:
        meta: which Fisher ("exact", "mc", "empirical"), likelihood, draws, seed, dtype, K-FAC form,
            versions, and for partial results the indices of their shards.
        notes: what limits these numbers.
    """

    def __init__(
        self, layers: Mapping[str, LayerFactors], meta: Mapping[str, Any], notes: Sequence[str] = ()
    ) -> None:
        self._layers = dict(layers)
        self.meta = dict(meta)
        self.notes = tuple(notes)

    def __getitem__(self, name: str) -> LayerFactors:
        if name not in self._layers:
            known = ", ".join(list(self._layers)[:8])
            raise KeyError(f"no factors of a layer called {name!r} (there are {known}, …)")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        samples = max((f.samples for f in self._layers.values()), default=0)
        return (
            f"KronFactors({len(self)} layers, {self.meta.get('fisher')}, {samples} samples, "
            f"{self.bytes() / 2**20:.1f} MiB)"
        )

    def bytes(self) -> int:
        """Memory of the sums; a shared A counts once."""
        seen: dict[int, int] = {}
        for f in self._layers.values():
            for t in (f.A_sum, f.G_sum):
                seen[t.data_ptr()] = t.numel() * t.element_size()
        return sum(seen.values())

    @classmethod
    def merge(cls, parts: Sequence[KronFactors]) -> KronFactors:
        """Add up partial results over different samples.

        The parts are added in the order of their shards, in fp64, whatever the order they are
        given in: the same list of shards always gives the same bits. Parts without shards are added
        in the order given.

        Raises:
            ValueError: no parts, parts of different kinds, or a shard that occurs twice.
        """
        if not parts:
            raise ValueError("parts: expected at least one, got none")
        if len({tuple(_kind(f) for f in p.values()) for p in parts}) != 1:
            raise ValueError("parts: expected the same layers in each")
        plain = [{k: v for k, v in p.meta.items() if k != "shards"} for p in parts]
        if any(m != plain[0] for m in plain):
            keys = {k for m in plain for k in m}
            different = sorted(k for k in keys if any(m.get(k) != plain[0].get(k) for m in plain))
            raise ValueError(f"parts: expected one kind of factors, they differ in {different}")
        shards = [tuple(p.meta.get("shards", ())) for p in parts]
        flat = [s for some in shards for s in some]
        if len(set(flat)) != len(flat):
            raise ValueError(f"parts: expected each shard once, got {sorted(flat)}")
        ordered = [p for _, p in sorted(zip(shards, parts, strict=True), key=lambda x: x[0])]
        layers: dict[str, LayerFactors] = {}
        for name, head in ordered[0].items():
            some = [p[name] for p in ordered]
            leader = head.shares_inputs_with
            if leader is not None and all(f.shares_inputs_with == leader for f in some):
                a, ones = layers[leader].A_sum, layers[leader].A_ones
            else:
                leader, a = None, _total([f.A_sum for f in some])
                # Σ a is kept where some layer with a bias needs it, which the parts may differ in.
                kept = all(f.A_ones.numel() for f in some)
                ones = _total([f.A_ones for f in some]) if kept else some[0].A_ones.new_zeros(0)
            layers[name] = replace(
                head,
                A_sum=a,
                A_ones=ones,
                G_sum=_total([f.G_sum for f in some]),
                rows=sum(f.rows for f in some),
                samples=sum(f.samples for f in some),
                shares_inputs_with=leader,
            )
        notes = dict.fromkeys(n for p in ordered for n in p.notes)
        return cls(layers, {**plain[0], "shards": sorted(flat)}, tuple(notes))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write factors.safetensors and factors.json; each file is whole or not there.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        table = []
        for f in self._layers.values():
            if f.shares_inputs_with is None:
                tensors[f"A/{f.name}"] = f.A_sum.contiguous().cpu()
                tensors[f"A_ones/{f.name}"] = f.A_ones.contiguous().cpu()
            tensors[f"G/{f.name}"] = f.G_sum.contiguous().cpu()
            table.append({k: getattr(f, k) for k in _FIELDS})
        manifest = {"schema": SCHEMA, "meta": self.meta, "notes": self.notes, "layers": table}
        # One file holds both, so that no crash can pair old numbers with a new description.
        replace_file(
            folder / "factors.safetensors",
            lambda path: save_file(tensors, path, {"manifest": json.dumps(manifest)}),
        )
        text = json.dumps(manifest, indent=1) + "\n"
        replace_file(folder / "factors.json", lambda path: path.write_text(text))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> KronFactors:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not such a folder, one of another version, or a file that is not whole.
        """
        path = Path(folder) / "factors.safetensors"
        if not path.is_file():
            raise ValueError(f"folder: no factors.safetensors in {str(folder)!r}")
        try:
            with safe_open(path, "pt") as file:
                manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"folder: {str(path)!r} is not a whole safetensors file of factors ({error})"
            ) from None
        if manifest.get("schema") != SCHEMA:
            raise ValueError(
                f"folder: {str(path)!r} has version {manifest.get('schema')} of the format, "
                f"expected {SCHEMA}"
            )
        layers: dict[str, LayerFactors] = {}
        try:
            for row in manifest["layers"]:
                name, leader = row["name"], row["shares_inputs_with"]
                if leader is None:
                    a, ones = tensors[f"A/{name}"], tensors[f"A_ones/{name}"]
                else:
                    a, ones = layers[leader].A_sum, layers[leader].A_ones
                layers[name] = LayerFactors(**row, A_sum=a, A_ones=ones, G_sum=tensors[f"G/{name}"])
        except KeyError as missing:
            raise ValueError(f"folder: {str(path)!r} has no {missing.args[0]}") from None
        return cls(layers, manifest["meta"], manifest["notes"])


_FIELDS = (
    "name",
    "kind",
    "weight",
    "bias",
    "form",
    "output_form",
    "inputs",
    "outputs",
    "groups",
    "rows",
    "samples",
    "shares_inputs_with",
)


def _kind(f: LayerFactors) -> tuple[Any, ...]:
    """What layers must have in common for their sums to be added."""
    return (
        f.name, f.kind, f.weight, f.bias, f.form, f.output_form, f.inputs, f.outputs, f.groups
    )  # fmt: skip


def _total(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].clone()
    total = parts[0].to(torch.float64, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
