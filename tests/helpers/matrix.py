"""Every pair on every kind of data with every objective: what works, and what is refused by which message.

    python tests/helpers/matrix.py

prints it. A cell takes a step of Pyro's SVI, after which every parameter has moved. The last columns are one thing
each.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Predictive
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import mlp

N, D, Z, HIDDEN = 12, 6, 3, (8,)

OBJECTIVES: dict[str, Callable[[], pv.Objective]] = {
    "ELBO": pv.ELBO,
    "ELBO, sampled": lambda: pv.ELBO(kl="monte_carlo"),
    "STL": lambda: pv.ELBO(2, gradient="stl"),
    "score": lambda: pv.ELBO(2, "monte_carlo", "score"),
    "IWAE": lambda: pv.IWAE(3),
    "DReG": lambda: pv.IWAE(3, "dreg"),
    "VIMCO": lambda: pv.IWAE(3, "vimco"),
    "Renyi": lambda: pv.Renyi(0.5, 3),
    "MIWAE": lambda: pv.MIWAE(2, 2),
    "PIWAE": lambda: pv.PIWAE(2, 2),
    "CIWAE": lambda: pv.CIWAE(0.5, 3),
    "TVO": lambda: pv.TVO(4, 3),
    "JVI": lambda: pv.JVI(4, 1),
    "RWS": lambda: pv.RWS(3),
}
NO_KL = "has no closed form"
NO_ORDER = "in one order"
NO_PATH = "can't be reparameterised"
NO_TRACE = "reads a tensor's value"
WITHOUT_PATH = ("score", "VIMCO", "RWS")
WORDS = {
    NO_KL: "no KL", NO_ORDER: "order", NO_PATH: "no path", NO_TRACE: "not traced",
}  # fmt: skip

#: What a likelihood is for: its name, its options, and data.
KINDS: dict[str, tuple[str, dict[str, int], Callable[..., Tensor]]] = {
    "binary": ("bernoulli", {}, lambda *shape: torch.rand(*shape).round()),
    "grey": ("continuous_bernoulli", {}, torch.rand),
    "8 bits": ("discretized_logistic", {"components": 2}, lambda *shape: torch.randint(256, shape) / 255),
    "categories": ("categorical", {"categories": 3}, lambda *shape: torch.randint(3, shape).float()),
    "counts": ("poisson", {}, lambda *shape: torch.poisson(3 * torch.rand(*shape))),
    "dispersed counts": ("negative_binomial", {}, lambda *shape: torch.poisson(9 * torch.rand(*shape))),
    "real": ("gaussian", {}, torch.randn),
    "heavy tails": ("student_t", {}, torch.randn),
    "correlated": ("low_rank_gaussian", {"rank": 2}, torch.randn),
}


def _flow_posterior(kind: str) -> nn.Module:
    return pv.FlowPosterior(mlp(D, HIDDEN, pv.FlowPosterior.features_for(Z)), (D,), Z, kind, hidden_dims=(8,))


def _posterior(family: type[pv.Posterior]) -> nn.Module:
    return family(mlp(D, HIDDEN, family.features_for(Z)), (D,))


POSTERIORS: dict[str, Callable[[], nn.Module]] = {
    "diagonal": lambda: _posterior(pv.DiagonalNormal),
    "full covariance": lambda: _posterior(pv.FullNormal),
    "low rank": lambda: _posterior(pv.LowRankNormal),
    "mixture": lambda: _posterior(pv.MixturePosterior),
    "IAF": lambda: _flow_posterior("iaf"),
    "spline": lambda: _flow_posterior("spline"),
    "coupling": lambda: _flow_posterior("coupling"),
    "unconditional": lambda: pv.Unconditional(Z, (D,)),
}
PRIORS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "standard": lambda _: pv.StandardNormal(Z),
    "mixture": lambda _: pv.MixturePrior(Z, 4),
    "VampPrior": lambda posterior: pv.VampPrior(posterior, torch.rand(4, D)),
    "flow": lambda _: pv.FlowPrior(Z, length=2, hidden_dims=(8,)),
}


@dataclass(frozen=True)
class Row:
    """A pair with data.

    Attributes:
        build: makes the pair and the arguments that it is called with.
        kl: the message that refuses a closed form, if there is none.
        path: the message that refuses a pathwise gradient, if there is none.
        traced: the message that refuses to compile, if it does.
        common: whether it is among those that are tested each time.
    """

    name: str
    kind: str
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]] = field(repr=False)
    kl: str | None = None
    path: str | None = None
    traced: str | None = None
    common: bool = True

    def refusal(self, objective: str) -> str | None:
        """The words of the message that refuses an objective; None where it works."""
        if self.path and objective not in WITHOUT_PATH:
            return self.path
        return self.kl if objective == "ELBO" else None


def rows() -> list[Row]:
    """All of them."""
    made = []
    for kind, (likelihood, options, draw) in KINDS.items():
        shared = {"likelihood": likelihood, **options}

        def vae(x=draw, shared=shared):
            return pv.mlp_vae((D,), latent_dim=Z, hidden_dims=HIDDEN, **shared), (x(N, D),)

        def conv(x=draw, shared=shared):
            pair = pv.conv_vae((2, 5, 4), latent_dim=Z, channels=(4,), residual_blocks=1, **shared)
            return pair, (x(N, 2, 5, 4),)

        def masked(vae=vae):
            pair, (x,) = vae()
            return pair, (x, torch.rand(x.shape) > 0.4)

        def conditional(x=draw, shared=shared):
            pair = pv.mlp_conditional_vae((D,), latent_dim=Z, label_dim=3, hidden_dims=HIDDEN, **shared)
            return pair, (x(N, D), torch.randint(3, (N,)))

        def semi(x=draw, shared=shared):
            pair = pv.mlp_semi_supervised_vae(
                (D,), latent_dim=Z, num_classes=3, hidden_dims=HIDDEN, classifier_weight=1.0, **shared
            )
            return pair, (x(N, D), torch.arange(N) % 4 - 1)

        def layers(x=draw, shared=shared, guide="ladder"):
            return pv.mlp_hierarchical_vae((D,), latent_dims=(4, Z), hidden_dims=(8, 7), guide=guide, **shared), (
                x(N, D),
            )

        def climbing(layers=layers):
            return layers(guide="bottom_up")

        def plain(x=draw, shared=shared):
            return pv.mlp_autoencoder((D,), latent_dim=Z, hidden_dims=HIDDEN, **shared), (x(N, D),)

        common = kind == "binary"
        made += [
            Row("VAE", kind, vae),
            Row("VAE, convolutions", kind, conv, common=common),
            Row("VAE, missing pixels", kind, masked, common=common or kind == "correlated"),
            Row("ConditionalVAE", kind, conditional, common=common),
            Row("SemiSupervisedVAE", kind, semi, path=NO_PATH, common=common),
            Row("HierarchicalVAE, ladder", kind, layers, common=common),
            Row("HierarchicalVAE, bottom-up", kind, climbing, kl=NO_ORDER, common=common),
            Row("Autoencoder", kind, plain, common=common),
        ]
    for posterior, make_posterior in POSTERIORS.items():
        for prior, make_prior in PRIORS.items():
            if (posterior, prior) in (("diagonal", "standard"), ("unconditional", "VampPrior")):
                continue  # the plain VAE; and pseudo-inputs that nothing looks at

            def parts(make_posterior=make_posterior, make_prior=make_prior):
                pair, (x,) = pv.mlp_vae((D,), latent_dim=Z, hidden_dims=HIDDEN), (torch.rand(N, D).round(),)
                pair.posterior = make_posterior()
                pair.prior = make_prior(pair.posterior)
                return pair, (x,)

            closed = prior == "standard" and posterior in ("full covariance", "low rank", "unconditional")
            made.append(
                Row(
                    f"VAE, {posterior}, {prior} prior",
                    "binary",
                    parts,
                    kl=None if closed else NO_KL,
                    traced=NO_TRACE if posterior == "spline" else None,
                    common=prior == "standard" or posterior == "diagonal",
                )
            )
    return made


def take_step(row: Row, objective: str) -> list[str]:
    """A step of SVI; returns the names of parameters that have not moved."""
    pyro.clear_param_store()
    pair, args = row.build()
    before = {name: value.detach().clone() for name, value in pair.named_parameters()}
    loss = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), loss=OBJECTIVES[objective]()).step(*args)
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"expected a finite loss, got {loss}.")
    return [name for name, value in pair.named_parameters() if torch.equal(before[name], value)]


def sampled(row: Row) -> pv.Objective:
    """An objective that the row trains with."""
    return pv.IWAE(3, "vimco") if row.path else pv.IWAE(3)


def simulates(row: Row) -> None:
    """Draws from prior and posterior have x's shape and support."""
    pair, args = row.build()
    for guide in (None, pair.guide):
        for parallel in (False, True):
            program = pyro.poutine.uncondition(pair.model)
            draws = Predictive(program, guide=guide, num_samples=4, parallel=parallel)(*args)["x"]
            if draws.shape != (4, *args[0].shape):
                raise ValueError(f"expected draws of shape {(4, *args[0].shape)}, got {tuple(draws.shape)}.")
            for x in draws:
                pair.likelihood.check(x)


def estimates(row: Row) -> None:
    """log p(x) of each datum."""
    pair, args = row.build()
    found = pv.log_likelihood(pair.model, pair.guide, args, 100, progress=False)
    if not bool(found.per_datum.isfinite().all()) or len(found.per_datum) != N:
        raise ValueError(f"expected {N} finite numbers, got {found.per_datum}.")


def converts(row: Row) -> None:
    """ArviZ's groups."""
    pair, args = row.build()
    groups = pv.to_arviz(pair, args, 10)
    if row.name == "Autoencoder":  # which reads x, so that it has no draws of x
        return
    if groups["posterior_predictive"]["x"].shape != (1, 10, *args[0].shape):
        raise ValueError(f"expected x in every draw, got {groups['posterior_predictive']['x'].shape}.")


def resumes(row: Row) -> None:
    """A checkpoint of one pair makes another the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        pyro.clear_param_store()
        pair, args = row.build()
        pv.fit(pair.model, pair.guide, args, sampled(row), epochs=1, batch_size=N // 2, checkpoint=path, progress=False)
        pyro.clear_param_store()
        other, _ = row.build()
        pv.load_parameters(path, other.model, other.guide, *args)
    for (name, value), loaded in zip(pair.named_parameters(), other.parameters(), strict=True):
        if not torch.equal(value, loaded):
            raise ValueError(f"expected '{name}' as it was saved, got another.")


def compiles(row: Row) -> None:
    """A compiled step gives the loss of an uncompiled one."""
    pyro.clear_param_store()
    pair, args = row.build()
    objective = sampled(row)
    step = pv.compile_step(pair.model, pair.guide, objective, torch.optim.SGD(pair.parameters(), 0.0))
    pyro.set_rng_seed(1)
    loss = step(*args)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(loss.item(), objective.loss(pair.model, pair.guide, *args), rtol=1e-4, atol=1e-3)


def maps(row: Row) -> None:
    """What a pair does besides: embed, reconstruct, generate."""
    pair, args = row.build()
    if pair.reconstruct(*args).shape != args[0].shape:
        raise ValueError(f"expected reconstructions of shape {tuple(args[0].shape)}.")
    if not isinstance(pair, pv.Autoencoder):
        labelled = isinstance(pair, pv.ConditionalVAE | pv.SemiSupervisedVAE)
        pair.likelihood.check(
            pair.generate(torch.arange(3) if labelled else 3).round() if row.kind == "binary" else args[0]
        )


CHECKS = {
    "Predictive": simulates, "log p(x)": estimates, "ArviZ": converts, "checkpoint": resumes, "compiled": compiles,
    "maps": maps,
}  # fmt: skip


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    import pyro_vae.compiled.function

    warnings.simplefilter("ignore")
    pyro_vae.compiled.function._inductor = lambda graph, _: graph  # what is traced is what matters here
    console = Console(width=300)
    table = Table(title="A step of SVI that moves every parameter, or why not; and what else works")
    for column in ("pair", "data", *OBJECTIVES, *CHECKS):
        table.add_column(column, no_wrap=True)
    for row in rows():
        cells = []
        for objective in OBJECTIVES:
            try:
                still = take_step(row, objective)
                cells.append("still: " + ", ".join(still) if still else "yes")
            except ValueError as error:
                cells.append(next((word for text, word in WORDS.items() if text in str(error)), f"[red]{error}"))
        for check in CHECKS.values():
            try:
                check(row)
                cells.append("yes")
            except ValueError as error:
                cells.append(next((word for text, word in WORDS.items() if text in str(error)), f"[red]{error}"))
        table.add_row(row.name, row.kind, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
