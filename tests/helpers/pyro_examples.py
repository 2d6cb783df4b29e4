"""The programs of four of Pyro's published examples (examples/vae, cvae, dmm.py), at sizes of a test, with data.

Plates, sites, names, scales, masks and registered modules are the examples' own; so is each oddity, such as a
``pyro.plate("data")`` without a size.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SIDE = 4
PIXELS = SIDE * SIDE
CLASSES = 3


def images(number: int = 18) -> tuple[Tensor, Tensor]:
    """Binary images (number, 4, 4) of three classes, a few pixels flipped, and their one-hot labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(SIDE).expand(SIDE, SIDE)
    prototypes = torch.stack([rows < 2, rows.T < 2, (rows + rows.T) % 2 == 0]).float()
    labels = torch.arange(number) % CLASSES
    flipped = torch.rand(number, SIDE, SIDE, generator=generator) < 0.05
    return (prototypes[labels] - flipped.float()).abs(), one_hot(labels, CLASSES).float()


def quadrants(number: int = 18) -> tuple[Tensor, Tensor]:
    """Images whose lower left quadrant is the input, -1 elsewhere, and the output to fill in, -1 in that quadrant."""
    whole, _ = images(number)
    given = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    given[SIDE // 2 :, : SIDE // 2] = True
    return whole.where(given, -1.0), whole.where(~given, -1.0)


def sequences(number: int = 12, num_steps: int = 4, width: int = 5) -> tuple:
    """A note that rises by one a step, in 1 to 4 steps: sequences as they are, reversed and packed, mask, lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(number) % num_steps + 1
    lengths = lengths.sort(descending=True).values
    first = torch.randint(width, (number, 1), generator=generator)
    mask = (torch.arange(num_steps) < lengths[:, None]).float()
    x = one_hot((first + torch.arange(num_steps)) % width, width) * mask[..., None]
    return x, pack_padded_sequence(reverse(x, lengths), lengths, batch_first=True), mask, lengths


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence from its last step to its first, with the padding where it was."""
    steps = torch.arange(x.shape[1])
    source = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return x.gather(1, source[..., None].expand(x.shape))


class GaussianEncoder(nn.Module):
    def __init__(self, data_dim: int, z_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(data_dim, hidden_dim), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(hidden_dim, z_dim), nn.Linear(hidden_dim, z_dim)

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(joined(*parts))
        return self.loc(hidden), self.log_scale(hidden).exp()


def joined(*parts: Tensor) -> Tensor:
    """Vectors side by side, broadcast over the dimensions to their left."""
    left = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*left, -1) for part in parts], -1)


def decoder(z_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(z_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, PIXELS), nn.Sigmoid())


class VAE(nn.Module):
    def __init__(self, z_dim: int = 3, hidden_dim: int = 16) -> None:
        super().__init__()
        self.encoder, self.decoder = GaussianEncoder(PIXELS, z_dim, hidden_dim), decoder(z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = x.new_zeros(x.shape[0], self.z_dim), x.new_ones(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            image = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, PIXELS))
            return image

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x.reshape(-1, PIXELS))
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


class CVAE(nn.Module):
    """Fills in an image: the baseline's guess, which is not trained here, enters the prior."""

    def __init__(self, z_dim: int = 3, hidden_dim: int = 16) -> None:
        super().__init__()
        self.baseline_net = decoder(PIXELS, hidden_dim)
        self.prior_net = GaussianEncoder(PIXELS, z_dim, hidden_dim)
        self.generation_net = decoder(z_dim, hidden_dim)
        self.recognition_net = GaussianEncoder(PIXELS, z_dim, hidden_dim)

    @staticmethod
    def filled(xs: Tensor, ys: Tensor) -> Tensor:
        """One image of the pixels given, and of ys elsewhere."""
        whole = xs.clone()
        whole[xs == -1] = ys[xs == -1]
        return whole.view(-1, PIXELS)

    def guess(self, xs: Tensor) -> Tensor:
        return self.baseline_net(xs.view(-1, PIXELS)).view(xs.shape)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> Tensor:
        pyro.module("generation_net", self)
        batch_size = xs.shape[0]
        with pyro.plate("data"):
            with torch.no_grad():
                guess = self.guess(xs)
            prior_loc, prior_scale = self.prior_net(self.filled(xs, guess))
            zs = pyro.sample("z", dist.Normal(prior_loc, prior_scale).to_event(1))
            loc = self.generation_net(zs)
            if ys is None:
                pyro.deterministic("y", loc.detach())
            else:
                masked_loc = loc[(xs == -1).view(-1, PIXELS)].view(batch_size, -1)
                masked_ys = ys[xs == -1].view(batch_size, -1)
                pyro.sample("y", dist.Bernoulli(masked_loc, validate_args=False).to_event(1), obs=masked_ys)
            return loc

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                loc, scale = self.prior_net(self.filled(xs, self.guess(xs)))
            else:
                loc, scale = self.recognition_net(self.filled(xs, ys))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


class SSVAE(nn.Module):
    """A style z and a class y, which is latent where no labels are given."""

    def __init__(self, z_dim: int = 3, hidden_dim: int = 16, aux_loss_multiplier: float = 46.0) -> None:
        super().__init__()
        self.encoder_y = nn.Sequential(
            nn.Linear(PIXELS, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, CLASSES), nn.Softmax(-1)
        )
        self.encoder_z = GaussianEncoder(PIXELS + CLASSES, z_dim, hidden_dim)
        self.decoder = decoder(z_dim + CLASSES, hidden_dim)
        self.z_dim, self.aux_loss_multiplier = z_dim, aux_loss_multiplier

    def model(self, xs: Tensor, ys: Tensor | None = None) -> Tensor:
        pyro.module("ss_vae", self)
        batch_size = xs.size(0)
        with pyro.plate("data"):
            loc, scale = xs.new_zeros(batch_size, self.z_dim), xs.new_ones(batch_size, self.z_dim)
            zs = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            alpha = xs.new_ones(batch_size, CLASSES) / CLASSES
            ys = pyro.sample("y", dist.OneHotCategorical(alpha), obs=ys)
            image = self.decoder(joined(zs, ys))
            pyro.sample("x", dist.Bernoulli(image, validate_args=False).to_event(1), obs=xs)
            return image

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs)))
            loc, scale = self.encoder_z(xs, ys)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def model_classify(self, xs: Tensor, ys: Tensor | None = None) -> None:
        """The auxiliary loss, by which labels train the guide's classifier."""
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            if ys is not None:
                with poutine.scale(scale=self.aux_loss_multiplier):
                    pyro.sample("y_aux", dist.OneHotCategorical(self.encoder_y(xs)), obs=ys)

    def guide_classify(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pass


class GatedTransition(nn.Module):
    """p(z_t | z_{t-1}): the identity at first, mixed with a proposed mean by a gate."""

    def __init__(self, z_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(z_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, z_dim), nn.Sigmoid())
        self.proposed = nn.Sequential(nn.Linear(z_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, z_dim))
        self.linear, self.scale = (
            nn.Linear(z_dim, z_dim),
            nn.Sequential(nn.ReLU(), nn.Linear(z_dim, z_dim), nn.Softplus()),
        )
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposed = self.gate(z), self.proposed(z)
        return (1 - gate) * self.linear(z) + gate * proposed, self.scale(proposed)


class Combiner(nn.Module):
    """q(z_t | z_{t-1}, x_{t:T}), the future by way of the recurrent network's state."""

    def __init__(self, z_dim: int, rnn_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(z_dim, rnn_dim), nn.Tanh())
        self.loc, self.scale = nn.Linear(rnn_dim, z_dim), nn.Sequential(nn.Linear(rnn_dim, z_dim), nn.Softplus())

    def forward(self, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        combined = 0.5 * (self.hidden(z) + state)
        return self.loc(combined), self.scale(combined)


class DMM(nn.Module):
    """A state-space model of ragged sequences; both programs take what :func:`sequences` gives."""

    def __init__(self, width: int = 5, z_dim: int = 3, hidden_dim: int = 8, num_iafs: int = 0) -> None:
        super().__init__()
        self.emitter = nn.Sequential(
            nn.Linear(z_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, width), nn.Sigmoid(),
        )  # fmt: skip
        self.trans, self.combiner = GatedTransition(z_dim, hidden_dim), Combiner(z_dim, hidden_dim)
        self.rnn = nn.GRU(width, hidden_dim, batch_first=True)
        self.iafs = nn.ModuleList(affine_autoregressive(z_dim, hidden_dims=[hidden_dim]) for _ in range(num_iafs))
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(z_dim)), nn.Parameter(torch.zeros(z_dim))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, hidden_dim))

    def model(self, x: Tensor, x_reversed, mask: Tensor, lengths: Tensor, annealing_factor: float = 1.0) -> None:
        pyro.module("dmm", self)
        z_previous = self.z_0.expand(x.size(0), self.z_0.size(0))
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.size(1) + 1)):
                mask_t = mask[:, t - 1 : t]
                loc, scale = self.trans(z_previous)
                with poutine.scale(scale=annealing_factor):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(mask_t).to_event(1))
                notes = dist.Bernoulli(self.emitter(z)).mask(mask_t).to_event(1)
                pyro.sample(f"obs_x_{t}", notes, obs=x[:, t - 1, :])
                z_previous = z

    def guide(self, x: Tensor, x_reversed, mask: Tensor, lengths: Tensor, annealing_factor: float = 1.0) -> None:
        pyro.module("dmm", self)
        h_0 = self.h_0.expand(1, x.size(0), self.rnn.hidden_size).contiguous()
        packed, _ = self.rnn(x_reversed, h_0)
        states = reverse(pad_packed_sequence(packed, batch_first=True)[0], lengths)
        z_previous = self.z_q_0.expand(x.size(0), self.z_q_0.size(0))
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.size(1) + 1)):
                q = dist.Normal(*self.combiner(z_previous, states[:, t - 1, :]))
                if self.iafs:
                    q = dist.TransformedDistribution(q, list(self.iafs)).mask(mask[:, t - 1])
                else:
                    q = q.mask(mask[:, t - 1 : t]).to_event(1)
                with poutine.scale(scale=annealing_factor):
                    z_previous = pyro.sample(f"z_{t}", q)
