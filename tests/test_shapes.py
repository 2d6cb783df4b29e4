"""The drawn shapes: what the pixels show is what the table of factors says."""

import numpy as np
import pytest
import torch
from torch.nn.functional import affine_grid, grid_sample

import pyro_vae as pv
from pyro_vae import shapes

# OKLab of linear sRGB, as its author gives it; the module has the other direction.
RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
CENTRES = (np.arange(64) + 0.5) / 32 - 1


@pytest.fixture(scope="module")
def drawn():
    factors = shapes.sample_factors(400)
    return factors, shapes.draw(factors)


def oklab(rgb):
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ RGB_TO_LMS.T) @ LMS_TO_LAB.T


def cover(images):
    """The part of each pixel that has ink, from the distance of its colour to the corner's, (N, 64, 64)."""
    paper = images[:, :, :1, :1].astype(float)
    distance = np.sqrt(((images - paper) ** 2).sum(1))
    return distance / np.percentile(distance, 97, axis=(1, 2), keepdims=True)


def test_place_size_and_hue_are_those_of_the_pixels(drawn):
    factors, images = drawn
    ink = cover(images)
    weight = ink.sum((1, 2))
    np.testing.assert_allclose((ink * CENTRES).sum((1, 2)) / weight, factors["x"], atol=0.003)
    np.testing.assert_allclose((ink * -CENTRES[:, None]).sum((1, 2)) / weight, factors["y"], atol=0.003)
    np.testing.assert_allclose(np.sqrt(weight / 32**2 / np.pi), factors["size"], rtol=0.01)
    middle = images.reshape(400, 3, -1)[np.arange(400), :, ink.reshape(400, -1).argmax(1)] / 255
    _, a, b = oklab(middle).T
    off = np.degrees(np.arctan2(b, a)) - factors["hue"]
    assert np.abs((off + 180) % 360 - 180).max() < 6  # where a colour is outside sRGB, it is clipped


def test_no_shape_touches_the_border(drawn):
    _, images = drawn
    border = np.concatenate([images[:, :, [0, -1]], images[:, :, :, [0, -1]].swapaxes(2, 3)], 2)
    assert (border == images[:, :, :1, :1]).all()


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_angle_turns_anticlockwise(kind):
    factors = shapes.sample_factors(1).assign(kind=kind, x=0.0, y=0.0, size=0.45)
    upright, turned = (torch.tensor(cover(shapes.draw(factors.assign(angle=a))))[:, None] for a in (0.0, 25.0))
    c, s = np.cos(np.radians(25)), np.sin(np.radians(25))
    there = torch.tensor([[[c, -s, 0], [s, c, 0]]])  # y points down in the grid
    by_hand = grid_sample(upright, affine_grid(there, [1, 1, 64, 64], align_corners=False), align_corners=False)
    assert (by_hand - turned).abs().mean() < 0.1 * (upright - turned).abs().mean()


def test_kinds_are_of_their_names(drawn):
    factors, _ = drawn
    filled = {}
    for kind in shapes.KINDS:
        upright = factors[:1].assign(kind=kind, x=0.0, y=0.0, angle=0.0, size=0.45)
        ink = cover(shapes.draw(upright))[0] > 0.5
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        filled[kind] = box.mean()
        assert np.abs(box[:, ::-1] * 1.0 - box).mean() < 0.02  # each is its own mirror image
    assert filled["square"] > 0.95 and filled["ellipse"] == pytest.approx(np.pi / 4, abs=0.03)
    assert filled["star"] < filled["triangle"] < filled["ellipse"]
    assert set(factors["kind"]) == set(shapes.KINDS)


def test_factors_are_independent_and_uniform():
    factors = shapes.sample_factors(4000)
    for name, (low, high) in shapes.RANGES.items():
        found = (factors[name] - low) / (high - low)
        assert found.min() >= 0 and found.max() < 1
        deciles = np.histogram(found, 10, (0, 1))[0]
        assert ((deciles - 400) ** 2 / 400).sum() < 30
    numbers = factors.assign(kind=factors["kind"].map(list(shapes.KINDS).index)).to_numpy(float)
    between = np.corrcoef(numbers.T) - np.eye(6)
    assert np.abs(between).max() < 4.5 / np.sqrt(4000)


def test_images_are_the_same_on_every_machine(drawn):
    factors, images = drawn
    assert factors["x"].tolist()[:2] == [0.0879156689906409, -0.2106372331190005]
    # Processors round cosines differently. One float32 rounding of them moves a byte in a thousand edge pixels by one.
    sums = images[:5].reshape(5, -1).sum(1, dtype=int)
    np.testing.assert_allclose(sums, [2876172, 2721730, 2896399, 2759423, 2686607], rtol=0, atol=10)


def test_a_longer_set_begins_with_a_shorter_one(drawn):
    factors, images = drawn
    assert factors.equals(shapes.sample_factors(500)[:400])
    np.testing.assert_array_equal(shapes.draw(factors[7:9]), images[7:9])


def test_load_has_the_factors_of_each_image():
    found = pv.data.load("shapes", validation=500)
    assert [len(split) for split in (found.train, found.validation, found.test)] == [10500, 500, 1000]
    assert found.event_shape == (3, 64, 64)
    for split in (found.train, found.validation, found.test):
        assert split.images.dtype == torch.float32 and len(split.factors) == len(split)
        some = [0, 7, len(split) - 1]
        np.testing.assert_array_equal((split[some] * 255).numpy(), shapes.draw(split.factors.iloc[some]))
        assert [list(shapes.KINDS)[label] for label in split.labels] == split.factors["kind"].tolist()
    tables = [split.factors for split in (found.train, found.validation, found.test)]
    assert len({row for table in tables for row in table["x"]}) == 12_000
    first = shapes.sample_factors(1000)
    assert set(found.test.factors["x"]) == set(first["x"])  # for every seed
    assert not found.test.factors["x"].equals(first["x"])  # but shuffled


@pytest.mark.parametrize("binarize", ["threshold", "fixed", "dynamic"])
def test_binary_shapes_are_refused(binarize):
    with pytest.raises(pv.PyroVAEError, match=f"expected binarize='none' for shapes.*got '{binarize}'.*gaussian"):
        pv.data.load("shapes", binarize=binarize)
