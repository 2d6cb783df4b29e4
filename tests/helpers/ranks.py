"""Run by tests/training/test_ranks.py, by torchrun or alone: trains programs whose noise is a column of the data.

    python ranks.py CASES FOLDER [NAME ...]

CASES is a function of this file. Each rank writes what the function returns to FOLDER/RANK.pt. Since the noise of a
datum is the same on every rank, so must be the training.
"""

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv

K = 4
RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = drawn(75, 5, seed=1) * torch.linspace(0.1, 3, 75, dtype=torch.float64)[:, None]
NOISE = drawn(75, K, 2, seed=2)  # (datum, particle, latent)


class Given(dist.Normal):
    """A normal whose noise is given: (rows, particles, latents), or (1, particles, latents) outside of the plate."""

    def __init__(self, loc, scale, noise):
        self.noise = noise
        super().__init__(loc, scale, validate_args=False)

    def expand(self, shape, _instance=None):
        return Given(self.loc.expand(shape), self.scale.expand(shape), self.noise)

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        noise = self.noise.movedim(1, 0)  # (particles, rows, latents)
        for _ in range(3 - len(shape)):
            noise = noise[0]
        return self.loc + self.scale * noise.expand(shape)


class Program(nn.Module):
    """A model and a guide; `kind` is what is special about them."""

    def __init__(self, kind="plain", dtype=torch.float64):
        super().__init__()
        self.kind = kind
        pyro.clear_param_store()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)
        self.late, self.shift = nn.Linear(2, 5), nn.Parameter(torch.zeros(2))
        for i, parameter in enumerate(self.parameters()):
            parameter.data = 0.3 * drawn(*parameter.shape, seed=10 + i).to(dtype)

    def plate(self, x):
        return (
            pyro.plate("data", 75, subsample_size=len(x), dim=-1)
            if self.kind == "global"
            else pyro.plate("data", len(x))
        )

    def model(self, x, noise):
        pyro.module("decoder", self.decoder)
        shift = torch.zeros(2).to(x)
        if self.kind in ("global", "outside"):
            shift = pyro.sample("shift", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            loc = self.decoder(z + shift)
            odd = (noise[:, :1, 0] > 2.1).to(x)  # in few minibatches
            if self.kind == "late" and bool(odd.any()):
                pyro.module("late", self.late)
                loc = loc + odd * self.late(z)
            fn = dist.Normal(loc, 1.0)
            if self.kind == "masked":
                fn = fn.mask(x < 1.5)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.module("encoder", self.encoder)
        if self.kind in ("global", "outside"):
            shift = pyro.param("shift_loc", self.shift)
            pyro.sample("shift", Given(shift, torch.ones(2).to(x), noise.new_full((1, K, 2), 0.3)).to_event(1))
        with self.plate(x):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", Given(loc, log_scale.exp(), noise).to_event(1))
            if self.kind == "factor":
                pyro.factor("penalty", -0.1 * loc.square().sum(-1), has_rsample=False)


def train(kind="plain", objective=None, dtype=torch.float64, data=None, **settings):
    program = Program(kind, dtype)
    pyro.set_rng_seed(0)
    args = (X.to(dtype), NOISE.to(dtype)) if data is None else data
    settings = {"lr": 1e-2, "seed": 0, "progress": False} | ({"batch_size": 16} if data is None else {}) | settings
    settings = ({} if "epochs" in settings else {"steps": 50}) | settings
    history = pv.fit(program.model, program.guide, args, objective or pv.ELBO(), **settings)
    return {n: p.detach().clone() for n, p in program.named_parameters()}, history.drop(columns="seconds").values


def averaged():
    average = pv.callbacks.EMA(0.9, at_end=True)
    frozen = pv.callbacks.Freeze("encoder", epochs=2)
    return train(callbacks=[average, frozen, StopAt(40)])


class StopAt(pv.Callback):
    """Ends the training, on rank 0 alone."""

    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            record.stop("far enough")


IWAE = (K, "dreg")
CASES = {
    "ELBO": lambda: train(),
    "ELBO, float32": lambda: train(dtype=torch.float32),
    "IWAE, DReG": lambda: train(objective=pv.IWAE(*IWAE)),
    "VIMCO": lambda: train(objective=pv.IWAE(K, "vimco")),
    "RWS": lambda: train(objective=pv.RWS(K)),
    "global latent": lambda: train("global"),
    "masks": lambda: train("masked", pv.IWAE(*IWAE)),
    "late parameters": lambda: train("late"),
    "late parameters, accumulated": lambda: train("late", accumulate=2),
    "weights": lambda: train(weights=torch.arange(75.0) % 4),
    "accumulated and clipped": lambda: train(accumulate=3, clip_norm=0.5, objective=pv.IWAE(*IWAE)),
    "validated": lambda: train(
        epochs=9,
        validation=(X[:11], NOISE[:11]),
        patience=2,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold_mode="abs"),
    ),
    "schedule": lambda: train(objective=pv.ELBO(kl="monte_carlo", beta=pv.schedules.warm_up(30))),
    "factor in the guide": lambda: train("factor", pv.IWAE(*IWAE)),
    "one datum": lambda: train(data=(X[:1], NOISE[:1]), batch_size=3, steps=9),
    "chunks": lambda: train(objective=pv.IWAE(*IWAE, chunk_size=2)),
    "Pyro's ELBO": lambda: train("global", pyro.infer.Trace_ELBO()),
    "few data": lambda: train(data=(X[:7], NOISE[:7]), batch_size=3, steps=9),
    "averaged": averaged,
}
COMPILED = {
    "ELBO": lambda: train(compile=True),
    "IWAE, DReG": lambda: train(objective=pv.IWAE(*IWAE), compile=True),
}


def cases(*names):
    return {name: CASES[name]() for name in names or CASES}


def compiled():
    return {name: train_compiled() for name, train_compiled in COMPILED.items()}


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Fails(pv.Callback):
    def on_step(self, record):
        if record.step == 3:
            raise RuntimeError("no room")


class Spoils(pv.Callback):
    """Changes parameters on rank 0 alone."""

    def on_step(self, record):
        next(iter(record.parameters.values())).data += 1.0


def refusals():
    """What each rank is told; all ranks go on to the next call."""
    own = RANK + 1
    data = X, NOISE
    return {
        "settings": raised(lambda: train(lr=0.01 * own)),
        "epochs": raised(lambda: train(epochs=own)),
        "parameters": raised(lambda: train("global" if RANK else "plain")),
        "data": raised(lambda: train(data=tuple(column[RANK::SIZE][:30] for column in data))),
        "loader": raised(lambda: train(data=DataLoader(TensorDataset(*data), 8, shuffle=True))),
        "outside of the plate": raised(lambda: train("outside", batch_size=75)),
        "validation data": raised(lambda: train(epochs=1, validation=tuple(column[RANK:20] for column in data))),
        "free bits": raised(lambda: train(objective=pv.ELBO(free_bits=0.1))),
        "score": raised(lambda: train(objective=pv.IWAE(K, "score"), batch_size=SIZE)),
        "batch norm": raised(batch_norm),
        "not finite": raised(lambda: train(data=(X.index_fill(0, torch.tensor(70), 1e200), NOISE))),
        "program": raised(lambda: train("plain", Broken())),
        "callback": raised(lambda: train(callbacks=Fails())),
        "spoilt": raised(lambda: train(callbacks=Spoils())),
        "arguments": raised(lambda: train(lr=-1.0 if RANK == 1 else 1e-2)),
        "other call": raised(lambda: train() if RANK else pv.distributed.group_of(None, "pv.ais")),
    }


def batch_norm():
    norm = nn.BatchNorm1d(5, dtype=torch.float64)
    program = Program()
    decoder = program.decoder
    program.decoder = nn.Sequential(decoder, norm)
    pv.fit(program.model, program.guide, (X, NOISE), pv.ELBO(), epochs=1, progress=False)


class Broken(pv.ELBO):
    def differentiable_loss(self, *args, **kwargs):
        if self.step == 5 and RANK == 1:
            raise RuntimeError("a worker has died")
        return super().differentiable_loss(*args, **kwargs)


def loaders():
    """Each rank's loader gives its own data, of other sizes: 38 and 37 rows, so that minibatches are those of one."""
    own = tuple(column[RANK::SIZE] for column in (X, NOISE))
    sharded = DistributedSampler(TensorDataset(X, NOISE), SIZE, RANK, seed=3) if SIZE > 1 else None
    return {
        "own data": train(data=DataLoader(TensorDataset(*own), 16 // SIZE), epochs=4),
        "stream": train(data=DataLoader(Stream(own), 16 // SIZE), epochs=4),
        "whole stream": train(data=DataLoader(Stream(own), 75), epochs=4),
        "whole": train(data=DataLoader(TensorDataset(*own), 75), epochs=4),
        "sampler": train(data=DataLoader(TensorDataset(X, NOISE), 8, sampler=sharded), epochs=2),
    }


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, columns):
        self.columns = columns

    def __iter__(self):
        return iter(list(zip(*self.columns, strict=True)))


def everything():
    return {"cases": cases(), "loaders": loaders(), "refusals": refusals()}


def left():
    """Rank 1 leaves, and rank 0 makes the call."""
    pv.distributed.TIMEOUT = timedelta(seconds=20)
    pv.distributed.group_of(None, "pv.fit")
    return "left" if RANK == 1 else raised(train)


def alone():
    """One fold for each rank, and an evaluation on rank 0 alone."""
    own = train(data=(X[RANK * 20 : RANK * 20 + 20], NOISE[:20]), batch_size=8, distributed=False)
    program = Program()
    return own, pv.fit(
        program.model, program.guide, (X, NOISE), pv.ELBO(), epochs=1, distributed=False
    ) if RANK == 0 else None


def main(name, folder, *arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.save(globals()[name](*arguments), Path(folder) / f"{RANK}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
