"""Factors in memory and on disk: merging, whole files, versions."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
from compare import assert_rms
from safetensors.torch import save_file

import deaddir_fast as dd
from deaddir_fast.fisher import factors as module
from deaddir_fast.fisher.factors import KronFactors
from fisher.dense_factors import MaskedTransformer, mlp

torch.set_num_threads(1)


def language_model_factors(**options) -> KronFactors:
    model = MaskedTransformer().eval()
    return dd.kron_factors(model, {"input_ids": torch.randint(0, 7, (5, 4))}, **options)


def assert_bitwise(one: KronFactors, other: KronFactors) -> None:
    assert list(one) == list(other)
    for name in one:
        for part in ("A_sum", "A_ones", "G_sum"):
            a, b = getattr(one[name], part), getattr(other[name], part)
            assert a.dtype == b.dtype and torch.equal(a, b)
        for part in module._FIELDS:
            assert getattr(one[name], part) == getattr(other[name], part)


@pytest.mark.parametrize("options", [
    {"fisher": "mc", "draws": 2},
    {"dtype": torch.float64},
    {"largest_head": 2},
    {"kfac": "reduce"},
    {"share_inputs": False},
])  # fmt: skip
def test_round_trip_is_bitwise(tmp_path, options):
    one = language_model_factors(**options)
    one.save(tmp_path / "a" / "b")
    other = KronFactors.load(tmp_path / "a" / "b")
    assert_bitwise(one, other)
    assert (other.meta, other.notes) == (one.meta, one.notes)
    assert other.bytes() == one.bytes()
    # Layers that share A still share its memory.
    shared = [f for f in other.values() if f.shares_inputs_with]
    assert len(shared) == (2 if options.get("share_inputs", True) else 0)
    for f in shared:
        assert f.A_sum.data_ptr() == other[f.shares_inputs_with].A_sum.data_ptr()
    assert json.loads((tmp_path / "a/b/factors.json").read_text())["meta"] == one.meta
    assert sorted(os.listdir(tmp_path / "a/b")) == ["factors.json", "factors.safetensors"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
@pytest.mark.parametrize("where", ["save_file", "half", "fsync", "replace"])
def test_a_save_that_breaks_off_leaves_the_old_files(tmp_path, monkeypatch, where, error):
    old, new = language_model_factors(), language_model_factors(fisher="mc")
    old.save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(*args, **options):
        raise error

    def half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise error

    if where in ("save_file", "half"):
        monkeypatch.setattr(module, "save_file", fail if where == "save_file" else half)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        new.save(tmp_path)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    assert_bitwise(KronFactors.load(tmp_path), old)


def test_a_save_that_breaks_off_between_the_files_is_whole(tmp_path, monkeypatch):
    """The numbers carry their own description; the JSON file is for reading by eye."""
    old, new = language_model_factors(), language_model_factors(fisher="mc", draws=2)
    old.save(tmp_path)
    real, calls = os.replace, []

    def second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        real(*args)

    monkeypatch.setattr(os, "replace", second)
    with pytest.raises(Killed):
        new.save(tmp_path)
    monkeypatch.undo()
    found = KronFactors.load(tmp_path)
    assert_bitwise(found, new)
    assert found.meta == new.meta


def test_folders_that_are_not_factors(tmp_path):
    with pytest.raises(ValueError, match=r"folder: no factors\.safetensors in"):
        KronFactors.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"folder: no factors\.safetensors in"):
        KronFactors.load(tmp_path)
    path = tmp_path / "factors.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="has version None of the format, expected 1"):
        KronFactors.load(tmp_path)
    save_file({"x": torch.zeros(2)}, path, {"manifest": json.dumps({"schema": 99})})
    with pytest.raises(ValueError, match="has version 99"):
        KronFactors.load(tmp_path)
    for content in (b"", b"not a safetensors file", (1 << 40).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"folder: .* is not a whole safetensors file"):
            KronFactors.load(tmp_path)
    language_model_factors().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"folder: .* is not a whole safetensors file"):
        KronFactors.load(tmp_path)


def test_a_description_that_lacks_numbers(tmp_path):
    factors = language_model_factors()
    manifest = {
        "schema": 1, "meta": {}, "notes": [],
        "layers": [{k: getattr(factors["q"], k) for k in module._FIELDS}],
    }  # fmt: skip
    save_file(
        {"A/q": torch.zeros(21)}, tmp_path / "factors.safetensors",
        {"manifest": json.dumps(manifest)},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"folder: .* has no A_ones/q"):
        KronFactors.load(tmp_path)


# ------------------------------------------------------------------------------------ merging


def shards(dtype=torch.float64) -> tuple[list[KronFactors], KronFactors]:
    model, x = mlp(4, 6, 3, dtype=dtype), torch.randn(11, 4).to(dtype)
    parts = []
    for k, piece in enumerate(x.split([3, 1, 5, 2])):
        some = dd.kron_factors(model, piece)
        parts.append(KronFactors(some, {**some.meta, "shards": [k]}, (f"note {k % 2}",)))
    return parts, dd.kron_factors(model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_is_the_whole_in_any_order(dtype):
    parts, whole = shards(dtype)
    merged = KronFactors.merge(parts)
    assert merged.meta["shards"] == [0, 1, 2, 3]
    assert merged.notes == ("note 0", "note 1")
    for order in itertools.permutations(range(4)):
        assert_bitwise(KronFactors.merge([parts[k] for k in order]), merged)
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    for name in whole:
        assert merged[name].samples == 11
        assert_rms(merged[name].A, whole[name].A, bound)
        assert_rms(merged[name].G, whole[name].G, bound)


def test_merging_one_part_copies_it():
    parts, _ = shards()
    merged = KronFactors.merge(parts[:1])
    assert_bitwise(merged, parts[0])
    merged["0"].G_sum.zero_()
    assert float(parts[0]["0"].G_sum.abs().max()) > 0


def test_merging_keeps_what_is_shared():
    model = MaskedTransformer().double().eval()
    parts = []
    for k in range(3):
        some = dd.kron_factors(model, {"input_ids": torch.randint(0, 7, (2, 4))})
        parts.append(KronFactors(some, {**some.meta, "shards": [k]}))
    merged = KronFactors.merge(parts)
    assert merged["v"].A_sum.data_ptr() == merged["q"].A_sum.data_ptr()
    assert merged["v"].A.shape == (7, 7)


def test_parts_that_share_differently():
    """A layer that leads in one part only keeps an A of its own."""
    model, ids = MaskedTransformer().double().eval(), torch.randint(0, 7, (4, 4))
    one, other = (
        dd.kron_factors(model, {"input_ids": part}, share_inputs=shared)
        for part, shared in zip(ids.split(2), (True, False), strict=True)
    )
    one, other = (KronFactors(f, {**f.meta, "shards": [k]}) for k, f in enumerate((one, other)))
    whole = dd.kron_factors(model, {"input_ids": ids})
    for order in ([one, other], [other, one]):
        merged = KronFactors.merge(order)
        for name in whole:
            assert_rms(merged[name].A, whole[name].A, 1e-13)
    assert merged["k"].shares_inputs_with is None


def test_parts_that_do_not_belong_together():
    parts, _ = shards()
    with pytest.raises(ValueError, match="parts: expected at least one"):
        KronFactors.merge([])
    with pytest.raises(ValueError, match="parts: expected each shard once"):
        KronFactors.merge([parts[0], parts[0]])
    other = KronFactors(parts[1], {**parts[1].meta, "fisher": "mc"})
    with pytest.raises(ValueError, match=r"differ in \['fisher'\]"):
        KronFactors.merge([parts[0], other])
    fewer = KronFactors({"0": parts[1]["0"]}, parts[1].meta)
    with pytest.raises(ValueError, match="parts: expected the same layers"):
        KronFactors.merge([parts[0], fewer])
    wider = dd.kron_factors(mlp(5, 6, 3), torch.randn(2, 5).double())
    with pytest.raises(ValueError, match="parts: expected the same layers"):
        KronFactors.merge([parts[0], KronFactors(wider, {**wider.meta, "shards": [9]})])


# ------------------------------------------------------------------------------------- access


def test_unpacking_and_names():
    factors = language_model_factors()
    A, G, count = factors["head"]
    assert A.shape == (7, 7) and G.shape == (3, 3) and count == 5 == factors["head"].count
    assert factors["head"][1].shape == (3, 3) and len(factors["head"]) == 3
    with pytest.raises(KeyError, match="no factors of a layer called 'tail'"):
        factors["tail"]
    assert "9 layers, exact, 5 samples" in repr(factors)


def test_heads():
    f = language_model_factors()["q"]
    blocks = f.heads(3)
    assert len(blocks) == 3
    assert torch.equal(blocks[1], f.G[2:4, 2:4])
    with pytest.raises(ValueError, match="count: expected a divisor of the 6 outputs"):
        f.heads(4)
