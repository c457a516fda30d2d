"""The processes of one run, started by torchrun or accelerate launch: rank 0 writes and reports, all of them train.

In a process that runs alone everything here does nothing, and costs nothing. Every function but `launched` must be
called by all processes, in the same order; inside `first` the one that works counts as alone.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import ElsewhereError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # how long the others wait for rank 0: an export and a measurement take minutes to hours
FAREWELL = 10.0  # seconds that a failing process waits for the others to clean up
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# what torchrun sets, then what the MPIs do that accelerate launch uses on processors
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_alone: ContextVar[bool] = ContextVar("alone", default=False)  # inside `first`
_words: list[Any] = []  # the store in which failing processes agree on who speaks, once joined


def launched() -> tuple[int, int]:
    """Rank and number of processes that a launcher has started, (0, 1) without one; torch is not imported."""
    rank, world = (next((os.environ[name] for name in names if name in os.environ), "") for names in (_RANK, _WORLD))
    if not (rank.isdigit() and world.isdigit() and "MASTER_ADDR" in os.environ and int(world) > 1):
        return 0, 1
    return int(rank), int(world)


def join() -> None:
    """Meet the other processes that were launched; nothing happens when that is done already, or there are none.

    Tensors on processors go through gloo, those on GPUs through NCCL.
    """
    rank, world = launched()
    if world == 1:
        return
    import torch
    from torch import distributed
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        return
    import torch.distributed.nn.functional  # takes the group there is for its default arguments: none yet, see `leave`

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("MASTER_PORT", "29500")
    store, _, _ = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend,
        store=PrefixStore("run", store),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    _words[:] = [PrefixStore("words", store)]


def leave() -> None:
    """Let go of the others, if `join` met them, when the work is done.

    gloo's threads must have ended before the interpreter does: one that drops a Python object after that aborts the
    process. They end with the group, and it with the last reference: wrappers in cycles hold some.
    """
    if not _words:
        return
    from torch import distributed

    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def world() -> int:
    """How many processes work together; 1 inside `first`. Where torch has not been imported nobody has joined."""
    distributed: Any = sys.modules.get("torch.distributed")
    if _alone.get() or distributed is None:
        return 1
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, 0 to world - 1."""
    if world() == 1:
        return 0
    from torch import distributed

    return int(distributed.get_rank())


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return rank() == 0


def share(batch_size: int) -> int:
    """Images of a batch that each process takes.

    Raises:
        UsageError: a batch that cannot be divided evenly, with two images at least for every process.
    """
    if batch_size % world() or batch_size < 2 * world():
        raise UsageError(
            f"a batch of {batch_size} images cannot be shared by {world()} processes; allowed are multiples of "
            f"{world()}, at least {2 * world()}: --set train.batch_size={world() * max(2, batch_size // world())}"
        )
    return batch_size // world()


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, equal to the last bit on each; where the tensor is, without gradient."""
    if world() == 1:
        return tensor.detach()
    from torch import distributed

    total = tensor.detach().to(_home(), copy=True).contiguous()
    distributed.all_reduce(total)
    return total.to(tensor.device)


def averaged(tensor: Tensor) -> Tensor:
    """The mean over all processes, equal to the last bit on each; where the tensor is, without gradient."""
    return summed(tensor) / world() if world() > 1 else tensor.detach()


def from_first(tensors: Iterable[Tensor]) -> None:
    """Fill the tensors, in place, with those of rank 0."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    with torch.no_grad():
        for tensor in tensors:
            told = tensor.detach().to(_home(), copy=True).contiguous()
            distributed.broadcast(told, 0)
            tensor.copy_(told)


def first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, told to all: bytes, or what JSON holds (tuples arrive as lists).

    Nobody else does the work, and inside it nothing is shared: it may call whatever shares elsewhere.

    Raises:
        ElsewhereError: on the other ranks, when the work fails; rank 0 raises what it was.
    """
    if world() == 1:
        return work()
    if not is_first():
        told: T = _unpacked(_told(None))
        return told
    token = _alone.set(True)
    try:
        result = work()
        packed = _packed(result)
    except BaseException as error:
        _alone.reset(token)
        code = getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)
        _told(b"e" + json.dumps({"text": str(error), "code": code}).encode())
        raise
    _alone.reset(token)
    _told(packed)
    return result


def _packed(result: Any) -> bytes:
    return b"b" + result if isinstance(result, bytes) else b"j" + json.dumps(result).encode()


def _unpacked(packed: bytes) -> Any:
    kind, content = packed[:1], packed[1:]
    if kind == b"b":
        return content
    found = json.loads(content)
    if kind == b"e":
        raise ElsewhereError(found["text"], exit_code=found["code"])
    return found


def _told(packed: bytes | None) -> bytes:
    """Rank 0's bytes on every rank; the others give None."""
    import torch
    from torch import distributed

    length = torch.tensor([len(packed or b"")], device=_home())
    distributed.broadcast(length, 0)
    content = torch.empty(int(length), dtype=torch.uint8)
    if packed is not None:
        content = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    content = content.to(_home())
    distributed.broadcast(content, 0)
    return packed if packed is not None else content.cpu().numpy().tobytes()


def _home() -> torch.device:
    """Where tensors must be to be sent: on the GPU if the processes were joined through NCCL alone."""
    import torch
    from torch import distributed

    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def is_broken(error: BaseException) -> bool:
    """Whether the error says that another process has gone."""
    texts = ("Connection closed by peer", "Connection reset by peer")
    return bool(_words) and any(text in str(error) for text in texts)


def part(error: BaseException, code: int, say: Callable[[], None]) -> int:
    """End together: `say` is called in the first process that fails, and its exit code is returned in all.

    A launcher terminates what is left as soon as one process has ended, so that they wait for each other; not for long,
    and not at all after an interrupt, which the launcher sends to all: who hangs on this one is free when it has ended.
    """
    if not _words:
        say()
        return code
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = _words[0]
    if isinstance(error, ElsewhereError):
        _wait(store, "spoken", 1)
    if _count(store, "speakers", 1) == 1:
        _count(store, "code", code)
        say()
        _count(store, "spoken", 1)
    _wait(store, "spoken", 1)
    common = _count(store, "code", 0)
    _count(store, "ended", 1)
    if not isinstance(error, KeyboardInterrupt):
        _wait(store, "ended", launched()[1])
    return code if math.isinf(common) else int(common)


def _wait(store: Any, key: str, count: int) -> None:
    end = time.monotonic() + FAREWELL
    while _count(store, key, 0) < count and time.monotonic() < end:
        time.sleep(0.02)


def _count(store: Any, key: str, more: int) -> float:
    """The number kept under the key, `more` added to it; of a store that has gone, what ends a wait."""
    try:
        return int(store.add(key, more))
    except (RuntimeError, OSError):
        return 1 if more else math.inf
