"""What does a file in recipes/ say of its data set?

`RECIPE = Recipe(...)` at its end: how the cases are found and split, how one is read, what is done to its
image before the network sees it, where the download is. prepare.py builds the HDF5 file from that, and
evaluate.py prepares, finds and cleans images that have no label in the same way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.download import Download
from support.files import InputError
from support.images import ENDINGS, Volume, files_in


class Case(NamedTuple):
    """What a sample will be made of. `fault`: why none can be, where that is known already."""

    split: str
    uid: str
    images: tuple[Path, ...]
    label: Path
    fault: str = ""


class Plan(NamedTuple):
    """A data set before it is read: its cases, how to read one, and what the file will say."""

    cases: list[Case]
    read: Callable[[Case], Volume]
    class_names: Sequence[str]
    source: str
    preprocessing: str
    unit: str
    settings: dict = {}  # noqa: RUF012  (never changed)
    counts: tuple[int, ...] = ()  # cases per split of the whole data set, where known


def images_in(folder: Path) -> list[tuple[Path, ...]]:
    """The images of a folder, a file each."""
    return [(file,) for file in files_in(folder, *ENDINGS)]


class Recipe(NamedTuple):
    """A data set's ways. `plan` takes the raw folder and raises InputError where it is not this data set's.
    `prepare` takes a volume as it was read, and the path for what is said where that cannot be done; the
    same is done to images without a label. `post_process`, where there is one, takes the predicted classes
    at every sampling step."""

    plan: Callable[[Path], Plan]
    prepare: Callable[[Volume, Path], Volume]
    download: Download
    find_images: Callable[[Path], list[tuple[Path, ...]]] = images_in
    post_process: Callable[[np.ndarray], np.ndarray] | None = None


def locate(raw: Path, marker: str) -> Path:
    """The folder, `raw` or one below, that holds `marker`. Raises InputError."""
    if (raw / marker).exists():
        return raw
    found = [path.parent for path in raw.rglob(marker) if "__MACOSX" not in path.parts]
    if len(found) != 1:
        what = "not in it" if not found else f"in {len(found)} of its folders"
        raise InputError(f"{raw}: {marker} is {what}; give the folder of the unpacked download as --raw")
    return found[0]
