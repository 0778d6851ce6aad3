"""What is a sample, a data set, a batch, and how is a batch augmented and cut into patches?
Sections 5.2 and 5.3 of Fu et al. (2023).

A data set is one HDF5 file, `<data_dir>/<name>.h5`, made by `prepare.py`:

    attributes   format_version, name, class_names (JSON list, background first), source,
                 preprocessing, unit ("mm" or "pixel"), settings (JSON: what train.py should use,
                 such as a patch_shape that suits the images; empty where train.py has a preset),
                 origin (a hash of where the samples came from)
    <split>/<uid>/image     float, spatial axes then channels     (split: train, validation, test)
    <split>/<uid>/label     integers, spatial axes, 0 is background
    <split>/<uid>           attributes spacing (per spatial axis, in `unit`), affine (4 x 4, NIfTI's
                            voxel-to-world matrix; in 2D to the pixels of the original picture),
                            crc32 (of image, label, spacing and affine, one after the other)

or it is made up on the spot (`phantom_us`, `phantom_ct`), which needs no file.
"""

import hashlib
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, Integer, Key
from scipy.ndimage import gaussian_filter
from scipy.special import expit

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
METADATA = 1 << 16  # bytes, more than HDF5 adds for a sample
EXACT = jax.lax.Precision.HIGHEST  # a TPU would round coordinates to bfloat16, up to a voxel off
T = TypeVar("T")


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: which file or option,
    what is wrong, and the mend. Programs print it and exit with status 2."""


def one_line(error: Exception) -> str:
    """What an exception says, on one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Sample(NamedTuple):
    """One case. Spacing is in mm, or in pixels where an image has no physical size."""

    image: Float[np.ndarray, "*spatial channels"]
    label: Integer[np.ndarray, "*spatial"]
    spacing: tuple[float, ...]
    uid: str
    affine: Float[np.ndarray, "4 4"]


class Dataset(NamedTuple):
    """A data set's facts and how to get its cases. `load(split, i)` raises InputError."""

    name: str
    class_names: tuple[str, ...]
    image_channels: int
    unit: str
    source: str
    uids: dict[str, tuple[str, ...]]
    canvas: tuple[int, ...]  # the largest size of a training image, per axis
    load: Callable[[str, int], Sample]
    settings: dict[str, tuple] = {}  # noqa: RUF012  (never changed: the file's proposals for train.py)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of which cases are in which split, and of the classes: what a run must find again, lest it
    is trained, or tested, on another split than it began with."""
    facts = json.dumps([dataset.uids, dataset.class_names, dataset.image_channels])
    return hashlib.sha256(facts.encode()).hexdigest()


# --- The file -----------------------------------------------------------------------------------


def replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, flush, and move into place: a reader, or a machine that stops, finds the
    old file or the new one whole. Raises InputError where the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); make room, or choose another folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)  # there only where something failed


class DatasetWriter:
    """Writes a data set, a sample at a time, beside its final name, and moves it there at the end of
    the `with` block. An exception inside the block leaves whatever was there before.

    After bad input, a full disk, or an interruption what was written stays beside it, and a writer with
    the same facts and the same `origin` (where the samples come from, in any words) goes on from
    there: `done` says which there are. Every sample is flushed, so that this holds for a process that
    was killed, too.
    """

    def __init__(
        self, path: Path, *, name: str, class_names: Sequence[str], source: str,
        preprocessing: str, unit: str, settings: dict | None = None, origin: str = "",
    ):  # fmt: skip
        self.path, self.partial = path, path.with_suffix(".h5.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "format_version": FORMAT_VERSION, "name": name, "class_names": json.dumps(list(class_names)),
            "source": source, "preprocessing": preprocessing, "unit": unit,
            "settings": json.dumps(settings or {}), "origin": hashlib.sha256(origin.encode()).hexdigest(),
        }  # fmt: skip
        self.done: set[tuple[str, str]] = set()
        # This format has checksums of all but the samples, and (unlike later ones) survives a kill.
        self.file = self._go_on(facts) or h5py.File(self.partial, "w", libver="v108")
        self._reserve(METADATA)
        self.file.attrs.update(facts)
        for split in SPLITS:
            self.file.require_group(split)
        self.file.flush()

    def _go_on(self, facts: dict) -> h5py.File | None:
        """What an earlier writer left, if it is sound and of the same facts."""
        try:
            file = h5py.File(self.partial, "r+", libver="v108")
        except BlockingIOError as error:
            raise InputError(f"{self.partial}: another build is writing it; wait for its end") from error
        except OSError:  # none, or damaged
            return None
        try:
            if dict(file.attrs) == facts:
                # The checksum is written last: a sample without it was cut short.
                for split in SPLITS:
                    for uid in list(file[split]):
                        if "crc32" in file[split][uid].attrs:
                            self.done.add((split, uid))
                        else:
                            del file[split][uid]
                return file
        except (KeyError, OSError, RuntimeError):
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
            raise InputError(
                f"{self.partial}: cannot be written ({error.strerror}); free some space and run the same "
                "command again: it goes on"
            ) from error

    def add(self, split: str, sample: Sample) -> None:
        """Writes a sample. Raises InputError where the disk does not take it."""
        image, label = np.asarray(sample.image, np.float32), np.asarray(sample.label, np.uint8)
        sample = sample._replace(image=image, label=label)
        self._reserve(image.nbytes + label.nbytes + METADATA)
        group = self.file[split].create_group(sample.uid)
        group.create_dataset("image", data=image)
        group.create_dataset("label", data=label)
        group.attrs["spacing"] = sample.spacing
        group.attrs["affine"] = sample.affine
        group.attrs["crc32"] = checksum(sample)
        self.file.flush()
        self.done.add((split, sample.uid))

    def remove(self, split: str, uid: str) -> None:
        """Takes a sample out that an earlier writer wrote."""
        del self.file[split][uid]
        self.done.discard((split, uid))

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        foreseen = kind is not None and issubclass(kind, (InputError, OSError, KeyboardInterrupt))
        self.file.close()
        if kind is None:
            os.replace(self.partial, self.path)
        elif not (foreseen and self.done):
            self.partial.unlink(missing_ok=True)


def checksum(sample: Sample) -> int:
    """CRC-32 of what is stored of a sample (a flipped byte changes it for certain), at some 4 GB/s."""
    crc = 0
    for part in (sample.image, sample.label, np.float64(sample.spacing), np.float64(sample.affine)):
        crc = zlib.crc32(np.ascontiguousarray(part), crc)
    return crc


def stored(values: h5py.Dataset) -> h5py.Dataset:
    """`values`, if the file holds them: HDF5 makes up what was never written, of any size."""
    if values.nbytes > values.id.get_storage_size():
        raise ValueError(f"{values.shape} are more voxels than it holds")
    return values


def open_file(path: Path) -> Dataset:
    """The data set in an HDF5 file. Raises InputError where the file is not one of ours."""
    try:
        file = h5py.File(path, "r")
        version = file.attrs.get("format_version")
    except Exception as error:  # a damaged file can raise nearly anything, here and below
        why = f"not a readable HDF5 file ({one_line(error)})"
        raise InputError(f"{path}: {why}; build it again") from error
    if version != FORMAT_VERSION:
        newer = isinstance(version, int | np.integer) and version > FORMAT_VERSION
        mend = "get the newer code, or build it again" if newer else "build it again"
        raise InputError(f"{path}: format version {version}, this code reads {FORMAT_VERSION}; {mend}")
    try:
        class_names = tuple(json.loads(file.attrs["class_names"]))
        uids = {split: tuple(file[split]) for split in SPLITS}
        shapes = [stored(file["train"][uid]["image"]).shape for uid in uids["train"]]
        name, unit, source = (str(file.attrs[key]) for key in ("name", "unit", "source"))
        settings = {key: tuples(value) for key, value in json.loads(file.attrs.get("settings", "{}")).items()}
    except Exception as error:
        raise InputError(f"{path}: damaged or incomplete ({one_line(error)}); build it again") from error
    if not shapes:
        raise InputError(f"{path}: no training samples; build it again from a complete folder")
    if len({(len(shape), *shape[-1:]) for shape in shapes}) > 1 or len(shapes[0]) not in (3, 4):
        raise InputError(f"{path}: images are not 2D or 3D with channels, or differ in that; build it again")

    def load(split: str, i: int) -> Sample:
        uid = uids[split][i]
        try:
            group = file[split][uid]
            sample = Sample(
                stored(group["image"])[()].astype(np.float32, copy=False), stored(group["label"])[()],
                tuple(float(s) for s in group.attrs["spacing"]), uid, group.attrs["affine"],
            )  # fmt: skip
            crc = group.attrs.get("crc32")  # files from before it was there have none
        except Exception as error:
            why = f"{split}/{uid} unreadable ({one_line(error)})"
            raise InputError(f"{path}: {why}; build it again") from error
        if sample.label.ndim != len(shapes[0]) - 1:
            raise InputError(f"{path}: {split}/{uid} is {sample.label.ndim}D, others are not; build it again")
        check(sample, f"{path}: {split}/{uid}", len(class_names), shapes[0][-1])
        if crc is not None and crc != checksum(sample):
            raise InputError(
                f"{path}: {split}/{uid} is not what was written; copy the file again, or build it again"
            )
        return sample

    canvas = tuple(int(n) for n in np.max(shapes, axis=0)[:-1])
    return Dataset(name, class_names, shapes[0][-1], unit, source, uids, canvas, load, settings)


def tuples(value: object) -> object:
    """JSON's lists as tuples, at every depth."""
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


def check(sample: Sample, where: str, classes: int, channels: int) -> Sample:
    """The sample, if it can be trained on; else InputError, with `where` in front."""
    dims = sample.label.ndim
    if sample.image.shape[:-1] != sample.label.shape or sample.image.shape[-1] != channels:
        raise InputError(
            f"{where}: image {sample.image.shape} and label {sample.label.shape} do not match "
            f"({channels} channels expected)"
        )
    if not np.issubdtype(sample.label.dtype, np.integer):
        raise InputError(f"{where}: the label is {sample.label.dtype}, whole numbers are needed")
    if len(sample.spacing) != dims or not all(0 < s < np.inf for s in sample.spacing):
        raise InputError(f"{where}: spacing {sample.spacing} is not {dims} positive numbers")
    if not np.isfinite(sample.image).all():
        raise InputError(f"{where}: the image holds NaN or infinite values; repair or remove it")
    if sample.label.min() < 0 or sample.label.max() >= classes:
        raise InputError(
            f"{where}: label values {sample.label.min()}..{sample.label.max()}, but there are "
            f"{classes} classes (0..{classes - 1})"
        )
    return sample


def open_dataset(name: str, data_dir: Path, phantom_shape: Sequence[int]) -> Dataset:
    """A data set by its name: made up (of size `phantom_shape`), or `<data_dir>/<name>.h5`, or for
    "folder:NAME" `<data_dir>/NAME.h5`. Raises InputError that says how to get what is missing."""
    if name in PHANTOMS:
        return open_phantom(name, phantom_shape)
    path = Path(data_dir) / f"{name.removeprefix('folder:')}.h5"
    if not path.exists():
        command = f"python prepare.py build {name} --raw DIR --data-dir {data_dir}"
        raise InputError(f"{path}: no such file; get the raw data (README, Data sets) and run: {command}")
    return open_file(path)


def normalise(
    image: Float[np.ndarray, "*spatial channels"],
) -> Float[np.ndarray, "*spatial channels"]:
    """Zero mean and unit variance per channel (§5.2), float32; a constant channel becomes zeros."""
    result = np.empty(image.shape, np.float32)
    for channel in range(image.shape[-1]):
        values = image[..., channel].astype(np.float32)
        # A mean of float32 leaves a constant channel exactly 0, and to the others a remainder.
        for _ in range(2):
            values -= values.mean(dtype=np.float64).astype(np.float32)
        if peak := np.abs(values).max():  # what is 1 at most has squares that float32 can hold
            values /= peak
            values /= np.sqrt(np.square(values).mean(dtype=np.float64)).astype(np.float32)
        result[..., channel] = values
    return result


def lowest(image: Float[np.ndarray, "*spatial channels"]) -> Float[np.ndarray, "channels"]:
    """Each channel's lowest intensity, which is what lies outside of an image. The first axis goes
    first: numpy is 25 times slower on all at once where the last axis is as short as the channels."""
    return image.min(axis=0).min(axis=tuple(range(image.ndim - 2)))


# --- Made-up data -------------------------------------------------------------------------------


def _wobble(
    rng: np.random.Generator, angle: np.ndarray, orders: Sequence[int], amplitude: float
) -> np.ndarray:
    """A random closed curve's relative radius minus 1 at each angle."""
    waves = (rng.normal() * np.cos(m * angle + rng.uniform(0, 2 * np.pi)) for m in orders)
    return amplitude * sum(waves)


def phantom_us(rng: np.random.Generator, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A made-up ultrasound image [0, inf) and its label: a dark wobbly ellipse under a bright line.

    The place is clear (the line is above the target, and above none of the look-alikes), the
    boundary is not: the label's outline has waves that the image does not show, under speckle and
    an acoustic shadow. So even a perfect network stays well under Dice 1.
    """
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")

    def ellipse(cy: float, cx: float, ry: float, rx: float, orders: Sequence[int], extra: float):
        """Relative radius minus 1, negative inside: as the image shows it, and as the label has it."""
        dy, dx = (y - cy) / ry, (x - cx) / rx
        angle = np.arctan2(dy, dx)
        seen = np.hypot(dy, dx) - 1 - _wobble(rng, angle, (2, 3), 0.1)
        return seen, seen - _wobble(rng, angle, orders, extra)

    cx, rx = rng.uniform(0.3, 0.7), rng.uniform(0.13, 0.22)
    ry = rx * rng.uniform(0.6, 0.9)
    line_y, slope = rng.uniform(0.2, 0.5), rng.uniform(-0.25, 0.25)
    cy = line_y + 1.25 * ry + rng.uniform(0.02, 0.06)
    seen, labelled = ellipse(cy, cx, ry, rx, (3, 4, 5), 0.08)
    blur = rng.uniform(0.1, 0.35)
    texture = gaussian_filter(rng.normal(size=y.shape), np.array(shape) / 16)
    image = 0.55 + 0.1 * texture / texture.std() - 0.35 * expit(-2 * seen / blur)
    for _ in range(rng.integers(2, 5)):
        far_y, far_x, size = rng.uniform(0.05, 0.95), rng.uniform(0, 1), rng.uniform(0.08, 0.2)
        if np.hypot(far_y - cy, far_x - cx) > rx + size + 0.05:
            look_alike, _ = ellipse(far_y, far_x, size * 0.75, size, (2,), 0.0)
            image -= 0.35 * expit(-2 * look_alike / blur)
    distance = (y - line_y - slope * (x - cx)) / max(0.02, 0.6 / shape[0])
    image += np.exp(-0.5 * distance**2) * (np.abs(x - cx) < 1.3 * rx)
    shadow = np.exp(-0.5 * ((x - rng.uniform(0, 1)) / rng.uniform(0.02, 0.05)) ** 2)
    image = np.clip(image, 0.05, None) * (1 - rng.uniform(0.4, 0.8) * shadow) * np.exp(-0.7 * y)
    speckle = rng.gamma(4.0, 1 / 4.0, size=y.shape)
    return np.sqrt(image * speckle)[..., None], (labelled < 0).astype(np.uint8)


def phantom_ct(rng: np.random.Generator, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A made-up CT volume in Hounsfield units and its label: a large organ, two that mirror each other
    (told apart by their side alone), and a vessel, in a body of about their density; in a window
    of soft tissue."""
    grid = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")
    jitter = rng.normal(scale=0.025, size=3)
    texture = gaussian_filter(rng.normal(size=shape), np.array(shape) / 12)
    texture /= texture.std()

    def organ(
        centre: Sequence[float], radii: Sequence[float], hidden: float
    ) -> tuple[np.ndarray, np.ndarray]:
        size = rng.uniform(0.85, 1.2)
        scaled = [(g - c - j) / (r * size) for g, c, j, r in zip(grid, centre, jitter, radii, strict=True)]
        radius = np.sqrt(sum(s**2 for s in scaled))
        angle = np.arctan2(scaled[0], scaled[1])
        seen = radius - 1 - _wobble(rng, angle, (2, 3), 0.06)
        bumps = gaussian_filter(rng.normal(size=shape), np.array(shape) / 20)
        return seen, seen - hidden * bumps / bumps.std()

    body, _ = organ((0.5, 0.5, 0.5), (0.46, 0.46, 0.8), 0.0)
    image = np.where(body < 0, 20.0, -900.0) + 15 * texture * (body < 0)
    label = np.zeros(shape, np.uint8)
    organs = [
        ((0.33, 0.4, 0.5), (0.17, 0.2, 0.3), 45.0),
        ((0.3, 0.72, 0.5), (0.09, 0.07, 0.22), 70.0),
        ((0.7, 0.72, 0.5), (0.09, 0.07, 0.22), 70.0),
        ((0.52, 0.6, 0.5), (0.05, 0.05, 0.6), 110.0),
    ]
    for value, (centre, radii, density) in enumerate(organs, start=1):
        seen, labelled = organ(centre, radii, 0.08)
        image += density * expit(-12 * seen)
        label[labelled < 0] = value
    image += rng.normal(scale=30, size=shape)
    return np.clip(image, -160, 240)[..., None], label


class Phantom(NamedTuple):
    """How a made-up data set is made. `counts` is cases per split."""

    make: Callable[[np.random.Generator, Sequence[int]], tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]
    spacing: tuple[float, ...]
    unit: str
    counts: tuple[int, int, int]


PHANTOMS = {
    "phantom_us": Phantom(phantom_us, ("background", "target"), (1, 1), "pixel", (240, 30, 60)),
    "phantom_ct": Phantom(
        phantom_ct,
        ("background", "large organ", "left organ", "right organ", "vessel"),
        (2.0, 2.0, 4.0),
        "mm",
        (60, 10, 20),
    ),
}


def open_phantom(name: str, shape: Sequence[int]) -> Dataset:
    """A made-up data set. Every case is a function of its name, its split, its number and `shape`, so
    that no seed of a training run moves it. Raises InputError where `shape` does not suit."""
    phantom = PHANTOMS[name]
    if len(shape) != len(phantom.spacing) or min(shape) < 16:
        raise InputError(f"{name}: phantom_shape {tuple(shape)} must be {len(phantom.spacing)} numbers >= 16")
    uids = {
        split: tuple(f"{name}_{split}_{i:03d}" for i in range(n))
        for split, n in zip(SPLITS, phantom.counts, strict=True)
    }
    shape = tuple(shape)

    def load(split: str, i: int) -> Sample:
        rng = np.random.default_rng([*name.encode(), SPLITS.index(split), i, *shape])
        image, label = phantom.make(rng, shape)
        spacing = tuple(float(s) for s in phantom.spacing)
        return Sample(normalise(image), label, spacing, uids[split][i], np.eye(4))

    source = "MADE UP by data.py, not real"
    return Dataset(name, phantom.class_names, 1, phantom.unit, source, uids, shape, load)


# --- Batches ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Cases as they come from the data set, padded at their ends to one size (`canvas`) with the
    lowest intensity of each channel and with background. `size` is what is real."""

    image: Float[Array, "batch *canvas channels"]
    label: Integer[Array, "batch *canvas"]
    size: Int[Array, "batch dims"]
    spacing: Float[Array, "batch dims"]


def batch_indices(n: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Which of n cases are in the batch of a step (0, 1, ...): a function of (seed, step), so that a
    resumed run needs no state. Every case comes once per epoch, each epoch in its own order."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, e]).permutation(n) for e in {p // n for p in positions}}
    return [int(orders[p // n][p % n]) for p in positions]


def make_batch(
    dataset: Dataset, seed: int, step: int, batch_size: int, rows: Sequence[int] | None = None
) -> Batch:
    """The batch of a step, on the host, or those `rows` of it that this host needs. Cases are read whole: a
    patch of the paper, with all that augmentation may reach around it, is 3/4 or more of its case, and
    one piece is read fastest."""
    indices = batch_indices(len(dataset.uids["train"]), seed, step, batch_size)
    indices = indices if rows is None else [indices[row] for row in rows]
    image = np.empty((len(indices), *dataset.canvas, dataset.image_channels), np.float32)
    label = np.zeros((len(indices), *dataset.canvas), np.uint8)
    size = np.empty((len(indices), len(dataset.canvas)), np.int32)
    spacing = np.empty((len(indices), len(dataset.canvas)), np.float32)
    for b, i in enumerate(indices):
        sample = dataset.load("train", i)
        size[b], spacing[b] = sample.label.shape, sample.spacing
        if sample.label.shape != dataset.canvas:
            image[b] = lowest(sample.image)
        inside = tuple(slice(n) for n in sample.label.shape)
        image[b][inside], label[b][inside] = sample.image, sample.label
    return Batch(image, label, size, spacing)


def prefetch(make: Callable[[int], T], start: int, stop: int, ahead: int = 2) -> Iterator[T]:
    """make(start), ..., make(stop - 1), made in threads up to `ahead` steps early, so that reading
    and copying to the device overlap with training."""
    with ThreadPoolExecutor(max_workers=ahead) as pool:
        waiting: deque = deque()
        for step in range(start, stop):
            waiting.append(pool.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- Augmentation, on the device ----------------------------------------------------------------


def rotation_matrix(angles: Float[Array, "n"]) -> Float[Array, "dims dims"]:
    """One angle turns the plane; three turn space about its first, second and third axis. Radians."""
    planes = [(0, 1)] if len(angles) == 1 else [(1, 2), (0, 2), (0, 1)]
    dims = 2 if len(angles) == 1 else 3
    matrix = jnp.eye(dims)
    for angle, (i, j) in zip(angles, planes, strict=True):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.eye(dims).at[i, i].set(cos).at[j, j].set(cos).at[i, j].set(-sin).at[j, i].set(sin)
        matrix = jnp.matmul(turn, matrix, precision=EXACT)
    return matrix


def cut_patch(
    image: Float[Array, "*canvas channels"],
    label: Integer[Array, "*canvas"],
    matrix: Float[Array, "dims dims"],
    source: Float[Array, "dims"],
    target: Float[Array, "dims"],
    patch_shape: Sequence[int],
) -> tuple[Float[Array, "*patch channels"], Int[Array, "*patch"]]:
    """Voxel i of the patch is the image at matrix (i - target) + source, in voxels: linear in the
    image, nearest in the label; outside there is the channel's lowest intensity, and background."""
    axes = [jnp.arange(n, dtype=jnp.float32) - centre for n, centre in zip(patch_shape, target, strict=True)]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"))
    where = jnp.tensordot(matrix, grid, 1, precision=EXACT) + source.reshape(-1, *(1,) * len(patch_shape))

    def linear(channel: Float[Array, "*canvas"]) -> Float[Array, "*patch"]:
        low = jnp.min(channel)
        return map_coordinates(channel - low, where, order=1, mode="constant", cval=0.0) + low

    patch = jax.vmap(linear, in_axes=-1, out_axes=-1)(image)
    return patch, map_coordinates(label.astype(jnp.int32), where, order=0, mode="constant", cval=0)


def augment(
    batch: Batch,
    keys: Key[Array, "batch"],
    patch_shape: Sequence[int],
    *,
    rotation: float,
    scaling: float,
    translation: Sequence[int],
) -> tuple[Float[Array, "batch *patch channels"], Int[Array, "batch *patch"]]:
    """Rotate by up to `rotation` radians about every axis and scale every axis by up to a share of
    `scaling`, both about the image's centre, translate by up to `translation` voxels per axis, then
    take a random patch (§5.3; the limits are settings), which may lie anywhere from the first to the
    last place, and is centred where the image is smaller. All zero: the patch alone.

    One linear map from patch to image does it all, so that only the patch's voxels are computed. The
    rotation is one in mm, not in voxels: `spacing` is taken out and put back.
    """
    dims = len(patch_shape)
    patch_size = jnp.array(patch_shape, jnp.float32)

    def one(image, label, size, spacing, key):
        key_angle, key_scale, key_shift, key_start = jax.random.split(key, 4)
        angles = jax.random.uniform(key_angle, (1 if dims == 2 else 3,), minval=-rotation, maxval=rotation)
        scale = jax.random.uniform(key_scale, (dims,), minval=1 - scaling, maxval=1 + scaling)
        shift = jax.random.uniform(key_shift, (dims,), minval=-1) * jnp.array(translation, jnp.float32)
        room = size - patch_size
        start = jnp.floor(jax.random.uniform(key_start, (dims,)) * (jnp.maximum(room, 0) + 1))
        start = jnp.where(room > 0, jnp.minimum(start, room), jnp.floor(room / 2))
        matrix = rotation_matrix(angles) * scale * spacing / spacing[:, None]
        centre = (size - 1) / 2
        return cut_patch(image, label, matrix, centre + shift, centre - start, patch_shape)

    return jax.vmap(one)(*batch, keys)
