"""Data sets: the digits, small fakes in the file layout of each data set, and the real files where present."""

import math
import os
import random
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from pyro_vae import data

REAL = Path(os.environ.get("PYRO_VAE_DATA", Path(__file__).parents[2] / "shared" / "data"))
SPLITS = ("train", "validation", "test")
IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist": "EMNIST"}
N_TRAIN, N_TEST = 24, 7


def real(folder):
    return pytest.mark.skipif(not (REAL / folder).is_dir(), reason=f"no {REAL / folder}")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def no_internet(*args, **kwargs):
        raise URLError("no internet in the tests")

    for module in ("mnist", "omniglot"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_internet)


def write_idx(path, array):
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def numbered_images(n, first):
    """Images with their number in pixel (0, 1), where a transposed image has zero."""
    images = np.zeros((n, 28, 28))
    images[:, 0, 1] = first + np.arange(n)
    images[:, 9, 9] = 255
    return images


@pytest.fixture
def idx_root(tmp_path, request):
    """A folder with a small copy of one torchvision set; image number i has label i % 10."""
    raw = tmp_path / IDX_SETS[request.param] / "raw"
    raw.mkdir(parents=True)
    for part, n, first in (("train", N_TRAIN, 1), ("t10k", N_TEST, 101)):
        images = numbered_images(n, first)
        prefix = part
        if request.param == "emnist":
            images = images.transpose(0, 2, 1)
            prefix = f"emnist-balanced-{'train' if part == 'train' else 'test'}"
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (first + np.arange(n)) % 10)
    return request.param, tmp_path


def every_idx_set(test):
    return pytest.mark.parametrize("idx_root", IDX_SETS, indirect=True)(test)


def mnist_only(test):
    return pytest.mark.parametrize("idx_root", ["mnist"], indirect=True)(test)


@pytest.fixture
def omniglot_root(tmp_path, monkeypatch):
    """Two background characters and one evaluation character, with 3 drawings each in black ink on white."""
    monkeypatch.setattr("torchvision.datasets.Omniglot._check_integrity", lambda self: True)
    for part, characters in (("images_background", 2), ("images_evaluation", 1)):
        for c in range(characters):
            folder = tmp_path / "omniglot-py" / part / "Greek" / f"character{c:02d}"
            folder.mkdir(parents=True)
            for i in range(3):
                page = np.full((105, 105), True)
                page[:, 60 * c : 60 * c + 20] = False
                page[10 * i + 5] = False
                page[100:] = part == "images_background"
                Image.fromarray(page).save(folder / f"{i}.png")
    return tmp_path


@pytest.fixture
def packed_root(tmp_path):
    rng = np.random.default_rng(0)
    bits = {key: rng.integers(0, 2, (n, 784)) for key, n in (("train", 9), ("valid", 4), ("test", 5))}
    write_packed(tmp_path, **{key: np.packbits(part, axis=1) for key, part in bits.items()})
    return bits, tmp_path


def write_packed(root, **arrays):
    folder = root / "binarized_mnist"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "binarized_mnist_larochelle_packed.npz", **arrays)


def rows(x):
    return {image.numpy().tobytes() for image in x}


def assert_sound(dataset, sizes):
    """Check sizes, shapes, types, ranges, and that no image is in two splits."""
    splits = [getattr(dataset, name) for name in SPLITS]
    assert tuple(map(len, splits)) == sizes
    for split, n in zip(splits, sizes, strict=True):
        assert split.x.shape == (n, *dataset.event_shape)
        assert split.x.dtype == torch.float32
        assert split.x.min() >= 0 and split.x.max() <= 1
        assert split.labels is None or (split.labels.dtype == torch.int64 and split.labels.shape == (n,))
    train, validation, test = (rows(split.images) for split in splits)
    assert not train & validation and not train & test and not validation & test


# --- reading ----------------------------------------------------------------------------------------------


def test_digits_are_all_of_sklearns_with_their_labels():
    dataset = data.load("digits")
    assert_sound(dataset, (1297, 250, 250))
    assert dataset.event_shape == (1, 8, 8)
    images, labels = load_digits(return_X_y=True)
    truth = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found = {}
    for name in SPLITS:
        split = getattr(dataset, name)
        for image, label in zip(split.x, split.labels, strict=True):
            found[(image * 16).flatten().double().numpy().tobytes()] = label.item()
    assert found == truth


def test_digits_test_images_do_not_depend_on_the_seed():
    a, b = data.load("digits", seed=0), data.load("digits", seed=1, validation=10)
    assert rows(a.test.x) == rows(b.test.x)
    assert not torch.equal(a.test.x, b.test.x)
    assert rows(a.validation.x) != rows(data.load("digits", seed=1).validation.x)


@every_idx_set
def test_torchvision_sets_are_read_upright_and_with_their_labels(idx_root):
    name, root = idx_root
    dataset = data.load(name, root=root)
    assert_sound(dataset, (20, 4, N_TEST))
    assert dataset.event_shape == (1, 28, 28)
    for split in (dataset.train, dataset.validation, dataset.test):
        number = (split.x[:, 0, 0, 1] * 255).round().long()
        assert torch.equal(number % 10, split.labels)
    numbers = [(getattr(dataset, s).x[:, 0, 0, 1] * 255).round().int().tolist() for s in SPLITS]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 1 + N_TRAIN))
    assert sorted(numbers[2]) == list(range(101, 101 + N_TEST))


def test_omniglot_is_small_and_its_ink_is_one(omniglot_root):
    dataset = data.load("omniglot", root=omniglot_root, validation=2)
    assert_sound(dataset, (4, 2, 3))
    for split in (dataset.train, dataset.validation, dataset.test):
        left, right = split.x[:, 0, 14, 2], split.x[:, 0, 14, 18]
        assert torch.equal(left, (split.labels == 0).float())
        assert torch.equal(right, (split.labels == 1).float())
    # Each small pixel averages 3.75 large ones, so a line of one large pixel keeps its ink.
    free = dataset.train.x[:, 0, :24, 26]
    assert torch.allclose(free.sum(1), torch.tensor(1 / 3.75), atol=0.02)


def test_binarized_mnist_keeps_its_own_splits(packed_root):
    bits, root = packed_root
    dataset = data.load("binarized_mnist", root=root)
    assert_sound(dataset, (9, 4, 5))
    for name, key in zip(SPLITS, ("train", "valid", "test"), strict=True):
        split = getattr(dataset, name)
        assert split.labels is None
        assert rows(split.x) == rows(torch.tensor(bits[key]).float().view(-1, 1, 28, 28))
    fixed = data.load("binarized_mnist", root=root, binarize="fixed")
    assert torch.equal(fixed.test.x, dataset.test.x)


def test_binarized_mnist_file_may_have_another_name(packed_root):
    _, root = packed_root
    file = next((root / "binarized_mnist").iterdir())
    file.rename(file.with_name("mine.npz"))
    assert len(data.load("binarized_mnist", root=str(root)).train) == 9
    (root / "binarized_mnist" / "other.npz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"expected binarized_mnist_larochelle.*got 2 npz files\. See help"):
        data.load("binarized_mnist", root=root)


# --- splits -----------------------------------------------------------------------------------------------


def test_shuffle_repeats_with_the_seed_and_mixes_sorted_parts(packed_root):
    _, root = packed_root
    n = 400
    counter = np.arange(n, dtype=">u2").view(np.uint8).reshape(n, 2)
    ordered = np.hstack([counter, np.zeros((n, 96), np.uint8)])
    write_packed(root, train=ordered, valid=ordered, test=ordered)
    a, b, c = (data.load("binarized_mnist", root=root, seed=seed) for seed in (0, 0, 1))
    for name in SPLITS:
        x = getattr(a, name).x
        assert torch.equal(x, getattr(b, name).x)
        assert not torch.equal(x, getattr(c, name).x)
        rank = (x[:, 0].flatten(1)[:, :16] @ 2.0 ** torch.arange(15, -1, -1)).numpy()
        assert sorted(rank) == list(range(n))
        correlation = np.corrcoef(rank, np.arange(n))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(n)


@pytest.mark.parametrize("n", [0, 1, 1546])
def test_validation_size(n):
    dataset = data.load("digits", validation=n)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [1547 - n, n, 250]
    assert dataset.validation.x.shape == (n, 1, 8, 8)
    assert dataset.validation.labels.shape == (n,)


def test_indexing():
    split = data.load("digits").test
    whole = split.x
    assert split[3].shape == (1, 8, 8)
    assert torch.equal(split[3], whole[3])
    assert torch.equal(split[-1], whole[249])
    assert torch.equal(split[5:9], whole[5:9])
    index = torch.tensor([7, 0, 7])
    assert torch.equal(split[index], whole[[7, 0, 7]])
    assert torch.equal(split[[7, 0]], whole[[7, 0]])
    assert len(list(split)) == 250
    with pytest.raises(IndexError):
        split[250]


@pytest.mark.parametrize("binarize", data.BINARIZE)
def test_data_loader_collates_images_only(binarize):
    split = data.load("digits", binarize=binarize).train
    batches = list(DataLoader(split, batch_size=500))
    assert [tuple(batch.shape) for batch in batches] == [(500, 1, 8, 8), (500, 1, 8, 8), (297, 1, 8, 8)]
    assert all(batch.dtype == torch.float32 for batch in batches)
    if binarize != "dynamic":
        assert torch.equal(torch.cat(batches), split.x)
    else:
        # A draw is 0 where the grey value is 0, and 1 where it is 1.
        x = torch.cat(batches)
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(x[split.images == 0], torch.zeros_like(x[split.images == 0]))
        assert torch.equal(x[split.images == 1], torch.ones_like(x[split.images == 1]))
    one_by_one = next(iter(DataLoader(split, batch_size=None)))
    assert one_by_one.shape == (1, 8, 8)


def test_repr_is_short():
    text = "Dataset(name='digits', train=Split(1547 x (1, 8, 8)), validation=Split(0 x (1, 8, 8)), test="
    assert repr(data.load("digits", validation=0)).startswith(text)


# --- binarisation -----------------------------------------------------------------------------------------


def test_threshold():
    grey, black = data.load("digits"), data.load("digits", binarize="threshold")
    assert torch.equal(black.train.x, (grey.train.x >= 0.5).float())
    assert (grey.train.x == 0.5).any(), "the edge case must be in the data"
    assert torch.equal(black.train.labels, grey.train.labels)


def z_score(draws, p):
    """The sum of all draws minus its mean under Bernoulli(p), in standard deviations; `p` has the shape of one draw."""
    p = p.double()
    return ((draws - p).sum() / (p * (1 - p)).sum().sqrt()).item()


def test_fixed_draw_repeats_and_changes_with_the_seed():
    grey = data.load("digits")
    a, b = (data.load("digits", binarize="fixed") for _ in range(2))
    for name in SPLITS:
        x, p = getattr(a, name).x, getattr(grey, name).x
        assert torch.equal(x, getattr(a, name).x)
        assert torch.equal(x, getattr(b, name).x)
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert abs(z_score(x, p)) < 4
        assert torch.equal(getattr(a, name).labels, getattr(grey, name).labels)
    # The grey test images are the same for every seed, so only the draw can change how often a pixel is on.
    other = data.load("digits", binarize="fixed", seed=1)
    assert not torch.equal(a.test.x.sum(0), other.test.x.sum(0))


def test_dynamic_draws_average_to_the_grey_values():
    grey, dynamic = data.load("digits").train.x[:20], data.load("digits", binarize="dynamic").train
    torch.manual_seed(0)
    index = torch.arange(20)
    draws = torch.stack([dynamic[index] for _ in range(400)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(draws[0], draws[1])
    spread = (grey * (1 - grey) / 400).sqrt()
    uncertain = spread > 0
    assert torch.equal(draws.mean(0)[~uncertain], grey[~uncertain])
    z = (draws.mean(0) - grey)[uncertain] / spread[uncertain]
    assert z.abs().max() < 5
    assert abs(z.square().mean() - 1) < 5 * (2 / len(z)) ** 0.5


def test_dynamic_draws_anew_by_every_way_of_indexing_and_follows_the_global_seed():
    train = data.load("digits", binarize="dynamic").train
    for index in (slice(0, 50), torch.arange(50), list(range(50))):
        assert not torch.equal(train[index], train[index])
    assert any(not torch.equal(train[0], train[0]) for _ in range(20))
    assert not torch.equal(train.x, train.x)
    torch.manual_seed(5)
    first = train.x
    torch.manual_seed(5)
    assert torch.equal(train.x, first)


def test_dynamic_evaluates_on_the_fixed_draw():
    dynamic, fixed = (data.load("digits", binarize=how) for how in ("dynamic", "fixed"))
    for name in ("validation", "test"):
        assert torch.equal(getattr(dynamic, name).x, getattr(dynamic, name).x)
        assert torch.equal(getattr(dynamic, name).x, getattr(fixed, name).x)


@pytest.mark.parametrize("binarize", data.BINARIZE)
def test_loading_leaves_the_global_generators_alone(binarize):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert data.load("digits", binarize=binarize).event_shape == (1, 8, 8)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "fashion-mnist"},
            r"expected name to be one of digits, shapes, mnist, .*: did you mean 'fashion_mnist'\?",
        ),
        ({"name": "MNIST"}, r"got 'MNIST': did you mean 'mnist'\?"),
        ({"name": "zzz"}, r"got 'zzz'\.$"),
        (
            {"name": "digits", "binarize": "dinamic"},
            r"expected binarize to be one of .*: did you mean 'dynamic'\?",
        ),
        ({"name": "digits", "validation": -1}, r"validation to be an integer of at least 0 or None, got -1"),
        ({"name": "digits", "validation": 0.1}, r"validation to be an integer of at least 0 or None, got 0\.1"),
        ({"name": "digits", "validation": 1547}, r"below the 1547 training images of digits, got 1547"),
        (
            {"name": "mnist"},
            r'expected root to be the folder of the mnist files, got None.*load\("mnist", root="data"\)',
        ),
        ({"name": "binarized_mnist"}, r'load\("binarized_mnist", root="data"\)'),
        (
            {"name": "binarized_mnist", "root": "d", "binarize": "dynamic"},
            r'expected binarize=.*already binary.*load "mnist"',
        ),
        ({"name": "binarized_mnist", "root": "d", "binarize": "threshold"}, r"already binary"),
        ({"name": "binarized_mnist", "root": "d", "validation": 5}, r"its own validation split, got 5\. Leave it out"),
    ],
)
def test_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


@pytest.mark.parametrize("name", [*IDX_SETS, "omniglot"])
def test_absent_files_and_failed_download(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"expected the {name} files in .*got no complete copy.*download"
    ) as caught:
        data.load(name, root=tmp_path)
    folder = tmp_path / IDX_SETS.get(name, "omniglot-py")
    assert f"Pass the root that holds a folder {folder.name}" in str(caught.value)
    assert not folder.exists()
    assert "no internet" in str(caught.value.__cause__)


@mnist_only
def test_damaged_idx_file_is_not_called_absent(idx_root):
    _, root = idx_root
    file = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"expected readable mnist files in .*MNIST.*Move the files away"):
        data.load("mnist", root=root)


@mnist_only
def test_incomplete_copy_is_called_incomplete(idx_root):
    _, root = idx_root
    (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"the mnist files in .* got no complete copy"):
        data.load("mnist", root=root)


def test_absent_binarized_mnist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected binarized_mnist_larochelle.*got 0 npz files"):
        data.load("binarized_mnist", root=tmp_path)


PACKED = np.zeros((3, 98), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"train": PACKED, "test": PACKED}, "valid"),
        ({"train": PACKED, "valid": PACKED, "test": PACKED.astype(np.int64)}, "unsigned byte"),
        ({"train": np.zeros((3, 784), np.uint8), "valid": PACKED, "test": PACKED}, "reshape"),
        ({"train": PACKED[0], "valid": PACKED, "test": PACKED}, "axis"),
    ],
)
def test_wrong_arrays_in_binarized_mnist(arrays, reason, tmp_path):
    write_packed(tmp_path, **arrays)
    with pytest.raises(ValueError, match=rf"shape \(N, 98\).*got .*{reason}"):
        data.load("binarized_mnist", root=tmp_path)


def test_binarized_mnist_file_that_is_not_an_npz(tmp_path):
    write_packed(tmp_path)
    file = next((tmp_path / "binarized_mnist").iterdir())
    for content in (b"version https://git-lfs", b"PK\x03\x04 cut short"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"to hold uint8 arrays .*got "):
            data.load("binarized_mnist", root=tmp_path)


# --- the real files ---------------------------------------------------------------------------------------


@real("MNIST")
def test_real_mnist():
    dataset = data.load("mnist", root=REAL)
    assert_sound(dataset, (50000, 10000, 10000))
    assert torch.bincount(dataset.test.labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    whole = torch.cat([dataset.train.x, dataset.validation.x])
    assert whole.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert whole.std().item() == pytest.approx(0.3081, abs=1e-4)


@real("MNIST")
def test_real_mnist_fixed_draw_has_the_mean_of_the_grey_values():
    grey, fixed = (data.load("mnist", root=REAL, binarize=how).test.x for how in ("none", "fixed"))
    assert abs(z_score(fixed, grey)) < 4


@real("binarized_mnist")
def test_real_binarized_mnist():
    dataset = data.load("binarized_mnist", root=REAL)
    assert_sound(dataset, (50000, 10000, 10000))
    assert set(dataset.test.x.unique().tolist()) == {0.0, 1.0}
    # The file is sorted by class: without a shuffle, its first 1000 test images are one digit, far from the mean image.
    mean, first = dataset.test.x.mean(0), dataset.test.x[:1000].mean(0)
    assert (mean - first).abs().max() < 5 * 0.5 / 1000**0.5


def test_a_dynamic_split_needs_probabilities():
    for images in (torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 3, 3), math.inf), torch.full((2, 1, 3, 3), -0.1)):
        with pytest.raises(ValueError, match=r"^expected grey values from 0 to 1 to draw from"):
            data.Split(images, None, dynamic=True)
