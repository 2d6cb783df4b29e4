"""What the ranks of a training must have in common, and what they take from rank 0."""

import pickle
import socket
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.distributions.transforms import BatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset

from pyro_vae.distributed import Group, mixed
from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import buffers
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives.gradients import ESTIMATORS
from pyro_vae.training import data_sums

if TYPE_CHECKING:
    from pyro_vae.training.loop import Loop
    from pyro_vae.training.setup import Asked

SAME_SCRIPT = "Run the same script with the same arguments on every rank."


def agree(group: Group, loop: "Loop", asked: "Asked") -> None:
    """Refuse, on all ranks at once, what they don't have in common; take the rest from rank 0."""
    batches, parameters = loop.batches, loop.parameters
    settings = loop.settings if batches.loader is None else loop.settings | {"batch_size": None}
    common = settings | {"epochs": asked.epochs, "steps": asked.steps, "patience": asked.patience}
    common |= {"validation": loop.held_out is not None, "checkpoint_every": str(asked.checkpoint_every)}
    tensors = {"parameter": parameters, "buffer": buffers(loop.modules)}
    common |= {f"{w} '{n}'": f"{tuple(p.shape)} of {p.dtype}" for w, each in tensors.items() for n, p in each.items()}
    group.require_same(common, SAME_SCRIPT)
    device = next(iter(parameters.values())).device
    devices = group.gather((socket.gethostname(), _identity(device)))
    if len(set(devices)) < group.size and device.type == "cuda":
        raise PyroVAEError(
            f"expected a GPU for each rank, got {', '.join(' '.join(each) for each in devices)}. Pass device='cuda', "
            "or move the program to the GPU of LOCAL_RANK."
        )
    if batches.loader is None:
        _require_same_data(group, batches, "data")
    else:
        _require_shards(group, batches)
        lengths = group.gather(batches.steps)
        batches.steps = None if None in lengths else max(length or 0 for length in lengths)
        loop.scales.whole = sum(group.gather(loop.scales.whole))
    if loop.held_out is not None and loop.held_out.loader is None:
        _require_same_data(group, loop.held_out, "validation data")
    elif loop.held_out is not None:
        _require_shards(group, loop.held_out)
    loop.ranks.with_callbacks = any(group.gather(bool(loop.callbacks)))
    with group.together():
        _refuse_what_couples(group, loop)
    group.broadcast(dict.fromkeys([*parameters.values(), *buffers(loop.modules).values()]))
    loop.key = group.of_first(loop.key)
    if group.rank:  # samples have noise of their own on each rank
        pyro.set_rng_seed(mixed(loop.key, group.rank))


def _identity(device: torch.device) -> str:
    """A device's own name, since each process may see one GPU alone."""
    return str(torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device)


def _require_same_data(group: Group, batches: Minibatches, name: str) -> None:
    """Refuse tensors that are not the same on all ranks, which each take a share of every minibatch."""
    own: dict[str, Any] = {}
    with group.together():
        own = data_sums.describe(batches)
    found = group.gather(own)
    for rank, each in enumerate(found):
        other = data_sums.difference(found[0], each)
        if other is not None:
            raise PyroVAEError(
                f"the ranks have different {name}: expected {other.what} to be {other.was}, as on rank 0, got "
                f"{other.now} on rank {rank}. Pass all data on each rank, which takes its share of every minibatch; or "
                "a DataLoader of each rank's own data."
            )


def _require_shards(group: Group, batches: Minibatches) -> None:
    """Refuse loaders that give the same data on two ranks."""
    own = 0
    with group.together():
        own = _content(batches)
    contents = group.gather(own)
    again = next((rank for rank in range(1, group.size) if contents[rank] in contents[:rank]), None)
    if again is not None:
        raise PyroVAEError(
            "expected each rank's DataLoader to have data of its own, got the same on rank "
            f"{contents.index(contents[again])} and rank {again}. Give it sampler="
            "torch.utils.data.DistributedSampler(data), or pass the data as tensors."
        )


def _content(batches: Minibatches) -> int:
    """A number that tells apart what different loaders give in an epoch, whatever their order."""
    loader: Any = batches.loader
    states = batches.generator_states()
    with rng.preserved(seed=0):
        if isinstance(loader.dataset, IterableDataset):
            content: Any = [batches.example()]
        else:
            # The loader makes a sampler of its own beside a given batch_sampler.
            by_batch = loader.batch_size is None and loader.batch_sampler is not None
            order: Sequence[Any] = list(loader.batch_sampler if by_batch else loader.sampler)
            indices = sorted(i for each in order for i in each) if by_batch else sorted(order)
            content = [indices, loader.dataset[indices[0]] if indices else None]
    batches.set_generator_states(states)
    leaves, shape = pytree.tree_flatten(content)
    parts = (each.numpy(force=True).tobytes() if isinstance(each, Tensor) else pickle.dumps(each) for each in leaves)
    return zlib.crc32(b"".join([repr(shape).encode(), *parts]))


def _refuse_what_couples(group: Group, loop: "Loop") -> None:
    """Refuse terms that are of a whole minibatch, where each rank has a share of it."""
    objective = loop.objective
    if getattr(objective, "free_bits", 0):
        raise PyroVAEError(
            "free bits average the KL over a minibatch, of which each rank has a share: expected free_bits=0 with "
            f"several processes, got {objective.free_bits}. Pass 0, or distributed=False."
        )
    signal = getattr(getattr(objective, "estimator", None), "signal", None)
    if signal is ESTIMATORS["score"].signal and (loop.batches.batch_size or 2) < 2 * _parts(group, loop.batches):
        raise PyroVAEError(
            "gradient='score' compares a datum with the others of its rank: expected at least two data of each "
            f"minibatch on a rank, got batch_size={loop.batches.batch_size} on {group.size} ranks. Pass a larger "
            "batch_size, or gradient='vimco' and several particles."
        )
    names = {part: name for module in loop.modules for name, part in module.named_modules()}
    called: list[nn.Module] = []
    hook = register_module_forward_pre_hook(lambda part, _: called.append(part))  # also of modules in a closure
    try:
        loop.program.trace(training=True)
    finally:
        hook.remove()
    for part in [*names, *called]:
        moves = isinstance(part, _NormBase) and part.track_running_stats  # also instance norm's statistics
        of_batch = isinstance(part, _BatchNorm | BatchNorm) and not isinstance(part, nn.SyncBatchNorm)
        if (of_batch or (moves and not isinstance(part, nn.SyncBatchNorm))) and part.training:
            raise PyroVAEError(
                f"batch norm takes the statistics of a rank's share alone: expected none in training, got "
                f"{type(part).__name__} '{names.get(part, '')}'. On GPUs, convert the module by "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm; or put it into evaluation mode, or leave it out."
            )


def _parts(group: Group, batches: Minibatches) -> int:
    """Into how many parts a minibatch is split; a DataLoader's is each rank's own."""
    return group.size if batches.loader is None else 1
