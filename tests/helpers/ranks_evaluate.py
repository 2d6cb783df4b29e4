"""All evaluations that a process group shares, and what it refuses, each result written to a file of this rank.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/helpers/ranks_evaluate.py FOLDER all

Without `all`, those that take long are left out.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch.utils.data import DataLoader, DistributedSampler

import pyro_vae as pv
from pyro_vae import distributed
from pyro_vae.evaluation import allocation, decomposition, measured, parts, pieces

D, Z, N = 3, 2, 23
RANK = int(os.environ.get("RANK", "0"))
X = torch.linspace(-2, 2, N * D).sin().mul(2).reshape(N, D)
QUIET: dict[str, Any] = {"progress": False}


def cut_small(set_to: Callable[[Any, str, Any], None] = setattr) -> None:
    """Cut these few data into many pieces, and those that are read into several parts."""
    set_to(pieces, "ELEMENTS_AT_ONCE", 5 * 50 * D)  # 5 rows with 50 samples
    set_to(parts, "rows_at_once", lambda args: 10)
    set_to(allocation, "ROWS_AT_ONCE", 4)
    set_to(decomposition, "DATA_AT_ONCE", 7)
    set_to(decomposition, "DENSITIES_AT_ONCE", 300)
    set_to(measured, "ROWS_AT_ONCE", 40)


def pair() -> pv.VAE:
    """A program with parameters, the same on each rank."""
    pyro.set_rng_seed(0)
    return pv.mlp_vae((D,), latent_dim=Z, hidden_dims=(8,), likelihood="gaussian")


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.ones(Z, D), 1.0).to_event(1), obs=x)


def guide_for_each_datum(x: torch.Tensor) -> None:
    loc = pyro.param("loc", lambda: 0.3 * torch.randn(len(x), Z))  # made in the first run
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.6).to_event(1))


def table(found: Any) -> Any:
    """What is compared of a table: all but the times."""
    return found.drop(columns="milliseconds", errors="ignore").to_dict()


def groups(found: Any) -> dict[str, torch.Tensor]:
    """The arrays of ArviZ's groups."""
    return {
        f"{group} {name}": torch.as_tensor(found[group][name].values.copy())
        for group in ("posterior", "prior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data")
        for name in found[group].data_vars
    }


def sandwich(found: pv.Sandwich) -> list[Any]:
    return [vars(found.lower), found.upper_per_datum, found.x]


def unseeded() -> list[Any]:
    pyro.set_rng_seed(3)
    found = [pv.log_likelihood(pair(), X, 50, **QUIET) for _ in range(2)]
    return [*map(vars, found), torch.rand(3)]  # the generators go on from the same state


def of_each_datum() -> Any:
    pyro.clear_param_store()
    return vars(pv.log_likelihood(model, guide_for_each_datum, X, 50, seed=0, **QUIET))


def refined(**options: Any) -> Any:
    return vars(pv.log_likelihood(pair(), X, 200, refine=True, seed=0, **QUIET, **options))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(X, batch_size=4, **options)  # type: ignore[arg-type]


ONE_BY_ONE: dict[str, Any] = {"vectorize_particles": False, **QUIET}
TO_MEAN: dict[str, Any] = {"error": 0.01, "error_of": "mean", **QUIET}
SETTINGS: dict[str, Any] = {"num_steps": 12, "num_chains": 4, "seed": 0, **QUIET}
RESULTS: dict[str, Callable[[], Any]] = {
    "log_likelihood": lambda: vars(pv.log_likelihood(pair(), X, 50, seed=0, **QUIET)),
    "one by one": lambda: vars(pv.log_likelihood(pair(), X, 50, seed=0, **ONE_BY_ONE)),
    "fewer data than ranks": lambda: vars(pv.log_likelihood(pair(), X[:1], 50, seed=0, **QUIET)),
    "read": lambda: vars(pv.log_likelihood(pair(), loader(), 50, seed=0, **QUIET)),
    "shuffled": lambda: vars(pv.log_likelihood(pair(), loader(shuffle=True), 50, seed=0, **QUIET)),
    "unseeded": unseeded,
    "not divisible": of_each_datum,
    "refined": refined,
    "to an error": lambda: vars(pv.log_likelihood(pair(), X, 200, error=0.05, seed=0, **QUIET)),
    "error of the mean": lambda: vars(pv.log_likelihood(pair(), X, 200, seed=0, **TO_MEAN)),
    "refined to an error of the mean": lambda: refined(error=0.004, error_of="mean"),
    "compare": lambda: table(pv.compare(pair(), X, [pv.ELBO(), pv.IWAE(4)], repeats=5, seed=0, **QUIET)),
    "compare, read": lambda: table(pv.compare(pair(), loader(), pv.IWAE(4), repeats=5, seed=0, **QUIET)),
    "ais": lambda: vars(pv.ais(pair(), X, **SETTINGS)),
    "bdmc": lambda: sandwich(pv.bdmc(pair(), X, start="guide", **SETTINGS)),
    "inference_gaps": lambda: vars(pv.inference_gaps(pair(), X, 50, num_steps=8, seed=0, **QUIET)),
    "decompose_elbo": lambda: str(vars(pv.decompose_elbo(pair(), X, 3, seed=0, **QUIET))),
    "decompose_elbo, read": lambda: str(vars(pv.decompose_elbo(pair(), loader(), 3, seed=0, **QUIET))),
    "decompose_elbo of one datum": lambda: str(vars(pv.decompose_elbo(pair(), X[:1], 3, seed=0, **QUIET))),
    "active_units": lambda: table(pv.active_units(pair(), X, 7, seed=0)),
    "to_arviz": lambda: groups(pv.to_arviz(pair(), X, 150, seed=0)),
    "to_arviz, read": lambda: groups(pv.to_arviz(pair(), loader(), 70, seed=0)),
}
LONG: dict[str, Callable[[], Any]] = {
    "compiled": lambda: vars(pv.log_likelihood(pair(), X, 50, seed=0, compile=True, **QUIET)),
    "compiled, refined": lambda: refined(compile=True),
    "refined, read": lambda: vars(pv.log_likelihood(pair(), loader(), 200, refine=True, seed=0, **QUIET)),
    "compiled, annealed": lambda: vars(pv.ais(pair(), X, compile=True, **SETTINGS)),
    "slower than the timeout": lambda: vars(pv.log_likelihood(slow, guide_by_rows, X, 50, seed=0, **QUIET)),
}


def is_piece_of_rank_1(x: torch.Tensor) -> bool:
    return RANK == 1 and len(x) == 5 and torch.equal(x[0], X[5])


def slow(x: torch.Tensor) -> None:
    if is_piece_of_rank_1(x):
        time.sleep(1.5 * distributed.TIMEOUT.total_seconds())
    model(x)


def others(**changes: Any) -> Any:
    """A call whose arguments differ on rank 1."""
    given = {"program": pair(), "x": X, "num_samples": 50, "seed": 0} | QUIET | (changes if RANK == 1 else {})
    return pv.log_likelihood(given.pop("program"), given.pop("x"), **given)


def changed(name: str) -> pv.VAE:
    """A pair with another value of a parameter, or of a buffer."""
    vae = pair()
    vae.register_buffer("offset", torch.zeros(2))
    if RANK == 1:
        with torch.no_grad():
            dict([*vae.named_parameters(), *vae.named_buffers()])[name].view(-1)[0] += 1.0
    return vae


def failing(x: torch.Tensor) -> None:
    if is_piece_of_rank_1(x):
        raise KeyError("a file that only rank 0 has")
    model(x)


def fails_in_the_middle() -> Any:
    return pv.log_likelihood(failing, guide_by_rows, X, 50, seed=0, **QUIET)


def guide_by_rows(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :Z] / 4, 0.6).to_event(1))


def other_call() -> Any:
    return pv.active_units(pair(), X) if RANK == 1 else pv.log_likelihood(pair(), X, 50, **QUIET)


def sharded() -> Any:
    own = loader(sampler=DistributedSampler(X))  # type: ignore[arg-type]
    return pv.log_likelihood(pair(), own, 50, seed=0, **QUIET)


def own_order() -> Any:
    own = loader(shuffle=True, generator=torch.Generator().manual_seed(RANK))
    return pv.log_likelihood(pair(), own, 50, seed=0, **QUIET)


def own_schedule() -> Any:
    steps = torch.linspace(0, 1, 5).square() if RANK == 1 else "linear"
    return pv.ais(pair(), X, 4, 4, schedule=steps, seed=0, **QUIET)


def work() -> str:
    """How many draws this process makes, in all."""
    drawn = 0

    def counted(x: torch.Tensor) -> None:
        nonlocal drawn
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            drawn += z.numel() // Z
            pyro.sample("x", dist.Normal(z @ torch.ones(Z, D), 1.0).to_event(1), obs=x)

    pv.log_likelihood(counted, guide_by_rows, X[:20], 50, seed=0, **QUIET)
    return str(drawn)


def call_of_rank_0() -> Any:
    if RANK == 0:
        return pv.log_likelihood(pair(), X, 50, seed=0, **QUIET)
    waiting = Path(sys.argv[1]) / "refusals 0"
    while not waiting.exists():
        time.sleep(0.05)
    return None


REFUSALS: dict[str, Callable[[], Any]] = {
    "other data": lambda: others(x=X + 1),
    "fewer data": lambda: others(x=X[:-1]),
    "data of one rank that are no data": lambda: others(x=torch.full_like(X, torch.nan)),
    "other settings": lambda: others(num_samples=60),
    "a setting that is wrong on one rank": lambda: others(num_samples=1),
    "other seed": lambda: others(seed=1),
    "other objectives": lambda: pv.compare(pair(), X, [pv.ELBO(), pv.IWAE(4 + RANK)], repeats=2, **QUIET),
    "other schedule": own_schedule,
    "other parameters": lambda: pv.active_units(changed("posterior.encoder.1.bias"), X, seed=0),
    "other buffers": lambda: pv.to_arviz(changed("offset"), X, 4, seed=0),
    "sharded loader": sharded,
    "own order": own_order,
    "failure of one rank": fails_in_the_middle,
    "another call": other_call,
    "work": work,
    "alone": lambda: [pv.log_likelihood(pair(), X, 50, seed=0, distributed=False, **QUIET).mean for _ in range(RANK)],
    "call of rank 0 alone": call_of_rank_0,  # the last one: its group has ended
}


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """How a call ends: the type of its error and the message, or its result."""
    try:
        return "none", str(call())
    except Exception as error:
        return type(error).__name__, str(error)


def main(folder: str, which: str = "") -> None:
    """Write the results, and then how each refusal ends."""
    torch.set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=5)
    cut_small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({n: f() for n, f in (RESULTS | LONG if which else RESULTS).items()}, f"{folder}/results {RANK}")
        ended = {name: refused(call) for name, call in REFUSALS.items()}
        torch.save(ended, f"{folder}/refusals {RANK}")


if __name__ == "__main__":
    main(*sys.argv[1:])
