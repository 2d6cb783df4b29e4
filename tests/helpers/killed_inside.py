"""Run by test_inside_epochs.py: trains in child processes that are killed inside of epochs, until one ends.

    python killed_inside.py FOLDER KILLS

prints a line for each child, and whether the parameters are those of a training that nobody killed.
"""

import os
import random
import signal
import sys
from pathlib import Path

import pyro
import torch

import pyro_vae as pv

torch_save = torch.save
EPOCHS, BATCHES = 6, 20


class Killer(pv.Callback):
    """Kills its process at a step, or while the checkpoint after that step is written."""

    def __init__(self, steps, writing):
        self.left, self.writing = steps, writing

    def on_step(self, record):
        self.left -= 1
        if self.left == 0 and not self.writing:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left == 0:
            torch.save = half_written


def half_written(state, file):
    torch_save(state, file)
    file.truncate(file.tell() // 2)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def train(path, out, callbacks):
    x = torch.randn(10 * BATCHES, 6, generator=torch.Generator().manual_seed(0))
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", scale="learned")
    history = pv.fit(
        vae,
        x,
        pv.IWAE(2),
        epochs=EPOCHS,
        batch_size=10,
        seed=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        clip_norm=5.0,
        checkpoint=path,
        checkpoint_every=3,
        callbacks=callbacks,
        validation=x[:9],
    )
    torch_save({"parameters": vae.state_dict(), "bounds": history.iloc[:, :2].values.tolist()}, out)


def child(*args):
    pid = os.fork()
    if pid == 0:
        train(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder, kills):
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what each child would import again
    chosen = random.Random(0)
    child(f"{folder}/whole.ckpt", f"{folder}/whole.pt", [])
    whole, killed = torch.load(f"{folder}/whole.pt"), 0
    run = 0
    while killed < kills:
        run += 1
        path, out = f"{folder}/{run}.ckpt", Path(folder, f"{run}.pt")
        while not out.exists():
            callbacks = [Killer(chosen.randint(1, 30), chosen.random() < 0.3)] if killed < kills else []
            status = child(path, out, callbacks)
            killed += status == -signal.SIGKILL
            print(run, status, flush=True)
        found = torch.load(out)
        same = found["bounds"] == whole["bounds"] and all(
            torch.equal(value, whole["parameters"][name]) for name, value in found["parameters"].items()
        )
        if not same:
            break
    print(f"{killed} kills, same bits: {same}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
