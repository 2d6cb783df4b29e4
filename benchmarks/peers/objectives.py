"""What each objective costs: a step of one network with K particles, compiled and not, beside the ELBO's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import ours
import torch
from configurations import LEARNING_RATE, Configuration
from measure import Spread, alternate, clock, ratio
from rich.console import Console
from rich.table import Table

import pyro_vae as pv

CONFIGURATION = Configuration(20, 200, 50, particles=16)
BESIDE = "ELBO, Monte Carlo KL, 16"  # as many particles


def objectives(k: int) -> dict[str, pv.Objective]:
    """By the names that tables know them by."""
    outer = round(k**0.5)
    found = [
        (pv.ELBO(), 1),
        (pv.ELBO(kl="monte_carlo"), 1),
        (pv.ELBO(k), k),
        (pv.ELBO(k, "monte_carlo"), k),
        (pv.ELBO(k, "monte_carlo", gradient="stl"), k),
        (pv.ELBO(k, "monte_carlo", gradient="score"), k),
        *((pv.IWAE(k, gradient), k) for gradient in ("pathwise", "stl", "dreg", "vimco")),
        (pv.Renyi(0.5, k), k),
        (pv.MIWAE(outer, k // outer), k),
        (pv.PIWAE(outer, k // outer), k),
        (pv.CIWAE(0.5, k), k),
        (pv.TVO(k, 10), k),
        (pv.JVI(k, 1), k),
        (pv.RWS(k), k),
    ]
    return {f"{objective.name}, {number}": objective for objective, number in found}


def measure(rounds: int, block: float) -> dict[str, Any]:
    """Seconds of a step of each, in turns, and their ratios to the ELBO's with as many particles."""
    clocks = {}
    x = CONFIGURATION.data()
    for name, objective in objectives(CONFIGURATION.particles).items():
        vae = ours.build(CONFIGURATION)
        optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
        step = pv.compile_step(vae.model, vae.guide, objective, optimizer)
        step(x)
        clocks[name] = clock(lambda step=step: step(x), block)
        eager = ours.eager(CONFIGURATION, objective)
        clocks[f"{name} uncompiled"] = clock(eager.step, block)
    times = alternate(clocks, rounds)
    return {
        name: {"seconds": asdict(Spread.of(values)), "over_elbo": asdict(ratio(times, name, BESIDE))}
        for name, values in times.items()
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """A row for each objective."""
    table = Table(title=f"A step of each objective: {CONFIGURATION.title}", title_justify="left")
    table.add_column("objective, particles", no_wrap=True)
    for column in ("ms, compiled", "over the ELBO's with 16", "ms, uncompiled"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        if not name.endswith(" uncompiled"):
            cells = (row["seconds"], row["over_elbo"], found[f"{name} uncompiled"]["seconds"])
            table.add_row(
                name, *(str(Spread(*(f * v for v in c.values()))) for f, c in zip((1e3, 1, 1e3), cells, strict=True))
            )
    console.print(table)
