"""Matrices divided into blocks of rows or columns: the plan of a launch, and sums over blocks.

A line is a row (dimension 0) or a column (1) and belongs to one block, which may have lines in
several matrices. Lines are cut into pieces, some neighbours and a range of each; every line of a
piece has a slot for a partial sum, and the sums of a block are joined in the order of its slots.
Small blocks are put in groups whose pieces one program finishes; large ones are spread over many
programs, with their sums joined in between. All of this depends on shapes and blocks alone.

A plan reads the blocks on the host once. It is kept for as long as the tensors of the blocks live
and torch has seen no write to them, so use the same tensors in every step. The kernels read the
plan's own copy of the blocks.
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _lists as lists

#: Numbers of a matrix: addresses of w, g, m, v; columns; dimension; where its lines' blocks start.
FIELDS = 7

#: Numbers of a piece: matrix, first line, lines, first and end element of each, first slot.
PIECE = 6

#: Rows and columns of a tile, by kind of piece: long rows, and columns or short rows.
TILES = ((4, 512), (32, 32))

#: Columns from which on rows are long.
LONG = 128

#: Elements of a group, of which one program makes two passes: few enough that those of all running
#: programs stay in the L2 cache. No more are in a piece of a large block.
GROUP = 8192

#: Columns that fill the 32 bytes that memory moves at a time, in the narrowest type.
SECTOR = 16

#: Blocks of a group at most.
GROUP_BLOCKS = 64


@dataclass
class Plan:
    """Pieces and groups of one division, on the host, and its table on devices.

    ``pieces`` has PIECE numbers a row; those of groups come first, of each kind together.
    ``groups`` has the first and end piece, then the first and end rank of the blocks; ``kinds``
    where the groups of the second kind start, and how many there are. Blocks are ranked in the
    order in which they are met; ``order`` has the slots by rank, ``start`` where those of a rank
    start in it, ``ids`` the blocks by rank. ``large`` are the first rank, the first pieces of both
    kinds, and the number of pieces.
    """

    pieces: np.ndarray
    groups: np.ndarray
    kinds: tuple[int, int]
    large: tuple[int, int, int, int]
    order: np.ndarray
    start: np.ndarray
    ids: np.ndarray
    lines: np.ndarray
    slots: int
    tables: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Blocks that have lines."""
        return len(self.ids)

    @property
    def offsets(self) -> tuple[int, int, int, int, int]:
        """Where groups, order, start, ids and lines begin in the table; pieces are first."""
        sizes = [x.size for x in (self.pieces, self.groups, self.order, self.start, self.ids)]
        return tuple(np.cumsum(sizes).tolist())  # type: ignore[return-value]

    def table(self, device: torch.device) -> Tensor:
        """All of it in one int64 tensor."""
        found = self.tables.get(device)
        if found is None:
            lists.refuse_capture(device)
            parts = (self.pieces, self.groups, self.order, self.start, self.ids, self.lines)
            flat = np.concatenate([np.asarray(x, dtype=np.int64).reshape(-1) for x in parts])
            found = self.tables[device] = torch.from_numpy(flat).to(device)
        if lists.capturing(device):
            lists.keep(found)
        elif device.type == "cuda":
            found.record_stream(torch.cuda.current_stream(device))
        return found


def turned(shape: tuple[int, int], dim: int) -> tuple[int, int, int]:
    """Rows, columns and dimension; a single column of rows is as well one row of columns."""
    rows, columns = shape
    return (1, rows, 1) if dim == 0 and columns == 1 else (rows, columns, dim)


def make_plan(
    shapes: Sequence[tuple[int, int]],
    dims: Sequence[int],
    blocks: Sequence[np.ndarray],
    count: int,
    *,
    grouped: bool,
    group: int = GROUP,
) -> Plan:
    """Plan a launch.

    Args:
        shapes: of the matrices.
        dims: 0 or 1 for each.
        blocks: integers in [0, count) for every line.
        grouped: put small blocks in groups; else all are treated as large.
        group: elements of a group, or of a piece.
    """
    matrices = [turned(s, d) for s, d in zip(shapes, dims, strict=True)]
    for k, block in enumerate(blocks):
        wrong = (block < 0) | (block >= count)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"blocks[{k}]: expected entries from 0 to {count - 1}, got {block[at]} at {at}"
            )
    length = [rows if dim else columns for rows, columns, dim in matrices]
    kind = [int((dim == 1 and r > 1) or (dim == 0 and c < LONG)) for r, c, dim in matrices]
    size = np.zeros(count, dtype=np.int64)
    for block, n in zip(blocks, length, strict=True):
        np.add.at(size, block, n)

    # ranks: by first line, wide panels of columns before anything else
    panel = [dim == 1 and rows > 1 for rows, _, dim in matrices]
    visit = sorted(range(len(matrices)), key=lambda k: not panel[k])
    met, of = [], []
    seen = np.zeros(count, dtype=bool)
    for k in visit:
        if length[k] == 0:
            continue
        block = np.asarray(blocks[k])
        new, first = np.unique(block, return_index=True)
        fresh = ~seen[new]
        new = new[fresh][np.argsort(first[fresh], kind="stable")]
        seen[new] = True
        met.append(new)
        of += [k] * len(new)
    ids = np.concatenate(met) if met else np.zeros(0, dtype=np.int64)
    wide = np.array([panel[k] for k in of], dtype=bool)
    second = np.array([kind[k] for k in of], dtype=bool)
    small = size[ids] * np.where(wide, SECTOR, 1) <= group if grouped else np.zeros(len(ids), bool)
    # small ones of the first kind, of the second, then large ones
    section = np.where(small, second.astype(int), 2)
    rank = np.argsort(section, kind="stable")
    ids, section, of = ids[rank], section[rank], [of[r] for r in rank]
    bounds = [int((section < s).sum()) for s in range(4)]

    group_of = np.full(count, -1, dtype=np.int64)
    ends: list[tuple[int, int]] = []
    begin, elements = 0, 0
    for r in range(bounds[2]):
        b = ids[r]
        new = r == begin or of[r] != of[r - 1] or section[r] != section[r - 1]
        if new or elements + size[b] > group or r - begin >= GROUP_BLOCKS:
            begin, elements = r, 0
            ends.append((r, r + 1))
        elements += size[b]
        ends[-1] = (begin, r + 1)
        group_of[b] = len(ends) - 1

    runs = [_runs(k, group_of[np.asarray(b)], length[k]) for k, b in enumerate(blocks)]
    every = np.concatenate(runs) if runs else np.zeros((0, 4), dtype=np.int64)
    in_group = every[every[:, 3] >= 0]
    in_group = in_group[np.argsort(in_group[:, 3], kind="stable")]

    pieces: list[tuple[int, ...]] = []
    slots = 0

    def cut(k: int, line: int, lines: int, shape: tuple[int, int], run: int) -> None:
        nonlocal slots
        most = shape[1] if matrices[k][2] else shape[0]
        for first in range(line, line + lines, most):
            here = min(most, line + lines - first)
            for start in range(0, length[k], run):
                pieces.append((k, first, here, start, min(length[k], start + run), slots))
                slots += here

    groups = []
    at = 0
    for g, (first, end) in enumerate(ends):
        before = len(pieces)
        tile = TILES[section[first]]
        while at < len(in_group) and in_group[at, 3] == g:
            k, line, lines, _ = in_group[at].tolist()
            cut(k, line, lines, tile, length[k])
            at += 1
        groups.append((before, len(pieces), first, end))
    firsts = []
    for s in (0, 1):
        firsts.append(len(pieces))
        for k, line, lines, g in every.tolist():
            if g < 0 and kind[k] == s:
                tile = TILES[s]
                cut(k, line, lines, tile, max(1, group // (tile[1] if matrices[k][2] else tile[0])))

    table = np.array(pieces, dtype=np.int64).reshape(-1, PIECE)
    owners = [np.asarray(blocks[k])[line : line + lines] for k, line, lines, *_ in table.tolist()]
    owner = np.concatenate(owners).astype(np.int64) if owners else np.zeros(0, dtype=np.int64)
    rank_of = np.zeros(count, dtype=np.int64)
    rank_of[ids] = np.arange(len(ids))
    ranks = rank_of[owner]
    return Plan(
        pieces=table,
        groups=np.array(groups, dtype=np.int64).reshape(-1, 4),
        kinds=(sum(first < bounds[1] for first, _ in ends), len(ends)),
        large=(bounds[2], firsts[0], firsts[1], len(table)),
        order=np.argsort(ranks, kind="stable"),
        start=np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=len(ids)))]),
        ids=ids,
        lines=np.concatenate([*map(np.asarray, blocks), np.zeros(0, dtype=np.int64)]),
        slots=slots,
    )


def _runs(k: int, group: np.ndarray, length: int) -> np.ndarray:
    """Runs of lines of one group: matrix, first line, lines, group."""
    if len(group) == 0 or length == 0:
        return np.zeros((0, 4), dtype=np.int64)
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    lines = np.diff(np.concatenate([first, [len(group)]]))
    return np.stack([np.full_like(first, k), first, lines, group[first]], axis=1)


# --- plans that are kept --------------------------------------------------------------------------

#: Plans that are kept; one list of matrices needs two.
SIZE = 64

_plans: OrderedDict[tuple, tuple[tuple[weakref.ref, ...], Plan]] = OrderedDict()


def plan_of(
    ws: Sequence[Tensor],
    blocks: Sequence[Tensor],
    dims: Sequence[int],
    count: int,
    *,
    grouped: bool,
    group: int = GROUP,
) -> Plan:
    """The plan of these matrices, made where there is none for these very blocks.

    Raises:
        ValueError: a block is not in [0, count).
        RuntimeError: a graph is being captured and the plan is not there yet.
    """
    shapes = lists.shapes(ws)
    kept = not any(b.is_inference() for b in blocks)  # those do not count their versions
    versions = tuple((id(b), b._version, b.data_ptr()) for b in blocks) if kept else ()
    key = (versions, shapes, tuple(dims), count, grouped, group)
    if kept and key in _plans:
        references, plan = _plans[key]
        if all(r() is b for r, b in zip(references, blocks, strict=True)):
            _plans.move_to_end(key)
            return plan
    for b in blocks[:1]:
        lists.refuse_capture(b.device)
    host = [b.cpu().numpy() for b in blocks]
    plan = make_plan(shapes, dims, host, count, grouped=grouped, group=group)
    if kept:
        _plans[key] = tuple(weakref.ref(b) for b in blocks), plan
        while len(_plans) > SIZE:
            _plans.popitem(last=False)
    return plan


def build(
    ws: Sequence[int],
    gs: Sequence[int],
    ms: Sequence[int],
    vs: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    dims: Sequence[int],
) -> np.ndarray:
    """The table of the matrices, from addresses and shapes."""
    rows, line = [], 0
    for w, g, m, v, shape, dim in zip(ws, gs, ms, vs, shapes, dims, strict=True):
        _, columns, turned_dim = turned(shape, dim)
        rows.append((w, g, m, v, columns, turned_dim, line))
        line += shape[dim]
    return lists.pack(rows)


# --- device code ----------------------------------------------------------------------------------


@triton.jit
def join_sums(
    plan_ptr, order, start, ids, part_ptr, out_ptr, first, end,
    STATE: tl.constexpr, BLOCKS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store the sums of the blocks of ranks first to end, at most BLOCKS, slot by slot."""
    r = first + tl.arange(0, BLOCKS)
    known = r < end
    begin = tl.load(plan_ptr + start + r, mask=known, other=0)
    stop = tl.load(plan_ptr + start + r + 1, mask=known, other=0)
    total = tl.zeros((BLOCKS, DEPTH), tl.float64)
    j = tl.arange(0, DEPTH)
    for step in range(0, tl.max(stop - begin, 0), DEPTH):
        at = begin[:, None] + step + j[None, :]
        inside = at < stop[:, None]
        slot = tl.load(plan_ptr + order + at, mask=inside, other=0)
        total += tl.load(part_ptr + slot, mask=inside, other=0.0).to(tl.float64)
    block = tl.load(plan_ptr + ids + r, mask=known, other=0)
    tl.store(out_ptr + block, tl.sum(total, 1).to(STATE), mask=known)


@triton.jit
def piece_at(table_ptr, plan_ptr, lines, piece, FIELDS: tl.constexpr, PIECE: tl.constexpr):
    """Addresses of the matrix and of the blocks of the piece's lines, and the piece itself."""
    at = plan_ptr + piece * PIECE
    matrix = tl.load(at)
    row_ptr = table_ptr + matrix * FIELDS
    first = tl.load(at + 1)
    block_ptr = plan_ptr + lines + tl.load(row_ptr + 6) + first
    return (
        row_ptr,
        block_ptr,
        matrix,
        tl.load(row_ptr + 4),
        tl.load(row_ptr + 5),
        first,
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
    )
