"""Draws the data set "shapes": colour images of known factors, by signed distance functions.

Integers of a fixed random bit stream give the factors, float32 arithmetic without transcendental functions gives the
pixels, and these are rounded to bytes. So all machines draw the same images, but for
a byte where cosines round differently.
"""

import numpy as np
import pandas as pd

SIDE = 64  # pixels
# The least and the largest value of each factor. Places and sizes are parts of half a side. All shapes fit in.
# Within 60 degrees no kind repeats: the star does so after 72, the square after 90. Hues are an interval, no circle.
RANGES = {"x": (-0.25, 0.25), "y": (-0.25, 0.25), "size": (0.35, 0.5), "angle": (-30, 30), "hue": (0, 270)}
STREAM = 2024  # the seed of the bit stream
AT_ONCE = 250  # images, which keeps the arrays within the processor's cache


def sample_factors(n: int) -> pd.DataFrame:
    """The factors of the first n images, a row each, independent and uniform."""
    # NumPy promises that a bit generator's raw integers stay the same between versions; its distributions may change.
    integers = np.random.PCG64(STREAM).random_raw((n, len(RANGES) + 1))
    uniform = (integers >> np.uint64(11)) * 2.0**-53
    found = pd.DataFrame({k: a + (b - a) * u for (k, (a, b)), u in zip(RANGES.items(), uniform.T, strict=False)})
    found["kind"] = np.array(list(KINDS))[(uniform[:, -1] * len(KINDS)).astype(int)]
    return found


def draw(factors: pd.DataFrame) -> np.ndarray:
    """Draw images of the factors, as bytes (N, 3, 64, 64)."""
    images = np.empty((len(factors), 3, SIDE, SIDE), np.uint8)
    x, y, size, angle, hue = factors[list(RANGES)].to_numpy().T
    angle, hue = np.deg2rad(angle), np.deg2rad(hue)
    columns = np.stack([x, y, size, np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    ink, paper = (_colour(*tone, hue).astype(np.float32) for tone in ((0.70, 0.135), (0.955, 0.025)))
    for kind, distance in KINDS.items():
        of_kind = np.flatnonzero(factors["kind"] == kind)
        for first in range(0, len(of_kind), AT_ONCE):
            rows = of_kind[first : first + AT_ONCE]
            cover = _cover(distance, columns[rows])[:, None]
            low, high = (colour[rows][:, :, None, None] for colour in (paper, ink))
            images[rows] = np.rint(255 * (low + (high - low) * cover))
    return images


def _cover(distance, columns: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The part of each pixel that the shape covers, from the distance of its centre to the edge."""
    x, y, size, cos, sin = columns.T[:, :, None, None]
    centres = ((np.arange(SIDE) + 0.5) / (SIDE / 2) - 1).astype(np.float32)
    right, up = centres[None, None, :] - x, -centres[None, :, None] - y
    pixels = distance((cos * right + sin * up) / size, (cos * up - sin * right) / size) * size * (SIDE / 2)
    return np.clip(0.5 - pixels, 0, 1)


def _colour(lightness: float, chroma: float, hue: np.ndarray) -> np.ndarray:
    """The sRGB of colours of OKLCH, which looks equally light at all hues: (N, 3) in [0, 1]."""
    lab = np.stack([np.full_like(hue, lightness), chroma * np.cos(hue), chroma * np.sin(hue)], 1)
    lms = (lab @ _LAB_TO_LMS.T) ** 3
    linear = np.clip(lms @ _LMS_TO_RGB.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


_LAB_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


# The signed distance from points to the edge of each kind, negative inside. Each has the area of the unit circle, its
# centroid at zero, and rounded corners.


def _ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide, high = np.float32(1.3), np.float32(1 / 1.3)
    scaled = _length(x / wide, y / high)
    slope = _length(x / wide**2, y / high**2)
    return scaled * (scaled - 1) / np.maximum(slope, np.float32(1e-6))  # exact to first order at the edge


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x) - np.float32(0.71014), np.abs(y) - np.float32(0.71014)
    outside, inside = _length(np.maximum(x, 0), np.maximum(y, 0)), np.minimum(np.maximum(x, y), 0)
    return outside + inside - np.float32(0.18)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    half, root = np.float32(1.01787), np.float32(3**0.5)
    x, y = np.abs(x) - half, y + half / root
    beyond = x + root * y > 0
    x, y = np.where(beyond, x - root * y, 2 * x) / 2, np.where(beyond, -root * x - y, 2 * y) / 2
    x = x - np.clip(x, -2 * half, 0)
    return -_length(x, y) * np.sign(y) - np.float32(0.2)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius, waist = np.float32(1.20625), np.float32(0.5)
    cos, sin = np.float32(0.809016994), np.float32(0.587785252)  # of 36 degrees
    x = np.abs(x)
    for side in (1, -1):  # two reflections fold the five points into one
        over = 2 * np.maximum(side * cos * x - sin * y, 0)
        x, y = x - side * over * cos, y + over * sin
    x, y = np.abs(x), y - radius
    edge_x, edge_y = waist * sin, waist * cos - np.float32(1)
    along = np.clip((x * edge_x + y * edge_y) / (edge_x * edge_x + edge_y * edge_y), 0, radius)
    outside = np.sign(y * edge_x - x * edge_y)
    return _length(x - edge_x * along, y - edge_y * along) * outside - np.float32(0.12)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = np.float32(1.87605)
    x, y = np.abs(x) / scale, y / scale + np.float32(0.657)
    lobe = _length(x - np.float32(0.25), y - np.float32(0.75)) - np.float32(2**0.5 / 4)
    middle = np.maximum(x + y, 0) / 2
    tip = np.minimum(_length(x, y - 1), _length(x - middle, y - middle)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, tip) * scale


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)


KINDS = {"ellipse": _ellipse, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart}
