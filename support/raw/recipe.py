"""What does a file in recipes/ say about its data set?

It ends with `RECIPE = Recipe(...)`: how the cases are found and split, how an image is prepared for
the network, and where to download the data. prepare.py builds the HDF5 file from it, and evaluate.py
and predict.py prepare and clean images without a label in the same way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.disk.files import InputError
from support.raw.images import (
    IGNORED, Reading, Volume, check_grid, flat, read_channels, read_label, show_value,
)  # fmt: skip


class Case(NamedTuple):
    """The files of a future sample: an image, in as many files as it has channels, and its labels, which are
    united, unless `classes` says which class each of them shows. `fault` says why it cannot be made, if that
    is known already."""

    split: str
    uid: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    fault: str = ""
    channels: tuple[str, ...] = ()  # by which the names of the images' files differ
    classes: tuple[int, ...] = ()


class Plan(NamedTuple):
    """A data set before it is read: its cases, and what the HDF5 file will say."""

    cases: list[Case]
    numbers: Sequence[int]  # in the labels' files, rising; they become classes 0, 1, ...
    class_names: Sequence[str]
    source: str
    preprocessing: str
    unit: str
    counts: tuple[int, ...] = ()  # cases per split of the whole data set, if known
    channels: int = 1
    settings: dict = {}  # noqa: RUF012  (never changed)
    ignore: Sequence[int] = ()  # numbers in the labels' files whose voxels do not count
    channel_names: Sequence[str] = ()  # if channels have names
    spacing: Sequence[float] = ()  # of a folder, whose labels are also kept on the images' own grids
    reading: Reading = Reading()


def read_pair(case: Case, reading: Reading, channels: int = 0) -> tuple[Volume, set[tuple[int, int]]]:
    """A case's image, in as many channels (0: as it is), and its label; in 2D if they are a volume of one
    slice. The label has the numbers of its files, or the classes that each of them shows: there, a later file
    replaces an earlier one, and such pairs of classes are returned, too. Raises InputError if a file cannot
    be used, they are not on one grid, or two labels that are united have different numbers above 0 at one
    place."""
    volume, _ = read_channels(case.images, channels, reading.geometry)
    label, replaced = np.zeros(volume.label.shape, np.int32), set()
    for i, path in enumerate(case.labels):
        values, affine = read_label(path, reading)
        check_grid(case.images[0], path, (label.shape, values.shape), (volume.affine, affine))
        if case.classes:
            if len(numbers := np.unique(values[values > 0])) > 1:
                what = f"{len(numbers)} numbers above 0, but with --class-per-file a file shows one class"
                raise InputError(f"{path}: {what}; leave the option out, or save a file per class")
            values = np.where(values > 0, case.classes[i], 0)
        differ = (values > 0) & (label > 0) & (values != label)
        if differ.any() and not case.classes:
            both = f"{case.labels[0]} and {path}"
            raise InputError(f"{both}: different labels at one place; repair one of them")
        replaced |= {(c, case.classes[i]) for c in np.unique(label[differ]).tolist()}
        label = np.where(values > 0, values, label)
    return flat(volume._replace(label=label)), replaced


def read_case(case: Case, plan: Plan) -> Volume:
    """A case's image and label, whose numbers are classes or IGNORED. Raises InputError if `read_pair` does,
    or the label has numbers that are no classes."""
    volume, _ = read_pair(case, plan.reading, plan.channels)
    values = volume.label
    wrong = values[~np.isin(values, [*plan.numbers, *plan.ignore])]
    if wrong.size:
        what = f"label {show_value(wrong[0])}, but the classes are {', '.join(map(show_value, plan.numbers))}"
        raise InputError(f"{case.labels[0]}: {what}; repair it or take it out")
    classes = np.where(np.isin(values, plan.ignore), IGNORED, np.searchsorted(plan.numbers, values))
    return volume._replace(label=classes.astype(np.uint8))


class Download(NamedTuple):
    """Files by name: address, and MD5 if it is known. Archives among them are unpacked."""

    files: dict[str, tuple[str, str]]
    licence: str
    citation: str


class Recipe(NamedTuple):
    """What is particular to a data set. `plan` takes the raw folder, and raises InputError if it
    does not hold this data set. `prepare` takes a volume as it was read, and the path that its InputErrors
    begin with. `download` is a sentence if it must be done by hand, and empty if there is nothing to get.
    `post_process`, if any, cleans the predicted classes of all sampling steps."""

    plan: Callable[..., Plan] | None  # made-up images have none, and that of a folder takes options, too
    prepare: Callable[[Volume, Path], Volume]
    download: Download | str = ""
    post_process: Callable[[np.ndarray], np.ndarray] | None = None


def locate(raw: Path, marker: str) -> Path:
    """The folder (`raw` or one below) that holds `marker`. Raises InputError unless there is just one."""
    if (raw / marker).exists():
        return raw
    found = [path.parent for path in raw.rglob(marker) if "__MACOSX" not in path.parts]
    if len(found) != 1:
        what = f"in {len(found)} of its folders" if found else "not in it"
        raise InputError(f"{raw}: {marker} is {what}; give the folder of the unpacked download as --raw")
    return found[0]
