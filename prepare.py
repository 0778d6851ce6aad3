"""How does a raw download, or a folder of one's own images, become a checked HDF5 file?
Section 5.2 of Fu et al. (2023).

    python prepare.py download hippocampus_mr                       # into raw/hippocampus_mr
    python prepare.py build hippocampus_mr --raw raw/hippocampus_mr # into data/hippocampus_mr.h5
    python prepare.py build folder:mine --raw my_folder             # images/ and labels/ in it
    python prepare.py show folder:mine                              # a table and a picture

data.py describes the file. A build that was interrupted goes on where it stopped. Reading order: a
file, its geometry, the data sets of the paper, a folder, then the three commands.
"""

import argparse
import errno
import hashlib
import http.client
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, Int, Integer
from matplotlib.figure import Figure
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import affine_transform, gaussian_filter
from tqdm import tqdm

from data import (
    PHANTOMS,
    SPLITS,
    Dataset,
    DatasetWriter,
    InputError,
    Sample,
    check,
    lowest,
    normalise,
    one_line,
    open_dataset,
    replace_file,
)
from evaluate import COLOURS, fullest_slice, show_slice


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
    read: Callable[[Case], Sample]
    class_names: Sequence[str]
    source: str
    preprocessing: str
    unit: str
    settings: dict = {}  # noqa: RUF012  (never changed)
    counts: tuple[int, ...] = ()  # cases per split of the whole data set, where known


class Volume(NamedTuple):
    """An image and its label on one grid. `affine` maps voxels to the world in mm (pictures: to the
    pixels of the file)."""

    image: Float[np.ndarray, "*spatial channels"]
    label: Integer[np.ndarray, "*spatial"]
    affine: Float[np.ndarray, "4 4"]

    def spacing(self) -> tuple[float, ...]:
        return tuple(float(s) for s in voxel_sizes(self.affine)[: self.label.ndim])


# --- A file -------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever fails inside is the file's fault: a damaged one can raise nearly anything."""
    if not path.exists():
        raise InputError(f"{path}: no such file; every image needs its label, every label its image")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable {kind} ({one_line(error)}); get it again") from error


def check_size(path: Path, shape: Sequence[int], voxel_bytes: int, packed: bool) -> None:
    """Raises an error where a header promises more than its file can hold, before memory is taken for
    it. Deflate packs up to 1032 to 1; up to 64 MB, other packings may do better."""
    size, most = math.prod(map(int, shape)) * voxel_bytes, path.stat().st_size
    if min(shape) < 1 or size > (max(1100 * most, 2**26) if packed else most):
        raise ValueError(f"a file of {most} bytes cannot hold {_times(shape)} voxels")


def read_nifti(path: Path, dims: Sequence[int] = (3,)) -> tuple[np.ndarray, np.ndarray]:
    """The values of a NIfTI file, float32, its axes turned to right, anterior, superior, and its affine.
    Raises InputError where it cannot be read, is not in mm, or its dimensions are none of `dims`."""
    with reading(path, "NIfTI file"):
        file = nibabel.load(path)
        # nibabel mends a pixdim of 0 or less on loading, which would hide wrong spacing.
        with nibabel.openers.ImageOpener(path) as raw:
            pixdim = type(file.header).from_fileobj(raw, check=False)["pixdim"][1 : 1 + min(file.ndim, 3)]
        unit, spacing = file.header.get_xyzt_units()[0], voxel_sizes(file.affine)
        if not all(0 < s < np.inf for s in (*pixdim, *spacing)):
            shown = ", ".join(f"{s:g}" for s in (*pixdim, *spacing))
            raise InputError(f"{path}: spacing {shown} must be positive; mend the file's header")
        if unit not in ("mm", "unknown"):
            raise InputError(f"{path}: lengths are in {unit}, mm expected; mend the file's header")
        if max(file.ndim, 3) not in dims:
            wanted = " or ".join(map(str, dims))
            raise InputError(f"{path}: {file.ndim} dimensions, {wanted} expected; split the file")
        kind = file.get_data_dtype()
        if kind.kind not in "iuf":
            raise ValueError(f"its values are {kind}, real numbers are needed")
        check_size(path, file.shape, kind.itemsize, packed=path.name.lower().endswith(".gz"))
        values = np.asanyarray(file.dataobj).astype(np.float32)
        if file.ndim == 2:
            values = values[..., None]
        turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, file.affine))
        return turned.get_fdata(dtype=np.float32), turned.affine


def read_picture(path: Path) -> PIL.Image.Image:
    """A PNG, TIFF or JPEG, upright, grey or coloured. Raises InputError."""
    with reading(path, "picture"):
        picture = PIL.Image.open(path)
        check_size(path, picture.size, len(picture.getbands()), packed=True)
        if (pages := getattr(picture, "n_frames", 1)) > 1:
            raise InputError(f"{path}: {pages} pages; save a volume as NIfTI, with its spacing")
        picture.load()
        picture = PIL.ImageOps.exif_transpose(picture)
        # Two levels become 0 and 255, as others write them; grey loses its alpha.
        return picture.convert("L") if picture.mode in ("1", "LA") else picture


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def is_grey(picture: PIL.Image.Image) -> bool:
    return picture.mode in ("L", "I", "F") or picture.mode.startswith("I;16")


def read_image(path: Path, dims: Sequence[int] = (3,), channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The intensities of a file, spatial axes then channels, and its affine; a coloured picture as 3
    channels, or grey if 1 is asked for. Raises InputError where they are not finite, or all one."""
    if is_nifti(path):
        values, affine = read_nifti(path, dims)
        values = values if values.ndim == 4 else values[..., None]
    else:
        picture = read_picture(path)
        if not is_grey(picture):
            picture = picture.convert("RGB")  # drops alpha, looks colours up
            picture = picture if channels == 3 else picture.convert("L")
        values, affine = np.atleast_3d(np.asarray(picture, np.float32)), np.eye(4)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: the image holds NaN or infinite values; repair it or take it out")
    if values.min() == values.max():
        raise InputError(f"{path}: the image is constant ({values.min():g}); take it out")
    return values, affine


COLOUR = 1 << 24  # added to a colour's red, green and blue bytes, so that no grey value is the same


def read_label(path: Path) -> tuple[Int[np.ndarray, "*spatial"], np.ndarray, str]:
    """A label's numbers as they are in the file, its affine, and which kind of file it is: NIfTI's whole
    numbers, a palette's indices, grey values, or colours as COLOUR + 0xRRGGBB. Raises InputError."""
    if is_nifti(path):
        (values, affine), kind = read_nifti(path), "NIfTI"
    else:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            raise InputError(f"{path}: JPEG changes a label's values; save it as PNG")
        picture, affine = read_picture(path), np.eye(4)
        values = np.asarray(picture)
        if picture.mode == "P":
            kind = "palette"
        elif is_grey(picture):
            kind = "grey"
        else:
            red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), np.int32), -1, 0)
            grey = (red == green) & (green == blue)
            kind = "grey in RGB" if grey.all() else "colour"
            values = np.where(grey, red, COLOUR + (red << 16) + (green << 8) + blue)
    most = 2 * COLOUR if kind == "colour" else COLOUR  # up to which float32 counts
    if not ((values == np.rint(values)) & (values >= 0) & (values < most)).all():  # NaN is none of these
        raise InputError(f"{path}: labels must be whole numbers from 0 to {most}; repair it or take it out")
    return values.astype(np.int32), affine, kind


def as_classes(values: Int[np.ndarray, "*spatial"], known: Sequence[int], path: Path) -> np.ndarray:
    """0 for the first of the `known` values (which rise), 1 for the second ... Raises InputError."""
    classes = np.searchsorted(known, values)
    wrong = values[np.asarray(known)[np.minimum(classes, len(known) - 1)] != values]
    if wrong.size:
        raise InputError(
            f"{path}: label {show_value(wrong[0])}, but the classes are {', '.join(map(show_value, known))}; "
            "repair it or take it out"
        )
    return classes.astype(np.uint8)


def show_value(value: int) -> str:
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


# --- Geometry -----------------------------------------------------------------------------------


def read_pair(case: Case, known: Sequence[int], dims: Sequence[int] = (3,), channels: int = 1) -> Volume:
    """A case's images, one channel after the other, and its label, whose numbers `known` become classes
    0, 1, ... Raises InputError where they are not on one grid."""
    label, label_affine, _ = read_label(case.label)
    images = []
    for path in case.images:
        image, affine = read_image(path, dims, channels)
        # 0.1 voxel at the corners is what rounding in the header may do.
        corners = np.array([[0, 0, 0], label.shape]) if label.ndim == 3 else np.zeros((1, 3))
        far = apply_affine(affine, corners) - apply_affine(label_affine, corners)
        if image.shape[:-1] != label.shape or np.abs(far).max() > 0.1 * voxel_sizes(affine).min():
            raise InputError(
                f"{path} and {case.label}: not on the same grid (sizes {_times(image.shape[:-1])} and "
                f"{_times(label.shape)}); resample the label to its image"
            )
        images.append(image)
    return Volume(np.concatenate(images, -1), as_classes(label, known, case.label), affine)


def _times(shape: Iterable) -> str:
    return " x ".join(f"{n:g}" for n in shape)


def resample(volume: Volume, spacing: Sequence[float], path: Path, *, smooth: bool = False) -> Volume:
    """The same field of view in voxels of another size: linear in the image (`smooth`: of what it is where
    it gets coarser, so that speckle does not turn into false structure), nearest in the label. The
    centre stays where it is, and so do the axes' directions; both are in the new affine. Raises
    InputError, with the name `path`, where nothing would be left, or far more than there was."""
    old, size = np.array(volume.spacing()), np.array(volume.label.shape)
    step = np.where(np.isclose(spacing, old, rtol=1e-3), 1, np.divide(spacing, old))
    if (step == 1).all():
        return volume
    voxels = (size / step).prod()
    if (step > 2 * size).any() or voxels > max(100 * size.prod(), 2**27):
        raise InputError(
            f"{path}: from spacing {_times(old)} to {_times(spacing)} is too far; mend its spacing, or "
            "take it out"
        )
    new_size = np.maximum(1, np.rint(size / step)).astype(int)
    start = (size - 1) / 2 - step * (new_size - 1) / 2  # the first new voxel, in old voxels

    def place(values: np.ndarray, order: int) -> np.ndarray:
        return affine_transform(values, step, start, tuple(new_size), order=order, mode="nearest")

    image, coarser = volume.image, np.maximum(step - 1, 0) / 2
    if smooth and coarser.max() > 0.05:
        image = gaussian_filter(image, (*coarser, 0))
    image = np.stack([place(channel, 1) for channel in np.moveaxis(image, -1, 0)], -1)
    dims, affine = len(size), np.eye(4)
    affine[range(dims), range(dims)] = step
    affine[:dims, 3] = start
    return Volume(image, place(volume.label, 0), volume.affine @ affine)


def crop(volume: Volume, shape: Sequence[int], start: Sequence[int] | None = None) -> Volume:
    """The box of a shape from a voxel on, or in the middle. Outside the volume there is each channel's
    lowest intensity, and background."""
    start = start or [(n - m) // 2 for n, m in zip(volume.label.shape, shape, strict=True)]
    cut = tuple(slice(max(a, 0), max(a, 0) + n) for a, n in zip(start, shape, strict=True))
    kept = volume.label[cut].shape
    there = tuple(slice(max(-a, 0), max(-a, 0) + n) for a, n in zip(start, kept, strict=True))
    label, image = np.zeros(shape, np.uint8), np.empty((*shape, volume.image.shape[-1]), np.float32)
    image[:] = lowest(volume.image)
    image[there], label[there] = volume.image[cut], volume.label[cut]
    shift = np.eye(4)
    shift[: len(shape), 3] = start
    return Volume(image, label, volume.affine @ shift)


def prepare_intensities(volume: Volume, _: Path) -> Volume:
    """What `PREPARATIONS` have in common: a volume in, as it was read from a path, and the one to train
    on out. The path is for what is said where that cannot be done."""
    return volume._replace(image=normalise(volume.image))


def as_sample(case: Case, volume: Volume) -> Sample:
    return Sample(volume.image, volume.label, volume.spacing(), case.uid, volume.affine)


# --- The data sets of the paper (§5.2), and one more --------------------------------------------


def locate(raw: Path, marker: str) -> Path:
    """The folder, `raw` or one below, that holds `marker`. Raises InputError."""
    if (raw / marker).exists():
        return raw
    found = [path.parent for path in raw.rglob(marker) if "__MACOSX" not in path.parts]
    if len(found) != 1:
        what = "not in it" if not found else f"in {len(found)} of its folders"
        raise InputError(f"{raw}: {marker} is {what}; give the folder of the unpacked download as --raw")
    return found[0]


def files_in(folder: Path, *endings: str) -> list[Path]:
    """The files with these endings, in the order of their names, without macOS's `._` copies."""
    if not folder.is_dir():
        return []
    paths = (p for p in folder.iterdir() if p.name[0] != "." and p.name.lower().endswith(endings))
    return sorted(paths, key=lambda path: path.name)


def muscle_us(raw: Path) -> Plan:
    """Muscle ultrasound (§5.2.1): folders for the splits, PNG, 480 x 512, masks of 0 and 255. Of 3917
    images 3910 have a mask; the others are left out."""
    root, cases = locate(raw, "trainannot"), []
    for split, folder in zip(SPLITS, ("train", "val", "test"), strict=True):
        labels = files_in(root / f"{folder}annot", ".png")
        cases += [Case(split, p.stem, (root / folder / p.name,), p) for p in labels]
    return Plan(
        cases, read_muscle_us, ("background", "muscle cross-section"),
        "Marzola et al. 2021, Mendeley Data 3jykz7wz8d", "zero mean, unit variance", "pixel",
        counts=(2531, 666, 713),
    )  # fmt: skip


def read_muscle_us(case: Case) -> Sample:
    volume = read_pair(case, known=(0, 255))
    if volume.label.shape != (480, 512):
        raise InputError(f"{case.images[0]}: {_times(volume.label.shape)} pixels, 480 x 512 expected")
    return as_sample(case, prepare_intensities(volume, case.images[0]))


def amos_ct(raw: Path) -> Plan:
    """Abdominal CT (§5.2.2): `dataset.json` lists the pairs; numbers up to 500 are CT. Of the public
    validation set the first 10 validate and the others test."""
    root, cases = locate(raw, "dataset.json"), []
    try:
        lists = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        for which in ("training", "validation"):
            pairs = [(root / pair["image"], root / pair["label"]) for pair in lists[which]]
            pairs = [pair for pair in pairs if int(re.search(r"(\d+)\.nii", pair[0].name)[1]) <= 500]
            for i, (image, label) in enumerate(pairs):
                split = "train" if which == "training" else "validation" if i < 10 else "test"
                cases.append(Case(split, image.name.split(".")[0], (image,), label))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{root / 'dataset.json'}: not AMOS's list of pairs ({one_line(error)})") from error
    names = (
        "background, spleen, right kidney, left kidney, gall bladder, oesophagus, liver, stomach, aorta, "
        "postcava, pancreas, right adrenal gland, left adrenal gland, duodenum, bladder, prostate/uterus"
    )
    return Plan(
        cases, read_amos_ct, names.split(", "), "AMOS 2022 (Ji et al.), Zenodo 7262581, CC BY 4.0",
        "RAS; 1.5 x 1.5 x 5 mm; HU clipped to [-991, 362]; zero mean, unit variance; centre 192 x 128 x 128",
        "mm", counts=(200, 10, 90),
    )  # fmt: skip


def read_amos_ct(case: Case) -> Sample:
    return as_sample(case, prepare_amos_ct(read_pair(case, range(16)), case.label))


def prepare_amos_ct(volume: Volume, path: Path) -> Volume:
    volume = resample(volume, (1.5, 1.5, 5.0), path)
    volume = volume._replace(image=normalise(np.clip(volume.image, -991, 362)))
    return crop(volume, (192, 128, 128))


def prostate_mr(raw: Path) -> Plan:
    """Male pelvic MR (§5.2.3): of each of 7 institutions, in the order of `institution.txt`, 2 validate, and
    of the others the first int(0.75 n) - 4 train."""
    root = locate(raw, "institution.txt")
    folder = locate(raw, "data") / "data"
    folder = folder / "data" if (folder / "data").is_dir() else folder  # the archive has one in it
    institutions: dict[str, list[str]] = {}
    lines = (root / "institution.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if len(words := line.split()) == 2:
            institutions.setdefault(words[1], []).append(words[0])
        elif words:
            raise InputError(f"{root / 'institution.txt'}: line {number} is not a case and an institution")
    cases = []
    for uids in institutions.values():
        trained = max(2, int(0.75 * len(uids)) - 2)
        for i, uid in enumerate(uids):
            split = "validation" if i < 2 else "train" if i < trained else "test"
            cases.append(Case(split, uid, (folder / f"{uid}_img.nii",), folder / f"{uid}_mask.nii"))
    names = (
        "background, bladder, bone, obturator internus, transition zone, central gland, rectum, "
        "seminal vesicle, neurovascular bundle"
    )
    return Plan(
        cases, read_prostate_mr, names.split(", "), "Li et al. 2022, Zenodo 7013610",
        "RAS; 0.75 x 0.75 x 2.5 mm; zero mean, unit variance; centre 256 x 256 x 48", "mm",
        counts=(411, 14, 164),
    )  # fmt: skip


def read_prostate_mr(case: Case) -> Sample:
    return as_sample(case, prepare_prostate_mr(read_pair(case, range(9)), case.label))


def prepare_prostate_mr(volume: Volume, path: Path) -> Volume:
    volume = resample(volume, (0.75, 0.75, 2.5), path)
    return crop(prepare_intensities(volume, path), (256, 256, 48))


BRATS_CHANNELS = ("t1", "t1ce", "t2", "flair")


def brats_mr(raw: Path) -> Plan:
    """Brain MR (§5.2.4): a folder per case; in the order of their names 938 train, 31 validate."""
    folders = sorted({path.parent for path in raw.rglob("[!.]*_seg.nii.gz")}, key=lambda path: path.name)
    if not folders:
        raise InputError(f"{raw}: no */*_seg.nii.gz; give the unpacked BraTS2021_Training_Data as --raw")
    cases = []
    for i, folder in enumerate(folders):
        split = "train" if i < 938 else "validation" if i < 938 + 31 else "test"
        names = (f"{folder.name}_{kind}.nii.gz" for kind in (*BRATS_CHANNELS, "seg"))
        *images, label = (folder / name for name in names)
        cases.append(Case(split, folder.name, tuple(images), label))
    return Plan(
        cases, read_brats_mr, ("background", "whole tumour"), "BraTS 2021 task 1 (Baid et al.), Kaggle",
        "RAS; zero mean, unit variance per channel (t1, t1ce, t2, flair); centre 179 x 219 x 155", "mm",
        counts=(938, 31, 282),
    )  # fmt: skip


def read_brats_mr(case: Case) -> Sample:
    volume = prepare_brats_mr(read_pair(case, known=(0, 1, 2, 4)), case.label)
    return as_sample(case, volume._replace(label=(volume.label > 0).astype(np.uint8)))


def prepare_brats_mr(volume: Volume, path: Path) -> Volume:
    if volume.label.shape != (240, 240, 155):
        raise InputError(f"{path}: {_times(volume.label.shape)} voxels, 240 x 240 x 155 expected")
    # In the files' own order (left, posterior, superior) [37:216, 10:229, 0:155]; here right and anterior.
    return crop(prepare_intensities(volume, path), (179, 219, 155), (240 - 216, 240 - 229, 0))


def hippocampus_mr(raw: Path) -> Plan:
    """Medical Segmentation Decathlon, Task 4 (not in the paper), sizes kept. Of every ten cases in the
    order of their names, seven train, one validates, two test."""
    root = locate(raw, "labelsTr")
    cases = []
    for i, path in enumerate(files_in(root / "labelsTr", ".nii.gz")):
        split = SPLITS[np.searchsorted([7, 8], i % 10, side="right")]
        cases.append(Case(split, path.name[: -len(".nii.gz")], (root / "imagesTr" / path.name,), path))
    return Plan(
        cases, read_hippocampus_mr, ("background", "anterior", "posterior"),
        "Medical Segmentation Decathlon, Task04_Hippocampus, CC-BY-SA 4.0",
        "RAS; clipped to percentiles 0.5 and 99.5; zero mean, unit variance", "mm",
    )  # fmt: skip


def read_hippocampus_mr(case: Case) -> Sample:
    return as_sample(case, prepare_hippocampus_mr(read_pair(case, range(3)), case.label))


def prepare_hippocampus_mr(volume: Volume, _: Path) -> Volume:
    """Scanners disagree there (a case's highest intensity is from 112 to 1.7e6): hence percentiles."""
    image = np.clip(volume.image, *np.percentile(volume.image, [0.5, 99.5]))
    return volume._replace(image=normalise(image))


PLANS = {
    "muscle_us": muscle_us, "amos_ct": amos_ct, "prostate_mr": prostate_mr, "brats_mr": brats_mr,
    "hippocampus_mr": hippocampus_mr,
}  # fmt: skip
# What is done to a volume once it is read, in training and to images without a label alike.
PREPARATIONS: dict[str, Callable[[Volume, Path], Volume]] = {
    "muscle_us": prepare_intensities, "amos_ct": prepare_amos_ct, "prostate_mr": prepare_prostate_mr,
    "brats_mr": prepare_brats_mr, "hippocampus_mr": prepare_hippocampus_mr,
}  # fmt: skip


# --- A folder of one's own ----------------------------------------------------------------------

ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".nii", ".nii.gz")


class Facts(NamedTuple):
    """What the plan of a folder needs to know of a case."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int
    unit: str
    kind: str
    values: tuple[int, ...]


def folder(raw: Path, args: argparse.Namespace) -> Plan:
    """`images/` and `labels/` (or `masks/`), matched by name without its ending: pictures or NIfTI, of
    any sizes. Every label is looked at once, to find classes, sizes and spacing, then all are read.

    A label's numbers become classes 0, 1, ... in rising order, 0 always being background; with
    `--classes`, numbers that are classes already stay. Volumes are resampled to the median spacing,
    pictures stay as they are, unless `--spacing` says otherwise.
    """
    faults, facts = {}, {}
    for case, result in run(survey, pairs(raw, splitter(args.split, args.group)), args.workers, "labels"):
        (faults if isinstance(result, InputError) else facts)[case] = result
    known, class_names = classes_of(facts, raw, args.classes)
    sorts = Counter((fact.unit, len(fact.shape), fact.channels) for fact in facts.values())
    ((unit, dims, channels), _), *_ = sorts.most_common() or [(("", 0, 0), 0)]
    if unit == "pixel" and {1, 3} <= {fact.channels for fact in facts.values()}:
        channels = 1
        print("grey and coloured pictures: all are read as grey", file=sys.stderr)
    for case in list(facts):
        if fault := odd_one(case, facts[case], known, (unit, dims, channels)):
            del facts[case]
            faults[case] = fault
    if not facts:
        raise InputError(str(next(iter(faults.values()))))
    if args.spacing and len(args.spacing) != dims:
        raise InputError(f"--spacing: {dims} numbers are needed, {len(args.spacing)} given")
    middle = np.median([fact.spacing for fact in facts.values()], axis=0)
    spacing = args.spacing or [float(f"{s:.4g}") for s in middle]
    sizes = [np.array(fact.shape) * fact.spacing / spacing for fact in facts.values()]
    settings = propose(np.median(sizes, axis=0).tolist(), spacing)
    kinds = Counter(fact.kind for fact in facts.values())
    classes = (f"{show_value(v)} is {name}" for v, name in zip(known, class_names, strict=True))
    options = (f"--{k.replace('_', '-')} {show_setting(v)}" for k, v in settings.items())
    print(
        f"labels: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}; {', '.join(classes)}\n"
        f"spacing {_times(spacing)} {unit}; proposed: {'; '.join(options)}",
        file=sys.stderr,
    )
    bad = (case._replace(fault=str(why)) for case, why in faults.items())
    cases = sorted([*facts, *bad], key=lambda case: case.uid)
    read = partial(read_folder, known=known, channels=channels, spacing=tuple(spacing))
    preprocessing = f"{_times(spacing)} {unit}; zero mean, unit variance; label values {known}"
    return Plan(cases, read, class_names, f"folder {raw.resolve().name}", preprocessing, unit, settings)


def pairs(raw: Path, split_of: Callable[[str], tuple[str, str]]) -> list[Case]:
    """A folder's cases, those without a partner with a fault. Raises InputError where there are none."""
    names = [name for name in ("labels", "masks") if (raw / name).is_dir()]
    if len(names) != 1 or not (raw / "images").is_dir():
        raise InputError(f"{raw}: needs the folders images and labels (or masks), one of each")
    images, labels = by_stem(raw / "images"), by_stem(raw / names[0])
    cases = []
    for stem in sorted(images | labels):
        found, masks = images.get(stem, []), labels.get(stem, [])
        split, fault = split_of(stem)
        if len(found) != 1 or len(masks) != 1:
            these = ", ".join(path.name for path in found + masks)
            counts = f"{len(found)} images, {len(masks)} labels"
            fault = f"{raw}: {these}: {counts} of one name; each image needs one label of its name"
        elif is_nifti(found[0]) != is_nifti(masks[0]):
            fault = f"{found[0]} and {masks[0]}: a picture and a volume; save both in one kind of file"
        cases.append(Case(split, stem, tuple(found or masks)[:1], (masks or found)[0], fault))
    if not cases:
        raise InputError(f"{raw / 'images'}: no {', '.join(ENDINGS)} files")
    return cases


def by_stem(directory: Path) -> dict[str, list[Path]]:
    """The files of a folder by their names without endings. Systems write one accent in several ways;
    here it is one (NFC), so that names from different machines match."""
    found: dict[str, list[Path]] = {}
    paths = files_in(directory, *ENDINGS)
    for path in paths:
        ending = max((e for e in ENDINGS if path.name.lower().endswith(e)), key=len)
        stem = unicodedata.normalize("NFC", os.fsencode(path.name[: -len(ending)]).decode(errors="replace"))
        found.setdefault(stem, []).append(path)
    if others := sum(path.name[0] != "." for path in directory.iterdir()) - len(paths):
        print(f"{directory}: {others} other files left out (read are {', '.join(ENDINGS)})", file=sys.stderr)
    return found


def splitter(split: str, group: str) -> Callable[[str], tuple[str, str]]:
    """A case's split by its name, and why it has none. `split` is three shares, or a file with a line
    "name split" per case. By shares, the name's hash decides (or that of the part which `group` finds,
    such as a patient), so that adding cases never moves others. Raises InputError."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if shares:
        if len(shares) != 3 or min(shares) < 0 or not np.isclose(sum(shares), 1):
            raise InputError(f"--split {split}: three shares that add up to 1 are needed, or a text file")
        try:
            pattern = re.compile(group)
        except re.error as error:
            raise InputError(f"--group {group}: not a regular expression ({error})") from error

        def by_hash(name: str) -> tuple[str, str]:
            match = pattern.search(name)
            if not match:
                return "train", f"{name}: --group {group} does not match this name; widen it"
            key = match[1] if pattern.groups else match[0] if group else name
            place = int.from_bytes(hashlib.sha256((key or "").encode()).digest()[:8]) / 2**64
            return SPLITS[min(np.searchsorted(np.cumsum(shares), place, side="right"), 2)], ""

        return by_hash
    try:
        listed, lines = {}, Path(split).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        why = f"neither three shares nor a text file ({one_line(error)})"
        raise InputError(f"--split {split}: {why}") from error
    for number, line in enumerate(lines, 1):
        name, _, which = unicodedata.normalize("NFC", line).strip().rpartition(" ")
        if line.strip() and (which not in SPLITS or listed.setdefault(name.strip(), which) != which):
            raise InputError(f"{split}: line {number} is not a new name and one of {', '.join(SPLITS)}")
    return lambda name: (
        listed.get(name, "train"),
        "" if name in listed else f"{split}: has no line for {name}",
    )


def survey(case: Case) -> Facts:
    """Looks at a label, and at what its image's header says. Raises InputError."""
    values, affine, kind = read_label(case.label)
    label = flat(Volume(np.zeros((*values.shape, 0)), values, affine))
    image = case.images[0]
    if is_nifti(image):
        shape = read_nifti(image, (3, 4))[0].shape  # all of it: a file that ends early must show here
        channels, unit = (shape[3] if len(shape) == 4 else 1), "mm"
    else:
        channels, unit = (1 if is_grey(read_picture(image)) else 3), "pixel"
    found = tuple(int(v) for v in np.unique(values))
    return Facts(label.label.shape, label.spacing(), channels, unit, kind, found)


def flat(volume: Volume) -> Volume:
    """A volume of one slice as an image in 2D, in mm."""
    if volume.label.ndim != 3 or sum(n > 1 for n in volume.label.shape) != 2:
        return volume
    (thin,) = (axis for axis, n in enumerate(volume.label.shape) if n == 1)
    order = [*(axis for axis in range(3) if axis != thin), thin, 3]
    return Volume(volume.image.squeeze(thin), volume.label.squeeze(thin), volume.affine[:, order])


def classes_of(facts: dict[Case, Facts], raw: Path, names: str) -> tuple[list[int], list[str]]:
    """The label numbers that are classes 0, 1, ..., and the classes' names, found or given. Raises
    InputError where they cannot be classes."""
    found = sorted({0}.union(*(fact.values for fact in facts.values())))
    if not names:
        if len(found) > 32:
            raise InputError(
                f"{raw}: {len(found)} different label values; save masks without smooth edges, or name the "
                "classes with --classes"
            )
        return found, ["background", *(f"class {show_value(v)}" for v in found[1:])]
    class_names = [name.strip() for name in names.split(",")]
    if len(class_names) < 2 or len(set(class_names)) < len(class_names) or len(class_names) > 256:
        raise InputError(f"--classes {names}: 2 to 256 different names are needed, background first")
    # 0 and 255 for two classes, or three colours for three; else numbers are classes already.
    return (found if len(found) == len(class_names) else list(range(len(class_names)))), class_names


def odd_one(case: Case, fact: Facts, known: Sequence[int], most: tuple[str, int, int]) -> str:
    """Why a case does not go with `most` others (unit, dimensions, channels) and the classes, or ""."""
    unit, dims, channels = most
    if wrong := sorted(set(fact.values) - set(known)):
        shown = ", ".join(map(show_value, wrong[:5]))
        return f"{case.label}: label {shown} is none of the {len(known)} --classes; name all, or repair it"
    if fact.unit != unit or len(fact.shape) != dims:
        fault = f"{len(fact.shape)}D in {fact.unit}s, most others are {dims}D in {unit}s"
    elif fact.channels != channels and not (unit == "pixel" and channels == 1):
        fault = f"{fact.channels} channels, most others have {channels}"
    else:
        return ""
    return f"{case.images[0]}: {fault}; keep one sort in a folder"


def propose(size: Sequence[float], spacing: Sequence[float]) -> dict[str, tuple]:
    """What train.py should use for images of about this size: strides that leave an axis of much longer
    voxels alone until the others are as long, and a patch that the strides divide, of up to 2^16
    voxels (a laptop's work), cut where the image is largest."""
    length, strides = np.array(spacing, float), []
    for _ in range(2):
        stride = np.where((length < 2 * length.min()) & (np.array(size) >= 16), 2, 1)
        strides.append(tuple(int(s) for s in stride))
        length = length * stride
    unit = np.prod(strides, axis=0)
    patch = np.maximum(np.minimum(size, 2**16) // unit, 1).astype(int) * unit
    while patch.prod() > 2**16:
        patch[patch.argmax()] -= unit[patch.argmax()]
    return {
        "patch_shape": tuple(int(n) for n in patch),
        "strides": tuple(strides),
        "translation": tuple(int(n) for n in np.maximum(patch // 12, 1)),
    }


def show_setting(value: tuple) -> str:
    """As train.py's options are typed: 16,32 or 2x2,2x1."""
    return ",".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)


def read_folder(case: Case, known: Sequence[int], channels: int, spacing: Sequence[float]) -> Sample:
    return as_sample(case, prepare_folder(read_pair(case, known, (3, 4), channels), case.images[0], spacing))


def prepare_folder(volume: Volume, path: Path, spacing: Sequence[float]) -> Volume:
    """A volume of a folder, smoothed where it is made coarser (the paper's data sets are not: §5.2 speaks
    of resampling alone)."""
    return prepare_intensities(resample(flat(volume), spacing, path, smooth=True), path)


# --- prepare.py build ---------------------------------------------------------------------------


def attempt(function: Callable, case: Case) -> object:
    """function(case), or the InputError that it raised."""
    try:
        if case.fault:
            raise InputError(case.fault)
        return function(case)
    except InputError as error:
        return error


def run(function: Callable, cases: Sequence[Case], workers: int, what: str) -> Iterator[tuple[Case, object]]:
    """Every case with function(case), or with the InputError that it raised, in order. With several
    `workers`, processes that are a few cases ahead, so that memory does not grow with the data."""
    bar = tqdm(cases, desc=what, disable=None)
    if workers == 1:
        for case in bar:
            yield case, attempt(function, case)
        return
    context = multiprocessing.get_context("spawn")  # the threads of JAX do not survive a fork
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for case in bar:
                waiting.append((case, pool.submit(attempt, function, case)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{what}: a process died, of too little memory perhaps; try --workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def build(args: argparse.Namespace) -> None:
    """`prepare.py build`. Raises InputError."""
    kind, _, name = args.name.partition(":")
    if not args.raw.is_dir():
        raise InputError(f"{args.raw}: no such folder; give the unpacked download as --raw")
    if kind == "folder":
        name = name or args.raw.resolve().name
        if name in PLANS or name in PHANTOMS or not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"folder:{name}: choose another NAME, of letters, digits, . _ - and not taken")
        plan = folder(args.raw, args)
    else:
        name, plan = kind, PLANS[kind](args.raw)
    if twice := [uid for uid, n in Counter(case.uid for case in plan.cases).items() if n > 1]:
        raise InputError(f"{args.raw}: {twice[0]} occurs twice; a name must be of one case")

    path = args.data_dir / f"{name}.h5"
    with DatasetWriter(
        path, name=name, class_names=plan.class_names, source=plan.source, preprocessing=plan.preprocessing,
        unit=plan.unit, settings=plan.settings, origin=str(args.raw.resolve()),
    ) as writer:  # fmt: skip
        bad = fill(writer, plan, args)
        counts = tuple(sum(where == split for where, _ in writer.done) for split in SPLITS)
        if not writer.done:
            raise InputError(f"{args.raw}: no case can be used; the first: {(bad or ['none found'])[0]}")
    report = path.with_name(f"{name}-skipped.txt")
    report.unlink(missing_ok=True)
    if bad:
        replace_file(report, "".join(f"{line}\n" for line in bad).encode(errors="backslashreplace"))
        print(f"{len(bad)} of {len(plan.cases)} cases skipped: {report}", file=sys.stderr)
    print(f"{path}: " + ", ".join(f"{n} {split}" for n, split in zip(counts, SPLITS, strict=True)))
    if plan.counts and plan.counts != counts:
        print(f"NB: the whole data set has {', '.join(map(str, plan.counts))}", file=sys.stderr)
    if not all(counts):
        print("NB: training needs all three splits; add cases, or change --split", file=sys.stderr)
    full = f"folder:{name}" if kind == "folder" else name
    print(f"next: python prepare.py show {full}; python train.py --dataset {full}")


def fill(writer: DatasetWriter, plan: Plan, args: argparse.Namespace) -> list[str]:
    """Writes the cases that are not there yet, and says what is wrong with those that cannot be written.
    Raises InputError at the first of them, unless --skip-bad."""
    bad: list[str] = []
    for key in writer.done - {(case.split, case.uid) for case in plan.cases}:
        writer.remove(*key)
    todo = [case for case in plan.cases if (case.split, case.uid) not in writer.done]
    if writer.done:
        print(f"going on: {len(writer.done)} of {len(plan.cases)} cases are there", file=sys.stderr)
    for case, result in run(plan.read, todo, args.workers, writer.path.stem):
        if isinstance(result, Sample) and not args.allow_empty and not result.label.any():
            result = InputError(f"{case.label}: no foreground in it; take the pair out, or --allow-empty")
        if isinstance(result, Sample):
            channels = result.image.shape[-1]
            writer.add(case.split, check(result, str(case.images[0]), len(plan.class_names), channels))
        elif args.skip_bad:
            bad.append(str(result))
        else:
            raise result
    return bad


# --- prepare.py show ----------------------------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    """`prepare.py show`: a table and `<data_dir>/<name>.png`. Reads a sample at a time."""
    dataset = open_dataset(args.name, args.data_dir, ())
    print(f"{dataset.name}: {dataset.source}; {dataset.image_channels} channels, {dataset.unit}\n")
    print(
        f"{'split':12}{'cases':>6}  {'size: smallest':20}{'median':20}{'largest':20}"
        f"{'spacing, median':18}intensity percentiles 1, 50, 99"
    )
    voxels, shown = {}, []
    for split in SPLITS:
        row, voxels[split], pictures = survey_split(dataset, split)
        print(row)
        shown += pictures
    print(f"\n{'class':28}{'share of voxels':>16}{'voxels, median':>16}  cases without it, per split")
    every = np.vstack(list(voxels.values()))
    for c, title in enumerate(dataset.class_names):
        without = ", ".join(str(int((voxels[split][:, c] == 0).sum())) for split in SPLITS)
        share = 100 * every[:, c].sum() / every.sum()
        print(f"{title:28}{share:14.3f} %{np.median(every[:, c]):16.0f}  {without}")
    path = args.data_dir / f"{dataset.name}.png"
    replace_file(path, montage(shown, dataset.class_names))
    print(f"\npicture: {path}")


def survey_split(dataset: Dataset, split: str) -> tuple[str, Int[np.ndarray, "cases classes"], list[tuple]]:
    """A split's row of the table, its voxels per class, and four of its cases as `montage` takes them."""
    count, classes = len(dataset.uids[split]), len(dataset.class_names)
    voxels, shown = np.zeros((count, classes), int), []
    if not count:
        return f"{split:12}{0:6d}", voxels, shown
    shapes, spacings, percentiles = [], [], []
    pictured = set(np.linspace(0, count - 1, min(count, 4)).astype(int))
    for i in tqdm(range(count), desc=split, disable=None, leave=False):
        sample = dataset.load(split, i)
        shapes.append(sample.label.shape)
        spacings.append(sample.spacing)
        percentiles.append(np.percentile(sample.image, [1, 50, 99]))
        voxels[i] = np.bincount(sample.label.ravel(), minlength=classes)
        if i in pictured:
            shown.append((f"{split}: {sample.uid}", *picture_of(sample)))
    sizes = (f"{_times(f(shapes, axis=0)):20}" for f in (np.min, np.median, np.max))
    levels = ", ".join(f"{level:.2f}" for level in np.median(percentiles, axis=0))
    row = f"{split:12}{count:6d}  {''.join(sizes)}{_times(np.median(spacings, axis=0)):18}{levels}"
    return row, voxels, shown


def montage(shown: Sequence[tuple], class_names: Sequence[str]) -> bytes:
    """A PNG of the cases (title, image, label), four in a row, with their labels' outlines."""
    rows = -(-len(shown) // 4)
    picture = Figure(figsize=(8.8, 2.4 * rows + 0.6), layout="constrained")
    grid = picture.subplots(rows, 4, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, (title, image, label) in zip(grid, shown, strict=False):
        show_slice(axes, image, label)
        axes.set_title(title[:32], fontsize=7)
    for c, title in enumerate(class_names[1:]):
        grid[0].plot([], [], color=COLOURS[c % len(COLOURS)], label=title)
    picture.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def picture_of(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The first channel and the label; of a volume, the axial slice that has the most foreground."""
    image, label = sample.image[..., 0], sample.label
    if label.ndim == 3:
        z = fullest_slice(label)
        image, label = np.rot90(image[..., z]), np.rot90(label[..., z])
    return image, label


# --- prepare.py download ------------------------------------------------------------------------


class Download(NamedTuple):
    """Files by name: address, and MD5 where it is known. Archives among them are unpacked."""

    files: dict[str, tuple[str, str]]
    licence: str
    citation: str


# fmt: off
MENDELEY = "https://data.mendeley.com/public-files/datasets/3jykz7wz8d/files"
ZENODO = "https://zenodo.org/record"
DOWNLOADS = {
    "muscle_us": Download(
        {"muscle_us.zip": (f"{MENDELEY}/b1601a22-98a5-41ce-9fbb-54dd21834b55/file_downloaded", "")},
        "open; its terms are on https://data.mendeley.com/datasets/3jykz7wz8d",
        "F. Marzola et al., Deep learning segmentation of transverse musculoskeletal ultrasound images for "
        "neuromuscular disease assessment, Computers in Biology and Medicine 135, 2021",
    ),
    "amos_ct": Download(
        {"amos22.zip": (f"{ZENODO}/7262581/files/amos22.zip", "")},
        "CC BY 4.0, https://zenodo.org/record/7262581",
        "Y. Ji et al., AMOS: A large-scale abdominal multi-organ benchmark for versatile medical image "
        "segmentation, NeurIPS 2022",
    ),
    "prostate_mr": Download(
        {name: (f"{ZENODO}/7013610/files/{name}", "") for name in ("institution.txt", "data.zip")},
        "open; its terms are on https://zenodo.org/record/7013610",
        "Y. Li et al., Prototypical few-shot segmentation for cross-institution male pelvic structures with "
        "spatial registration, 2022",
    ),
    "hippocampus_mr": Download(
        {"Task04_Hippocampus.tar": (
            "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar",
            "9d24dba78a72977dbd1d2e110310f31b")},
        "CC BY-SA 4.0, http://medicaldecathlon.com",
        "M. Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 2022",
    ),
}
# fmt: on
ATTEMPTS, PAUSE = 6, 2.0  # connections that bring nothing new; seconds before the next, doubling


def download(args: argparse.Namespace) -> None:
    """`prepare.py download`. Raises InputError."""
    if args.name == "brats_mr":
        raise InputError(
            "brats_mr: needs a Kaggle account; log in, get the archive from "
            "https://www.kaggle.com/datasets/dschettler8845/brats-2021-task1, unpack BraTS2021_Training_Data"
        )
    target, what = args.raw_dir / args.name, DOWNLOADS[args.name]
    print(f"{args.name}: licence {what.licence}\nplease cite: {what.citation}")
    for name, (url, md5) in what.files.items():
        path = target / name
        if not path.exists():
            fetch(url, path, md5)
        if path.suffix in (".zip", ".tar") and not (target / path.stem).exists():
            unpack(path, target / path.stem)
    print(f"next: python prepare.py build {args.name} --raw {target}")


def fetch(url: str, path: Path, md5: str) -> None:
    """A file from an address, by way of `<path>.partial`, which an interrupted download leaves and the next
    one goes on with. Its size must be what the server says, its MD5 `md5`. Raises InputError."""
    part = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    vain, most = 0, -1
    while problem := transfer(url, part):
        have = part.stat().st_size if part.exists() else 0
        vain, most = (0, have) if have > most else (vain + 1, most)
        if vain >= ATTEMPTS:
            raise InputError(f"{url}: {problem} ({have} bytes are there); run it again later: it goes on")
        time.sleep(PAUSE * 2**vain)
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise InputError(f"{url}: MD5 {found}, {md5} expected; it is deleted, download it again")
    os.replace(part, path)


def transfer(url: str, part: Path) -> str:
    """What one connection brings of what `part` still misses, added to it; and why that is not all, or "".
    Raises InputError where another try would not help."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "prepare.py"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
            begin, total = 0, int(reply.headers.get("Content-Length", -1))
            if reply.status == 206:
                span = re.match(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
                begin, total = (int(span[1]), int(span[2])) if span else (-1, -1)
                if begin != have:
                    part.unlink()
                    return "the server sent another part than was asked for"
            bar = tqdm(desc=part.stem, initial=begin, total=max(total, 0) or None, unit="B", unit_scale=True)
            with open(part, "ab" if begin else "wb") as file, bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        problem = f"the server answered {error.code} {error.reason}"
        if error.code == 416:  # what is there is longer than the file
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code != 429:
            raise InputError(f"{url}: {problem}; get it by hand into {part.with_suffix('')}") from error
        return problem
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return f"the connection broke ({one_line(error)})"
    except OSError as error:
        raise InputError(f"{part}: cannot be written ({error.strerror}); mend it and run again") from error
    size = part.stat().st_size
    if size > total >= 0:
        part.unlink()
    return "" if total in (-1, size) else f"the server announced {total} bytes and sent {size}"


def unpack(archive: Path, target: Path) -> None:
    """A zip or tar into a folder, whole or not at all. What would land outside is never written: of a
    tar that is an error, of a zip it is left out. Raises InputError."""
    part = target.with_name(target.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    print(f"unpacking {archive}", file=sys.stderr)
    try:
        shutil.unpack_archive(archive, part, **({"filter": "data"} if archive.suffix == ".tar" else {}))
        os.replace(part, target)
    except Exception as error:  # a damaged archive can raise nearly anything
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        mend = "free some space" if full else "delete it and download it again"
        raise InputError(f"{archive}: cannot be unpacked ({one_line(error)}); {mend}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- The program --------------------------------------------------------------------------------


def spacing_option(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < v < np.inf for v in values):
        raise ValueError
    return values


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="raw folder to HDF5")
    command.add_argument("name", help=f"{', '.join(PLANS)}, or folder:NAME for one's own")
    command.add_argument("--raw", type=Path, required=True, help="the unpacked download, or one's own folder")
    command.add_argument("--data-dir", type=Path, default=Path("data"))
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    command.add_argument("--skip-bad", action="store_true", help="list bad cases in a file, and go on")
    command.add_argument("--allow-empty", action="store_true", help="labels without foreground are right")
    own = command.add_argument_group("for a folder of one's own")
    own.add_argument("--classes", default="", help="names, background first: background,nerve,vessel")
    own.add_argument("--split", default="0.7,0.1,0.2", help="three shares, or a file of lines: name split")
    own.add_argument("--group", default="", help="regular expression; what it finds stays in one split")
    own.add_argument("--spacing", type=spacing_option, help="to resample to: 2,2 (pixels), 1,1,3 (mm)")
    command.set_defaults(run=build)
    command = commands.add_parser("show", help="a table and a picture of a prepared data set")
    command.add_argument("name")
    command.add_argument("--data-dir", type=Path, default=Path("data"))
    command.set_defaults(run=show)
    command = commands.add_parser("download", help="get and unpack an open data set")
    command.add_argument("name", choices=[*DOWNLOADS, "brats_mr"])
    command.add_argument("--raw-dir", type=Path, default=Path("raw"))
    command.set_defaults(run=download)
    args = parser.parse_args(argv)
    if args.run is build:
        kind = args.name.partition(":")[0]
        if kind != "folder" and args.name not in PLANS:
            parser.error(f"{args.name} is none of {', '.join(PLANS)}, folder:NAME")
        own_options = [f"--{name}" for name in ("classes", "split", "group", "spacing")
                       if getattr(args, name) != own.get_default(name)]  # fmt: skip
        if kind != "folder" and own_options:
            parser.error(f"{own_options[0]} is for folder:NAME; {args.name} has its own")
        if args.workers < 1:
            parser.error("--workers must be at least 1")
    try:
        args.run(args)
    except (InputError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
