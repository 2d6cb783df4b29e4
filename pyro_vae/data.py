"""Public image data sets as tensors, in disjoint train, validation and test splits."""

import difflib
import functools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import default_collate

from pyro_vae import shapes
from pyro_vae.checks import Between, Whole, checked, shown
from pyro_vae.errors import PyroVAEError
from pyro_vae.extras import require

_TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "omniglot": "Omniglot",
}
NAMES = ("digits", "shapes", *_TORCHVISION, "binarized_mnist")
HELD_OUT = {"digits": 250, "shapes": 1000}  # validation images by default; a sixth of the others
BINARIZE = ("none", "threshold", "fixed", "dynamic")


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The images of one split, and their labels.

    ``split[i]`` is one image (C, H, W). With a slice, a list or an index tensor, ``split[index]`` is a minibatch
    (len(index), C, H, W). Labels are a separate attribute, so a ``torch.utils.data.DataLoader`` collates images only.

    Attributes:
        images: float32 images in [0, 1], (N, C, H, W).
        labels: int64 labels, (N,), or None.
        dynamic: whether `images` are grey values, from which each indexing draws new binary images.
        factors: what each image was drawn from, a table of N rows with a column for each factor; None if that is not
            known.

    Example:
        >>> import torch, pyro_vae as pv
        >>> split = pv.data.Split(torch.full((3, 1, 2, 2), 0.5), labels=None, dynamic=True)
        >>> split[torch.tensor([0, 2])].shape
        torch.Size([2, 1, 2, 2])
        >>> split.x.unique()
        tensor([0., 1.])
    """

    images: Tensor
    labels: Tensor | None
    dynamic: bool = False
    factors: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        if not self.dynamic:
            return
        if not self.images.is_floating_point():
            raise PyroVAEError(f"expected grey values to draw from, of floating point, got {shown(self.images)}.")
        if not bool(((self.images >= 0) & (self.images <= 1)).all()):
            low, high = self.images.min().item(), self.images.max().item()
            raise PyroVAEError(f"expected grey values from 0 to 1 to draw from, got {low:g} to {high:g}. Rescale them.")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Split({len(self)} x {tuple(self.images.shape[1:])})"

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        """Return float32 images in [0, 1]; a dynamic split draws them with torch's global random number generator."""
        try:
            images = self.images[index]
        except (IndexError, TypeError) as error:
            message = f"expected the numbers of some of {len(self)} images, got {shown(index)}: {error}."
            raise IndexError(message) from error
        return torch.bernoulli(images) if self.dynamic else images

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return a list of images; a DataLoader calls this to fetch one minibatch."""
        return list(self[indices])

    @property
    def x(self) -> Tensor:
        """All images, (N, C, H, W); a dynamic split draws them anew."""
        return self[:]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The name of a data set and its three disjoint splits, as :func:`pyro_vae.data.load` returns them."""

    name: str
    train: Split
    validation: Split
    test: Split

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one image, (C, H, W)."""
        return tuple(self.train.images.shape[1:])


@checked
def load(
    name: str,
    *,
    root: str | Path | None = None,
    binarize: str = "none",
    validation: Whole | None = None,
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0,
) -> Dataset:
    """Load a data set as shuffled, disjoint train, validation and test splits.

    Images are float32 in [0, 1], (N, C, H, W). Labels are int64, (N,). The validation images are taken from the
    training part. Each split is shuffled, because some data sets are sorted by class or by writer. The same seed gives
    the same data, and the global random number generators keep their state.

    Arguments:
        name: one of

            - ``"digits"``: the 1797 digits of scikit-learn, 8 x 8, available offline. The 250 test images are the same
              for every seed.
            - ``"shapes"``: 12,000 colour images of one shape each, 3 x 64 x 64, made in some seconds, without files.
              They are the same on every machine, but for rounding, and the 1000 test images are the same for every
              seed. A pixel is a whole number of 255ths. In memory they take 600 MB. The table ``split.factors`` has
              what an image was drawn from, independent and uniform: `x` and `y`, the place of the shape's centroid in
              an image from -1 to 1, upwards, from -0.25 to 0.25; `size`, the radius of the circle of the same area,
              from 0.35 to 0.5; `angle`, anticlockwise, from -30 to 30 degrees; `hue`, an angle of OKLCH, from 0 (pink)
              to 270 degrees (blue); and `kind`, one of ellipse, square, triangle, star and heart, with labels 0 to 4.
            - ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``, ``"emnist"`` (the "balanced" split): 28 x 28.
            - ``"omniglot"``: 105 x 105 resized to 28 x 28, with ink as 1. The training images are the background
              alphabets and the test images the evaluation alphabets, each with labels from 0. Burda et al. used other
              28 x 28 images and another split, so likelihoods do not compare with theirs.
            - ``"binarized_mnist"``: the fixed binarisation of MNIST by Larochelle and Murray, without labels, read from
              ``<root>/binarized_mnist/binarized_mnist_larochelle_packed.npz``. The arrays train, valid and test in this
              file are ``np.packbits(np.loadtxt(f, dtype=np.uint8), axis=1)`` of the authors' ``.amat`` files.
        root: the folder above torchvision's own folder (above ``MNIST``). torchvision downloads absent files into it.
            ``"digits"`` and ``"shapes"`` need no root.
        binarize: one of

            - ``"none"``: grey values stay as they are.
            - ``"threshold"``: a pixel is 1 if its grey value is 0.5 or more.
            - ``"fixed"``: each pixel is drawn once from Bernoulli(grey value).
            - ``"dynamic"``: training images are drawn anew at each indexing, with torch's global random number
              generator (Salakhutdinov and Murray; Burda et al.). Validation and test images are those of ``"fixed"``,
              so that evaluation is repeatable.

            ``"shapes"``, whose images have colours, takes ``"none"`` only.
        validation: the number of validation images, 0 for none. The default is 250 for digits, 1000 for shapes, and
            a sixth of the training part otherwise (50000/10000/10000 for MNIST). ``"binarized_mnist"`` has its own
            10000.
        seed: the seed of the shuffle, the choice of validation images and the fixed draw.

    Raises:
        ValueError: an argument is invalid, or the files are damaged.
        FileNotFoundError: the files are not in `root`, and torchvision could not download them.

    Example:
        >>> import pyro_vae as pv
        >>> digits = pv.data.load("digits", binarize="dynamic")
        >>> digits
        Dataset(name='digits', train=Split(1297 x (1, 8, 8)), validation=Split(250 x (1, 8, 8)), test=...)
        >>> digits.train[:32].shape
        torch.Size([32, 1, 8, 8])
        >>> shapes = pv.data.load("shapes")
        >>> shapes
        Dataset(name='shapes', train=Split(10000 x (3, 64, 64)), validation=Split(1000 x (3, 64, 64)), test=...)
        >>> shapes.test.factors.columns.tolist()
        ['x', 'y', 'size', 'angle', 'hue', 'kind']

    References:
        Salakhutdinov and Murray (2008), *On the Quantitative Analysis of Deep Belief Networks*, ICML.
        Larochelle and Murray (2011), *The Neural Autoregressive Distribution Estimator*, AISTATS.
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
    """
    _check_choice("name", name, NAMES)
    _check_choice("binarize", binarize, BINARIZE)
    if name == "binarized_mnist" and binarize in ("dynamic", "threshold"):
        raise PyroVAEError(
            f"expected binarize='none' or 'fixed' for binarized_mnist, which is already binary, got {binarize!r}. "
            'Leave it out, or load "mnist" to binarise its grey images.'
        )
    if name == "shapes" and binarize != "none":
        raise PyroVAEError(
            f"expected binarize='none' for shapes, whose images have colours, got {binarize!r}. Leave it out, and take "
            'a likelihood of real pixels, such as likelihood="gaussian".'
        )
    if name == "binarized_mnist" and validation is not None:
        raise PyroVAEError(
            f"expected no validation for binarized_mnist, which has its own validation split, got {validation}. "
            "Leave it out."
        )

    if name == "digits":
        parts = _read_digits()
    elif name == "shapes":
        parts = _draw_shapes()
    elif root is None:
        raise PyroVAEError(
            f'expected root to be the folder of the {name} files, got None. Pass it: load("{name}", root="data").'
        )
    elif name == "binarized_mnist":
        parts = _read_binarized_mnist(Path(root).expanduser())
    else:
        parts = _read_torchvision(name, Path(root).expanduser())

    # A separate generator, because loading must not change the state of the global one.
    generator = torch.Generator().manual_seed(seed)
    train, *held_out, test = [_take(part, torch.randperm(len(part), generator=generator)) for part in parts]
    if not held_out:
        n = validation if validation is not None else HELD_OUT.get(name, len(train) // 6)
        if n >= len(train):
            raise PyroVAEError(f"expected validation to be below the {len(train)} training images of {name}, got {n}.")
        held_out, train = [_take(train, slice(n))], _take(train, slice(n, None))

    # "fixed" draws training images and "dynamic" does not, so they come last: both then have the same test images.
    once = "fixed" if binarize == "dynamic" else binarize
    test, val = (_binarized(split, once, generator) for split in (test, *held_out))
    return Dataset(name, _binarized(train, binarize, generator), val, test)


def collate(*columns: str | int) -> Callable[[Sequence[Any]], Any]:
    """Make a ``collate_fn`` of a DataLoader that keeps some columns of each datum, and leaves out others, as labels.

    The second tensor of a minibatch is the second argument of model and guide. For :class:`pyro_vae.VAE` that is the
    mask. So a label must not come there.

    Arguments:
        columns: what to keep of a datum: the keys of dictionaries, or the places in tuples.

    Returns:
        A function from a list of data to a minibatch: a dictionary of the keys, or the tensors at the places. It can be
        pickled, as the workers of a DataLoader need.

    Raises:
        ValueError: there are no columns; or keys and places are mixed; or a datum lacks one of them.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pairs = [(torch.zeros(5), label) for label in range(10)]
        >>> loader = torch.utils.data.DataLoader(pairs, batch_size=4, collate_fn=pv.data.collate(0))
        >>> next(iter(loader)).shape
        torch.Size([4, 5])
    """
    kinds = {type(column) for column in columns}
    if kinds not in ({str}, {int}):
        raise PyroVAEError(
            f"expected columns to be keys of dictionaries, or places in tuples, got {shown(columns)}. Pass "
            'pv.data.collate("x"), or pv.data.collate(0).'
        )
    return functools.partial(_collated, columns)


def _collated(columns: tuple[Any, ...], rows: Sequence[Any]) -> Any:
    by_key = isinstance(columns[0], str)
    try:
        kept = [{c: row[c] for c in columns} if by_key else tuple(row[c] for c in columns) for row in rows]
    except (KeyError, IndexError, TypeError) as error:
        raise PyroVAEError(
            f"expected data with the {'keys' if by_key else 'places'} {list(columns)}, got {shown(rows[0])} "
            f"({type(error).__name__}: {error}). Pass those that each datum has to pv.data.collate."
        ) from error
    found = default_collate(kept)
    return found if by_key or len(columns) > 1 else found[0]


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value).lower(), choices, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise PyroVAEError(f"expected {argument} to be one of {', '.join(choices)}, got {value!r}{hint}")


def _take(split: Split, index: slice | Tensor) -> Split:
    labels, factors = split.labels, split.factors
    return Split(
        split.images[index],
        None if labels is None else labels[index],
        factors=None if factors is None else factors.iloc[np.arange(len(factors))[index]].reset_index(drop=True),
    )


def _binarized(split: Split, binarize: str, generator: torch.Generator) -> Split:
    images = split.images
    if images.dtype == torch.uint8:  # until here, since bytes take a quarter of the memory of float32
        images = images / 255
    if binarize == "threshold":
        images = (images >= 0.5).float()
    elif binarize == "fixed":
        images = torch.bernoulli(images, generator=generator)
    return Split(images, split.labels, binarize == "dynamic", split.factors)


def _draw_shapes() -> list[Split]:
    factors = shapes.sample_factors(12_000)
    images, labels = torch.from_numpy(shapes.draw(factors)), torch.tensor(factors["kind"].map(list(shapes.KINDS).index))
    whole = Split(images, labels, factors=factors)
    return [_take(whole, slice(1000, None)), _take(whole, slice(1000))]


def _read_digits() -> list[Split]:
    require("sklearn", by='pv.data.load("digits")')
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    # A constant random_state, so that models of different seeds are evaluated on the same test images.
    *images, y_train, y_test = train_test_split(*load_digits(return_X_y=True), test_size=250, random_state=0)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in images)
    return [Split(x_train, torch.tensor(y_train)), Split(x_test, torch.tensor(y_test))]


def _read_torchvision(name: str, root: Path) -> list[Split]:
    require("torchvision", by=f'pv.data.load("{name}")')
    from torchvision import datasets, transforms

    create = getattr(datasets, _TORCHVISION[name])
    folder = root / ("omniglot-py" if name == "omniglot" else create.__name__)
    # PILToTensor comes last, because Resize antialiases PIL images.
    shrink = transforms.Compose([transforms.Resize((28, 28)), transforms.PILToTensor()])
    extra = {"emnist": {"split": "balanced"}, "omniglot": {"transform": shrink}}.get(name, {})

    def read(train: bool) -> Any:
        arguments: dict[str, Any] = {"root": root, "background" if name == "omniglot" else "train": train} | extra
        try:
            return create(**arguments)
        except Exception as error:
            # Only this text tells absent files from damaged ones.
            if "Dataset not found" not in str(error):
                raise PyroVAEError(
                    f"expected readable {name} files in {folder}, got {error!r}. Move the files away and load again."
                ) from error
        try:
            return create(**arguments, download=True)
        except (RuntimeError, OSError) as error:
            for made in (folder / "raw", folder):  # torchvision makes these folders before it downloads
                if made.is_dir() and not any(made.iterdir()):
                    made.rmdir()
            raise FileNotFoundError(
                f"expected the {name} files in {folder}, got no complete copy, and the download failed. Pass the root "
                f"that holds a folder {folder.name}. Or load {name} on a machine with internet access, and copy its "
                f"folder to {folder}."
            ) from error

    def to_split(part: Any) -> Split:
        if name == "omniglot":
            images, labels = zip(*part, strict=True)
            return Split((255 - torch.stack(images)) / 255, torch.tensor(labels))
        # The files of EMNIST hold transposed images.
        images = part.data.mT if name == "emnist" else part.data
        return Split(images.unsqueeze(1) / 255, part.targets)

    return [to_split(read(train=True)), to_split(read(train=False))]


def _read_binarized_mnist(root: Path) -> list[Split]:
    path = root / "binarized_mnist" / "binarized_mnist_larochelle_packed.npz"
    if not path.exists():
        found = list(path.parent.glob("*.npz"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"expected {path.name} in {path.parent}, or one npz file of another name, got {len(found)} npz files. "
                "See help(pyro_vae.data.load) for how to make the file."
            )
        path = found[0]
    try:
        with np.load(path) as arrays:
            packed = [arrays[key] for key in ("train", "valid", "test")]
        bits = [np.unpackbits(part, axis=1).reshape(len(part), 1, 28, 28) for part in packed]
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise PyroVAEError(
            f"expected {path} to hold uint8 arrays train, valid and test of shape (N, 98), the 784 pixels of each "
            f"image packed by np.packbits, got {type(error).__name__}: {error}. "
            "See help(pyro_vae.data.load) for how to make the file."
        ) from error
    return [Split(torch.from_numpy(part).float(), labels=None) for part in bits]
