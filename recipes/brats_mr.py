"""Brain MR (Section 5.2.4), BraTS 2021: a folder per case, four channels.

In the order of names, 938 cases are for training, 31 for validation, and the rest for testing. Every
label above 0 is whole tumour.
"""

from pathlib import Path

import numpy as np

from data import normalise
from support.disk.files import InputError
from support.raw.images import Volume, crop, times
from support.raw.recipe import Case, Plan, Recipe

CHANNELS = ("t1", "t1ce", "t2", "flair")


def plan(raw: Path) -> Plan:
    cases = []
    for i, label in enumerate(sorted(raw.rglob("[!.]*_seg.nii.gz"), key=lambda path: path.name)):
        split = "train" if i < 938 else "validation" if i < 938 + 31 else "test"
        uid = label.name.removesuffix("_seg.nii.gz")
        images = tuple(label.with_name(f"{uid}_{channel}.nii.gz") for channel in CHANNELS)
        cases.append(Case(split, uid, images, (label,)))
    if not cases:
        raise InputError(f"{raw}: no */*_seg.nii.gz; give the unpacked BraTS2021_Training_Data as --raw")
    return Plan(
        cases, (0, 1, 2, 4), ("background", "whole tumour"),
        "BraTS 2021 task 1 (Baid et al.), Kaggle",
        "RAS; zero mean, unit variance per channel (t1, t1ce, t2, flair); a box of 179 x 219 x 155", "mm",
        counts=(938, 31, 282), channels=4, channel_names=CHANNELS,
    )  # fmt: skip


def prepare(volume: Volume, path: Path) -> Volume:
    if volume.label.shape != (240, 240, 155):
        raise InputError(f"{path}: {times(volume.label.shape)} voxels, 240 x 240 x 155 expected; remove it")
    tumour = (volume.label > 0).astype(np.uint8)
    volume = volume._replace(image=normalise(volume.image), label=tumour)
    # In the files' axes (left, posterior, superior) this is [37:216, 10:229, 0:155]; ours are RAS.
    return crop(volume, (179, 219, 155), (240 - 216, 240 - 229, 0))


RECIPE = Recipe(
    plan, prepare, "it needs a Kaggle account; log in, get the archive from "
    "https://www.kaggle.com/datasets/dschettler8845/brats-2021-task1, unpack BraTS2021_Training_Data",
)  # fmt: skip
