"""What is a sample, a data set, a batch, and how is a batch augmented and cut into patches?
Sections 5.2 and 5.3 of Fu et al. (2023).

A data set is one HDF5 file, `<data_dir>/<name>.h5`, made by `prepare.py` and described in
support/disk/dataset_file.py. Some are made up on the spot (`phantom_us`, `phantom_ct`) and need no file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from support.disk.dataset_file import SPLITS, open_file
from support.disk.files import InputError
from support.raw.images import IGNORED
from support.raw.phantoms import PHANTOMS

EXACT = jax.lax.Precision.HIGHEST  # a TPU would otherwise round coordinates, by up to a voxel
PHANTOM_VOXELS = 1 << 22  # of a made-up image; more than the largest case of abdominal CT has


class Sample(NamedTuple):
    """One case. Spacing is in mm, or in pixels where an image has no physical size."""

    image: Float[np.ndarray, "*spatial channels"]
    label: Integer[np.ndarray, "*spatial"]
    spacing: tuple[float, ...]
    uid: str
    affine: Float[np.ndarray, "4 4"]
    own_label: Integer[np.ndarray, "..."] | None = None  # on the image's own grid, if that is another one
    own_affine: Float[np.ndarray, "4 4"] | None = None


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
    settings: dict[str, tuple | float] = {}  # noqa: RUF012  (never changed: the file's proposals for train.py)
    channel_names: tuple[str, ...] = ()  # if they have names
    numbers: tuple[int, ...] = ()  # of the classes in the label files, if they are known
    geometry: str = ""  # how files were read: see Reading in support/raw/images.py
    threshold: float = -1.0
    content: str = ""  # SHA-256 of the samples' checksums; empty for made-up images


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the cases of each split, the classes and the channels. A run compares it, so that
    it is neither continued nor tested on a split other than the one that it began with."""
    facts = json.dumps([dataset.uids, dataset.class_names, dataset.image_channels])
    return hashlib.sha256(facts.encode()).hexdigest()


def open_dataset(name: str, data_dir: Path, phantom_shape: Sequence[int]) -> Dataset:
    """A data set by its name: made up (of size `phantom_shape`), or `<data_dir>/<name>.h5`, or for
    "folder:NAME" `<data_dir>/NAME.h5`. Raises InputError, which says how to get a missing file."""
    if name in PHANTOMS:
        return open_phantom(name, phantom_shape)
    path = Path(data_dir) / f"{name.removeprefix('folder:')}.h5"
    if not path.exists():
        command = f"python prepare.py build {name} --raw DIR --data-dir {data_dir}"
        raise InputError(f"{path}: no such file; get the raw data (see docs/data.md) and run: {command}")
    facts, read = open_file(path)

    def load(split: str, i: int) -> Sample:
        uid = facts["uids"][split][i]
        return Sample(uid=uid, **read(split, uid))

    return Dataset(**facts, load=load)


def open_phantom(name: str, shape: Sequence[int]) -> Dataset:
    """A made-up data set. A case depends only on the data set's name, its split, its number and
    `shape`, never on the seed of a training run. Raises InputError if `shape` is unsuitable."""
    phantom = PHANTOMS[name]
    dims = len(phantom.spacing)
    # Checked here, too, because the size may come from a model file that somebody else wrote.
    if len(shape) != dims or not all(16 <= n <= 1024 for n in shape) or math.prod(shape) > PHANTOM_VOXELS:
        raise InputError(
            f"{name}: phantom_shape {tuple(shape)} must be {dims} numbers from 16 to 1024, and no more than "
            f"{PHANTOM_VOXELS:,} voxels"
        )
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

    source = "MADE UP, not real"
    return Dataset(name, phantom.class_names, 1, phantom.unit, source, uids, shape, load)


def normalise(image: Float[np.ndarray, "*spatial channels"]) -> Float[np.ndarray, "*spatial channels"]:
    """Zero mean and unit variance per channel (§5.2), float32; a constant channel becomes zeros."""
    result = np.empty(image.shape, np.float32)
    for channel in range(image.shape[-1]):
        values = image[..., channel].astype(np.float32)
        # With a mean rounded to float32, a constant channel becomes exactly 0; others need a second pass.
        for _ in range(2):
            values -= values.mean(dtype=np.float64).astype(np.float32)
        if peak := np.abs(values).max():  # so that float32 can hold the squares
            values /= peak
            values /= np.sqrt(np.square(values).mean(dtype=np.float64)).astype(np.float32)
        result[..., channel] = values
    return result


# --- Batches ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Cases as stored, padded at their ends to one size (`canvas`): images with the lowest intensity
    of each channel, labels with background. `size` is the size before padding."""

    image: Float[Array, "batch *canvas channels"]
    label: Integer[Array, "batch *canvas"]
    size: Int[Array, "batch dims"]
    spacing: Float[Array, "batch dims"]


def batch_indices(n: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Which of n cases are in the batch of a step (0, 1, ...). This depends on (seed, step) only, so a
    resumed run needs no state. Every case comes once per epoch, and each epoch has its own order."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, e]).permutation(n) for e in {p // n for p in positions}}
    return [int(orders[p // n][p % n]) for p in positions]


def make_batch(
    dataset: Dataset, seed: int, step: int, batch_size: int, rows: Sequence[int] | None = None
) -> Batch:
    """The batch of a step, in host memory, or only the `rows` of it that this host needs. Cases are
    read whole: the paper's patches, with the margin that augmentation may reach, are 3/4 or more of
    a case, and one block is read fastest."""
    indices = batch_indices(len(dataset.uids["train"]), seed, step, batch_size)
    indices = indices if rows is None else [indices[row] for row in rows]
    n, canvas, dims = len(indices), dataset.canvas, len(dataset.canvas)
    image = np.empty((n, *canvas, dataset.image_channels), np.float32)
    label = np.zeros((n, *canvas), np.uint8)
    size, spacing = np.empty((n, dims), np.int32), np.empty((n, dims), np.float32)
    for b, i in enumerate(indices):
        sample = dataset.load("train", i)
        inside = tuple(slice(length) for length in sample.label.shape)
        image[b] = sample.image.min(axis=0).min(axis=tuple(range(dims - 1)))  # much faster in two steps
        image[b][inside], label[b][inside] = sample.image, sample.label
        size[b], spacing[b] = sample.label.shape, sample.spacing
    return Batch(image, label, size, spacing)


# --- Augmentation, on the device ----------------------------------------------------------------


def rotation_matrix(angles: Float[Array, "n"]) -> Float[Array, "dims dims"]:
    """The rotation by one angle in the plane, or by three about the axes of space, in order; in radians."""
    planes = [(0, 1)] if len(angles) == 1 else [(1, 2), (0, 2), (0, 1)]
    dims = 2 if len(angles) == 1 else 3
    matrix = jnp.eye(dims)
    for angle, (i, j) in zip(angles, planes, strict=True):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.eye(dims).at[i, i].set(cos).at[j, j].set(cos).at[i, j].set(-sin).at[j, i].set(sin)
        matrix = jnp.matmul(turn, matrix, precision=EXACT)
    return matrix


def cut_patch(
    image: Float[Array, "*canvas channels"], label: Integer[Array, "*canvas"],
    matrix: Float[Array, "dims dims"], source: Float[Array, "dims"], target: Float[Array, "dims"],
    patch_shape: Sequence[int],
) -> tuple[Float[Array, "*patch channels"], Int[Array, "*patch"]]:  # fmt: skip
    """A patch whose voxel i is taken at matrix (i - target) + source, in voxels: linearly in the image,
    from the nearest voxel in the label. Outside is each channel's lowest intensity, and background."""
    axes = [jnp.arange(n, dtype=jnp.float32) - centre for n, centre in zip(patch_shape, target, strict=True)]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"))
    where = jnp.tensordot(matrix, grid, 1, precision=EXACT) + source.reshape(-1, *(1,) * len(patch_shape))

    def linear(channel: Float[Array, "*canvas"]) -> Float[Array, "*patch"]:
        low = jnp.min(channel)
        return map_coordinates(channel - low, where, order=1, mode="constant", cval=0.0) + low

    patch = jax.vmap(linear, in_axes=-1, out_axes=-1)(image)
    return patch, map_coordinates(label.astype(jnp.int32), where, order=0, mode="constant", cval=0)


def random_foreground(
    label: Integer[Array, "*canvas"], key: Key[Array, ""]
) -> tuple[Float[Array, "dims"], Bool[Array, ""]]:
    """The place of a voxel of the foreground, each as likely as any other, and whether there is one."""
    before = jnp.cumsum((label > 0) & (label != IGNORED))  # how many there are up to each voxel
    number = jax.random.randint(key, (), 0, jnp.maximum(before[-1], 1))
    voxel = jnp.unravel_index(jnp.searchsorted(before, number, side="right"), label.shape)
    return jnp.stack(voxel).astype(jnp.float32), before[-1] > 0


def augment(
    batch: Batch, keys: Key[Array, "batch"], patch_shape: Sequence[int], *, rotation: float, scaling: float,
    translation: Sequence[int], foreground: float = 0.0,
) -> tuple[Float[Array, "batch *patch channels"], Int[Array, "batch *patch"]]:  # fmt: skip
    """Rotate by up to `rotation` radians about every axis and stretch the patch's grid along every axis
    by a factor from 1 - `scaling` to 1 + `scaling` (so that structures look larger or smaller), both
    about the image's centre, translate by up to `translation` voxels per axis, then take a random
    patch (§5.3; the limits are settings). It may lie anywhere in the image, and is centred along axes
    where the image is smaller. With all limits zero, only the patch is taken.
    A share of `foreground` of the patches show a random voxel of the foreground, if there is any.

    One linear map from patch to image does all of this, so that only the patch's voxels are
    computed. It rotates in mm, not in voxels: it converts voxels to mm with `spacing`, and back.
    """
    dims = len(patch_shape)
    patch_size = jnp.array(patch_shape, jnp.float32)

    def one(image, label, size, spacing, key):
        key_angle, key_scale, key_shift, key_start, key_foreground = jax.random.split(key, 5)
        angles = jax.random.uniform(key_angle, (1 if dims == 2 else 3,), minval=-rotation, maxval=rotation)
        scale = jax.random.uniform(key_scale, (dims,), minval=1 - scaling, maxval=1 + scaling)
        shift = jax.random.uniform(key_shift, (dims,), minval=-1) * jnp.array(translation, jnp.float32)
        room = size - patch_size
        start = jnp.floor(jax.random.uniform(key_start, (dims,)) * (jnp.maximum(room, 0) + 1))
        turn, centre = rotation_matrix(angles), (size - 1) / 2
        matrix = turn * scale * spacing / spacing[:, None]
        if foreground:
            key_share, key_voxel, key_place = jax.random.split(key_foreground, 3)
            voxel, there = random_foreground(label, key_voxel)
            back = jnp.matmul(spacing * (voxel - centre - shift), turn, precision=EXACT) / (scale * spacing)
            # Any place of the patch may show the voxel: in its middle alone, the place would be the answer.
            place = jnp.floor(jax.random.uniform(key_place, (dims,)) * patch_size)
            near = jnp.maximum(jnp.round(centre + back) - place, 0)
            start = jnp.where(there & (jax.random.uniform(key_share) < foreground), near, start)
        start = jnp.where(room > 0, jnp.minimum(start, room), jnp.floor(room / 2))
        return cut_patch(image, label, matrix, centre + shift, centre - start, patch_shape)

    return jax.vmap(one)(*batch, keys)
