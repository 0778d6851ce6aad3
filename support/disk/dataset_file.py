"""What is in a data set's HDF5 file, how is it read, and how is it written so that a build that is stopped,
or runs out of disk, can continue?

    attributes   format_version, name, class_names (JSON list, background first), source,
                 preprocessing, unit ("mm" or "pixel"), settings (JSON: what train.py should use,
                 such as a patch_shape that suits the images; empty if train.py has a preset),
                 origin (a hash of where the samples came from), channel_names (JSON list; empty where
                 channels have no names, such as red, green and blue, or older files), numbers (JSON
                 list: what the classes were in the label files; empty in older files), geometry and
                 threshold (how files were read that can be read in several ways; none in older files)
    <split>/<uid>/image     float, spatial axes then channels     (split: train, validation, test)
    <split>/<uid>/label     integers, spatial axes, 0 is background, 255 is ignored
    <split>/<uid>           attributes spacing (per spatial axis, in `unit`), affine (4 x 4, NIfTI's
                            voxel-to-world matrix; in 2D to the pixels of the original picture),
                            crc32 (of all that is stored of it, one after the other), origin (a hash of
                            which raw files it was made from, and how, and "empty" without foreground)
    <split>/<uid>/own_label     the label on the image's own grid, with the attribute own_affine: only of
                            validation and test cases, where a folder of one's own was resampled
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import h5py
import numpy as np

from support.disk.files import InputError, one_line, tuples, writing
from support.raw.images import IGNORED

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
METADATA = 1 << 16  # bytes, more than HDF5 adds for a sample


def checksum(
    image: np.ndarray, label: np.ndarray, spacing: Sequence[float] | np.ndarray, affine: np.ndarray,
    own_label: np.ndarray | None = None, own_affine: np.ndarray | None = None,
) -> int:  # fmt: skip
    """CRC-32 of what is stored of a sample (which a flipped byte changes for certain), at some 4 GB/s."""
    crc, own_grid = 0, () if own_label is None else (own_label, np.float64(own_affine))
    for part in (image, label, np.float64(spacing), np.float64(affine), *own_grid):
        crc = zlib.crc32(np.ascontiguousarray(part), crc)
    return crc


# --- Reading ------------------------------------------------------------------------------------


def open_file(path: Path) -> tuple[dict, Callable[[str, str], dict]]:
    """The facts about the data set in an HDF5 file, by the names of the fields of data.Dataset, and
    `read(split, uid)`, which gives what is stored of a sample, by those of data.Sample. Both raise InputError
    if the file is not one of ours, or damaged."""
    try:
        file = h5py.File(path, "r")
        version = file.attrs.get("format_version")
        facts = facts_of(file) if version == FORMAT_VERSION else {}
    except Exception as error:  # a damaged file can raise nearly anything, here and below
        why = f"not a readable HDF5 file, or damaged ({one_line(error)})"
        raise InputError(f"{path}: {why}; build it again") from error
    if not facts:
        why = f"format version {version}, but this code reads {FORMAT_VERSION}"
        raise InputError(f"{path}: {why}; build it again, or get newer code if that is higher")
    shapes, names, classes = facts.pop("shapes"), facts["channel_names"], len(facts["class_names"])
    if not shapes:
        raise InputError(f"{path}: no training samples; build it again from a complete folder")
    if names and len(names) != shapes[0][-1]:
        raise InputError(f"{path}: {len(names)} names of {shapes[0][-1]} channels; build it again")
    if len({(len(shape), *shape[-1:]) for shape in shapes}) > 1 or len(shapes[0]) not in (3, 4):
        raise InputError(f"{path}: all images must be 2D or all 3D, with equal channels; build it again")
    *canvas, channels = (int(n) for n in np.max(shapes, axis=0))

    def read(split: str, uid: str) -> dict:
        where = f"{path}: {split}/{uid}"
        try:
            group = file[split][uid]
            found = {name: array[()] for name, array in group.items()}
            found["image"] = found["image"].astype(np.float32, copy=False)
            found["spacing"] = tuple(float(s) for s in group.attrs["spacing"])
            found |= {name: group.attrs[name] for name in ("affine", "own_affine") if name in group.attrs}
            crc = checksum(**found)  # which fails if an array is missing, or one too many
            intact = int(group.attrs.get("crc32", crc)) == crc  # older files have none
        except Exception as error:
            raise InputError(f"{where} unreadable ({one_line(error)}); build it again") from error
        if found["label"].ndim != len(canvas):
            raise InputError(f"{where} is {found['label'].ndim}D, unlike others; build it again")
        check_sample(where, found, classes, channels)
        if not intact:
            fix = "copy the file again, or build it again"
            raise InputError(f"{where} differs from what was written; {fix}")
        return found

    return facts | {"canvas": tuple(canvas), "image_channels": channels}, read


def check_sample(where: str, sample: dict, classes: int, channels: int) -> None:
    """Raises InputError, which begins with `where`, unless a sample, whose parts have the names above, can be
    trained on."""
    image, label, spacing, own = (sample.get(name) for name in ("image", "label", "spacing", "own_label"))
    if image.shape != (*label.shape, channels):
        shapes = f"image {image.shape} and label {label.shape}"
        raise InputError(f"{where}: {shapes} do not match ({channels} channels expected)")
    if not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"{where}: the label is {label.dtype}, but must be whole numbers")
    if len(spacing) != label.ndim or not all(0 < s < np.inf for s in spacing):
        raise InputError(f"{where}: spacing {spacing} is not {label.ndim} positive numbers")
    if not np.isfinite(image).all():
        raise InputError(f"{where}: the image holds NaN or infinite values; repair or remove it")
    known = label != IGNORED
    low, high = (int(find(label, initial=0, where=known)) for find in (np.min, np.max))
    if low < 0 or high >= classes:
        what = f"label values {low}..{high}, but there are {classes} classes (0..{classes - 1})"
        raise InputError(f"{where}: {what}")
    if own is not None and (
        own.ndim != label.ndim or not own.size or own.max(initial=0, where=own != IGNORED) >= classes
    ):
        raise InputError(f"{where}: its label on the image's own grid does not agree with its label")


def facts_of(file: h5py.File) -> dict:
    """The facts about a data set, its training images' `shapes` among them. Raises any exception if the file
    has none."""
    uids = {split: tuple(file[split]) for split in SPLITS}
    settings = json.loads(file.attrs.get("settings", "{}"))
    crcs = [[int(file[split][uid].attrs.get("crc32", 0)) for uid in uids[split]] for split in SPLITS]
    return {name: str(file.attrs[name]) for name in ("name", "unit", "source")} | {
        "class_names": tuple(map(str, json.loads(file.attrs["class_names"]))),
        "channel_names": tuple(map(str, json.loads(file.attrs.get("channel_names", "[]")))),
        "numbers": tuple(map(int, json.loads(file.attrs.get("numbers", "[]")))),
        "geometry": str(file.attrs.get("geometry", "")),
        "threshold": float(file.attrs.get("threshold", -1.0)),
        "uids": uids, "shapes": [file["train"][uid]["image"].shape for uid in uids["train"]],
        "settings": {key: tuples(value) for key, value in settings.items()},
        "content": hashlib.sha256(json.dumps(crcs).encode()).hexdigest(),
    }  # fmt: skip


# --- Writing ------------------------------------------------------------------------------------


class DatasetWriter(AbstractContextManager):
    """Writes a data set, a sample at a time, beside its final name, and moves it there at the end of the
    `with` block. An exception inside the block leaves whatever was there before.

    After bad input, a full disk, or an interruption what was written stays beside it, and a writer with the
    same facts and the same `origin` (where the samples come from, in any words) continues from there:
    `done` has the (split, uid) of what is written, with what `add` was told of its origin. Every sample is
    flushed, so that this holds for a process that was killed, too. Raises InputError if the disk does not
    take a sample, or another process writes the same file.
    """

    def __init__(self, path: Path, *, origin: str = "", **facts: object):
        """`facts` are the other attributes above, by their names; lists and settings become JSON here."""
        self.path, self.partial = path, path.with_suffix(".h5.partial")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()  # since HDF5 does not say why it cannot make a file
        for name, fact in facts.items():
            facts[name] = fact if isinstance(fact, str | float) else json.dumps(fact)
        facts |= {"format_version": FORMAT_VERSION, "origin": hashlib.sha256(origin.encode()).hexdigest()}
        self.done: dict[tuple[str, str], str] = {}
        # This format has checksums of all but the samples, and (unlike later ones) survives a kill.
        self.file = self._reopen(facts) or h5py.File(self.partial, "w", libver="v108")
        self._reserve(METADATA)
        self.file.attrs.update(facts)
        for split in SPLITS:
            self.file.require_group(split)
        self.file.flush()

    def _reopen(self, facts: dict) -> h5py.File | None:
        """What an earlier writer left, if it is sound and of the same facts."""
        try:
            file = h5py.File(self.partial, "r+", libver="v108")
        except BlockingIOError as error:
            raise InputError(f"{self.partial}: another build is writing it; wait for its end") from error
        except OSError:  # none, or damaged
            return None
        try:
            if dict(file.attrs) == facts:
                for split in SPLITS:
                    group = file[split]
                    for uid in list(group):
                        sample = group[uid]
                        if "crc32" in sample.attrs:
                            self.done[split, uid] = str(sample.attrs["origin"])
                        else:  # the checksum is written last: this sample was cut short
                            del group[uid]
                return file
        except Exception:  # a damaged file can raise nearly anything
            self.done.clear()
        file.close()
        return None

    def _reserve(self, size: int) -> None:
        """Finds out whether the disk takes `size` more bytes. HDF5 does not survive a write that fails: the
        file is lost then, and sometimes the process. (Its file is locked, on Windows against any other way of
        writing into it.)"""
        room = self.path.with_suffix(".room.partial")
        try:
            room.write_bytes(bytes(size))
        except OSError as error:
            self.file.close()
            why = f"cannot be written ({error.strerror})"
            fix = "free some space and run the same command again, which continues from here"
            raise InputError(f"{self.partial}: {why}; {fix}") from error
        finally:
            room.unlink(missing_ok=True)

    def add(self, split: str, *, uid: str, origin: str = "", **sample: object) -> None:
        """Writes a sample, whose arrays have the names above, and whose `origin` is what it was made from, in
        any words. Raises InputError if the disk does not take it."""
        kinds = {"image": np.float32, "label": np.uint8, "own_label": np.uint8}
        sample = {
            name: np.asarray(value, kinds.get(name)) for name, value in sample.items() if value is not None
        }
        self._reserve(sum(array.nbytes for array in sample.values()) + METADATA)
        group = self.file[split].create_group(uid)
        for name, array in sample.items():
            if name in kinds:
                group[name] = array
            else:
                group.attrs[name] = array
        group.attrs.update(origin=origin, crc32=checksum(**sample))
        self.file.flush()
        self.done[split, uid] = origin

    def remove(self, split: str, uid: str) -> None:
        """Takes out a sample that an earlier writer wrote."""
        del self.file[split][uid]
        self.file.flush()  # before its space is used again: else a killed process leaves it with other voxels
        self.done.pop((split, uid))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None:
            with writing(self.path):
                with open(self.partial, "r+b") as file:
                    os.fsync(file.fileno())  # so that the name is never that of a file in part
                os.replace(self.partial, self.path)
        elif not (self.done and issubclass(kind, InputError | OSError | KeyboardInterrupt)):
            self.partial.unlink(missing_ok=True)
