"""Draw the pictures of the front page: a VAE of the drawn shapes, trained on one thread in about five minutes.

``python examples/front_page.py`` writes pictures into docs/images, which takes some minutes more. With the file
runs/front_page.pt of an earlier run, it draws them anew and does not train.
"""

import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch
from torch import nn

import pyro_vae as pv

LATENTS, EPOCHS, BATCH = 8, 16, 32
CHECKPOINT, IMAGES = Path("runs/front_page.pt"), Path("docs/images")

torch.set_num_threads(1)
shapes = pv.data.load("shapes")


# The pair: convolutions without overlap at first, which is fast; and a fixed scale, which keeps q(z|x) near the prior.
class Centred(nn.Module):
    """Pixels with mean 0 and scale 1, with which training is faster."""

    def forward(self, x):
        return 4 * (x - 0.85)


def layers(*parts):
    """The parts in a row, with an activation after each but the last."""
    return nn.Sequential(*(each for part in parts for each in (part, nn.SiLU())))[:-1]


pyro.set_rng_seed(0)
encoder = nn.Sequential(
    Centred(),
    layers(
        nn.Conv2d(3, 32, 4, stride=4),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.Conv2d(64, 64, 4, stride=2, padding=1),
        nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 256)),
        nn.Linear(256, 2 * LATENTS),
    ),
)
decoder = layers(
    nn.Linear(LATENTS, 256),
    nn.Sequential(nn.Linear(256, 64 * 4 * 4), nn.Unflatten(1, (64, 4, 4))),
    nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
    nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
    nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
    nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
)
nn.init.constant_(decoder[-1].bias, 0.92)  # the mean colour
vae = pv.VAE(
    prior=pv.StandardNormal(LATENTS),
    likelihood=pv.Gaussian(decoder, shapes.event_shape, scale=0.2),
    posterior=pv.DiagonalNormal(encoder, shapes.event_shape),
)

steps = EPOCHS * -(-len(shapes.train) // BATCH)
started = time.perf_counter()
CHECKPOINT.parent.mkdir(exist_ok=True)
history = pv.fit(
    vae,
    shapes.train,
    pv.ELBO(beta=pv.schedules.warm_up(steps // 3, start=0.05)),
    epochs=EPOCHS,
    batch_size=BATCH,
    lr=1e-3,
    lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1),
    scheduler_every="step",
    compile=True,
    checkpoint=CHECKPOINT,
    seed=0,
)
print(f"{len(history)} epochs; {time.perf_counter() - started:.0f} s in this run")
print(history.iloc[-1:].to_string())


def save(figure, name):
    """Write a picture, on white also where the page around it is dark."""
    figure.savefig(IMAGES / f"{name}.png", dpi=100, facecolor="white")
    plt.close(figure)


x, factors = shapes.test.x, shapes.test.factors
z = vae.embed(x)

# The plane of the two latent dimensions that follow the hue most; a point has the colour of its shape.
follows = [abs(factors["hue"].corr(pd.Series(each.numpy()), method="spearman")) for each in z.T]
first, second = sorted(torch.tensor(follows).topk(2).indices.tolist())
column, row = (((1 + sign * torch.tensor(factors[name])) * 32).long() for name, sign in (("x", 1), ("y", -1)))
colours = x[torch.arange(len(x)), :, row, column]

# log p(x) of some images, from proposals fitted to each, and bounds on it.
few = x[:40]
log_p = pv.log_likelihood(vae, few, 1000, refine=True, seed=0)
print(log_p)
objectives = [pv.ELBO(k, kl="monte_carlo") for k in (1, 4, 16, 64)] + [pv.IWAE(k) for k in (1, 4, 16, 64)]
table = pv.compare(vae, few, objectives, repeats=5, log_likelihood=log_p, seed=0)
print(table.round(2).to_string())

pyro.set_rng_seed(1)
plt.rcParams["font.size"] = 15
figure, panels = plt.subplots(1, 4, figsize=(18, 5.2), layout="constrained")
figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
pv.plots.images(vae.generate(36), columns=6, ax=panels[0])
pv.plots.reconstructions(x[:18], vae.reconstruct(x[:18]), columns=6, ax=panels[1])
panels[1].set_yticks([])
panels[2].scatter(z[:, first], z[:, second], s=30, c=colours.numpy(), linewidths=0.3, edgecolors="white")
panels[2].set(xlabel=f"$z_{first}$", ylabel=f"$z_{second}$", box_aspect=1)
pv.plots.bounds(table, ax=panels[3])
panels[3].set(box_aspect=1, ylabel="nats per image")
panels[3].legend(loc="upper right", bbox_to_anchor=(1, 0.95), fontsize=11)  # below the line at log p(x)
titles = "Samples", "Data and reconstructions", "Latent space", "Bounds on log p(x)"
for panel, title in zip(panels, titles, strict=True):
    panel.set_title(title, pad=12)
    panel.set_anchor("N")
save(figure, "front_page")
plt.rcdefaults()

save(pv.plots.traversal(vae, x, start=1).figure, "traversal")
save(pv.plots.interpolation(vae, x[:6], x[6:12]).figure, "interpolation")
