"""How is a data set's HDF5 file written, so that a build that is stopped, or runs out of disk, can continue?

data.py describes the file and reads it. Both use the same checksum and format version.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import h5py
import numpy as np

from support.files import InputError

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
METADATA = 1 << 16  # bytes, more than HDF5 adds for a sample


def checksum(
    image: np.ndarray, label: np.ndarray, spacing: Sequence[float], affine: np.ndarray,
    own_label: np.ndarray | None = None, own_affine: np.ndarray | None = None,
) -> int:  # fmt: skip
    """CRC-32 of what is stored of a sample (which a flipped byte changes for certain), at some 4 GB/s."""
    crc, own_grid = 0, () if own_label is None else (own_label, np.float64(own_affine))
    for part in (image, label, np.float64(spacing), np.float64(affine), *own_grid):
        crc = zlib.crc32(np.ascontiguousarray(part), crc)
    return crc


def own(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """What a group holds under a name. Raises ValueError where HDF5 would look for it outside of the file: if
    it is a link, is stored in other files, or needs a filter, which may be a plug-in of this machine."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing, or is a link to another place")
    found = group[name]
    if isinstance(found, h5py.Dataset):
        facts = found.id.get_create_plist()
        if facts.get_layout() == h5py.h5d.VIRTUAL or facts.get_external_count() or facts.get_nfilters():
            raise ValueError(f"{name} is stored in other files, or needs a filter")
    return found


class DatasetWriter(AbstractContextManager):
    """Writes a data set, a sample at a time, beside its final name, and moves it there at the end of the
    `with` block. An exception inside the block leaves whatever was there before.

    After bad input, a full disk, or an interruption what was written stays beside it, and a writer with the
    same facts and the same `origin` (where the samples come from, in any words) continues from there:
    `done` has the (split, uid) of what is written, with what `add` was told of its origin. Every sample is
    flushed, so that this holds for a process that was killed, too. Raises InputError where the disk does not
    take a sample, or another process writes the same file.
    """

    def __init__(
        self, path: Path, *, name: str, class_names: Sequence[str], source: str,
        preprocessing: str, unit: str, settings: dict | None = None, origin: str = "",
        channel_names: Sequence[str] = (),
    ):  # fmt: skip
        self.path, self.partial = path, path.with_suffix(".h5.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "format_version": FORMAT_VERSION, "name": name, "class_names": json.dumps(list(class_names)),
            "source": source, "preprocessing": preprocessing, "unit": unit,
            "settings": json.dumps(settings or {}), "origin": hashlib.sha256(origin.encode()).hexdigest(),
            "channel_names": json.dumps(list(channel_names)),
        }  # fmt: skip
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
                    group = own(file, split)
                    for uid in list(group):
                        sample = own(group, uid)
                        if "crc32" in sample.attrs:
                            for array in sample:
                                own(sample, array)
                            self.done[split, uid] = str(sample.attrs["origin"])
                        else:  # the checksum is written last: this sample was cut short
                            del group[uid]
                return file
        except Exception:  # a damaged file can raise nearly anything
            self.done.clear()
        file.close()
        return None

    def _reserve(self, size: int) -> None:
        """Takes the disk space for `size` bytes. HDF5 does not survive a write that fails: the file is
        lost then, and sometimes the process. (It cuts off what it does not use with every flush.)"""
        try:
            with open(self.partial, "ab") as file:
                file.write(bytes(size))
        except OSError as error:
            self.file.close()
            why = f"cannot be written ({error.strerror})"
            fix = "free some space and run the same command again, which continues from here"
            raise InputError(f"{self.partial}: {why}; {fix}") from error

    def add(
        self, split: str, *, uid: str, image: np.ndarray, label: np.ndarray, spacing: Sequence[float],
        affine: np.ndarray, own_label: np.ndarray | None = None, own_affine: np.ndarray | None = None,
        origin: str = "",
    ) -> None:  # fmt: skip
        """Writes a sample, whose `origin` is what it was made from, in any words. Raises InputError where the
        disk does not take it."""
        image, label = np.asarray(image, np.float32), np.asarray(label, np.uint8)
        arrays = {"image": image, "label": label}
        if own_label is not None:
            arrays["own_label"] = own_label = np.asarray(own_label, np.uint8)
        self._reserve(sum(array.nbytes for array in arrays.values()) + METADATA)
        group = self.file[split].create_group(uid)
        for name, array in arrays.items():
            group[name] = array
        group.attrs.update(spacing=spacing, affine=affine, origin=origin)
        if own_label is not None:
            group.attrs["own_affine"] = own_affine
        group.attrs["crc32"] = checksum(image, label, spacing, affine, own_label, own_affine)
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
            os.replace(self.partial, self.path)
        elif not (self.done and issubclass(kind, InputError | OSError | KeyboardInterrupt)):
            self.partial.unlink(missing_ok=True)
