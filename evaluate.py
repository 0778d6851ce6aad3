"""How are predictions, Dice, Hausdorff distances and the curves over sampling steps made?
Sections 5.1.4, 5.2 (patches) and 6.1 of Fu et al. (2023).

    python evaluate.py test runs/phantom_us-rec_xT --sampler ddpm,ddim

scores every sampling step on the test split: a table on the terminal, and CSV and JSON beside the
run; report.py makes the paper's tables and figures of them.

    python evaluate.py predict runs/hippocampus_mr-rec_xT image.nii.gz -o masks

gives images masks, on their own grids. The scores and predictions take plain values, and train.py
validates with the same functions; a `Run` is a trained network with the data set it belongs to.
"""

import argparse
import csv
import ctypes
import gzip
import io
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import PIL.Image
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Integer, Key, Shaped
from matplotlib.figure import Figure
from scipy.ndimage import affine_transform, binary_dilation, binary_erosion, binary_fill_holes
from scipy.ndimage import label as connected_components
from scipy.spatial import KDTree
from tqdm import tqdm

from data import Dataset, InputError, Sample, fingerprint, lowest, open_dataset, replace_file
from diffusion import SAMPLERS, Image, Keys, Schedule, respace, sample
from strategies import make_denoise
from unet import UNet, compiler_options

# --- Scores (§5.1.4) ----------------------------------------------------------------------------


def dice(prediction: Bool[np.ndarray, "*spatial"], label: Bool[np.ndarray, "*spatial"]) -> float:
    """Binary Dice score 2 |A and B| / (|A| + |B|), in [0, 1]; NaN where both are empty, which leaves
    the class out of this sample's mean."""
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else float("nan")


def surface(mask: Bool[np.ndarray, "*spatial"]) -> Integer[np.ndarray, "n dims"]:
    """Where the voxels are that touch the mask's outside along an axis, or the image's edge. Only the
    mask's box is looked at: in large volumes most structures are small."""
    axes = range(mask.ndim)
    along = [np.flatnonzero(mask.any(axis=tuple(set(axes) - {axis}))) for axis in axes]
    box = tuple(slice(found.min(), found.max() + 1) for found in along)
    inner = binary_erosion(mask[box])  # beyond the box there is nothing of the mask
    return np.argwhere(mask[box] & ~inner) + [found.min() for found in along]


def hausdorff_95(
    prediction: Bool[np.ndarray, "*spatial"],
    label: Bool[np.ndarray, "*spatial"],
    spacing: Sequence[float],
) -> float:
    """95 % Hausdorff distance, in the unit of `spacing` (mm, or pixels in 2D): the larger of the two
    95th percentiles of the distances from one surface to the other.

    Both empty: NaN, which leaves the class out of the sample's mean. One empty: the length of the image's
    diagonal, the worst that there is, so that missing a class cannot improve the mean.
    """
    if not prediction.any() or not label.any():
        diagonal = float(np.linalg.norm(np.array(label.shape) * spacing))
        return diagonal if prediction.any() or label.any() else float("nan")
    a, b = (surface(mask) * np.array(spacing) for mask in (prediction, label))
    there, back = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def disk(radius: int) -> Bool[np.ndarray, "size size"]:
    """MATLAB's strel("disk", radius), which is an octagon: lines in four directions, dilated by one
    another (Adams 1993), then widened to 2 radius - 1 pixels."""
    # The lengths make the octagon's sides as equal as whole pixels allow.
    length = 2 * radius / (1 / np.tan(np.pi / 8) + 1 / np.sin(np.pi / 8))
    element = np.zeros((2 * radius - 1, 2 * radius - 1), bool)
    element[radius - 1, radius - 1] = True
    straight, slanted = int(length), int(length / np.sqrt(2))
    for line in (np.eye(2 * slanted + 1), np.eye(2 * slanted + 1)[::-1]):
        element = binary_dilation(element, line)
    rest = radius - 1 - 2 * slanted - straight
    for side in (straight, rest):
        element = binary_dilation(element, np.ones((2 * side + 1, 2 * side + 1)))
    return element


def post_process_muscle(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Marzola et al. (2021)'s cleaning of a muscle's mask (§5.2.1): holes filled, eroded, dilated and
    opened with disks of 3, 5 and 10 pixels; of several pieces the largest, or, if the second is larger
    than 75 % of it, that of the two whose top edge is higher; holes filled."""
    mask = binary_fill_holes(mask)
    # As in MATLAB, the image's edge alone erodes nothing.
    mask = binary_erosion(mask, disk(3), border_value=1)
    mask = binary_dilation(mask, disk(5))
    mask = binary_dilation(binary_erosion(mask, disk(10), border_value=1), disk(10))
    pieces, count = connected_components(mask, np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(pieces.ravel())[1:]
        first, second = np.argsort(-sizes, kind="stable")[:2] + 1
        if sizes[second - 1] > 0.75 * sizes[first - 1]:
            # Row-major order: a piece's first pixel lies in its top row.
            first = min(first, second, key=lambda piece: np.argmax(pieces == piece))
        mask = pieces == first
    return binary_fill_holes(mask)


def clean(name: str, predictions: Integer[np.ndarray, "K *spatial"]) -> Integer[np.ndarray, "K *spatial"]:
    """The predicted classes as §5.2 scores them: muscle_us post-processed, all others as they are."""
    if name != "muscle_us":
        return predictions
    return np.stack([post_process_muscle(classes == 1) for classes in predictions]).astype(int)


class Score(NamedTuple):
    """Scores of one case, [sampling step, foreground class]."""

    uid: str
    dice: Float[np.ndarray, "K foreground"]
    hausdorff: Float[np.ndarray, "K foreground"]


def score(
    predictions: Integer[np.ndarray, "K *spatial"], case: Sample, classes: int, *, last_distance: bool = False
) -> Score:
    """Dice and 95 % Hausdorff distance of the predicted classes at every sampling step. With
    `last_distance`, the distance (the slower one) of the last step alone; NaN before."""
    shape = (len(predictions), classes - 1)
    dices, distances = np.empty(shape), np.full(shape, np.nan)
    for k, j in np.ndindex(shape):
        a, b = predictions[k] == j + 1, case.label == j + 1
        dices[k, j] = dice(a, b)
        if not last_distance or k == len(predictions) - 1:
            distances[k, j] = hausdorff_95(a, b, case.spacing)
    return Score(case.uid, dices, distances)


def per_case(values: Float[np.ndarray, "*K foreground"]) -> Float[np.ndarray, "*K"]:
    """Mean over the foreground classes that a case has, per sampling step; NaN where it has none."""
    return np.ma.masked_invalid(values).mean(axis=-1).filled(np.nan)


def mean_std(values: Sequence[Float[np.ndarray, "K foreground"]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the cases of the mean over classes, per sampling step."""
    cases = np.ma.masked_invalid([per_case(v) for v in values])
    return cases.mean(axis=0).filled(np.nan), cases.std(axis=0).filled(np.nan)


# --- Prediction ---------------------------------------------------------------------------------


def network(model: UNet):
    """`model`, which takes one example, as f_theta of a batch."""
    return lambda image, t, x_t, x_0_hat: jax.vmap(model)(image, t, x_t, x_0_hat)


def predict_patches(
    model: UNet,
    schedule: Schedule,
    image: Float[np.ndarray | Array, "batch *spatial channels"],
    keys: Keys,
    *,
    sampler: str,
    prediction: str,
) -> Float[Array, "K batch *spatial classes"]:
    """Class probabilities of every sampling step (one "step" without diffusion), for a re-spaced
    schedule."""
    program = prediction_program(model, image.shape[1:-1])
    return program(model, schedule, image, keys, sampler=sampler, prediction=prediction)


def prediction_program(model: UNet, patch_shape: Sequence[int]) -> Callable[..., Array]:
    """`predict_patches`, compiled as its network wants to be."""
    options = compiler_options(model.stem.for_cpu, patch_shape, model.stem.kernel.shape[-1])
    return _compiled(tuple(options.items()))


@cache
def _compiled(options: tuple[tuple[str, str], ...]) -> Callable[..., Array]:
    static = ("sampler", "prediction")
    return jax.jit(_predict_patches, static_argnames=static, compiler_options=dict(options))


def _predict_patches(
    model: UNet, schedule: Schedule, image: Image, keys: Keys, *, sampler: str, prediction: str
) -> Float[Array, "K batch *spatial classes"]:
    denoise = make_denoise(network(model), schedule, prediction)
    classes = model.head.bias.shape[0]
    if not model.noisy_mask:
        return jax.nn.softmax(denoise(image, None, None, None).output, axis=-1)[None]

    def x_0_hat(image, k, x_t, previous):
        return denoise(image, k, x_t, previous).x_0_hat

    masks = sample(
        schedule, x_0_hat, image, keys,
        classes=classes, step=SAMPLERS[sampler], self_condition=model.self_condition,
    )  # fmt: skip
    return (masks + 1) / 2


def patch_starts(shape: Sequence[int], patch_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The fewest patches that cover an image, evenly spread. The overlaps of §5.2 come out: 64 x 0 x 0
    (abdominal CT), 0 x 0 x 16 (prostate), 77 x 37 x 101 (brain)."""
    axes = []
    for size, patch in zip(shape, patch_shape, strict=True):
        count = -(-size // patch)
        axes.append([round(i * (size - patch) / max(count - 1, 1)) for i in range(count)])
    return list(product(*axes))


def predict_cases(
    model: UNet,
    schedule: Schedule,
    cases: Iterable[Sample],
    key: Key[Array, ""],
    *,
    patch_shape: Sequence[int],
    batch_size: int,
    sampler: str,
    prediction: str,
    first: int = 0,
    shardings: tuple[jax.sharding.Sharding, jax.sharding.Sharding] | None = None,
) -> Iterator[tuple[Sample, Float[np.ndarray, "K *spatial classes"]]]:
    """Every case with its class probabilities at every sampling step. Where patches overlap, the
    probabilities are averaged (§5.2). Patches of several cases share batches of one fixed size, so
    that one compilation serves all sizes; a patch's noise depends on `key`, the case's number (from
    `first` on) and the patch's number only. `shardings`: of images and of keys, on several devices."""
    waiting: list[tuple[_Sum, tuple[slice, ...], np.ndarray, Array]] = []
    sums: list[_Sum] = []

    def flush() -> None:
        now, waiting[:] = waiting[:batch_size], waiting[batch_size:]
        filled = now + [now[-1]] * (batch_size - len(now))
        image = np.stack([patch for _, _, patch, _ in filled])
        keys = jnp.stack([key for _, _, _, key in filled])
        if shardings is not None:  # each host has all of it, and keeps its part
            image, keys = (
                jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
                for whole, sharding in zip((image, keys), shardings, strict=True)
            )
        result = predict_patches(model, schedule, image, keys, sampler=sampler, prediction=prediction)
        if not result.is_fully_addressable:  # several hosts, each with its part
            result = multihost_utils.process_allgather(result, tiled=True)
        result = np.asarray(result)
        for b, (total, where, _, _) in enumerate(now):
            total.add(where, result[:, b])

    for number, case in enumerate(cases, first):
        pad = [
            (-((n - p) // 2), p - n + (n - p) // 2)
            for n, p in zip(case.label.shape, patch_shape, strict=True)
        ]
        pad = [(max(before, 0), max(after, 0)) for before, after in pad]
        padded = [max(size) for size in zip(case.label.shape, patch_shape, strict=True)]
        starts = patch_starts(padded, patch_shape)
        sums.append(_Sum(case, pad, len(starts)))
        image = np.empty((*padded, case.image.shape[-1]), np.float32)
        image[:] = lowest(case.image)  # as data.augment does
        image[sums[-1].inside] = case.image
        for i, start in enumerate(starts):
            where = tuple(slice(a, a + n) for a, n in zip(start, patch_shape, strict=True))
            patch_key = jax.random.fold_in(jax.random.fold_in(key, number), i)
            waiting.append((sums[-1], where, image[where], patch_key))
        while len(waiting) >= batch_size:
            flush()
        while sums and sums[0].left == 0:
            yield sums.pop(0).mean()
    while waiting:
        flush()
    for total in sums:
        yield total.mean()


class _Sum:
    """The probabilities of one case's patches, added up on its padded grid."""

    def __init__(self, case: Sample, pad: list[tuple[int, int]], patches: int):
        self.case, self.left = case, patches
        self.shape = tuple(n + a + b for n, (a, b) in zip(case.label.shape, pad, strict=True))
        self.inside = tuple(slice(a, a + n) for n, (a, _) in zip(case.label.shape, pad, strict=True))
        self.total: np.ndarray | None = None
        self.count = np.zeros(self.shape, np.float32)

    def add(self, where: tuple[slice, ...], probability: np.ndarray) -> None:
        if self.total is None:
            K, classes = len(probability), probability.shape[-1]
            self.total = np.zeros((K, *self.shape, classes), np.float32)
        self.total[:, *where] += probability
        self.count[where] += 1
        self.left -= 1

    def mean(self) -> tuple[Sample, np.ndarray]:
        mean = self.total[:, *self.inside] / self.count[self.inside][..., None]
        return self.case, mean


class Run(NamedTuple):
    """A trained network, its settings (train.Config), and the data set that it belongs to."""

    folder: Path
    checkpoint: str
    config: Any  # train.Config
    model: UNet
    step: int
    dataset: Dataset


def open_run(folder: str | Path, checkpoint: str = "best", data_dir: str = "") -> Run:
    """The run in a folder. Raises InputError where its checkpoint is missing or damaged, or where its
    data set is not the one that it was trained on."""
    from train import load_run  # which needs this file

    config, model, header = load_run(str(folder), checkpoint)
    dataset = open_dataset(config.dataset, Path(data_dir or config.data_dir), config.phantom_shape)
    if (len(dataset.class_names), dataset.image_channels) != (header["classes"], header["image_channels"]):
        raise InputError(f"{folder}: trained on other classes or channels than {config.dataset} now has")
    if header.get("cases") != fingerprint(dataset):
        raise InputError(
            f"{folder}: {config.dataset} now has other cases or splits, so that its test cases may be among "
            "those trained on; train again"
        )
    return Run(Path(folder), checkpoint, config, model, header["step"], dataset)


def predict_run(
    run: Run, cases: Iterable[Sample], *, sampler: str, K: int, seed: int, first: int = 0, batch_size: int = 0
) -> Iterator[tuple[Sample, Float[np.ndarray, "K *spatial classes"]]]:
    """`predict_cases` with the network, schedule and patches of a run. Raises InputError where it was
    trained on fewer than K noise levels."""
    from train import PATCHES_PER_BATCH, key_for, make_schedule  # which need this file

    config = run.config
    if not 1 <= K <= config.train_timesteps:
        raise InputError(f"--sampling-steps {K} is not between 1 and {config.train_timesteps}, as trained")
    return predict_cases(
        run.model, respace(make_schedule(config), K), cases, key_for("sampling", seed),
        patch_shape=config.patch_shape, sampler=sampler, prediction=config.prediction, first=first,
        batch_size=batch_size or PATCHES_PER_BATCH[len(config.patch_shape)],
    )  # fmt: skip


# --- Pictures and provenance --------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


def fullest_slice(label: Integer[np.ndarray, "x y z"]) -> int:
    """The place along the last axis that has the most foreground."""
    return int((label > 0).sum(axis=(0, 1)).argmax())


def slice_at(values: Shaped[np.ndarray, "*spatial"], z: int | None) -> Shaped[np.ndarray, "height width"]:
    """The z-th axial slice of a volume with the patient's front up; a picture as it is."""
    return values if z is None else np.rot90(values[..., z])


def show_slice(axes, image: np.ndarray, label: np.ndarray) -> None:
    """An image in grey, with the outline of every class of `label`."""
    low, high = np.percentile(image, [1, 99])
    axes.imshow(image, cmap="gray", interpolation="nearest", vmin=low, vmax=max(high, low + 1e-6))
    for c in range(1, int(label.max(initial=0)) + 1):
        if (label == c).any():
            colour = COLOURS[(c - 1) % len(COLOURS)]
            axes.contour(label == c, levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set_xticks([])
    axes.set_yticks([])


def picture(cases: Sequence[tuple[Sample, Integer[np.ndarray, "K *spatial"]]], title: str) -> bytes:
    """A PNG: a row per case with the image, the truth, and the predicted classes at each sampling step;
    of a volume, the slice along its last axis that has the most foreground."""
    K = len(cases[0][1])
    figure = Figure(figsize=(1.7 * (K + 2), 1.9 * len(cases) + 0.5), layout="constrained")
    grid = figure.subplots(len(cases), K + 2, squeeze=False)
    for row, (case, predictions) in zip(grid, cases, strict=True):
        classes = 1 + max(int(case.label.max()), int(predictions.max()))
        dices = per_case(score(predictions, case, classes, last_distance=True).dice)
        z = fullest_slice(case.label) if case.label.ndim == 3 else None
        for axes, panel in zip(row, [np.zeros_like(case.label), case.label, *predictions], strict=True):
            show_slice(axes, slice_at(case.image[..., 0], z), slice_at(panel, z))
        for axes, value in zip(row[2:], dices, strict=True):
            axes.set_xlabel(f"Dice {100 * value:.1f}", fontsize=8)
    heads = [
        "image",
        "truth",
        *([f"step {k}" for k in range(1, K + 1)] if K > 1 else ["prediction"]),
    ]
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=9)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def keep_compiled() -> None:
    """Compiled programs are kept on disk, so that a second start is fast: where JAX_COMPILATION_CACHE_DIR
    says, else in the user's cache, apart for every machine, since a program is made for one CPU."""
    if not jax.config.jax_compilation_cache_dir:
        folder = Path.home() / ".cache" / "jax" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Memory that arrays leave stays with this process (Linux with glibc; elsewhere nothing changes).

    On a CPU, XLA asks for the memory of all intermediate values at each call, and frees it at the end.
    glibc gives so large a block back to the system, which then finds and clears every page of it again: for
    a large network that took as long as the work. glibc can only keep what the main thread asked for, so
    programs are to run there. To be called before JAX is used. Source: mallopt(3).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def provenance() -> dict[str, str]:
    """What ran: hardware, versions, commit, date. Every result carries it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD") + (" (changed)" if git("status", "--porcelain") else "")
    except OSError:
        commit = ""
    devices = jax.devices()
    return {
        "commit": commit or "unknown",
        "devices": f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})",
        "jax": jax.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# --- Masks for images without a label (evaluate.py predict) --------------------------------------


class Target(NamedTuple):
    """An image to predict, prepared as in training (`sample`, whose label is empty), and the grid of its
    file, on which the mask is written: shape and voxel-to-world affine. A picture's third axis is 1."""

    name: str
    file: Path
    sample: Sample
    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]


def find_images(given: Sequence[str], dataset: str) -> list[tuple[Path, ...]]:
    """The files of every image: one, or one per channel, which are typed with commas between them. A
    folder stands for all its images (brats_mr: its cases). Raises InputError."""
    from prepare import BRATS_CHANNELS, ENDINGS, files_in  # which needs this file

    found: list[tuple[Path, ...]] = []
    for text in given:
        path = Path(text)
        if not path.is_dir():
            more = [tuple(Path(part) for part in ([text] if path.exists() else text.split(",")))]
        elif dataset == "brats_mr":
            cases = sorted({flair.parent for flair in path.rglob("[!.]*_flair.nii.gz")})
            more = [tuple(c / f"{c.name}_{kind}.nii.gz" for kind in BRATS_CHANNELS) for c in cases]
        else:
            more = [(file,) for file in files_in(path, *ENDINGS)]
        if not more:
            raise InputError(f"{path}: no images in it ({', '.join(ENDINGS)})")
        found += more
    return found


def preparation(run: Run) -> Callable:
    """What is done to the run's images between reading and training: a prepare.Volume, and the
    path that it came from, in, another volume out. Raises InputError."""
    from prepare import PREPARATIONS, prepare_folder  # which needs this file

    name = run.config.dataset
    if name.startswith("folder:"):
        return partial(prepare_folder, spacing=run.dataset.load("train", 0).spacing)
    if name not in PREPARATIONS:
        raise InputError(f"{run.folder}: trained on made-up images; train on real ones to predict real ones")
    return PREPARATIONS[name]


def read_target(files: Sequence[Path], run: Run) -> Target:
    """An image and its grid. Raises InputError where it cannot be one of the run's."""
    from prepare import Volume, is_nifti, read_image  # which needs this file

    first, volumes, channels = files[0], run.dataset.unit == "mm", run.dataset.image_channels
    images, affines = [], []
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        if is_nifti(file) != volumes:
            raise InputError(f"{file}: {run.folder} takes {'NIfTI files' if volumes else 'pictures'}")
        image, affine = read_image(file, (3, 4), channels)
        images.append(image)
        affines.append(affine)
        if image.shape[:-1] != images[0].shape[:-1] or not np.allclose(affine, affines[0], atol=1e-3):
            raise InputError(f"{first} and {file}: not on one grid; resample one to the other")
    image = np.concatenate(images, -1)
    if image.shape[-1] != channels:
        raise InputError(
            f"{first}: {image.shape[-1]} channels, {run.folder} was trained on {channels}"
            + ("; give their files with commas between them" if channels > image.shape[-1] else "")
        )
    volume = Volume(image, np.zeros(image.shape[:-1], np.uint8), affines[0])
    volume = preparation(run)(volume, first)
    if volume.label.ndim != len(run.config.patch_shape):
        raise InputError(f"{first}: {volume.label.ndim}D, {run.folder} takes {len(run.config.patch_shape)}D")
    if volumes:
        file = nibabel.load(first)
        shape, affine = (*file.shape, 1)[:3], file.affine
    else:
        shape, affine = (*image.shape[:-1], 1), np.eye(4)
    name = re.sub(r"(\.nii)?\.[^.]+$", "", first.name, flags=re.IGNORECASE)
    sample = Sample(volume.image, volume.label, volume.spacing(), name, volume.affine)
    return Target(name, first, sample, shape, affine)


def on_file_grid(
    values: Float[np.ndarray, "*spatial"], target: Target, outside: float
) -> Float[np.ndarray, "x y z"]:
    """Values of the prepared grid at the file's voxels, linear between them, and `outside` where the
    prepared grid does not reach, such as beyond a centre crop."""
    prepared = np.linalg.inv(target.sample.affine) @ target.affine  # prepared voxel of a file's voxel
    values = np.atleast_3d(values)
    placed = affine_transform(
        values, prepared[:3, :3], prepared[:3, 3], target.shape, order=1, mode="nearest"
    )
    # Preparation turns, scales and cuts, so every axis of the file runs along one of the prepared ones.
    for axis, along in enumerate(np.abs(prepared[:3, :3]).argmax(axis=0)):
        where = prepared[along, axis] * np.arange(target.shape[axis]) + prepared[along, 3]
        # Rounding the size in resampling may move the edge by a quarter of a voxel.
        beyond = (where < -0.76) | (where > values.shape[along] - 0.24)
        placed[(slice(None),) * axis + (beyond,)] = outside
    return placed


def classify(probability: Float[np.ndarray, "*spatial classes"], target: Target) -> np.ndarray:
    """The most probable class at each voxel of the file; a class at a time, for the sake of memory."""
    mask = np.zeros(target.shape, np.uint8)
    highest = on_file_grid(probability[..., 0], target, 1.0)
    for c in range(1, probability.shape[-1]):
        placed = on_file_grid(probability[..., c], target, 0.0)
        mask[placed > highest] = c
        highest = np.maximum(highest, placed)
    return mask


def encode(values: np.ndarray, target: Target) -> tuple[str, bytes]:
    """Values on the file's grid as a file of its kind, and its ending: NIfTI with the same affine, or for
    whole numbers a picture with a palette (its indices are the classes), for others a TIFF with a page
    per class."""
    if target.file.name.lower().endswith((".nii", ".nii.gz")):
        like = nibabel.load(target.file)
        header = like.header.copy()
        header.set_data_dtype(values.dtype)
        header["cal_min"] = header["cal_max"] = 0
        shape = (*like.shape[:3], *values.shape[3:])
        content = type(like)(values.reshape(shape), like.affine, header).to_bytes()
        zipped = target.file.name.lower().endswith(".gz")
        return (".nii.gz", gzip.compress(content)) if zipped else (".nii", content)
    buffer = io.BytesIO()
    if values.dtype == np.uint8:
        picture = PIL.Image.fromarray(values[..., 0], "P")
        colours = [0] * 3 + [int(c[i : i + 2], 16) for c in COLOURS * 37 for i in (1, 3, 5)]
        picture.putpalette(colours[:768])
        tiff = target.file.suffix.lower() in (".tif", ".tiff")
        picture.save(buffer, format="TIFF" if tiff else "PNG")
        return (target.file.suffix if tiff else ".png"), buffer.getvalue()
    pages = [PIL.Image.fromarray(page) for page in np.moveaxis(values.reshape(*target.shape[:2], -1), -1, 0)]
    pages[0].save(buffer, format="TIFF", save_all=True, append_images=pages[1:])
    return ".tif", buffer.getvalue()


def overlay(
    target: Target, mask: np.ndarray, variance: np.ndarray | None, names: Sequence[str], title: str
) -> bytes:
    """A PNG: the prepared image with the outlines of the predicted classes, of a volume the slice that has
    most of them; beside it the variance over seeds, where there is one."""
    figure = Figure(figsize=(4.6 * (1 + (variance is not None)), 4.8), layout="constrained")
    grid = figure.subplots(1, 1 + (variance is not None), squeeze=False)[0]
    z = (fullest_slice(mask) if mask.any() else mask.shape[2] // 2) if mask.ndim == 3 else None
    show_slice(grid[0], slice_at(target.sample.image[..., 0], z), slice_at(mask, z))
    if variance is not None:
        shown = grid[1].imshow(slice_at(variance, z), cmap="viridis", vmin=0)
        figure.colorbar(shown, ax=grid[1], label="variance over seeds", shrink=0.8)
        grid[1].set(xticks=[], yticks=[])
    for c, name in enumerate(names[1:]):
        grid[0].plot([], [], color=COLOURS[c % len(COLOURS)], label=name)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def predict_target(run: Run, target: Target, sampler: str, K: int, seeds: Sequence[int]) -> np.ndarray:
    """Probabilities [seed, K, *spatial, classes] on the prepared grid. The noise is that of a first case,
    so that an image's mask does not depend on what else is predicted."""
    # An image that is a single patch must not be computed a whole batch of times.
    single = int((np.array(target.sample.label.shape) <= run.config.patch_shape).all())
    results = [
        next(predict_run(run, [target.sample], sampler=sampler, K=K, seed=seed, batch_size=single))
        for seed in seeds
    ]
    return np.stack([probability for _, probability in results])


def predict(args: argparse.Namespace) -> None:
    """`evaluate.py predict`: a mask for every image, on its own grid, with the names of its classes."""
    run = open_run(args.run, args.checkpoint, args.data_dir)
    out, diffusion = Path(args.output or run.folder / "predictions"), run.model.noisy_mask
    images = find_images(args.images, run.config.dataset)
    out.mkdir(parents=True, exist_ok=True)
    sampler = (args.sampler or run.config.sampler) if diffusion else "none"
    K = (args.sampling_steps or run.config.sampling_steps) if diffusion else 1
    seeds = range(args.seed, args.seed + (args.seeds if diffusion else 1))
    written: set[str] = set()
    for files in tqdm(images, "images", disable=len(images) == 1):
        target = read_target(files, run)
        if target.name in written:
            raise InputError(f"{target.file}: another image of this name was predicted before; rename one")
        written.add(target.name)
        probabilities = predict_target(run, target, sampler, K, seeds)
        write_prediction(out / target.name, run, target, probabilities, files, args)
    print(f"{len(images)} masks: {out}")


def write_prediction(
    stem: Path, run: Run, target: Target, probabilities: np.ndarray, files: Sequence[Path],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """`<stem>-mask` (and `-step1` ..., `-probabilities`, `-variance` where asked for), `<stem>.json`, and
    `<stem>-overlay.png`. Means over the seeds; the variance is half its sum over the classes: with two
    classes, that of either one's probability."""
    names, dataset = run.dataset.class_names, run.config.dataset
    mean = probabilities.mean(axis=0)
    cleaned = clean(dataset, mean.argmax(-1))
    outputs: dict[str, np.ndarray] = {}
    for k in range(len(mean)) if args.all_steps else [len(mean) - 1]:
        # Post-processing is defined on classes; without it, probabilities make smoother outlines.
        step = np.eye(len(names), dtype=np.float32)[cleaned[k]] if dataset == "muscle_us" else mean[k]
        outputs[f"-step{k + 1}" if args.all_steps else "-mask"] = classify(step, target)
    if args.all_steps:
        outputs["-mask"] = outputs[f"-step{len(mean)}"]
    variance = None
    if len(probabilities) > 1:
        variance = probabilities[:, -1].var(axis=0).sum(-1) / 2
        outputs["-variance"] = on_file_grid(variance, target, 0.0)
    if args.probabilities:
        placed = [on_file_grid(mean[-1, ..., c], target, float(c == 0)) for c in range(len(names))]
        outputs["-probabilities"] = np.stack(placed, -1)
    saved = {}
    for what, values in outputs.items():
        ending, content = encode(values, target)
        saved[what.removeprefix("-")] = f"{stem.name}{what}{ending}"
        replace_file(stem.with_name(saved[what.removeprefix("-")]), content)
    facts = {
        "images": [str(file) for file in files], "files": saved, "classes": dict(enumerate(names)),
        "run": str(run.folder), "checkpoint": run.checkpoint, "trained_steps": run.step,
        "trained_on": f"{dataset} ({run.dataset.source})", "sampling_steps": len(mean),
        "seeds": len(probabilities), **provenance(),
    }  # fmt: skip
    replace_file(stem.with_name(f"{stem.name}.json"), json.dumps(facts, indent=2).encode())
    title = f"{target.file.name}, by {run.folder.name}, trained on {dataset} ({run.dataset.source})"
    png = overlay(target, cleaned[-1], variance, names, title)
    replace_file(stem.with_name(f"{stem.name}-overlay.png"), png)


# --- The program --------------------------------------------------------------------------------


def table(rows: Sequence[tuple[str, list[Score]]], unit: str) -> str:
    """Mean Dice (percent) at each sampling step, with mean and standard deviation over the cases at
    the last, and the last step's 95 % Hausdorff distance."""
    K = max(len(scores[0].dice) for _, scores in rows)
    first = max(len(name) for name, _ in rows) + 2
    heads = [f"step {k}" for k in range(1, K + 1)]
    lines = [" " * first + "".join(h.rjust(8) for h in heads) + f"{'Dice (%)':>17}{f'HD95 ({unit})':>19}"]
    for name, scores in rows:
        mean, std = mean_std([s.dice for s in scores])
        far, far_std = mean_std([s.hausdorff for s in scores])
        steps = "".join(f"{100 * m:8.2f}" for m in mean).ljust(8 * K)
        last = f"{100 * mean[-1]:9.2f} ± {100 * std[-1]:5.2f}{far[-1]:11.2f} ± {far_std[-1]:5.2f}"
        lines.append(name.ljust(first) + steps + last)
    return "\n".join(lines)


def write_scores(folder: Path, scores: list[Score], classes: Sequence[str], facts: dict) -> None:
    """`<folder>/<split>-<checkpoint>-<sampler>-<K>-seed<n>.csv`, a line per case, step and class, and a
    `.json` of the means and of what was run."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["uid", "step", "class", "dice", "hausdorff_95"])
    for case in scores:
        for k, j in np.ndindex(case.dice.shape):
            writer.writerow(
                [
                    case.uid,
                    k + 1,
                    classes[j + 1],
                    f"{case.dice[k, j]:.6f}",
                    f"{case.hausdorff[k, j]:.4f}",
                ]
            )
    (mean, std), (far, far_std) = (
        mean_std([s.dice for s in scores]),
        mean_std([s.hausdorff for s in scores]),
    )
    summary = {
        **facts, "cases": len(scores),
        "dice_mean": mean.tolist(), "dice_std": std.tolist(),
        "hausdorff_95_mean": far.tolist(), "hausdorff_95_std": far_std.tolist(),
    }  # fmt: skip
    parts = [facts[key] for key in ("split", "checkpoint", "sampler", "sampling_steps")]
    name = "-".join(map(str, [*parts, f"seed{facts['seed']}"]))
    replace_file(folder / f"{name}.csv", text.getvalue().encode())
    replace_file(folder / f"{name}.json", json.dumps(summary, indent=2).encode())


def score_run(run: Run, split: str, *, sampler: str, K: int, seed: int) -> list[Score]:
    """Scores of a split's cases, written to the run's folder and returned."""
    count = len(run.dataset.uids[split])
    if not count:
        raise InputError(f"{run.dataset.name}: no {split} cases; build it again with some")
    cases = (run.dataset.load(split, i) for i in range(count))
    predictions = predict_run(run, cases, sampler=sampler, K=K, seed=seed)
    scores = [
        score(clean(run.config.dataset, probability.argmax(-1)), case, probability.shape[-1])
        for case, probability in tqdm(predictions, f"{run.folder.name} {sampler} {K}", count)
    ]
    facts = {
        "split": split, "sampler": sampler, "sampling_steps": K, "seed": seed,
        "checkpoint": run.checkpoint, "trained_steps": run.step, "unit": run.dataset.unit,
        "source": run.dataset.source, **provenance(), "config": asdict(run.config),
    }  # fmt: skip
    write_scores(run.folder / "scores", scores, run.dataset.class_names, facts)
    return scores


def test(args: argparse.Namespace) -> None:
    """`evaluate.py test`: score runs on a split, with every sampler and every seed asked for."""
    rows, units = [], set()
    for folder in args.runs:
        run = open_run(folder, args.checkpoint, args.data_dir)
        units.add(run.dataset.unit)
        diffusion = run.model.noisy_mask
        K = (args.sampling_steps or run.config.sampling_steps) if diffusion else 1
        # Without diffusion there is no noise: one seed stands for all.
        for seed in range(args.seed, args.seed + (args.seeds if diffusion else 1)):
            for sampler in args.sampler.split(",") if diffusion else ["none"]:
                scores = score_run(run, args.split, sampler=sampler, K=K, seed=seed)
                shown = [sampler] * diffusion + [f"seed {seed}"] * (args.seeds > 1)
                rows.append((" ".join([run.folder.name, *shown]), scores))
    print(table(rows, "/".join(sorted(units))))
    print("\nper case and class: the CSV files in scores/ of each run")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("test", help="score runs at every sampling step")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    command.add_argument("--split", default="test", choices=["validation", "test"])
    command.add_argument("--sampler", default="ddpm,ddim", help="ddpm, ddim, or both")
    command.add_argument("--sampling-steps", type=int, default=0, help="K; 0: as trained")
    command.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    command.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    command.add_argument("--checkpoint", default="best", choices=["best", "last"])
    command.add_argument("--data-dir", default="", help="where the HDF5 file is, if it moved")
    command.set_defaults(run_command=test)
    command = commands.add_parser("predict", help="masks for images")
    command.add_argument("run", metavar="RUN", help="run folder of train.py")
    command.add_argument(
        "images", nargs="+", metavar="IMAGE",
        help="PNG, TIFF, JPEG or NIfTI; channels in several files: t1.nii,t1ce.nii,...; or folders of images",
    )  # fmt: skip
    command.add_argument("-o", "--output", default="", help="folder (default: RUN/predictions)")
    command.add_argument("--sampler", default="", help="ddpm or ddim (default: as validated)")
    command.add_argument("--sampling-steps", type=int, default=0, help="K; 0: as trained")
    command.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    command.add_argument("--seeds", type=int, default=1, help="average so many, and map their variance")
    command.add_argument("--probabilities", action="store_true", help="write those of every class, too")
    command.add_argument("--all-steps", action="store_true", help="write the mask of every sampling step")
    command.add_argument("--checkpoint", default="best", choices=["best", "last"])
    command.add_argument("--data-dir", default="", help="where the HDF5 file is, if it moved")
    command.set_defaults(run_command=predict)
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    if args.seeds < 1:
        parser.error("--seeds must be 1 or more")
    if unknown := set(filter(None, args.sampler.split(","))) - set(SAMPLERS):
        parser.error(f"--sampler: {', '.join(unknown)} is none of {', '.join(SAMPLERS)}")
    keep_compiled()
    keep_memory()
    try:
        args.run_command(args)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
