"""Hippocampus MR, Medical Segmentation Decathlon, Task 4 (not in the paper), in the original sizes.

Of every ten cases, by name, seven are for training, one for validation and two for testing.
"""

from pathlib import Path

import numpy as np

from data import SPLITS, normalise
from support.raw.images import Volume, files_in
from support.raw.recipe import Case, Download, Plan, Recipe, locate


def plan(raw: Path) -> Plan:
    root, cases = locate(raw, "labelsTr"), []
    for i, path in enumerate(files_in(root / "labelsTr", ".nii.gz")):
        split = SPLITS[np.searchsorted([7, 8], i % 10, side="right")]
        uid, image = path.name.removesuffix(".nii.gz"), root / "imagesTr" / path.name
        cases.append(Case(split, uid, (image,), (path,)))
    return Plan(
        cases, range(3), ("background", "anterior", "posterior"),
        "Medical Segmentation Decathlon, Task04_Hippocampus, CC-BY-SA 4.0",
        "RAS; clipped to percentiles 0.5 and 99.5; zero mean, unit variance", "mm",
    )  # fmt: skip


def prepare(volume: Volume, _: Path) -> Volume:
    # Scanners disagree (the highest intensity of a case is from 112 to 1.7e6), hence percentiles.
    image = np.clip(volume.image, *np.percentile(volume.image, [0.5, 99.5]))
    return volume._replace(image=normalise(image))


ADDRESS = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
RECIPE = Recipe(plan, prepare, Download(
    {"Task04_Hippocampus.tar": (ADDRESS, "9d24dba78a72977dbd1d2e110310f31b")},
    "CC BY-SA 4.0, http://medicaldecathlon.com",
    "M. Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 2022",
))  # fmt: skip
