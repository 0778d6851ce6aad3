"""Made-up images with a truth that is known, for trying everything without a download."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from numpy.random import Generator

Shape = Sequence[int]
Pair = tuple[np.ndarray, np.ndarray]


def wobble(rng: Generator, angle: np.ndarray, orders: Sequence[int], amplitude: float) -> np.ndarray:
    """A random closed curve's relative radius minus 1 at each angle."""
    waves = (rng.normal() * np.cos(m * angle + rng.uniform(0, 2 * np.pi)) for m in orders)
    return amplitude * sum(waves)


def phantom_us(rng: Generator, shape: Shape) -> Pair:
    """A made-up ultrasound image [0, inf) and its label: a dark wobbly ellipse under a bright line.

    The place is clear (the line is above the target, and above none of the look-alikes), but the boundary is
    not: the label's outline has waves that the image does not show, under speckle and an acoustic shadow. So
    even a perfect network stays well under Dice 1.
    """
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")

    def ellipse(cy: float, cx: float, ry: float, rx: float, orders: Sequence[int], extra: float) -> Pair:
        """Relative radius minus 1, negative inside: as the image shows it and as the label has it."""
        dy, dx = (y - cy) / ry, (x - cx) / rx
        angle = np.arctan2(dy, dx)
        seen = np.hypot(dy, dx) - 1 - wobble(rng, angle, (2, 3), 0.1)
        return seen, seen - wobble(rng, angle, orders, extra)

    cx, rx = rng.uniform(0.3, 0.7), rng.uniform(0.13, 0.22)
    ry = rx * rng.uniform(0.6, 0.9)
    line_y, slope = rng.uniform(0.2, 0.5), rng.uniform(-0.25, 0.25)
    cy = line_y + 1.25 * ry + rng.uniform(0.02, 0.06)
    seen, labelled = ellipse(cy, cx, ry, rx, (3, 4, 5), 0.08)
    blur = rng.uniform(0.1, 0.35)
    texture = scipy.ndimage.gaussian_filter(rng.normal(size=y.shape), np.array(shape) / 16)
    image = 0.55 + 0.1 * texture / texture.std() - 0.35 * scipy.special.expit(-2 * seen / blur)
    for _ in range(rng.integers(2, 5)):
        far_y, far_x, size = rng.uniform(0.05, 0.95), rng.uniform(0, 1), rng.uniform(0.08, 0.2)
        if np.hypot(far_y - cy, far_x - cx) > rx + size + 0.05:
            look_alike, _ = ellipse(far_y, far_x, size * 0.75, size, (2,), 0.0)
            image -= 0.35 * scipy.special.expit(-2 * look_alike / blur)
    distance = (y - line_y - slope * (x - cx)) / max(0.02, 0.6 / shape[0])
    image += np.exp(-0.5 * distance**2) * (np.abs(x - cx) < 1.3 * rx)
    shadow = np.exp(-0.5 * ((x - rng.uniform(0, 1)) / rng.uniform(0.02, 0.05)) ** 2)
    image = np.clip(image, 0.05, None) * (1 - rng.uniform(0.4, 0.8) * shadow) * np.exp(-0.7 * y)
    speckle = rng.gamma(4.0, 1 / 4.0, size=y.shape)
    return np.sqrt(image * speckle)[..., None], (labelled < 0).astype(np.uint8)


def phantom_ct(rng: Generator, shape: Shape) -> Pair:
    """A made-up CT volume in Hounsfield units and its label: a large organ, two that mirror each other
    (told apart by their side alone), and a vessel, in a body of about their density; in a window
    of soft tissue."""
    grid = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")
    jitter = rng.normal(scale=0.025, size=3)
    texture = scipy.ndimage.gaussian_filter(rng.normal(size=shape), np.array(shape) / 12)
    texture /= texture.std()

    def organ(centre: Sequence[float], radii: Sequence[float], hidden: float) -> Pair:
        size = rng.uniform(0.85, 1.2)
        x, y, z = ((g - c - j) / (r * size) for g, c, j, r in zip(grid, centre, jitter, radii, strict=True))
        seen = np.sqrt(x**2 + y**2 + z**2) - 1 - wobble(rng, np.arctan2(x, y), (2, 3), 0.06)
        bumps = scipy.ndimage.gaussian_filter(rng.normal(size=shape), np.array(shape) / 20)
        return seen, seen - hidden * bumps / bumps.std()

    body, _ = organ((0.5, 0.5, 0.5), (0.46, 0.46, 0.8), 0.0)
    image = np.where(body < 0, 20.0, -900.0) + 15 * texture * (body < 0)
    label = np.zeros(shape, np.uint8)
    organs = (
        ((0.33, 0.4, 0.5), (0.17, 0.2, 0.3), 45.0),
        ((0.3, 0.72, 0.5), (0.09, 0.07, 0.22), 70.0),
        ((0.7, 0.72, 0.5), (0.09, 0.07, 0.22), 70.0),
        ((0.52, 0.6, 0.5), (0.05, 0.05, 0.6), 110.0),
    )
    for value, (centre, radii, density) in enumerate(organs, start=1):
        seen, labelled = organ(centre, radii, 0.08)
        image += density * scipy.special.expit(-12 * seen)
        label[labelled < 0] = value
    image += rng.normal(scale=30, size=shape)
    return np.clip(image, -160, 240)[..., None], label


class Phantom(NamedTuple):
    """How a made-up data set is made. `counts` is cases per split."""

    make: Callable[[Generator, Shape], Pair]
    class_names: tuple[str, ...]
    spacing: tuple[float, ...]
    unit: str
    counts: tuple[int, int, int]


ORGANS = ("background", "large organ", "left organ", "right organ", "vessel")
PHANTOMS = {
    "phantom_us": Phantom(phantom_us, ("background", "target"), (1, 1), "pixel", (240, 30, 60)),
    "phantom_ct": Phantom(phantom_ct, ORGANS, (2.0, 2.0, 4.0), "mm", (60, 10, 20)),
}
