"""Run by test_ranks.py: trains on three processes of which one kills itself, and torchrun starts all of them again.

    torchrun --nproc-per-node 3 --max-restarts 1 killed_ranks.py FOLDER PLACE RANK NUMBER

PLACE is "step", "reduction", "checkpoint" or "nowhere"; it is there the NUMBER-th time. The last process to end writes
FOLDER/end.pt. By itself, many kills at random places, which take half a minute each:

    python tests/helpers/killed_ranks.py KILLS SEED

or kills after which two processes, or one, go on in place of three:

    python tests/helpers/killed_ranks.py fewer KILLS SEED
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import torch
import torch.distributed as dist

import pyro_vae as pv
from pyro_vae.training import checkpoint as checkpoints

PLACES = ("step", "reduction", "checkpoint")
X = torch.randn(75, 6, generator=torch.Generator().manual_seed(0))
torch_save, all_reduce = torch.save, dist.all_reduce


class Dies:
    """Kills this process at the n-th call."""

    def __init__(self, number):
        self.left = number

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, place, rank, number):
    dies = Dies(number if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else 0)
    if int(os.environ["RANK"]) != rank:
        place = "nowhere"

    class Kills(pv.Callback):
        on_all_ranks = True

        def on_step(self, record):
            if place == "step":
                dies()

    def reduce(*args, **kwargs):
        work = all_reduce(*args, **kwargs)
        if place == "reduction":
            dies()
        return work

    def save(state, file, **options):
        torch_save(state, file, **options)
        if place == "checkpoint" and "format" in state:
            file.truncate(file.tell() // 2)
            file.flush()
            dies()
            file.seek(0)
            torch_save(state, file)

    dist.all_reduce, checkpoints.torch.save = reduce, save
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    options = {"validation": X[:10], "checkpoint": folder / "run.pt", "checkpoint_every": 2, "seed": 3}
    average = pv.callbacks.EMA(0.9)
    history = pv.fit(vae, X, pv.IWAE(3), epochs=4, batch_size=16, callbacks=[average, Kills()], **options)
    if os.environ["RANK"] == "0":
        end = {"parameters": vae.state_dict(), "bounds": history.drop(columns="seconds").values.tolist()}
        torch_save(end | {"averages": average.averages}, folder / "end.pt")


def start(folder, place, rank, number, ranks=3, restarts=1):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    own = [__file__, folder, place, str(rank), str(number)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run([sys.executable, *command, *own], env=environment, capture_output=True, text=True)


def same(first, second):
    """Whether two trainings have ended alike, to the last bit."""
    named = all(torch.equal(first[k][n], second[k][n]) for k in ("parameters", "averages") for n in first[k])
    return named and torch.equal(*(torch.tensor(each["bounds"]).nan_to_num(0.0) for each in (first, second)))


def many(kills, seed):
    """Kill at random places, and compare."""
    draw, ends = random.Random(seed), []
    with tempfile.TemporaryDirectory() as root:
        for i in range(kills + 1):
            folder = Path(root, str(i))
            folder.mkdir()
            place = PLACES[i % 3] if i else "nowhere"
            rank = 0 if place == "checkpoint" else draw.randrange(3)
            number = draw.randint(1, {"step": 20, "reduction": 40, "checkpoint": 9, "nowhere": 1}[place])
            done = start(folder, place, rank, number)
            assert done.returncode == 0, done.stderr
            restarted = "closing signal" in done.stderr or "exitcode: -9" in done.stderr
            ends.append(torch.load(folder / "end.pt"))
            print(place, rank, number, "restarted" * restarted, "same bits" if same(ends[0], ends[-1]) else "DIFFERS")


def fewer(kills, seed):
    """Kill at random places, go on with fewer processes, and print the last bounds beside the unbroken one's."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        for i in range(kills + 1):
            folder = Path(root, str(i))
            folder.mkdir()
            if i:
                place, rank, number = PLACES[i % 2], draw.randrange(3), draw.randint(5, 15)
                assert start(folder, place, rank, number, restarts=0).returncode != 0
            ranks = 2 - i % 2 if i else 3
            done = start(folder, "nowhere", 0, 1, ranks)
            assert done.returncode == 0, done.stderr
            says = "noise of samples is new" in done.stderr
            bounds = torch.load(folder / "end.pt")["bounds"]
            print(
                f"{ranks} processes, {len(bounds)} epochs, validation {bounds[-1][1]:.3f}", "warned" * says, flush=True
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fewer":
        fewer(int(sys.argv[2]), int(sys.argv[3]))
    elif len(sys.argv) == 3:
        many(int(sys.argv[1]), int(sys.argv[2]))
    else:
        train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
