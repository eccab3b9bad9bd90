"""Scanned digits -> scenes: pure functions from a random generator to arrays; nothing here touches a disk.

A scene is painted from back to front: a textured background, a few scribbles that are no digits, then the digits one by
one, each in a colour that stands out from what lies around it and none hiding too much of those below; blur and noise
come last. The constants below are the difficulty. They were fixed before any model was trained on the scenes.

OpenCV draws nothing here: its arithmetic, unlike that of NumPy, SciPy and Pillow as used below, may vary with the
processor, and the same seed is to give the same scene everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.datasets import load_digits

__all__ = ['Scene', 'compose_scene', 'load_scans', 'split_scans']

TEST_SHARE = 0.2  # of the scans of each class

REFERENCE_SIZE = 320  # the nominal size, in pixels, that the number of digits is stated at
DIGITS = (3, 7)  # digits a scene at the reference size, growing in proportion to the nominal size
SMALLEST = 24  # pixels of height, whatever the size of the scene
LARGEST = 0.375  # of the nominal size
WIDEST = 0.6  # a digit's height is at most this share of the scene's shorter side
TURN = 25  # degrees, either way: a 6 stays a 6
SHEAR = 0.15
STRETCH = (0.8, 1.15)  # width, as a factor
LEVEL = (0.38, 0.5)  # of ink, where the stroke ends
THINNING = (0.0, 0.5)  # how much of the ground shows through the thinnest ink

VISIBLE = 0.8  # the least share of each digit that no other digit and no border hides
OVERHANG = 0.1  # the largest share of a digit's height or width beyond the border
CONTRAST = 60  # least difference in luma (0..255) between a digit and nine tenths of the pixels around it
TEXTURE_SPAN = 60  # largest difference of each colour channel between the two colours of a background
SCRIBBLES = (0, 3)
ATTEMPTS = 50  # poses tried for a digit before it is left out

BLUR = (0.0, 1.0)  # standard deviation in pixels
NOISE = (0.0, 10.0)  # standard deviation in levels of 0..255


@dataclass(frozen=True)
class Scene:
    """A picture and what is to be seen on it.

    Args:
        image: RGB, uint8, `(H, W, 3)`.
        owner: int32, `(H, W)`: n where the n-th digit is on top, counted from 1, and 0 on the background.
        digits: what the n-th digit says, 0..9.
        scans: the scan that the n-th digit was made from, as a row of scikit-learn's `load_digits`.
    """

    image: np.ndarray
    owner: np.ndarray
    digits: tuple[int, ...]
    scans: tuple[int, ...]


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits of scikit-learn: ink in 0..1, float64, `(N, 8, 8)`, and what each says, `(N,)`."""
    bunch = load_digits()
    return bunch.images / 16, bunch.target


def split_scans(targets: np.ndarray, seed: int) -> dict[str, list[np.ndarray]]:
    """Deal the scans of each class out to 'train' and 'test', so that no scan is in both.

    Args:
        targets: the digit of each scan, `(N,)`.
        seed: another seed, another deal.

    Returns:
        For each split, a list of ten arrays: the scan numbers of each class.
    """
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(targets == digit)) for digit in range(10)]
    cuts = [round(TEST_SHARE * len(scans)) for scans in shuffled]
    return {
        'train': [scans[cut:] for scans, cut in zip(shuffled, cuts, strict=True)],
        'test': [scans[:cut] for scans, cut in zip(shuffled, cuts, strict=True)],
    }


def compose_scene(rng: np.random.Generator, images: np.ndarray, pool: Sequence[np.ndarray], size: int) -> Scene:
    """One scene, of digits drawn from `pool`.

    Args:
        rng: the only source of chance.
        images: all scans, `(N, 8, 8)`, ink in 0..1.
        pool: for each class the scan numbers to draw from.
        size: nominal size in pixels: the longer side is 0.8 to 1.0 of it. Digits are 24 pixels to 0.375 * `size` high
            and their number grows with `size`, so a large scene holds both digits that a reduced copy of it would
            lose and digits that fill a large part of it.
    """
    height, width = draw_shape(rng, size)
    canvas = Canvas(draw_background(rng, height, width), np.zeros((height, width), np.int32))
    largest = max(SMALLEST, min(LARGEST * size, WIDEST * min(height, width)))
    fewest, most = (max(1, round(count * size / REFERENCE_SIZE)) for count in DIGITS)
    digits, scans = [], []
    for _ in range(rng.integers(fewest, most, endpoint=True)):
        digit = int(rng.integers(10))
        scan = int(rng.choice(pool[digit]))
        if place_digit(rng, canvas, images[scan], largest):
            digits.append(digit)
            scans.append(scan)
    return Scene(degrade(rng, canvas.image), canvas.owner, tuple(digits), tuple(scans))


def draw_shape(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Height and width: mostly 3:4 to 4:3, one in six wider or taller, up to 2:1."""
    longer = size * rng.uniform(0.8, 1.0)
    aspect = rng.uniform(4 / 3, 2) if rng.random() < 1 / 6 else rng.uniform(1, 4 / 3)
    sides = round(longer), round(longer / aspect)
    return sides if rng.random() < 0.5 else sides[::-1]


# ----------------------------------------------------------------------------------------------------- background


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A texture between two colours of moderate distance, crossed by scribbles: float32 RGB in 0..255, `(H, W, 3)`."""
    texture = (gradient, clouds, stripes, checks, blobs)[rng.integers(5)]
    weight = texture(rng, height, width)[..., None]  # (H, W, 1)
    colour = draw_colour(rng)
    other = np.clip(colour + rng.uniform(-TEXTURE_SPAN, TEXTURE_SPAN, 3), 0, 255)
    image = (colour + weight * (other - colour)).astype(np.float32)  # (H, W, 3)
    for _ in range(rng.integers(*SCRIBBLES, endpoint=True)):
        other = np.clip(colour + rng.uniform(-TEXTURE_SPAN, TEXTURE_SPAN, 3), 0, 255)
        blend(image, scribble(rng, height, width), other)
    return image


def gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A ramp from 0 to 1, straight or round."""
    y, x = np.ogrid[:height, :width]
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * math.pi)
        return spread(math.cos(angle) * x + math.sin(angle) * y)
    return spread(np.sqrt((x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2))


def clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of three octaves, 0 to 1."""
    cells = log_uniform(rng, 2, 12)
    total = np.zeros((height, width), np.float32)
    for octave in range(3):
        rows, columns = (2 + round(cells * 2**octave * side / max(height, width)) for side in (height, width))
        grid = Image.fromarray(rng.random((rows, columns), np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return spread(total)


def stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Parallel bands, soft or sharp, 0 to 1."""
    across, _ = waves(rng, height, width)
    return np.clip(rng.uniform(1, 8) * across + 0.5, 0, 1)


def checks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A turned chequerboard, soft or sharp, 0 to 1."""
    across, along = waves(rng, height, width)
    return np.clip(rng.uniform(4, 32) * across * along + 0.5, 0, 1)


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Islands with clear shores, 0 to 1."""
    return np.clip(rng.uniform(8, 24) * (clouds(rng, height, width) - 0.5) + 0.5, 0, 1)


def waves(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two triangular waves at right angles to each other, of one random period and direction: -0.5 to 0.5, `(H, W)`."""
    y, x = np.ogrid[:height, :width]
    angle, period = rng.uniform(0, math.pi), log_uniform(rng, 12, 0.4 * max(height, width))
    dy, dx = math.sin(angle) / period, math.cos(angle) / period
    turns = dx * x + dy * y + rng.random(), dy * x - dx * y + rng.random()
    return tuple(np.abs(2 * (turn - np.floor(turn)) - 1) - 0.5 for turn in turns)


def scribble(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The opacity, 0 to 1, of a curved stroke that crosses a part of the scene: `(H, W)`."""
    fine = 3  # drawn so many times larger and reduced, for smooth edges
    points = rng.uniform(-0.1, 1.1, (4, 2)) * (width, height)
    t = np.linspace(0, 1, 64)[:, None]
    curve = (1 - t) ** 3 * points[0] + 3 * t * (1 - t) ** 2 * points[1]
    curve += 3 * t**2 * (1 - t) * points[2] + t**3 * points[3]  # a cubic Bezier curve, (64, 2)
    picture = Image.new('L', (fine * width, fine * height))
    stroke = round(fine * log_uniform(rng, 1.5, 0.03 * max(height, width)))
    ImageDraw.Draw(picture).line([(x, y) for x, y in (fine * curve).tolist()], 255, stroke, joint='curve')
    return np.asarray(picture.reduce(fine)) / np.float32(255)


# --------------------------------------------------------------------------------------------------------- digits


@dataclass
class Canvas:
    """A scene in the making.

    Args:
        image: RGB, float32 in 0..255, `(H, W, 3)`.
        owner: int32, `(H, W)`: the number of the digit on top, 0 on the background.
        areas: of each digit, all the pixels it was drawn with.
        visible: of each digit, the pixels still to be seen.
    """

    image: np.ndarray
    owner: np.ndarray
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    visible: np.ndarray = field(default_factory=lambda: np.zeros(0, int))


def place_digit(rng: np.random.Generator, canvas: Canvas, scan: np.ndarray, largest: float) -> bool:
    """Put a digit on top of the canvas, in place, where it can be read and leaves readable what it covers.

    Args:
        scan: ink in 0..1, `(8, 8)`.
        largest: greatest height in pixels.

    Returns:
        Whether one of the poses tried was good; the canvas is as it was if none.
    """
    for _ in range(ATTEMPTS):
        opacity, mask = render_digit(rng, scan, log_uniform(rng, SMALLEST, largest))
        window, part = drop(rng, mask.shape, canvas.owner.shape)
        area, opacity, mask = mask.sum(), opacity[part], mask[part]
        covered = np.bincount(canvas.owner[window][mask], minlength=len(canvas.areas) + 1)[1:]
        areas = np.append(canvas.areas, area)
        visible = np.append(canvas.visible - covered, mask.sum())
        if (visible < VISIBLE * areas).any():
            continue
        colour = contrasting_colour(rng, canvas.image[window], mask)
        if colour is None:
            continue
        blend(canvas.image[window], opacity, colour)
        canvas.owner[window][mask] = len(areas)
        canvas.areas, canvas.visible = areas, visible
        return True
    return False


def render_digit(rng: np.random.Generator, scan: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """A scan drawn `size` pixels high, turned, sheared and stretched: opacity, 0 to 1, and mask, bool, both `(h, w)`.

    The 8x8 ink is read as samples of a smooth surface (cubic splines) and cut at a random level, which sets the weight
    of the stroke; so edges are as sharp at 100 pixels as at 20. Thin ink lets the ground through, to a random degree.
    The arrays end a few pixels outside the stroke, so that they show what lies around it.
    """
    step = size / len(scan)  # pixels a scan cell
    angle, shear = math.radians(rng.uniform(-TURN, TURN)), rng.uniform(-SHEAR, SHEAR)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = turn @ np.array([[step, 0], [shear * step, rng.uniform(*STRETCH) * step]])  # (row, column), scan -> picture
    ink = np.pad(scan, 1)
    shape = np.ceil(np.abs(pose).sum(1) * len(ink)).astype(int)
    inverse = np.linalg.inv(pose)
    offset = (len(ink) - 1) / 2 - (inverse * (shape - 1) / 2).sum(1)  # centre on centre
    surface = ndimage.affine_transform(ink, inverse, offset, tuple(shape), order=3)
    level = rng.uniform(*LEVEL)
    edge = np.clip(0.8 * step * (surface - level) + 0.5, 0, 1)  # about 1.5 pixels wide
    thin = np.clip((0.85 - surface) / (0.85 - level), 0, 1)
    margin = reach(size) + 1
    rows, columns = (np.flatnonzero(edge.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    opacity = np.pad((edge * (1 - rng.uniform(*THINNING) * thin))[box], margin)
    return opacity, np.pad(edge[box] >= 0.5, margin)


def drop(
    rng: np.random.Generator, shape: tuple[int, int], scene: tuple[int, int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """A random place for an array of that shape, up to `OVERHANG` beyond the scene's border.

    Returns:
        The window of the scene that it falls on, and the part of the array that falls inside.
    """
    window, part = [], []
    for length, side in zip(shape, scene, strict=True):
        beyond = OVERHANG * length
        start = round(rng.uniform(-beyond, max(side - length + beyond, 0)))
        window.append(slice(max(start, 0), min(start + length, side)))
        part.append(slice(window[-1].start - start, window[-1].stop - start))
    return tuple(window), tuple(part)


def contrasting_colour(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """A random RGB colour for `mask` that stands out from the pixels around it, or None if a few draws find none."""
    ring = ndimage.maximum_filter(mask, 2 * reach(max(mask.shape)) + 1) & ~mask
    around = luma(image[ring])
    for _ in range(16):
        colour = draw_colour(rng)
        if np.quantile(np.abs(around - luma(colour)), 0.1) >= CONTRAST:
            return colour
    return None


def reach(size: float) -> int:
    """How many pixels around a digit of that size decide whether its colour stands out."""
    return 2 + round(size) // 24


# ------------------------------------------------------------------------------------------------------ the camera


def degrade(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Lens blur and sensor noise: float32 in 0..255 -> uint8, `(H, W, 3)`."""
    blur = rng.uniform(*BLUR)
    noise = rng.uniform(*NOISE) * rng.standard_normal(image.shape, np.float32)
    image = ndimage.gaussian_filter(image, (blur, blur, 0)) + noise
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------- small parts


def draw_colour(rng: np.random.Generator) -> np.ndarray:
    """A grey of any lightness, pushed towards a random hue: RGB in 0..255, `(3,)`."""
    return np.clip(rng.uniform(0, 255) + rng.uniform(-90, 90, 3), 0, 255)


def luma(colour: np.ndarray) -> np.ndarray:
    """How light RGB appears (ITU-R BT.601): `(..., 3)` -> `(...)`."""
    return 0.299 * colour[..., 0] + 0.587 * colour[..., 1] + 0.114 * colour[..., 2]


def blend(image: np.ndarray, opacity: np.ndarray, colour: np.ndarray) -> None:
    """Paint `colour` over `image` in place, as far as `opacity` (0..1, `(H, W)`) says."""
    image += opacity[..., None] * (colour - image)


def spread(values: np.ndarray) -> np.ndarray:
    """Shift and scale to 0..1."""
    return (values - values.min()) / (values.max() - values.min())


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
