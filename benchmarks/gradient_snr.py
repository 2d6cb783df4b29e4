r"""How the signal-to-noise ratio of a bound's gradient changes with the number of particles, by estimator.

    python benchmarks/gradient_snr.py         (under a minute; --out FOLDER for the figure)

More particles make the importance-weighted bound tighter and the guide's gradient worse: its signal falls as 1/K, its
noise only as 1/sqrt(K) (Rainforth et al. 2018). There are two remedies. MIWAE averages M bounds of K particles. DReG
(Tucker et al. 2019) replaces the score in the gradient by a second pathwise term, and its signal-to-noise ratio
rises. Here the ratio of VIMCO rises too, up to the 64 particles measured, because of its control variate.

The problem is that of these papers: x ~ N(z, I), z ~ N(mu, I), q(z|x) = N(A x + b, 2/3 I), in 20 dimensions with
1,024 data. The parameters differ from their best values by N(0, 0.01^2). The signal-to-noise ratio is ||E g|| /
sqrt(tr Cov g), where the vector g is the gradient of the bound averaged over all data. All estimators but STL have
the same E g, which is measured by the one with the least noise, DReG.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv

D, N, REPEATS = 20, 1024, 8
PARTICLES = [1, 4, 16, 64, 128, 256]
GRADIENTS = ["pathwise", "stl", "dreg", "vimco", "score"]
LAST = 64  # theory gives the slopes in the limit of many particles, so they are measured from here on


class Benchmark:
    """The model, the guide and their parameters: theta is mu, phi is A and b."""

    def __init__(self, seed=0):
        pyro.set_rng_seed(seed)
        self.x = torch.randn(D) + math.sqrt(2) * torch.randn(N, D)
        mu = self.x.mean(0)
        best = {"mu": mu, "A": torch.eye(D) / 2, "b": mu / 2}
        self.p = {name: (value + 0.01 * torch.randn_like(value)).requires_grad_() for name, value in best.items()}

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.p["mu"], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.p["A"].T + self.p["b"], math.sqrt(2 / 3)).to_event(1))

    def gradients(self, objective, repeats=REPEATS):
        """Draws of the mean bound's gradient: in theta (repeats, 20) and in phi (repeats, 420)."""
        draws = []
        for _ in range(repeats):
            bound = objective.bound(self.model, self.guide, self.x).mean()
            parts = torch.autograd.grad(bound, list(self.p.values()))
            draws.append(torch.cat([part.flatten() for part in parts]).double())
        return torch.stack(draws).split([D, D * D + D], 1)


def moments(draws):
    """The length of the mean gradient, corrected for noise, and the noise of one draw."""
    variance = draws.var(0).sum()
    signal = (draws.mean(0).square().sum() - variance / len(draws)).clamp(min=0)
    return signal.sqrt().item(), variance.sqrt().item()


def measure(benchmark, particles=PARTICLES, gradients=GRADIENTS, repeats=REPEATS):
    """A table with one row for each side (theta, phi), estimator and number of particles.

    It has the noise of one draw and the signal-to-noise ratio. For phi it also has the distance between the mean
    gradients of the estimator and of DReG, relative to their length, and the distance expected by chance. The gradient
    in theta is the same for all estimators, "any".
    """
    rows = []
    for k in particles:
        kinds = [
            kind for kind in gradients if kind in ("pathwise", "stl", "dreg") or 1 < k <= 64
        ]  # the others cost K^2
        draws = {kind: benchmark.gradients(pv.IWAE(k, kind), repeats) for kind in kinds}
        signal, noise = moments(torch.cat([theta for theta, _ in draws.values()]))
        rows.append({"side": "theta", "estimator": "any", "K": k, "noise": noise, "SNR": signal / noise})
        best = draws["dreg"][1]
        size = moments(best)[0]
        for kind in kinds:
            own = draws[kind][1]
            signal, noise = moments(own)
            chance = (own.var(0).sum() / len(own) + best.var(0).sum() / len(best)).sqrt().item()
            row = {"side": "phi", "estimator": kind, "K": k, "noise": noise}
            row["SNR"] = (signal if kind == "stl" else size) / noise
            row["distance"] = (own.mean(0) - best.mean(0)).norm().item() / size
            rows.append(row | {"chance": chance / size})
    return pd.DataFrame(rows).set_index(["side", "estimator", "K"]).sort_index()


def measure_miwae(benchmark, total=256, repeats=REPEATS):
    """The signal-to-noise ratio of the guide's gradient for MIWAE with M K = total, by K."""
    ratios = {}
    for k in (4, 16, 64, 256):
        exact = benchmark.gradients(pv.MIWAE(total // k, k, "dreg"), repeats)[1]
        ratios[k] = moments(exact)[0] / moments(benchmark.gradients(pv.MIWAE(total // k, k), repeats)[1])[1]
    return pd.Series(ratios)


def slope(ratios):
    """The least-squares slope of log SNR against log K."""
    k, ratio = torch.tensor(ratios.index.to_list()).log(), torch.tensor(ratios.to_list()).log()
    k = k - k.mean()
    return ((k * ratio).sum() / k.square().sum()).item()


def slopes(table, miwae):
    """The slopes by theory and as measured."""
    late = {key: group.droplevel([0, 1]).loc[LAST:] for key, group in table.SNR.groupby(level=[0, 1])}
    # M = 256 / K, so theory's sqrt(M / K) is 16 / K: slope -1.
    return pd.DataFrame(
        [
            ("guide, pathwise", -0.5, slope(late["phi", "pathwise"])),
            ("guide, DReG", 0.5, slope(late["phi", "dreg"])),
            ("model", 0.5, slope(late["theta", "any"])),
            ("guide, MIWAE of M K = 256", -1.0, slope(miwae)),
        ],
        columns=["gradient", "theory", "measured"],
    ).set_index("gradient")


def draw(table, miwae):
    """Plot the signal-to-noise ratio against the number of particles, for the model and for the guide."""
    names = {"dreg": "DReG", "stl": "STL (biased)", "vimco": "VIMCO", "pathwise": "pathwise", "score": "score function"}
    colours = ["#009E73", "#E69F00", "#CC79A7", "#0072B2", "#D55E00"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    ratios = table.SNR["theta", "any"]
    axes[0].plot(ratios.index, ratios, color="black", marker="o", markerfacecolor="none", label="any estimator")
    for (kind, name), colour, marker in zip(names.items(), colours, "Ds^ov", strict=True):
        ratios = table.SNR["phi", kind]
        axes[1].plot(ratios.index, ratios, color=colour, marker=marker, label=name, markerfacecolor="none")
    axes[1].plot(miwae.index, miwae, color="black", marker="x", linestyle=":", label="MIWAE, M K = 256")
    k = torch.tensor([64.0, 256.0])
    for ax, side, kind, exponent, shift in (
        (axes[0], "theta", "any", 0.5, 0.8),
        (axes[1], "phi", "pathwise", -0.5, 0.6),
        (axes[1], "phi", "dreg", 0.5, 0.65),
    ):
        line = shift * table.SNR[side, kind][64] * (k / 64) ** exponent
        ax.plot(k, line, color="grey", linewidth=1)
        sign = "+" if exponent > 0 else "\N{MINUS SIGN}"
        at, side = ((64, line[0]), "left") if exponent > 0 else ((256, line[1]), "right")
        ax.annotate(f"slope {sign}1/2", at, (0, -4), color="grey", textcoords="offset points", ha=side, va="top")
    for ax, title in zip(axes, ("model (theta)", "guide (phi)"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="particles K", title=f"gradient of the {title}")
        ax.set_xticks(PARTICLES, labels=map(str, PARTICLES))
        ax.minorticks_off()
        ax.legend(
            frameon=False,
            loc="upper center" if ax is axes[0] else "center left",
            bbox_to_anchor=None if ax is axes[0] else (1, 0.5),
        )
    axes[0].set_yticks([1, 2, 3], labels=["1", "2", "3"])
    axes[0].set_ylabel("signal-to-noise ratio")
    return figure


def main():
    """Measure, print, plot and check the slopes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write gradient_snr.png to")
    out = parser.parse_args().out
    if out:
        matplotlib.use("Agg")
    benchmark = Benchmark()
    table, miwae = measure(benchmark), measure_miwae(benchmark)
    print("Signal-to-noise ratio of the gradient of all data:\n")
    print(table.unstack("K").SNR.round(2).to_string(na_rep=""), "\n")
    print("Distance of phi's mean gradient from DReG's, relative to its length (in brackets: expected by chance):\n")
    phi = table.loc["phi"].drop(index="dreg")
    shown = phi.apply(lambda row: f"{row.distance:.2f} ({row.chance:.2f})", axis=1)
    print(shown.unstack("K").to_string(na_rep=""), "\n")
    found = slopes(table, miwae)
    print(f"Slopes of log SNR against log K, from K = {LAST} on (MIWAE: from 4):\n")
    print(found.round(2).to_string())
    figure = draw(table, miwae)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / "gradient_snr.png", dpi=150)
    if ((found.measured - found.theory).abs() > 0.1).any():
        raise SystemExit("a measured slope differs from theory by more than 0.1.")


if __name__ == "__main__":
    main()
