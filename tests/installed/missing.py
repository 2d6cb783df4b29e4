"""Prints the message of a call whose package is missing: python missing.py CALL."""

import sys

import torch

import pyro_vae as pv

CALLS = {
    "plots": lambda: pv.plots.images(torch.zeros(1, 4, 4)),
    "digits": lambda: pv.data.load("digits"),
    "mnist": lambda: pv.data.load("mnist", root="data"),
    "arviz": lambda: pv.to_arviz(pv.mlp_vae((5,), latent_dim=2), torch.zeros(3, 5).bernoulli()),
    "tensorboard": lambda: pv.callbacks.TensorBoard("board"),
}

try:
    CALLS[sys.argv[1]]()
except pv.MissingPackageError as error:
    print(error)
