"""Running sums of outer products against fp64 products."""

from __future__ import annotations

import pytest
import torch
from compare import assert_rms

from deaddir_fast.fisher.accumulate import GramSum, diagonal, unpack

torch.set_num_threads(1)


def total(rows, cuts, held=16, dtype=torch.float64, **options):
    found = GramSum(rows.shape[1], dtype, rows.device, held, **options)
    for part in rows.split(cuts):
        found.add(part)
    found.release()
    return found


@pytest.mark.parametrize("cuts", [[100], [1] * 100, [16, 16, 68], [15, 2, 0, 83], [0, 99, 1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_do_not_depend_on_how_rows_arrive(cuts, dtype):
    rows = torch.randn(100, 7).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    one, other = (total(rows, c, dtype=wide) for c in ([100], cuts))
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.sums, other.sums)
    assert one.count == other.count == 100
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    assert_rms(unpack(one.packed, 7), rows.double().mT @ rows.double(), bound)
    assert_rms(one.sums, rows.double().sum(0), bound)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_factor_and_precision_of_the_sum(kind):
    rows = torch.randn(50, 5)
    found = total(rows, 9, dtype=kind, alpha=0.3, ones=False)
    assert found.packed.dtype == kind
    assert found.sums.shape == (0,)
    assert_rms(unpack(found.packed, 5), 0.3 * rows.double().mT @ rows.double(), 1e-6)


def test_fp64_rows_into_an_fp32_sum():
    rows = torch.randn(40, 5).double()
    found = total(rows, 7, dtype=torch.float32)
    assert_rms(unpack(found.packed, 5), rows.mT @ rows, 1e-6)


def test_rows_of_several_types():
    """16-bit rows after fp32 ones: the buffer is flushed, nothing is lost or converted."""
    rows = torch.randn(30, 4)
    found = GramSum(4, torch.float32, rows.device, held=16)
    found.add(rows[:11])
    found.add(rows[11:].bfloat16())
    found.release()
    both = torch.cat([rows[:11], rows[11:].bfloat16().float()]).double()
    assert_rms(unpack(found.packed, 4), both.mT @ both, 1e-6)
    assert_rms(found.sums, both.sum(0), 1e-6)


def test_rows_may_be_overwritten_after_they_were_added():
    rows = torch.randn(5, 3).double()
    found, truth = GramSum(3, torch.float64, rows.device), rows.mT @ rows
    found.add(rows)
    rows.zero_()
    found.release()
    assert_rms(unpack(found.packed, 3), truth, 1e-15)


def test_adding_goes_on_after_a_release():
    rows = torch.randn(12, 3).double()
    found = GramSum(3, torch.float64, rows.device)
    found.add(rows[:5])
    found.release()
    found.add(rows[5:])
    found.release()
    assert_rms(unpack(found.packed, 3), rows.mT @ rows, 1e-15)


@pytest.mark.parametrize("width", [0, 1, 3])
def test_no_rows(width):
    found = GramSum(width, torch.float32, torch.device("cpu"))
    found.add(torch.empty(0, width))
    found.release()
    assert torch.equal(found.packed, torch.zeros(width * (width + 1) // 2))
    assert found.count == 0


def test_zero_width_rows_are_counted():
    assert total(torch.empty(9, 0).double(), 2).count == 9


@pytest.mark.parametrize("width", [0, 1, 2, 5, 511])
def test_packed_triangles(width):
    square = torch.randn(width, width).double()
    square = square + square.mT
    row, column = torch.tril_indices(width, width)
    packed = square[row, column]
    assert torch.equal(unpack(packed, width), square)
    assert torch.equal(diagonal(packed), square.diagonal())
    assert torch.equal(diagonal(torch.stack([packed, packed]))[1], square.diagonal())


def test_long_sums_of_one_sign_keep_their_accuracy():
    """Where a running fp32 sum would stop growing: 2^20 rows near one."""
    rows = 1 + torch.rand(1 << 20, 1) / 8
    found = total(rows, 5000, held=2048, dtype=torch.float64)
    assert_rms(found.packed, rows.double().square().sum(0), 1e-6)
    assert_rms(found.sums, rows.double().sum(0), 1e-6)
