"""Hundreds of command lines, right and wrong: the status, one line for an error, and nothing overwritten."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import QUICK, TINY, files, pyro_vae

SMALL = [*TINY, "--epochs", "1"]
HUGE = str(10**12)
BEYOND = str(10**30)  # of no integer type
NO_INTEGERS = ["", " ", "x", "1.5", "nan", "inf", "1e3", "0x10", "½", "1\n2", "-", "9" * 5000]
NO_NUMBERS = ["", " ", "x", "1,5", "0x10", "½", "1\n2", "-"]
INTEGERS = {  # the least value of each option
    "train": {
        "validation": 0,
        "latent-dim": 1,
        "particles": 1,
        "warm-up": 0,
        "epochs": 1,
        "batch-size": 1,
        "patience": 1,
        "seed": 0,
    },
    "compare": {"num-images": 2, "repeats": 2, "seed": 0},
    "evaluate": {"num-images": 2, "num-samples": 30, "ais-images": 2, "ais-steps": 2, "ais-chains": 2, "seed": 0},
    "sample": {"num-samples": 1, "seed": 0},
}
CHOICES = {
    "network": ("mlp", "conv"),
    "likelihood": ("bernoulli", "gaussian"),
    "objective": ("elbo", "elbo-monte-carlo", "iwae"),
    "gradient": ("pathwise", "stl", "dreg"),
    "binarize": ("none", "threshold", "fixed", "dynamic"),
}
NO_RUNS = [
    "",
    ".",
    "..",
    "/",
    "nowhere",
    "nowhere/below",
    "file",
    "file/below",
    "folder",
    "loop",
    "loop/below",
    "~nosuchuser/run",
    "a\nb",
    "é€",
    "\udce9",
    "x" * 300,
    "x/" * 3000,
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "run/config.json",
    "run/checkpoint.pt",
    "run/figures",
]
DAMAGED = {  # what config.json may hold by hand
    "not_json": "{",
    "list": "[]",
    "null": "null",
    "empty": "",
    "deep": "[" * 100_000,
    "not_utf_8": b"\xff",
}
DAMAGED_VALUES = {
    "data": ["", "nosuch", None, 5, [], "binarized_mnist"],
    "hidden_dims": ["", "x", 5, None, [16], "17", "16,16", HUGE, "-1", "0"],
    "latent_dim": [0, -1, 10**12, 10**30, "2", None, 2.5, 3],
    "seed": [-1, 2**32, "0", None, 10**30],
    "network": ["conv", "x", None],
    "likelihood": ["x", None, 5],
    "binarize": ["x", None, "none"],
    "validation": [-1, 10**12, "x", 2.5],
    "root": [5, None],
    "channels": [5],
    "scale": [None],
}


def rows():
    """Of each command line: its arguments, and what its line of error says."""
    train = ["train", "digits"]
    for command, options in INTEGERS.items():
        start = [command, "digits" if command == "train" else "run"]
        for option, least in options.items():
            for value in [*NO_INTEGERS, str(least - 1), "-1", str(-(10**30))]:
                yield [*start, f"--{option}", value], f"--{option}"
            yield [*start, f"--{option}"], f"--{option}"
        yield [command], "Missing argument"
        yield [command, "--nosuch"], "--nosuch"
        yield [*start, "--nosuch", "1"], "--nosuch"
        yield [*start, "-x"], "-x"
        yield [*start, "another"], "another"
        yield [*start, "--compile=1"], "--compile"
        yield [*start, "--se"], "--se"
        yield [*start, "--seed", BEYOND], "--seed"
        yield [*start, "--seed", str(2**32)], "--seed"
    for name in ("nosuch", "Train", "", "-h", "--nosuch", "é", "--version=1"):
        yield [name], ""
    for option, values in CHOICES.items():
        for value in ["", "x", values[0].upper(), f" {values[0]}", "é", "\n", ",".join(values)]:
            yield [*train, f"--{option}", value], f"--{option}"
        yield [*train, f"--{option}"], f"--{option}"
    for option in ("lr", "free-bits"):
        for value in [*NO_NUMBERS, "nan", "-1", "-inf", "inf"]:
            yield [*train, f"--{option}", value], option.replace("-", "[-_]")
    yield [*train, "--lr", "0"], "--lr"
    yield [*train, "--free-bits", "1e300"], "--free-bits"
    yield [*train, "--warm-up", "9" * 400], "--warm-up"
    yield [*train, "--lr", "1e400"], "--lr"
    for option, network in (("hidden-dims", "mlp"), ("channels", "conv")):
        for value in [*NO_INTEGERS, "0", "-1", ",", "16,", "16,,16", "16;16", HUGE, BEYOND, f"16,{HUGE},16"]:
            yield [*train, "--network", network, f"--{option}", value], ""
    for value in [*NO_NUMBERS, "nan", "0", "-1", "inf", "Learned"]:
        yield [*train, "--likelihood", "gaussian", "--scale", value], "scale"
    yield [*train, "--latent-dim", HUGE], "memory"
    yield [*train, "--latent-dim", BEYOND], "memory"
    yield [*train, "--latent-dim", HUGE, "--network", "conv"], "memory"
    yield [*train, "--hidden-dims", "3000000000,3000000000"], "memory"
    yield [*train, "--particles", HUGE], "memory"
    yield [*train, "--particles", BEYOND], "memory"
    yield [*train, "--particles", HUGE, "--objective", "iwae"], "memory"
    yield [*train, "--validation", HUGE], "validation"
    yield [*train, "--validation", BEYOND], "validation"
    yield ["sample", "run", "--num-samples", HUGE], "memory"
    yield ["sample", "run", "--num-samples", BEYOND], "memory"
    yield ["compare", "run", "--repeats", HUGE], "memory"
    yield ["compare", "run", "--repeats", BEYOND], "memory"
    for option in ("num-samples", "ais-chains", "ais-steps"):
        yield ["evaluate", "run", f"--{option}", HUGE], "memory"
        yield ["evaluate", "run", f"--{option}", BEYOND], "memory"
    for name in ("nosuch", "", "é", "a\nb", "Digits", "x" * 5000, "/dev/null", "binarized_mnist"):
        yield ["train", name], ""
    for root in ("nowhere", "file", "loop", "~nosuchuser/data", "x" * 300, "x/" * 3000, "", "a\nb", "/dev/full"):
        yield ["train", "binarized_mnist", "--root", root], ""
    for out in ("file", "file/below", "folder", "loop", "loop/below", "x" * 300, "x/" * 3000, "run/config.json"):
        yield [*train, *SMALL, "--out", out], ""
    for out in (".", "..", "/", "/dev/null", "/dev/full", "/proc/run", "/sys/run", "run/figures"):
        yield [*train, *SMALL, "--out", out], ""
    yield [*train, *SMALL, "--out", "run", "--seed", "1"], "seed"
    yield [*train, *SMALL, "--out", "run"], "3 epochs"
    yield [*train, *SMALL, "--out", ""], ""
    for command in ("compare", "evaluate", "sample"):
        for path in NO_RUNS:
            yield [command, path], ""


def named(arguments):
    return (
        " ".join(text if len(text) < 40 else f"{text[:20]}...{len(text)}" for text in arguments)
        .encode("unicode_escape")
        .decode()
    )


ROWS = list(rows())


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder of things that no command may overwrite."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(trained[0], place / "run")
    (place / "file").write_text("the only copy")
    (place / "folder").mkdir()
    (place / "folder" / "chapter.tex").write_text("the only copy")
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nowhere/at/all")
    return place


@pytest.fixture(autouse=True)
def little_memory():
    """An allocation of a size that is refused too late fails, and leaves the machine alone."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(arguments, said, place):
    before = files(place)
    status, out, err = pyro_vae(*arguments)
    assert (status, out) == (2, ""), (out, err)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert len(err) < 10_000

    assert re.search(said, err), err
    assert files(place) == before
    return err


# Of so many rows of one kind, the quick suite has each fourth.
SOME = [pytest.param(*row, id=named(row[0]), marks=[pytest.mark.slow] if i % 4 else []) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(("arguments", "said"), SOME)
def test_a_wrong_command_line(arguments, said, place, monkeypatch):
    monkeypatch.chdir(place)
    refused(arguments, said, place)


CONFIGS = [(f"{name}={value!r:.30}", name, value) for name, values in DAMAGED_VALUES.items() for value in values]


@pytest.mark.parametrize("command", ["compare", "sample"])
@pytest.mark.parametrize(("name", "value"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_a_damaged_option(run, command, name, value):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {name: value}))
    refused([command, "run"], "", run)


@pytest.mark.parametrize("command", ["compare", "sample"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_of_options(run, command, content):
    (run / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused([command, "run"], "config.json", run)


STARTED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell may ignore it
ENTRY = f"{STARTED} from pyro_vae_command import main; print(flush=True); main()"
EVALUATE = f"evaluate run {' '.join(map(str, QUICK))}"
COMPARE = "compare run --num-images 5 --repeats 2"
TRAIN = "train digits --hidden-dims 4 --epochs 1 --out"
FULL = "No space left on device"
LARGE = "File too large"
SHELL = [  # a command line, its status, and what its one line of error says, if there is one
    ("p --help >&-", 0, None),
    ("p --help > /dev/full", 2, FULL),
    ("p --help | true", 2, "Broken pipe"),
    ("p --version > /dev/full", 2, FULL),
    ("p sample run >&-", 0, None),
    ("p sample run > /dev/full", 2, FULL),
    ("p sample run | true", 2, "Broken pipe"),
    ("p sample run 2>&-", 0, None),
    ("p sample run <&- >&- 2>&-", 0, None),
    (f"p {COMPARE} > /dev/full", 2, FULL),
    (f"p {COMPARE} | true", 2, "Broken pipe"),
    (f"p {TRAIN} new >&-", 0, None),
    (f"p {TRAIN} new > /dev/full", 2, FULL),
    (f"p {TRAIN} new | true", 2, "Broken pipe"),
    ("p trian", 2, "trian"),
    ("p trian 2>&-", 2, None),
    ("p trian 2> /dev/full", 2, None),
    ("p trian <&- >&- 2> /dev/full", 2, None),
    ("ulimit -f 4; p sample run", 2, LARGE),
    (f"ulimit -f 4; p {TRAIN} new", 2, LARGE),
    (f"ulimit -f 4; p {COMPARE}", 2, LARGE),
    (f"ulimit -f 16; p {COMPARE}", 2, LARGE),
    ("HOME=/nonexistent p sample run", 0, None),
    ("unset HOME; p sample run", 0, None),
    ("TMPDIR=/nonexistent p sample run", 0, None),
    ("MPLBACKEND=nonsense p sample run", 0, None),
    ("MPLBACKEND=module://nonsense p sample run", 0, None),
    (f"PYTHONIOENCODING=ascii p {COMPARE}", 0, None),
    (f"LC_ALL=C p {COMPARE}", 0, None),
    (f"PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 LC_ALL=C p {COMPARE}", 0, None),
    (f"unset LANG; COLUMNS=1 TERM=dumb NO_COLOR=1 p {COMPARE}", 0, None),
    ("COLUMNS=1 p train --help", 0, None),
    (f"PYTHONIOENCODING=ascii p {TRAIN} é€", 0, None),
    (f"PYTHONWARNINGS=error::FutureWarning p {COMPARE}", 0, None),
    (f"PYTHONWARNINGS=error::FutureWarning p {TRAIN} new", 0, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "status", "said"), SHELL, ids=[row[0] for row in SHELL])
def test_a_command_line_of_a_shell(run, line, status, said):
    before = files(run)
    defined = f"set -o pipefail; p() {{ '{sys.executable}' -c 'from pyro_vae_command import main; main()' \"$@\"; }}; "
    done = subprocess.run(["bash", "-c", defined + line], capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == status, done.stderr
    if said is None:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert said in done.stderr
    if LARGE in str(said):
        assert {name: content for name, content in files(run).items() if name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("place", ["HOME", "MPLCONFIGDIR"])
def test_an_unwritable_home(run, monkeypatch, place):
    monkeypatch.setenv(place, "/dev/null")
    done = subprocess.run([sys.executable, "-c", ENTRY, "sample", "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # matplotlib says that it keeps its cache elsewhere


INT, TERM = signal.SIGINT, signal.SIGTERM
MOMENTS = [("--help", t, [INT]) for t in (0.05, 0.3, 0.9, 1.8)]
MOMENTS += [("sample run", t, [INT]) for t in (0.1, 1.2, 2.4, 4.5)]
MOMENTS += [("evaluate run", t, [INT]) for t in (4.0, 8.0)]
MOMENTS += [(f"{TRAIN} new --epochs 100000", t, [INT]) for t in (0.6, 3.6, 5.0, 8.0)]
MOMENTS += [("evaluate run", t, [TERM]) for t in (0.5, 8.0)]
MOMENTS += [(line, t, [INT, INT]) for line in ("evaluate run", f"{TRAIN} new --epochs 100000") for t in (0.5, 8.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "seconds", "signals"), MOMENTS)
def test_a_signal_at_a_moment(run, line, seconds, signals):
    before = files(run)
    command = [sys.executable, "-c", ENTRY, *line.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # Python itself has started
    time.sleep(seconds)
    for each in signals:
        process.send_signal(each)
        time.sleep(0.2)
    err = process.communicate(timeout=60)[1]
    if process.returncode == 0:  # a fast machine had ended before
        return
    assert process.returncode in (128 + signals[0], -signals[0]), err  # a shell shows both as 128 + n
    assert "Traceback" not in err, err
    if signals == [INT]:
        assert (process.returncode, err.count("\n")) == (130, 1), err
        assert err.startswith("stopped by Ctrl-C")
    assert err.count("\n") <= 1
    assert files(run) == before
