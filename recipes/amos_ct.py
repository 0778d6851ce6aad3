"""Abdominal CT (Section 5.2.2), AMOS 2022: `dataset.json` lists the pairs; numbers up to 500 are CT.

The first 10 cases of the public validation set are for validation, the others for testing.
"""

import json
import re
from pathlib import Path

import numpy as np

from data import normalise
from support.disk.files import InputError, one_line
from support.raw.images import Volume, crop, resample
from support.raw.recipe import Case, Download, Plan, Recipe, locate

NAMES = (
    "background, spleen, right kidney, left kidney, gall bladder, oesophagus, liver, stomach, aorta, "
    "postcava, pancreas, right adrenal gland, left adrenal gland, duodenum, bladder, prostate/uterus"
)


def plan(raw: Path) -> Plan:
    root, cases = locate(raw, "dataset.json"), []
    try:
        lists = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        for which in ("training", "validation"):
            pairs = [(root / pair["image"], root / pair["label"]) for pair in lists[which]]
            pairs = [pair for pair in pairs if int(re.search(r"(\d+)\.nii", pair[0].name)[1]) <= 500]
            for i, (image, label) in enumerate(pairs):
                split = "train" if which == "training" else "validation" if i < 10 else "test"
                cases.append(Case(split, image.name.split(".")[0], (image,), (label,)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"not AMOS's list of pairs ({one_line(error)})"
        raise InputError(f"{root / 'dataset.json'}: {why}; download it again") from error
    return Plan(
        cases, range(16), NAMES.split(", "), "AMOS 2022 (Ji et al.), Zenodo 7262581, CC BY 4.0",
        "RAS; 1.5 x 1.5 x 5 mm; HU clipped to [-991, 362]; zero mean, unit variance; centre 192 x 128 x 128",
        "mm", counts=(200, 10, 90),
    )  # fmt: skip


def prepare(volume: Volume, path: Path) -> Volume:
    volume = resample(volume, (1.5, 1.5, 5.0), path)
    volume = volume._replace(image=normalise(np.clip(volume.image, -991, 362)))
    return crop(volume, (192, 128, 128))


RECIPE = Recipe(plan, prepare, Download(
    {"amos22.zip": ("https://zenodo.org/record/7262581/files/amos22.zip", "")},
    "CC BY 4.0, https://zenodo.org/record/7262581",
    "Y. Ji et al., AMOS: A large-scale abdominal multi-organ benchmark for versatile medical image "
    "segmentation, NeurIPS 2022",
))  # fmt: skip
