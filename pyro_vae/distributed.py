"""The process group: which processes work together, what they must agree on, and what they share.

The engine is ``torch.distributed``. A group that the user has initialised is used; else the variables of ``torchrun``,
or of a step of Slurm's ``srun``, start one. Each process is a rank. Values go over a group of gloo's, so that a rank
that is missing is noticed, with any backend for the gradients.
"""

import atexit
import copy
import gc
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_vae.devices import of_float64
from pyro_vae.errors import OtherRankError, PyroVAEError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for another one
CPU = torch.device("cpu")
SAYS_SO = 60.0  # seconds after which a rank that waits says for what

ADVICE = (
    "Each rank must make the same calls of pyro_vae in the same order. Pass distributed=False to a call that one rank "
    "makes alone; if the others are only slow, raise pyro_vae.distributed.TIMEOUT before the first call."
)

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, calls of this package are those of this process alone, as with ``distributed=False``."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def is_alone() -> bool:
    """Whether this is inside of :func:`alone`."""
    return _ALONE.get()


@dataclass
class Group:
    """The ranks that work together; this process is one of them."""

    rank: int
    size: int
    side: Any = field(repr=False)  # a group of gloo's, for values of Python and for sums on the CPU
    patient: Any = field(default=None, repr=False)  # another one of gloo's, whose messages may take long
    doing: str = "a call"  # the call that the ranks make

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank; tensors go to the CPU."""
        found: list[Any] = [None] * self.size
        content = pickle.dumps(carried(value, CPU))
        self._waiting(lambda: dist.all_gather_object(found, content, group=self.side))
        return [pickle.loads(each) for each in found]

    def of_first(self, value: T) -> T:
        """Rank 0's value."""
        content: list[Any] = [pickle.dumps(carried(value, CPU)) if self.is_first else None]
        self._waiting(lambda: dist.broadcast_object_list(content, dist.get_global_rank(self.side, 0), self.side))
        found: T = pickle.loads(content[0])
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work that ranks do by themselves: a failure of one of them is raised on all at its end.

        Raises:
            OtherRankError: another rank has failed; the rank that has failed raises its own exception.
        """
        failure: Exception | None = None
        try:
            yield
        except OtherRankError:
            raise  # all ranks know of it
        except Exception as error:
            failure = error
        self.raise_failures(failure)

    def raise_failures(self, failure: Exception | None) -> None:
        """Raise the failure of this rank, or tell of that of another one; all ranks call it."""
        found = self.gather(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        for rank, each in enumerate(found):
            if each is not None:
                raise OtherRankError(f"rank {rank} of {self.size} has failed in {self.doing}: {each[0]}: {each[1]}")

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it; its failure is raised on all ranks."""
        value: Any = None
        with self.together():
            if self.is_first:
                value = work()
        return self.of_first(value)

    def require_same(self, own: Mapping[str, Any], fix: str) -> None:
        """Refuse, on all ranks at once, the first of these values that is not the same on every rank."""
        all_own = self.gather(dict(own))
        for name in dict.fromkeys(name for each in all_own for name in each):
            found = [each.get(name, "absent") for each in all_own]
            for rank, value in enumerate(found):
                if value != found[0]:
                    raise PyroVAEError(
                        f"the ranks of {self.doing} have different {name}: expected {found[0]}, as on rank 0, got "
                        f"{value} on rank {rank} of {self.size}. {fix}"
                    )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks rank 0's values, in place, in one message for each type and device."""
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        for each in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in each])
            self._waiting(lambda flat=flat: dist.broadcast(flat, 0, self._for(flat)))  # type: ignore[misc]
            for tensor, part in zip(each, flat.split([tensor.numel() for tensor in each]), strict=True):
                tensor.copy_(part.reshape(tensor.shape))

    def sum(self, *tensors: Tensor) -> None:
        """Sum tensors over ranks, in place; on a GPU nothing waits for the result."""
        self._waiting(lambda: self._sum(tensors))

    def _sum(self, tensors: tuple[Tensor, ...]) -> None:
        for work in [dist.all_reduce(each, group=self._for(each), async_op=True) for each in tensors]:
            work.wait()

    def share(self, number: int) -> slice:
        """This rank's part of so many rows, which differ by one row at most from rank to rank."""
        return slice(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def _for(self, tensor: Tensor) -> Any:
        return self.side if tensor.device.type == "cpu" else dist.group.WORLD

    def _waiting(self, work: Callable[[], Any]) -> None:
        """Do what waits for the other ranks; refuse one that does not come, or has left."""
        try:
            work()
        except RuntimeError as error:
            raise OtherRankError(
                f"rank {self.rank} of {self.size} has waited in {self.doing} for a rank that has left, or did not come "
                f"within {TIMEOUT.total_seconds():g} s ({str(error).splitlines()[0][:200]}): expected all ranks. "
                f"{ADVICE}"
            ) from error


def group_of(distributed: bool | None, doing: str) -> Group | None:
    """The process group of a call, after all its ranks have made the call; None for a process of its own.

    Raises:
        ValueError: `distributed` is True and there is no group; or the ranks make different calls.
        OtherRankError: a rank does not make the call.
    """
    if distributed is not None and not isinstance(distributed, bool):
        raise PyroVAEError(
            f"expected distributed to be True, False or None, got {distributed!r}. None takes the process group, if "
            "there is one."
        )
    if distributed is False or is_alone():
        return None
    group = _group()
    if group is None:
        if distributed:
            raise PyroVAEError(
                "expected a process group with distributed=True, got none: neither was "
                "torch.distributed.init_process_group called, nor did torchrun start this program. Start it by "
                "`torchrun --nproc-per-node 2 program.py`, or drop distributed."
            )
        return None
    group.doing = doing
    with _saying(group):
        calls = group.gather(doing)
    if len(set(calls)) > 1:
        listed = ", ".join(f"rank {rank} {each}" for rank, each in enumerate(calls))
        raise PyroVAEError(f"the ranks make different calls: expected one call on all of them, got {listed}. {ADVICE}")
    return group


_known: tuple[Any, Group] | None = None  # the user's group, and ours beside it


def _group() -> Group | None:
    global _known
    if not dist.is_available():
        return None
    if not dist.is_initialized() and not _start():
        return None
    world = dist.group.WORLD
    if _known is None or _known[0] is not world:
        if dist.get_world_size() == 1:
            return None
        try:
            side = dist.new_group(backend="gloo", timeout=TIMEOUT)
        except RuntimeError as error:
            raise OtherRankError(
                f"rank {dist.get_rank()} has waited for the other ranks' first call of pyro_vae, and one of them has "
                f"left, or did not come within {TIMEOUT.total_seconds():g} s: expected all of them. {ADVICE}"
            ) from error
        _known = world, Group(dist.get_rank(), dist.get_world_size(), side)
    return _known[1]


def _start() -> bool:
    """Start a process group by the variables of torchrun, or of srun; False without them, or for one process."""
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        _take_from_slurm()
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return False
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        local = 0 if torch.cuda.device_count() == 1 else local  # Slurm may show each task its own GPU alone
        if local >= torch.cuda.device_count():
            raise PyroVAEError(
                f"expected a GPU for each process of this machine, got {torch.cuda.device_count()} and a process "
                f"of local rank {local}. Start as many processes as there are GPUs, or hide them: "
                "CUDA_VISIBLE_DEVICES= for training on CPUs."
            )
        torch.cuda.set_device(local)
    # Gloo for tensors on the CPU, NCCL for those on a GPU.
    dist.init_process_group(store=_store(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    atexit.register(_end)
    return True


def _store() -> Any:
    """The store by which the processes meet, with names of their own for each restart by torchrun.

    torchrun's own store stays from restart to restart, and would tell a process the addresses of dead ones.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    size, serves = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0" and not of_agent
    store = dist.TCPStore(address, port, size, serves, timeout=TIMEOUT)
    return dist.PrefixStore(f"pyro_vae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _end() -> None:
    global _known
    _known = None  # the last references to the groups, whose threads must end before the interpreter
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _take_from_slurm() -> None:
    """Set torchrun's variables from those of a step of Slurm, one process for each task."""
    env = os.environ
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
        env[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    )
    env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]))
    # Steps of one allocation may run side by side, and each needs a port of its own.
    job, step = (int("".join(filter(str.isdigit, env[name])) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    env.setdefault("MASTER_PORT", str(20_000 + (job * 31 + step) % 20_000))


def _first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as node[03-07,11],other."""
    head, bracket, inside = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    return head + inside.partition("]")[0].split(",")[0].split("-")[0]


@contextmanager
def _saying(group: Group) -> Iterator[None]:
    """Inside, a rank that waits for long says so."""

    def say() -> None:
        warnings.warn(
            f"rank {group.rank} of {group.size} has waited in {group.doing} for {SAYS_SO:g} s for other ranks to make "
            f"that call. {ADVICE}",
            stacklevel=2,
        )

    timer = threading.Timer(SAYS_SO, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def carried(value: Any, device: torch.device | None) -> Any:
    """The same on a device, also in records of this package; None leaves it where it is."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.detach().to(of_float64(device) if value.dtype is torch.float64 else device)
    if isinstance(value, dict):
        return {key: carried(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        found = [carried(each, device) for each in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if type(value).__module__.startswith("pyro_vae."):
        found = copy.copy(value)
        vars(found).update({name: carried(each, device) for name, each in vars(value).items()})
        return found
    return value


def mixed(*numbers: int) -> int:
    """A seed from several integers, such as a seed and the number of a piece: others for any other numbers.

    Each is a step of SplitMix64 (Steele, Lea and Flood 2014). It fits NumPy's seeds of 32 bits.
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 32


_MASK = 2**64 - 1
