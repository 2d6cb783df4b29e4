"""A VAE's training step and log p(x), ours and other packages'.

    python benchmarks/peers/run.py [--quick] [--only CONFIGURATION]

All contestants have the same network, weights, batch, Adam and arithmetic, which is checked. They take turns in one
process with one thread. Written are tables, bench.json and two figures.
"""

from __future__ import annotations

import os

# ruff: noqa: E402  one thread for all, which the libraries read as they are imported
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import json
import math
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import floor
import numpyro_jit
import objectives
import ours
import pyro
import pyro_svi
import pythae_model
import report
import torch
import torch_by_hand
from configurations import Configuration, Contestant, Estimator
from measure import Clock, Spread, alternate, check_reached, check_same, clock, ratio, seconds
from rich.console import Console

import pyro_vae as pv

PEERS = (ours, pyro_svi, torch_by_hand, numpyro_jit, pythae_model)
CONFIGURATIONS = [
    Configuration(128, 400, 20),
    Configuration(20, 200, 50),
    Configuration(128, 400, 20, particles=50),
    Configuration(20, 200, 50, particles=50),
    Configuration(64, 0, 20, conv=True),
]
PARTICLES, QUICK_PARTICLES = (1, 4, 16, 64, 256, 1024), (1, 16, 256)
BATCHES, QUICK_BATCHES = (8, 16, 32, 64, 128, 256, 512), (8, 64, 512)
LIKELIHOOD, NUM_SAMPLES = Configuration(1, 400, 20), 5000
PYRO = "SVI, Pyro's {}".format
console = Console(width=170)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter ones")
    choices = [*(c.key for c in CONFIGURATIONS), "log-likelihood", "objectives", "cost-particles", "cost-batch"]
    parser.add_argument("--only", action="append", choices=choices, help="may be given several times")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and the figures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", module="torch")

    chosen = options.only or choices
    particles, batches = (QUICK_PARTICLES, QUICK_BATCHES) if options.quick else (PARTICLES, BATCHES)
    results: dict[str, Any] = {"machine": machine(), "quick": options.quick, "training": {}}
    for configuration in CONFIGURATIONS:
        if configuration.key in chosen:
            result = results["training"][configuration.key] = train(configuration, options.quick)
            report.print_training(console, result)
            if configuration.particles > 1:
                console.print(pythae_model.LEFT_OUT, "\n")
            save(results, options.out)
    if "log-likelihood" in chosen:
        results["log_likelihood"] = estimate(options.quick)
        report.print_likelihood(console, results["log_likelihood"])
    if "objectives" in chosen:
        console.print("[dim]each objective: compiling ...[/dim]")
        fresh()
        results["objectives"] = objectives.measure(5 if options.quick else 21, 0.05)
        objectives.show(console, results["objectives"])
    results["claims"] = claims(results)
    if results["claims"]:
        report.print_claims(console, results["claims"])
    save(results, options.out)
    if "cost-particles" in chosen:
        found = sweep([Configuration(20, 200, 50, particles=k) for k in particles], options.quick)
        results["cost_of_particles"] = found
        results["growth"] = growth(found)
        report.print_growth(console, results["growth"])
        title = "Cost of particles: MLP 784-200-50, batch 20 (K = 1: ELBO; above: IWAE)"
        report.draw(lines(found, "particles"), "K, particles", title, options.out / "cost_particles.png")
        save(results, options.out)
    if "cost-batch" in chosen:
        found = results["cost_of_batch"] = sweep([Configuration(size, 400, 20) for size in batches], options.quick)
        title = "Cost of a batch: MLP 784-400-20, ELBO, K = 1"
        report.draw(lines(found, "batch"), "batch size", title, options.out / "cost_batch.png")
    save(results, options.out)
    console.print(f"Written: {', '.join(str(path) for path in sorted(options.out.iterdir()))}")


def train(
    configuration: Configuration,
    quick: bool,
    rounds: int = 31,
    chosen: Callable[[Contestant], bool] = lambda _: True,
) -> dict[str, Any]:
    """Check that all contestants compute and train the same, then time their steps."""
    console.print(f"[dim]{configuration.title}: compiling ...[/dim]")
    fresh()
    contestants = [c for peer in PEERS for c in peer.contestants(configuration) if chosen(c)]
    work = configuration.particles * configuration.batch
    evaluations, steps, again = (200, 100, 12) if work < 1000 else (30, 20, 5) if work < 4000 else (10, 8, 3)
    for contestant in contestants:
        contestant.loss()  # what the first call does besides, such as to compile, is no part of any time
    losses = {c.name: [c.loss() for _ in range(evaluations)] for c in contestants}
    z = {name: check_same(name, values, losses[ours.COMPILED]) for name, values in losses.items()}
    for contestant in contestants:
        for _ in range(steps):
            contestant.step()
    reached = {c.name: statistics.fmean(c.loss() for _ in range(again)) for c in contestants}
    for c in contestants:
        same = next(other.name for other in contestants if other.noisier == c.noisier)
        check_reached(c.name, reached[c.name], reached[same])

    # Short blocks: what else the machine does then meets all contestants of a round alike.
    rounds, block = (5, 0.05) if quick else (rounds, 0.06)
    clocks = {c.name: clock(c.step, block) for c in contestants}
    clocks[floor.NAME] = clock(floor.training(configuration), block)
    times = alternate(clocks, rounds)
    rows = compared(times)
    for c in contestants:
        rows[c.name] |= {
            "first": statistics.fmean(losses[c.name]) / configuration.batch,
            "z": z[c.name],
            "reached": reached[c.name] / configuration.batch,
            "line": c.line,
        }
    return {
        "title": configuration.title,
        **asdict(configuration),
        "steps": steps,
        "rounds": rounds,
        "contestants": rows,
    }


def estimate(quick: bool) -> dict[str, Any]:
    """Check that all estimates of log p(x) agree, then time them."""
    console.print(f"[dim]log p(x), {LIKELIHOOD.title}: compiling ...[/dim]")
    fresh()
    estimators = [e for peer in PEERS for e in peer.estimators(LIKELIHOOD, NUM_SAMPLES)]
    few, some, many, rounds = (2, 12, 42, 5) if quick else (2, 12, 82, 9)
    x = LIKELIHOOD.data(many)
    repeated = LIKELIHOOD.data(2).repeat(20, 1)  # two data, many times: each an estimate
    values = {e.name: e.estimate(repeated) for e in estimators}
    totals = {name: [a + b for a, b in zip(v[::2], v[1::2], strict=True)] for name, v in values.items()}
    z = {name: check_same(name, total, totals[ours.COMPILED]) for name, total in totals.items()}

    def one(estimator: Estimator) -> Clock:
        """Seconds of a sample, without what each call takes to compile."""

        def on(number: int) -> float:
            return seconds(lambda: estimator.estimate(x[:number]))

        if estimator.compiles_in_call:
            return lambda: (on(many) - on(few)) / ((many - few) * NUM_SAMPLES)
        on(some)  # jax.jit compiles for each shape
        return lambda: on(some) / (some * NUM_SAMPLES)

    clocks = {e.name: one(e) for e in estimators}
    samples = 10 * NUM_SAMPLES
    runs = {rows: floor.sampling(LIKELIHOOD, rows, samples) for rows in (625, 1250, 2500, 5000)}
    best = min(runs, key=lambda rows: min(seconds(runs[rows]) for _ in range(5)))
    clocks[floor.NAME] = lambda: seconds(runs[best]) / samples
    times = alternate(clocks, rounds)
    rows = compared(times)
    for name, total in totals.items():
        rows[name] |= {"first": statistics.fmean(total) / 2, "z": z[name]}
    return {
        "title": f"MLP 784-{LIKELIHOOD.hidden}-{LIKELIHOOD.latent}",
        "num_samples": NUM_SAMPLES,
        "rounds": rounds,
        "contestants": rows,
    }


def compared(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Each contestant's times, and its ratios to the floor and to the compiled step."""
    return {
        name: {
            "seconds": asdict(Spread.of(values)),
            "over_floor": asdict(ratio(times, name, floor.NAME)),
            "ours_over_it": asdict(ratio(times, ours.COMPILED, name)),
            "rounds": values,
        }
        for name, values in times.items()
    }


def sweep(configurations: list[Configuration], quick: bool) -> list[dict[str, Any]]:
    """The same at several sizes, for what figures draw."""
    found = []
    for configuration in configurations:
        found.append(train(configuration, quick, 11, lambda contestant: contestant.line is not None))
        report.print_training(console, found[-1])
    return found


def lines(found: list[dict[str, Any]], size: str) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Name of a line, to its sizes and times."""
    drawn: dict[str, list[tuple[int, dict[str, float]]]] = {name: [] for name in report.STYLES}
    for result in found:
        for name, row in result["contestants"].items():
            drawn[row.get("line", name)].append((result[size], row["seconds"]))
    return {name: points for name, points in drawn.items() if len(points) > 1}


def growth(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Our compiled step's time by K, and its share outside the matrix products: whole and in portions."""
    found = [
        result["contestants"] | {"particles": result["particles"]} for result in found if result["particles"] >= 16
    ]
    return {
        name: {
            "points": [
                {
                    "particles": rows["particles"],
                    "seconds": step(rows)["seconds"],
                    "share_outside": asdict(Spread.of([1 - a / b for a, b in rounds(rows[floor.NAME], step(rows))])),
                }
                for rows in found
            ],
            "exponent": asdict(exponent(found, step)),
        }
        for name, step in STEPS.items()
    }


#: Which of a sweep's rows is the step; few particles are one portion.
STEPS = {
    "at once": lambda rows: rows[ours.COMPILED],
    "in portions": lambda rows: rows.get(ours.PORTIONS, rows[ours.COMPILED]),
    "products": lambda rows: rows[floor.NAME],
}


def exponent(found: list[dict[str, Any]], step: Callable[[dict[str, Any]], Any]) -> Spread:
    """That of K in the time, from the fewest particles to the most."""
    octaves = math.log(found[-1]["particles"] / found[0]["particles"])
    return Spread.of([math.log(b / a) / octaves for a, b in rounds(step(found[0]), step(found[-1]))])


def rounds(first: dict[str, Any], second: dict[str, Any]) -> zip[tuple[float, float]]:
    return zip(first["rounds"], second["rounds"], strict=True)


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios that the project promises, of those configurations that ran."""
    compiled = ours.COMPILED
    promised: list[tuple[str, str, str, float]] = []
    for configuration in CONFIGURATIONS:
        key, particles = configuration.key, configuration.particles
        objectives = ("TraceMeanField_ELBO", "Trace_ELBO") if particles == 1 else ("RenyiELBO",)
        at_most = {"mlp-20-200-50-1": 0.25, "mlp-128-400-20-1": 0.6}.get(key, 1.0)
        promised += [(key, compiled, PYRO(objective), at_most) for objective in objectives]
        promised += [(key, compiled, peer, 1.0) for peer in ("PyTorch compiled", "NumPyro jitted")]
        if particles > 1:
            pairs = [(pv.IWAE(particles), "RenyiELBO")]
        else:
            pairs = [(pv.ELBO(), "TraceMeanField_ELBO"), (pv.ELBO(kl="monte_carlo"), "Trace_ELBO")]
        promised += [(key, ours.svi_name(mine), PYRO(pyros), 1.0) for mine, pyros in pairs]
    found = []
    for key, above, below, at_most in promised:
        if key in results["training"]:
            rows = results["training"][key]["contestants"]
            times = {name: row["rounds"] for name, row in rows.items()}
            spread = asdict(ratio(times, above, below))
            found.append({"what": f"{above} / {below}", "where": key, "ratio": spread, "at_most": at_most})
    return found


def fresh() -> None:
    """Nothing is left of the last configuration: no parameters in Pyro's store, no compiled shapes."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch._dynamo.reset()


def machine() -> dict[str, Any]:
    packages = ("pyro_vae", "torch", "pyro-ppl", "numpyro", "jax", "pythae")
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].split(":", 1)[1].strip() if models else platform.processor()


def save(results: dict[str, Any], out: Path) -> None:
    (out / "bench.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
