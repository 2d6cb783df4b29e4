"""More programs of Pyro's examples and tutorials (scANVI, AIR, ProdLDA, EasyGuide), and of its messenger guides.

They are written anew at sizes of a test. Plates, masks, factors and families are those that Pyro publishes.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from helpers.pyro_examples import joined
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormalMessenger
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, one_hot, softmax, softplus


def dense(*sizes: int) -> nn.Sequential:
    """Linear layers with batch norm between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def halves(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a network's output, which takes rows alone."""
    first, second = network(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1).chunk(2, -1)
    return first, second


class SCANVI(nn.Module):
    """Counts of genes: z1 and the class y make z2; the guide's factor trains its classifier where y is observed."""

    def __init__(self, genes: int = 5, classes: int = 3, z_dim: int = 2, alpha: float = 0.1, has_rsample: bool = False):
        super().__init__()
        self.z2_decoder, self.x_decoder = dense(z_dim + classes, 6, 2 * z_dim), dense(z_dim, 6, 2 * genes)
        self.z2l_encoder, self.classifier = dense(genes, 6, 2 * z_dim + 2), dense(z_dim, 6, classes)
        self.z1_encoder = dense(classes + z_dim, 6, 2 * z_dim)
        self.genes, self.classes, self.z_dim, self.alpha, self.has_rsample = genes, classes, z_dim, alpha, has_rsample
        self.scale = 0.5  # of all sites, as the example's loss is scaled to one gene of one cell

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        theta = pyro.param("inverse_dispersion", 10.0 * x.new_ones(self.genes), constraint=constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(self.z_dim)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(self.classes)), obs=y)
            loc, scale = halves(self.z2_decoder, joined(z1, y))
            z2 = pyro.sample("z2", dist.Normal(loc, softplus(scale)).to_event(1))
            total = pyro.sample("l", dist.LogNormal(3.0, x.new_ones(1)).to_event(1))
            gate, share = halves(self.x_decoder, z2)
            logits = (theta + 1e-6).log() - (total * softmax(share, -1) + 1e-6).log()
            counts = dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=theta, logits=logits)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            locs, scales = halves(self.z2l_encoder, (1 + x).log())
            pyro.sample("l", dist.LogNormal(3.0 + locs[..., -1:], softplus(scales[..., -1:])).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(locs[..., :-1], softplus(scales[..., :-1])).to_event(1))
            logits = self.classifier(z2.reshape(-1, self.z_dim)).reshape(*z2.shape[:-1], -1)
            q = dist.OneHotCategorical(logits=logits)
            if y is None:
                y = pyro.sample("y", q)
            else:
                pyro.factor("classification_loss", -self.alpha * q.log_prob(y), has_rsample=self.has_rsample)
            loc, scale = halves(self.z1_encoder, joined(z2, y))
            pyro.sample("z1", dist.Normal(loc, softplus(scale)).to_event(1))


def counts(number: int = 12, genes: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Counts whose largest gene is that of the class, and one-hot classes."""
    generator = torch.Generator().manual_seed(0)
    y = one_hot(torch.arange(number) % classes, classes).float()
    rates = 2.0 + 10.0 * torch.nn.functional.pad(y, (0, genes - classes))
    return torch.poisson(rates, generator=generator), y


class AIR(nn.Module):
    """Attend, infer, repeat: objects are added to an image until z_pres is zero, which masks all that comes later."""

    def __init__(self, steps: int = 2, side: int = 4, window: int = 2, z_dim: int = 2, hidden: int = 6) -> None:
        super().__init__()
        self.steps, self.side, self.window, self.z_dim = steps, side, window, z_dim
        self.decode = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, window**2), nn.Sigmoid())
        self.encode = nn.Sequential(nn.Linear(window**2, hidden), nn.ReLU(), nn.Linear(hidden, 2 * z_dim))
        self.rnn = nn.LSTMCell(side**2 + 3 + z_dim + 1, hidden)
        self.predict = nn.Linear(hidden, 1 + 2 * 3)
        self.h_init, self.c_init = nn.Parameter(torch.zeros(1, hidden)), nn.Parameter(torch.zeros(1, hidden))
        self.z_where_init, self.z_what_init = nn.Parameter(torch.zeros(1, 3)), nn.Parameter(torch.zeros(1, z_dim))
        self.register_buffer("where_loc", torch.tensor([2.0, 0.0, 0.0]))
        self.register_buffer("where_scale", torch.tensor([0.2, 0.5, 0.5]))

    def moved(self, images: Tensor, where: Tensor, side: int) -> Tensor:
        """Images seen through the window (scale, x, y)."""
        s, x, y = where.unbind(-1)
        zero = torch.zeros_like(s)
        theta = torch.stack([torch.stack([s, zero, x], -1), torch.stack([zero, s, y], -1)], -2)
        images = images.view(len(images), 1, *[int(images.shape[-1] ** 0.5)] * 2)
        grid = affine_grid(theta, [len(images), 1, side, side], align_corners=False)
        return grid_sample(images, grid, align_corners=False).flatten(1)

    def model(self, x: Tensor, batch_size: int | None = None) -> None:
        pyro.module("decode", self.decode)
        with pyro.plate("data", len(x)) as index:
            batch = x[index]
            n = len(batch)
            image, present = torch.zeros(n, self.side**2), torch.ones(n, 1)
            for t in range(self.steps):
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * present).to_event(1))
                prior = dist.Normal(self.where_loc.expand(n, 3), self.where_scale.expand(n, 3))
                where = pyro.sample(f"z_where_{t}", prior.mask(present).to_event(1))
                prior = dist.Normal(torch.zeros(n, self.z_dim), torch.ones(n, self.z_dim))
                what = pyro.sample(f"z_what_{t}", prior.mask(present).to_event(1))
                image = image + present * self.moved(self.decode(what), where, self.side)
            pyro.sample("obs", dist.Normal(image, 0.3 * torch.ones(n, self.side**2)).to_event(1), obs=batch)

    def guide(self, x: Tensor, batch_size: int | None = None) -> None:
        for name in ("rnn", "predict", "encode"):
            pyro.module(name, getattr(self, name))
        h, c, where, what = (
            pyro.param(name, getattr(self, name)) for name in ("h_init", "c_init", "z_where_init", "z_what_init")
        )
        with pyro.plate("data", len(x), subsample_size=batch_size) as index:
            batch = x[index]
            n = len(batch)
            h, c, where, what = (each.expand(n, -1) for each in (h, c, where, what))
            present = torch.ones(n, 1)
            for t in range(self.steps):
                h, c = self.rnn(torch.cat([batch, where, what, present], 1), (h, c))
                p, loc, scale = self.predict(h).split([1, 3, 3], -1)
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(p.sigmoid() * present).to_event(1))
                q = dist.Normal(loc + self.where_loc, softplus(scale) * self.where_scale)
                where = pyro.sample(f"z_where_{t}", q.mask(present).to_event(1))
                s, a, b = where.unbind(-1)
                window = self.moved(batch, torch.stack([1 / s, -a / s, -b / s], -1), self.window)
                loc, scale = self.encode(window).chunk(2, -1)
                what = pyro.sample(f"z_what_{t}", dist.Normal(loc, softplus(scale)).mask(present).to_event(1))


def scenes(number: int = 10, side: int = 4) -> Tensor:
    """Images with a block or none, with noise."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(number, side, side)
    image[: number // 2, :2, :2] = 1.0
    return image.flatten(1) + 0.1 * torch.randn(number, side**2, generator=generator)


class ProdLDA(nn.Module):
    """A topic model with logistic-normal topics; batch norm and dropout in both networks."""

    def __init__(self, words: int = 6, topics: int = 3, hidden: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(words, hidden), nn.Softplus(), nn.Dropout(dropout))
        self.loc = nn.Sequential(nn.Linear(hidden, topics), nn.BatchNorm1d(topics, affine=False))
        self.log_variance = nn.Sequential(nn.Linear(hidden, topics), nn.BatchNorm1d(topics, affine=False))
        beta = nn.Linear(topics, words, bias=False)
        self.decoder = nn.Sequential(nn.Dropout(dropout), beta, nn.BatchNorm1d(words, affine=False), nn.Softmax(1))
        self.topics = topics

    def model(self, docs: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, scale = docs.new_zeros(len(docs), self.topics), docs.new_ones(len(docs), self.topics)
            topics = softmax(pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1)), -1)
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, self.decoder(topics)), obs=docs)

    def guide(self, docs: Tensor) -> None:
        pyro.module("encoder", nn.ModuleList([self.hidden, self.loc, self.log_variance]))
        with pyro.plate("documents", docs.shape[0]):
            hidden = self.hidden(docs)
            q = dist.Normal(self.loc(hidden), (0.5 * self.log_variance(hidden)).exp())
            pyro.sample("logtheta", q.to_event(1))


def documents(number: int = 16, words: int = 6) -> Tensor:
    """Word counts of documents of two topics and several lengths."""
    generator = torch.Generator().manual_seed(0)
    share = torch.where((torch.arange(words) < words // 2) == (torch.arange(number) % 2 == 0)[:, None], 0.3, 0.03)
    return torch.poisson(share * torch.linspace(5, 20, number)[:, None], generator=generator)


def walks(batch: Tensor, subsample: Tensor, full_size: int, drift: float | None = None) -> None:
    """Bits in steps (T, b) of a subsample, whose logits are random walks of one drift, which may be known."""
    if drift is None:
        drift = pyro.sample("drift", dist.LogNormal(-1, 0.5))
    with pyro.plate("data", full_size, subsample=subsample):
        z = torch.zeros(())
        for t in range(len(batch)):
            z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
            pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=batch[t])


class States(EasyGuide):
    """One normal of all states of a sequence, whose parameters have a row for each of all data."""

    def guide(self, batch: Tensor, subsample: Tensor, full_size: int) -> None:
        group = self.group(match="state_[0-9]*")
        diagonal = pyro.param(
            "state_cov_diag", lambda: torch.full(group.event_shape, 0.1), constraint=constraints.positive
        )
        factor = pyro.param("state_cov_factor", lambda: torch.randn(*group.event_shape, 2) * 0.1)
        with self.plate("data", full_size, subsample=subsample):
            loc = pyro.param("state_loc", lambda: torch.full((full_size, *group.event_shape), 0.5), event_dim=1)
            group.sample("states", dist.LowRankMultivariateNormal(loc, factor, diagonal))


class Walks(States):
    """The same, with a point for the drift, which all data share."""

    def guide(self, batch: Tensor, subsample: Tensor, full_size: int) -> None:
        self.map_estimate("drift")
        super().guide(batch, subsample, full_size)


def chain(x: Tensor) -> None:
    """Two latents and a datum, all positive but the first: log x is normal of variance 1 + 0.5^2 + 0.8^2."""
    with pyro.plate("data", len(x)):
        links(x)


def indexed_chain(x: Tensor, index: Tensor, full_size: int = 12) -> None:
    """The same in rows of all data, whose indices come with them."""
    with pyro.plate("data", full_size, subsample=index):
        links(x)


def drawn_chain(x: Tensor, rows: int = 5) -> None:
    """The same in rows that the plate draws."""
    with pyro.plate("data", len(x), subsample_size=rows) as index:
        links(x[index])


def links(x: Tensor) -> None:
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.LogNormal(z1, 0.5))
    pyro.sample("x", dist.LogNormal(z2.log(), 0.8), obs=x)


class DrawnGroup(EasyGuide):
    """A guide of :func:`drawn_chain`, whose plate draws the rows."""

    def guide(self, x: Tensor, rows: int = 5) -> None:
        group = self.group(match="z[12]")
        with self.plate("data", len(x), subsample_size=rows):
            loc = pyro.param("loc", lambda: torch.zeros(len(x), *group.event_shape), event_dim=1)
            scale = pyro.param("scale", lambda: torch.full(group.event_shape, 0.5), constraint=constraints.positive)
            group.sample("both", dist.Normal(loc, scale).to_event(1))


class Custom(AutoNormalMessenger):
    """Overrides one site, as the class's docstring shows: its mean is that of the prior, moved and stretched."""

    def get_posterior(self, name: str, prior: dist.Distribution) -> dist.Distribution:
        if name != "z2":
            return super().get_posterior(name, prior)
        bias, weight = pyro.param("bias", torch.tensor(0.1)), pyro.param("weight", torch.tensor(0.7))
        scale = pyro.param("scale", torch.tensor(0.4), constraint=constraints.positive)
        return dist.LogNormal(bias + weight * self.upstream_value("z1"), scale)


class Tracks(nn.Module):
    """A linear state-space model in plates of sequences and sensors; steps after the end and lost readings are masked.

    The guide is mean-field; all is normal, so that :meth:`log_evidence` is exact.
    """

    def __init__(self, steps: int = 3, sensors: int = 2) -> None:
        super().__init__()
        self.decay, self.log_noise = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(-0.7))
        self.encoder = nn.Linear(steps * sensors, 2 * steps)
        self.sensors = sensors

    def model(self, x: Tensor, lengths: Tensor, seen: Tensor) -> None:
        pyro.module("tracks", self)
        sensors = pyro.plate("sensors", self.sensors, dim=-1)
        with pyro.plate("sequences", len(x), dim=-2):
            z = x.new_zeros(len(x), 1)
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=(t < lengths)[:, None]):
                    z = pyro.sample(f"z_{t}", dist.Normal(self.decay * z, 0.6))
                    with sensors, poutine.mask(mask=seen[:, t]):
                        pyro.sample(f"x_{t}", dist.Normal(z, self.log_noise.exp()), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor, seen: Tensor) -> None:
        loc, log_scale = self.encoder((x * seen).flatten(1)).chunk(2, -1)
        with pyro.plate("sequences", len(x), dim=-2):
            for t in pyro.markov(range(x.shape[1])):
                q = dist.Normal(loc[:, t : t + 1], (log_scale[:, t : t + 1] - 0.7).exp())
                pyro.sample(f"z_{t}", q.mask((t < lengths)[:, None]))

    def log_evidence(self, x: Tensor, lengths: Tensor, seen: Tensor) -> Tensor:
        t = torch.arange(x.shape[1])
        step = self.decay ** (t[:, None] - t).clamp(0) * (t[:, None] >= t)  # z = step @ noise
        states = 0.36 * step @ step.T
        covariance = states.repeat_interleave(self.sensors, 0).repeat_interleave(self.sensors, 1)
        covariance = covariance + (2 * self.log_noise).exp() * torch.eye(len(covariance))
        kept = (seen & (t < lengths[:, None])[..., None]).flatten(1)
        both = kept[:, :, None] & kept[:, None]
        # What is masked becomes a standard normal at zero, which adds a constant.
        whole = torch.where(both, covariance, torch.eye(len(covariance)))
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)), whole)
        return normal.log_prob(x.flatten(1) * kept) + 0.5 * math.log(2 * math.pi) * (~kept).sum(1)


def readings(number: int = 12, steps: int = 3, sensors: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Readings of random walks, how many steps each has, and which readings were not lost."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(number, steps, 1, generator=generator).cumsum(1)
    x = walk + 0.5 * torch.randn(number, steps, sensors, generator=generator)
    return x, torch.arange(number) % steps + 1, torch.rand(number, steps, sensors, generator=generator) < 0.8
