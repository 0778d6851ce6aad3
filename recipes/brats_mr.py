"""Brain MR (Section 5.2.4), BraTS 2021: a folder per case, four channels.

In the order of their names 938 cases train, 31 validate, and the rest test. The whole tumour is any label
above 0.
"""

from pathlib import Path

import numpy as np

from data import normalise
from support.download import Download
from support.files import InputError
from support.images import Volume, crop, read_pair, times
from support.recipe import Case, Plan, Recipe

CHANNELS = ("t1", "t1ce", "t2", "flair")


def plan(raw: Path) -> Plan:
    folders = sorted({path.parent for path in raw.rglob("[!.]*_seg.nii.gz")}, key=lambda path: path.name)
    if not folders:
        raise InputError(f"{raw}: no */*_seg.nii.gz; give the unpacked BraTS2021_Training_Data as --raw")
    cases = []
    for i, folder in enumerate(folders):
        split = "train" if i < 938 else "validation" if i < 938 + 31 else "test"
        cases.append(Case(split, folder.name, images_of(folder), folder / f"{folder.name}_seg.nii.gz"))
    return Plan(
        cases, read, ("background", "whole tumour"), "BraTS 2021 task 1 (Baid et al.), Kaggle",
        "RAS; zero mean, unit variance per channel (t1, t1ce, t2, flair); centre 179 x 219 x 155", "mm",
        counts=(938, 31, 282),
    )  # fmt: skip


def images_of(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / f"{folder.name}_{kind}.nii.gz" for kind in CHANNELS)


def find_images(folder: Path) -> list[tuple[Path, ...]]:
    """The cases of a folder of cases without a label."""
    return [images_of(case) for case in sorted({path.parent for path in folder.rglob("[!.]*_flair.nii.gz")})]


def read(case: Case) -> Volume:
    volume = prepare(read_pair(case.images, case.label, known=(0, 1, 2, 4)), case.label)
    return volume._replace(label=(volume.label > 0).astype(np.uint8))


def prepare(volume: Volume, path: Path) -> Volume:
    if volume.label.shape != (240, 240, 155):
        raise InputError(f"{path}: {times(volume.label.shape)} voxels, 240 x 240 x 155 expected")
    volume = volume._replace(image=normalise(volume.image))
    # In the files' own order (left, posterior, superior) [37:216, 10:229, 0:155]; here right and anterior.
    return crop(volume, (179, 219, 155), (240 - 216, 240 - 229, 0))


DOWNLOAD = Download(
    {},
    by_hand="needs a Kaggle account; log in, get the archive from "
    "https://www.kaggle.com/datasets/dschettler8845/brats-2021-task1, unpack BraTS2021_Training_Data",
)
RECIPE = Recipe(plan, prepare, DOWNLOAD, find_images)
