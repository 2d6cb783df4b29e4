"""Run by test_training.py: trains in child processes that kill themselves at a given place, and start again.

    python killed_runs.py FOLDER PLACE ...

For each place it prints a line an attempt: place|attempt|exit status|files written.
"""

import os
import signal
import sys
from pathlib import Path

import pyro
import torch

import pyro_vae as pv
from pyro_vae.training import checkpoint as checkpoints

torch_save, move = torch.save, checkpoints.Path.replace


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Data:
    """A tensor that kills the process at its n-th use: in the middle of an epoch, or of validation."""

    def __init__(self, x, at):
        self.x, self.at, self.uses = x, at, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.uses += 1
        if self.uses == self.at:
            die()
        return self.x[index]


def train(place, path, out):
    saves = []

    def save(state, file):
        torch_save(state, file)
        if "format" not in state:  # a trial in memory
            return
        saves.append(state)
        if place == "half-written" and len(saves) == 2:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    def replace(self, target):
        if place == "before the move" and len(saves) == 2:
            die()
        move(self, target)
        if place == "after the move" and len(saves) == 2:
            die()

    torch.save, checkpoints.Path.replace = save, replace
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    history = pv.fit(
        vae.model,
        vae.guide,
        Data(x, {"first epoch": 3, "third epoch": 11}.get(place)),
        pv.IWAE(2),
        epochs=4,
        batch_size=16,
        seed=1,
        checkpoint=path,
        validation=Data(x[:9], 3 if place == "validation" else None),
    )
    torch_save({"parameters": vae.state_dict(), "bounds": history.iloc[:, :2].values.tolist()}, out)


def main(folder, places):
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what each child would import again
    for place in ["nowhere", *places]:
        for attempt in [place] if place == "nowhere" else [place, "nowhere"]:
            child = os.fork()  # a process of its own, without importing everything again
            if child == 0:
                train(attempt, f"{folder}/{place}.ckpt", f"{folder}/{place}.pt")
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            written = [name for name in (f"{place}.ckpt", f"{place}.pt") if Path(folder, name).exists()]
            print(place, attempt, status, *written, sep="|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
