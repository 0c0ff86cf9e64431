"""The processes of a scan: who they are, and how they hear of each other.

What is not a tensor travels as JSON over a gloo group of the scan's own, in exchanges that every
process takes part in; a process that fails says so in its next one, and the others stop too.
Tensors travel from one process to another, between GPUs over NCCL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

#: A process may work this long on its own before the others give it up. One that is gone is
#: noticed at once: its connections close.
PATIENCE = timedelta(hours=24)
#: A process that fails waits this long for the others to hear of it.
FAREWELL = timedelta(seconds=10)
#: Bytes that go before each message.
HEAD = 2048


class RankError(RuntimeError):
    """Another process of the scan failed, or is gone."""


class Sent:
    """A tensor on its way, kept alive until it has arrived."""

    def __init__(self, work: Any, x: Tensor) -> None:
        self._work, self._x = work, x

    def wait(self) -> None:
        """Until it has arrived.

        Raises:
            RankError: the other process is gone.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise RankError(f"a process that sums were sent to is gone ({_short(error)})") from None


def _bytes(raw: bytes, size: int) -> Tensor:
    padded = torch.zeros(size, dtype=torch.uint8)
    if raw:
        padded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return padded


def _text(raw: Tensor) -> str:
    return raw.numpy().tobytes().decode(errors="replace")


def _head(size: int, failure: str) -> Tensor:
    """What goes before a message: its size, or why there is none.

    All in one, so that it arrives from a process that does not wait for the others.
    """
    head = torch.zeros(HEAD, dtype=torch.uint8)
    head[:8].view(torch.int64)[0] = size
    head[8:] = _bytes(failure.encode()[: HEAD - 8], HEAD - 8)
    return head


def _message(head: Tensor) -> str:
    return _text(head[8:]).rstrip("\0")


def _of_a_connection(error: BaseException) -> bool:
    text = str(error).lower()
    gone = ("closed by peer", "reset by peer", "gloo", "nccl", "broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in gone)


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


class Ranks:
    """The processes that make one scan; this one alone where torch.distributed is not initialised.

    A context manager: an error in the block is told to the other processes.

    Attributes:
        rank, size: which process this is, of how many.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._talk = 0, 1, None
        self._nccl = False
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._nccl = "nccl" in str(dist.get_backend_config())

    def __enter__(self) -> Ranks:
        if self.size > 1:
            self._talk = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._talk is None:
            return
        if error is None:
            dist.destroy_process_group(self._talk)
        elif not isinstance(error, RankError):
            text = f"{type(error).__name__}: {error}"
            # Those that are busy find this process gone later.
            dist.distributed_c10d._set_pg_timeout(FAREWELL, self._talk)
            with suppress(RuntimeError):
                self._all(_head(0, text))
            if _of_a_connection(error):
                # In a pass of a sharded model, which all processes take part in.
                raise RankError(
                    f"process {self.rank} of {self.size} lost another one in the middle of a "
                    f"pass; that one's own output says why ({_short(error)})"
                ) from error

    @property
    def first(self) -> bool:
        """Whether this process writes the report and shows progress."""
        return self.rank == 0

    def exchange(self, said: Any) -> list[Any]:
        """What every process says here, by rank: JSON's types and non-finite floats.

        Raises:
            RankError: another process failed instead of getting here, or is gone.
        """
        if self._talk is None:
            return [said]
        raw = json.dumps(said).encode()
        try:
            heads = self._all(_head(len(raw), ""))
            failed = {rank: text for rank, text in enumerate(map(_message, heads)) if text}
            if not failed:
                sizes = [int(h[:8].view(torch.int64)) for h in heads]
                bodies = self._all(_bytes(raw, max(sizes)))
        except RuntimeError as error:
            raise RankError(
                f"process {self.rank} of {self.size} lost another one, whose own output says why "
                f"({_short(error)})"
            ) from None
        for rank, text in failed.items():
            raise RankError(f"process {rank} of {self.size} failed: {text}")
        return [json.loads(_text(b[:n])) for b, n in zip(bodies, sizes, strict=True)]

    def barrier(self) -> None:
        """Until every process is here; errors as :meth:`exchange`."""
        self.exchange(None)

    def most(self, value: int) -> int:
        """The largest of what the processes give; errors as :meth:`exchange`."""
        return max(self.exchange(value))

    def _all(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self._talk)
        return found

    # ----------------------------------------------------------------------------------- tensors

    def send(self, x: Tensor, to: int) -> Sent:
        """Start to send a tensor to another process; keep what is returned and wait for it."""
        x = x.contiguous()
        if x.is_cuda and self._nccl:
            return Sent(dist.isend(x, to), x)
        x = x.cpu()
        return Sent(dist.isend(x, to, group=self._talk), x)

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int
    ) -> Tensor:
        """A tensor that another process sends, on ``device``.

        Raises:
            RankError: it is gone.
        """
        direct = device.type == "cuda" and self._nccl
        x = torch.empty(shape, dtype=dtype, device=device if direct else "cpu")
        try:
            dist.recv(x, source, group=None if direct else self._talk)
        except RuntimeError as error:
            raise RankError(
                f"process {self.rank} of {self.size} waited for sums of process {source}, which "
                f"is gone; its own output says why ({_short(error)})"
            ) from None
        return x.to(device)


P = ParamSpec("P")
R = TypeVar("R")
_current: ContextVar[Ranks] = ContextVar("ranks")


def together(function: Callable[P, R]) -> Callable[P, R]:
    """A function that all processes call: where one fails, the others stop too."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with Ranks() as ranks:
            token = _current.set(ranks)
            try:
                return function(*args, **kwargs)
            finally:
                _current.reset(token)

    return run


def current() -> Ranks:
    """The processes of the function that runs :func:`together`."""
    return _current.get()


def _is_launched() -> bool:
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dist.is_available() and all(k in os.environ for k in wanted)


def is_first() -> bool:
    """Whether this is the first of the processes launched together, or one of its own."""
    return not _is_launched() or os.environ["RANK"] == "0"


@contextmanager
def launched(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun (or whatever sets RANK and its like) has started.

    Does nothing for a process of its own, or where a group is there already.

    Args:
        device: asked for; "cuda" becomes that of the local rank.

    Yields:
        The device of this process.
    """
    if not _is_launched() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if device.index is None else device
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    # Not after an error: it could wait for processes that are gone.
    dist.destroy_process_group()
