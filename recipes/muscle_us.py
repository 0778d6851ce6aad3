"""Muscle ultrasound (Section 5.2.1): PNG, 480 x 512, masks of 0 and 255, one folder per split.

Of 3917 images 3910 have a mask; the others are left out. Source: Marzola et al. (2021).
"""

from pathlib import Path

import numpy as np
import scipy
from jaxtyping import Bool, Integer

from data import SPLITS, normalise
from support.raw.images import Volume, files_in
from support.raw.recipe import Case, Download, Plan, Recipe, locate


def plan(raw: Path) -> Plan:
    root, cases = locate(raw, "trainannot"), []
    for split, folder in zip(SPLITS, ("train", "val", "test"), strict=True):
        labels = files_in(root / f"{folder}annot", ".png")
        cases += [Case(split, p.stem, (root / folder / p.name,), (p,)) for p in labels]
    return Plan(
        cases, (0, 255), ("background", "muscle cross-section"),
        "Marzola et al. 2021, Mendeley Data 3jykz7wz8d", "zero mean, unit variance", "pixel",
        counts=(2531, 666, 713),
    )  # fmt: skip


def prepare(volume: Volume, _: Path) -> Volume:
    return volume._replace(image=normalise(volume.image))


# --- Post-processing ----------------------------------------------------------------------------

Mask = Bool[np.ndarray, "height width"]
Steps = Integer[np.ndarray, "K height width"]


def disk(radius: int) -> Mask:
    """MATLAB's strel("disk", radius): an octagon, 2 radius - 1 pixels wide, whose sides are as equal as whole
    pixels allow (Adams 1993)."""
    side = 2 * radius / (1 / np.tan(np.pi / 8) + 1 / np.sin(np.pi / 8))
    y, x = np.abs(np.indices((2 * radius - 1, 2 * radius - 1)) - (radius - 1))
    return x + y <= 2 * (radius - 1 - int(side / np.sqrt(2)))


def clean(mask: Mask) -> Mask:
    """A mask as Marzola et al. (2021) clean it: holes are filled; it is eroded, dilated and opened with
    disks of 3, 5 and 10 pixels; of several pieces, the largest stays, or, if the second largest
    exceeds 75 % of it, the one of the two with the higher top edge; holes are filled again."""
    mask = scipy.ndimage.binary_fill_holes(mask)
    # As in MATLAB, nothing is eroded at the image's edge.
    mask = scipy.ndimage.binary_erosion(mask, disk(3), border_value=1)
    mask = scipy.ndimage.binary_dilation(mask, disk(5))
    mask = scipy.ndimage.binary_erosion(mask, disk(10), border_value=1)
    mask = scipy.ndimage.binary_dilation(mask, disk(10))
    pieces, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(pieces.ravel())[1:]
        first, second = np.argsort(-sizes, kind="stable")[:2] + 1
        if sizes[second - 1] > 0.75 * sizes[first - 1]:
            # Row-major order: a piece's first pixel lies in its top row.
            first = min(first, second, key=lambda piece: np.argmax(pieces == piece))
        mask = pieces == first
    return scipy.ndimage.binary_fill_holes(mask)


def post_process(predictions: Steps) -> Steps:
    """The predicted classes at every sampling step, cleaned."""
    return np.stack([clean(classes == 1) for classes in predictions]).astype(int)


FILES = "https://data.mendeley.com/public-files/datasets/3jykz7wz8d/files"
RECIPE = Recipe(plan, prepare, Download(
    {"muscle_us.zip": (f"{FILES}/b1601a22-98a5-41ce-9fbb-54dd21834b55/file_downloaded", "")},
    "open; its terms are on https://data.mendeley.com/datasets/3jykz7wz8d",
    "F. Marzola et al., Deep learning segmentation of transverse musculoskeletal ultrasound images for "
    "neuromuscular disease assessment, Computers in Biology and Medicine 135, 2021",
), post_process=post_process)  # fmt: skip
