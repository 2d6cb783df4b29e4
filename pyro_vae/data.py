"""Image data sets as tensors, with disjoint train, validation and test splits."""

from __future__ import annotations

import difflib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError

_TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "omniglot": "Omniglot",
}
NAMES = ("digits", *_TORCHVISION, "binarized_mnist")
BINARIZE = ("none", "threshold", "fixed", "dynamic")


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The images of one split, shape (N, 1, H, W), and their labels, shape (N,), or None.

    ``split[i]`` is one image (1, H, W); ``split[index]``, for a slice, a list or an index tensor, is a batch
    (len(index), 1, H, W). Labels are kept apart, so a ``torch.utils.data.DataLoader`` collates images only.
    A `dynamic` split holds grey values in `images`, and each indexing draws binary images from them.

    >>> split = Split(torch.full((3, 1, 2, 2), 0.5), labels=None, dynamic=True)
    >>> split[torch.tensor([0, 2])].shape
    torch.Size([2, 1, 2, 2])
    >>> split.x.unique()
    tensor([0., 1.])
    """

    images: Tensor
    labels: Tensor | None
    dynamic: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        """Show the size, as ``Split(50000 x (1, 28, 28))``."""
        return f"Split({len(self)} x {tuple(self.images.shape[1:])})"

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        """Return float32 images in [0, 1]; a dynamic split draws them with torch's global generator."""
        images = self.images[index]
        return torch.bernoulli(images) if self.dynamic else images

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return a list of images: what a DataLoader calls to fetch one batch."""
        return list(self[indices])

    @property
    def x(self) -> Tensor:
        """All images, shape (N, 1, H, W); one fresh draw of them if the split is dynamic."""
        return self[:]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits of one data set, as `load` returns them."""

    name: str
    train: Split
    validation: Split
    test: Split

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one image, (1, H, W)."""
        return tuple(self.train.images.shape[1:])


def load(
    name: str,
    *,
    root: str | Path | None = None,
    binarize: str = "none",
    validation: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a data set: float32 images in [0, 1] of shape (N, 1, H, W), int64 labels of shape (N,).

    Validation images come out of the training part. Each split is shuffled: some sets are sorted by class or
    writer, and the first images of such a split do not stand for the rest.

    Args:
        name: one of

            - ``"digits"``: scikit-learn's 1797 8x8 digits, offline. The 250 test images are the same for
              every seed.
            - ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``, ``"emnist"`` (the "balanced" split): 28x28.
            - ``"omniglot"``: 105x105 resized to 28x28, ink is 1. Trains on the background alphabets, tests on
              the evaluation ones, whose labels count from 0 again. Burda et al. used other 28x28 images and
              another split: likelihoods here do not compare with theirs.
            - ``"binarized_mnist"``: MNIST as binarised once by Larochelle & Murray, without labels, read from
              ``<root>/binarized_mnist/binarized_mnist_larochelle_packed.npz``. Its arrays train, valid, test
              are ``np.packbits(np.loadtxt(f, dtype=np.uint8), axis=1)`` of the authors' ``.amat`` files.
        root: the folder above torchvision's own (above ``MNIST``); torchvision downloads into it what it
            lacks. Not needed for digits.
        binarize: ``"none"`` keeps grey values; ``"threshold"`` is ``x >= 0.5``; ``"fixed"`` draws each pixel
            once from Bernoulli(grey value); ``"dynamic"`` draws training images anew each time they are
            indexed, with torch's global generator (Salakhutdinov & Murray; Burda et al.), and gives
            validation and test the draw of ``"fixed"``, so that evaluation repeats.
        validation: number of validation images, 0 for none. By default 250 for digits, a sixth of the
            training part otherwise (MNIST: 50000/10000/10000); binarized_mnist has its own 10000.
        seed: of the shuffle, the choice of validation images and the fixed draw.

    Raises:
        ValueError: an argument is not one of the above, or the files are damaged.
        FileNotFoundError: the files are not in `root` and could not be downloaded.

    >>> data = load("digits", binarize="dynamic")
    >>> data
    Dataset(name='digits', train=Split(1297 x (1, 8, 8)), validation=Split(250 x (1, 8, 8)), test=...)
    >>> data.train[:32].shape
    torch.Size([32, 1, 8, 8])

    References:
        Salakhutdinov & Murray (2008), On the quantitative analysis of deep belief networks, ICML.
        Larochelle & Murray (2011), The neural autoregressive distribution estimator, AISTATS.
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders, ICLR.
    """
    _check_choice("name", name, NAMES)
    _check_choice("binarize", binarize, BINARIZE)
    if validation is not None and (not isinstance(validation, int) or validation < 0):
        raise PyroVAEError(f"validation must be a whole number of images, 0 or more, got {validation!r}")
    if name == "binarized_mnist" and binarize in ("dynamic", "threshold"):
        raise PyroVAEError(
            f"binarized_mnist is already binary: leave out binarize={binarize!r}, "
            'or use name="mnist" for dynamic binarisation of the grey images'
        )
    if name == "binarized_mnist" and validation is not None:
        raise PyroVAEError(f"binarized_mnist has its own validation split: leave out validation={validation}")

    if name == "digits":
        parts = _read_digits()
    elif root is None:
        raise PyroVAEError(f'{name} needs the folder its files are in: load("{name}", root="data")')
    elif name == "binarized_mnist":
        parts = _read_binarized_mnist(Path(root).expanduser())
    else:
        parts = _read_torchvision(name, Path(root).expanduser())

    # A generator of its own: loading must not change what the program draws next.
    generator = torch.Generator().manual_seed(seed)
    train, *held_out, test = [_take(part, torch.randperm(len(part), generator=generator)) for part in parts]
    if not held_out:
        n = validation if validation is not None else 250 if name == "digits" else len(train) // 6
        if n >= len(train):
            raise PyroVAEError(f"validation must be below {name}'s {len(train)} training images, got {n}")
        held_out, train = [_take(train, slice(n))], _take(train, slice(n, None))

    # Train is drawn last, so that "fixed" and "dynamic" evaluate on the same binary images.
    once = "fixed" if binarize == "dynamic" else binarize
    test, val = (_binarized(split, once, generator) for split in (test, *held_out))
    return Dataset(name, _binarized(train, binarize, generator), val, test)


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value).lower(), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PyroVAEError(f"{argument} must be one of {', '.join(choices)}, got {value!r}{hint}")


def _take(split: Split, index: slice | Tensor) -> Split:
    return Split(split.images[index], None if split.labels is None else split.labels[index])


def _binarized(split: Split, binarize: str, generator: torch.Generator) -> Split:
    images = split.images
    if binarize == "threshold":
        images = (images >= 0.5).float()
    elif binarize == "fixed":
        images = torch.bernoulli(images, generator=generator)
    return Split(images, split.labels, dynamic=binarize == "dynamic")


def _read_digits() -> list[Split]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    # A constant random_state, so that runs with different seeds are scored on the same test images.
    *images, y_train, y_test = train_test_split(*load_digits(return_X_y=True), test_size=250, random_state=0)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in images)
    return [Split(x_train, torch.tensor(y_train)), Split(x_test, torch.tensor(y_test))]


def _read_torchvision(name: str, root: Path) -> list[Split]:
    from torchvision import datasets, transforms

    create = getattr(datasets, _TORCHVISION[name])
    folder = root / ("omniglot-py" if name == "omniglot" else create.__name__)
    extra: dict[str, Any] = {}
    if name == "emnist":
        extra["split"] = "balanced"
    elif name == "omniglot":
        # Resize antialiases, as these are PIL images.
        extra["transform"] = transforms.Compose([transforms.Resize((28, 28)), transforms.PILToTensor()])

    def read(train: bool) -> Any:
        arguments = {"root": root, "background" if name == "omniglot" else "train": train, **extra}
        try:
            return create(**arguments)
        except Exception as error:
            # torchvision tells absent files from damaged ones by this text only.
            if "Dataset not found" not in str(error):
                raise PyroVAEError(
                    f"cannot read the {name} files in {folder} ({error!r}): move them away and load again"
                ) from error
        try:
            return create(**arguments, download=True)
        except (RuntimeError, OSError) as error:
            for made in (folder / "raw", folder):  # by torchvision, before it found nothing to put there
                if made.is_dir() and not any(made.iterdir()):
                    made.rmdir()
            raise FileNotFoundError(
                f"no complete copy of {name} in {folder}, and downloading it failed. Pass the root that holds a "
                f"folder {folder.name}; or, where there is internet, load {name} once and copy that folder to {folder}"
            ) from error

    def to_split(part: Any) -> Split:
        if name == "omniglot":
            images, labels = zip(*part, strict=True)
            return Split((255 - torch.stack(images)) / 255, torch.tensor(labels))
        # EMNIST's files hold every image transposed.
        images = part.data.mT if name == "emnist" else part.data
        return Split(images.unsqueeze(1) / 255, part.targets)

    return [to_split(read(train=True)), to_split(read(train=False))]


def _read_binarized_mnist(root: Path) -> list[Split]:
    path = root / "binarized_mnist" / "binarized_mnist_larochelle_packed.npz"
    if not path.exists():
        found = list(path.parent.glob("*.npz"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{path.parent} must hold {path.name}, or one npz file of another name; "
                f"it holds {len(found)}. help(pyro_vae.data.load) says how to make the file"
            )
        path = found[0]
    try:
        with np.load(path) as arrays:
            packed = [arrays[key] for key in ("train", "valid", "test")]
        bits = [np.unpackbits(part, axis=1).reshape(len(part), 1, 28, 28) for part in packed]
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise PyroVAEError(
            f"{path} must hold uint8 arrays train, valid and test of shape (N, 98), the 784 pixels of each image "
            f"packed by np.packbits, but: {error}. help(pyro_vae.data.load) says how to make the file"
        ) from error
    return [Split(torch.from_numpy(part).float(), labels=None) for part in bits]
