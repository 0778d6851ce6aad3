"""What does a trained network make of an image, and how good is that? Prediction by patches, Dice score and
Hausdorff distance at every sampling step: Sections 5.1.4, 5.2 and 6.1 of Fu et al. (2023).

    python evaluate.py test runs/phantom_us-rec_xT --sampler ddpm,ddim

scores every sampling step on the test split. It prints a table and writes CSV and JSON files into
the run's folder, from which report.py makes the paper's tables and figures. A trained network is a
single file, which needs nothing else:

    from evaluate import load
    model = load("runs/mine-rec_xT/best")           # or a file that somebody sent
    probability = model(image, spacing=(1.0, 1.0))  # of every class, on the image's own grid

Reading order: scores, prediction, the model and its file, the program.
"""

import argparse
import dataclasses
import io
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer, Key
from tqdm import tqdm

from data import Dataset, Sample, fingerprint, open_dataset
from diffusion import SAMPLERS, Image, Keys, Schedule, key_for, make_schedule, respace, sample
from recipes import recipe_of
from settings import ModelFacts, network_arguments, read_facts
from strategies import STRATEGIES, batched, make_denoise
from support.disk.command_line import Parser, add_sampling_options, add_scoring_options, check_counts
from support.machine.cpu_convolution import way_here
from support.disk.files import InputError, one_line, program, read_signed, write_signed
from support.raw.images import (
    IGNORED, Grid, Volume, as_volume, box_of, classes_on_grid, cut, flat, fullest_slice,
    is_nifti, most_probable, on_grid, read_channels, times,
)  # fmt: skip
from support.machine.devices import gathered, kind_of_device, prepare_machine, provenance, spread
from support.raw.pairing import check_channels
from support.raw.recipe import Recipe
from support.results.scores import CaseScores, RunScores, table, write_scores
from unet import NETWORKS

Classes = Integer[np.ndarray, "K *spatial"]  # the predicted ones, at every sampling step
Probabilities = Float[np.ndarray, "K *spatial classes"]

# --- Scores (§5.1.4) ----------------------------------------------------------------------------


def dice(prediction: Bool[np.ndarray, "*spatial"], label: Bool[np.ndarray, "*spatial"]) -> float:
    """Binary Dice score 2 |A and B| / (|A| + |B|), in [0, 1]; NaN if both are empty."""
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else float("nan")


def surface(mask: Bool[np.ndarray, "*spatial"]) -> Integer[np.ndarray, "n dims"]:
    """The indices of the voxels that touch the mask's outside along an axis, or the image's edge.
    Only the mask's bounding box is searched, since most structures are small in large volumes."""
    if not mask.any():
        return np.empty((0, mask.ndim), int)
    axes = range(mask.ndim)
    along = [np.flatnonzero(mask.any(axis=tuple(set(axes) - {axis}))) for axis in axes]
    box = tuple(slice(filled.min(), filled.max() + 1) for filled in along)
    inner = scipy.ndimage.binary_erosion(mask[box])  # the mask has no voxels beyond the box
    return np.argwhere(mask[box] & ~inner) + [filled.min() for filled in along]


def distances(
    a: Integer[np.ndarray, "n dims"], b: Integer[np.ndarray, "m dims"], spacing: Sequence[float]
) -> Float[np.ndarray, "n"]:
    """From each voxel of `a` to the nearest of `b`, in the unit of `spacing`; infinite if there is none."""
    return scipy.spatial.KDTree(b * np.array(spacing)).query(a * np.array(spacing))[0]


def hausdorff_95(
    prediction: Bool[np.ndarray, "*spatial"], label: Bool[np.ndarray, "*spatial"], spacing: Sequence[float]
) -> float:
    """95 % Hausdorff distance, in the unit of `spacing` (mm, or pixels in 2D): the larger of the two
    95th percentiles of the distances from one surface to the other.

    If both masks are empty, it is NaN. If one is empty, it is the length of the image's diagonal, the worst
    value, so that missing a class cannot improve the mean. A volume of one slice is a picture: along its
    short axis there is no surface.
    """
    long = [axis for axis, n in enumerate(label.shape) if n > 1]
    if 0 < len(long) < label.ndim:
        prediction, label = prediction.squeeze(), label.squeeze()
        spacing = [spacing[axis] for axis in long]
    if not prediction.any() or not label.any():
        diagonal = float(np.linalg.norm(np.array(label.shape) * spacing))
        return diagonal if prediction.any() or label.any() else float("nan")
    a, b = surface(prediction), surface(label)
    return float(max(np.percentile(distances(*pair, spacing), 95) for pair in ((a, b), (b, a))))


def score_class(
    prediction: Bool[np.ndarray, "*spatial"], truth: Bool[np.ndarray, "*spatial"],
    spacing: Sequence[float], *, distance: bool = True,
) -> tuple[float, float, str]:  # fmt: skip
    """Dice, 95 % Hausdorff distance (NaN without `distance`) and outcome of one class.

    Both scores are NaN if the truth does not have the class, so that the classes of a case's mean do not
    depend on the prediction: otherwise a class that one method invents would count for it, and for no other
    method with which it is compared. The outcome marks such classes, and missed ones.
    """
    nan, predicted = float("nan"), bool(prediction.any())
    if not truth.any():
        return nan, nan, "invented" if predicted else "absent"
    far = hausdorff_95(prediction, truth, spacing) if distance else nan
    return dice(prediction, truth), far, "found" if predicted else "missed"


def score(predictions: Classes, case: Sample, classes: int, *, last_distance: bool = False) -> CaseScores:
    """The scores of `score_class` for the predicted classes at every sampling step. With `last_distance`, the
    distance (the slower score) is computed at the last step only. What is predicted where the truth is
    IGNORED does not count."""
    shape = (len(predictions), classes - 1)
    dices, distances, outcome = np.empty(shape), np.empty(shape), np.empty(shape, "<U8")
    counted = case.label != IGNORED
    for k, j in np.ndindex(shape):
        masks = (predictions[k] == j + 1) & counted, case.label == j + 1
        measured = not last_distance or k == len(predictions) - 1
        one = score_class(*masks, case.spacing, distance=measured)
        dices[k, j], distances[k, j], outcome[k, j] = one
    return CaseScores(case.uid, dices, distances, outcome)


def score_masks(
    prediction: object, truth: object, spacing: object = (), threshold: float = -1.0
) -> dict[int, dict]:
    """Dice (in [0, 1]), 95 % Hausdorff distance (in the unit of `spacing`) and outcome of every foreground
    class that occurs in one of two masks of the same shape, or in both: {1: {"dice": 0.9, ...}, 2: ...}.

    `spacing` may be left out; then distances are in voxels. With a `threshold` (`model.facts.threshold`, for
    a truth as its file has it), the truth is class 1 above it. Dice and distance are NaN for a class that the
    truth lacks (`score_class`). Warns if the masks have no number in common, as when one has the classes 1,
    2, ... and the other one the numbers of its file. Raises InputError if the arrays do not fit together."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    spacing = tuple(map(float, spacing)) or (1.0,) * truth.ndim
    if prediction.shape != truth.shape or truth.ndim not in (2, 3) or not truth.size:
        shapes = f"{prediction.shape} and {truth.shape}"
        raise InputError(f"masks of shapes {shapes}: two of one shape in 2D or 3D are needed")
    if len(spacing) != truth.ndim or not all(0 < s < np.inf for s in spacing):
        raise InputError(f"spacing {spacing}: {truth.ndim} positive numbers are needed")
    masks = prediction, truth > threshold if threshold >= 0 else truth
    numbers = [{*np.unique(mask).tolist()} - {0} for mask in masks]
    if any(number < 0 or number % 1 for number in set.union(*numbers)):
        raise InputError("masks must be arrays of class numbers: 0 for background, 1, 2, ...")
    if all(numbers) and not set.intersection(*numbers):
        said = " and ".join(", ".join(f"{n:g}" for n in sorted(some)[:5]) for some in numbers)
        warnings.warn(f"the masks have no number in common ({said}); give both the same ones", stacklevel=2)
    names = "dice", "hausdorff_95", "outcome"
    return {
        int(c): dict(zip(names, score_class(*(mask == c for mask in masks), spacing), strict=True))
        for c in sorted(set.union(*numbers))
    }


def clean(dataset: str, predictions: Classes) -> Classes:
    """The predicted classes as §5.2 scores them: post-processed for muscle_us, unchanged for all others."""
    post_process = recipe_of(dataset).post_process
    return post_process(predictions) if post_process else predictions


# --- Prediction ---------------------------------------------------------------------------------

PATCHES_PER_BATCH = {2: 16, 3: 2}  # per number of spatial dimensions


class Blend(NamedTuple):
    """How the patches of an image overlap, and what each voxel of a patch counts in their mean."""

    overlap: float  # the least share of a patch that its neighbour covers, too
    sigma: float  # of a Gaussian about the patch's middle, as a share of its length


# The paper's plain mean (§5.2), and what nnU-Net and MONAI do: a voxel near a patch's edge, where the network
# sees little of its surroundings, counts less.
BLENDS = {"mean": Blend(0.0, float("inf")), "gaussian": Blend(0.5, 1 / 8)}


def prediction_program(
    network: eqx.Module, patch_shape: Sequence[int], sampler: str, prediction: str
) -> Callable[[eqx.Module, Schedule, Image, Keys], Array]:
    """The program from a network, a re-spaced schedule, images and keys to the class probabilities of a batch
    of patches at every sampling step (one "step" without diffusion), compiled with the network's options."""
    return _program(tuple(network.compiler_options(patch_shape).items()), sampler, prediction)


@cache
def _program(options: tuple[tuple[str, str], ...], sampler: str, prediction: str) -> Callable:
    @partial(jax.jit, compiler_options=dict(options))
    def predict(network: eqx.Module, schedule: Schedule, image: Image, keys: Keys) -> Array:
        denoise = make_denoise(batched(network), schedule, prediction)
        if not network.noisy_mask:
            return jax.nn.softmax(denoise(image, None, None, None).output, axis=-1)[None]
        masks = sample(
            schedule, lambda *given: denoise(*given).x_0_hat, image, keys,
            classes=network.classes, sampler=SAMPLERS[sampler], self_condition=network.self_condition,
        )  # fmt: skip
        positive = (masks + 1) / 2
        # Softmax sums to 1; masks from a predicted eps are clipped class by class, at worst all to -1.
        return normalised(positive) if prediction == "eps" else positive

    return predict


def normalised(positive: Float[Array, "*places classes"]) -> Float[Array, "*places classes"]:
    """Numbers from 0 to 1 as probabilities, whose sum over the classes is 1; equal ones if all are 0."""
    total = positive.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1), 1 / positive.shape[-1])


def patch_starts(
    shape: Sequence[int], patch_shape: Sequence[int], overlap: float = 0.0
) -> list[tuple[int, ...]]:
    """The starts of the fewest evenly spread patches that cover an image and whose neighbours overlap by at
    least the share `overlap` of their length. With 0 the overlaps are those of §5.2: 64 x 0 x 0 (abdominal
    CT), 0 x 0 x 16 (prostate), 77 x 37 x 101 (brain)."""
    axes = []
    for size, patch in zip(shape, patch_shape, strict=True):
        stride = max(int(patch * (1 - overlap)), 1)  # at most
        count = -(-max(size - patch, 0) // stride) + 1
        axes.append([round(i * (size - patch) / max(count - 1, 1)) for i in range(count)])
    return list(product(*axes))


def patch_weight(patch_shape: Sequence[int], sigma: float) -> Float[np.ndarray, "*patch"]:
    """What each voxel of a patch counts in the mean of overlapping patches, 1 in the middle."""
    axes = [(np.arange(n) - (n - 1) / 2) / (sigma * n) for n in patch_shape]
    squares = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True))
    return np.exp(-squares / 2).astype(np.float32)


def predict_cases(
    predict: Callable[[np.ndarray, Keys], np.ndarray], cases: Iterable[Sample], key: Key[Array, ""], *,
    patch_shape: Sequence[int], batch_size: int, first: int = 0, blend: str = "mean",
) -> Iterator[tuple[Sample, Probabilities]]:  # fmt: skip
    """Every case with its class probabilities at every sampling step. `predict(image, keys)` gives those of
    a batch of patches, [K, batch, *patch, classes]. If patches overlap, the probabilities are averaged (§5.2;
    `blend` is one of BLENDS). Patches of several cases share batches of one fixed size, so that one
    compilation serves all sizes; a patch's noise depends only on `key`, the case's number (counted from
    `first`) and the patch's number."""
    overlap, sigma = BLENDS[blend]
    weight = patch_weight(patch_shape, sigma)
    sums: deque[PatchSum] = deque()

    def patches() -> Iterator[tuple[PatchSum, tuple[slice, ...], np.ndarray, Array]]:
        for number, case in enumerate(cases, first):
            sums.append(PatchSum(case, patch_shape, overlap))
            for i, (where, image) in enumerate(sums[-1].patches()):
                yield sums[-1], where, image, jax.random.fold_in(jax.random.fold_in(key, number), i)

    waiting = patches()
    while now := list(islice(waiting, batch_size)):
        filled = now + [now[-1]] * (batch_size - len(now))
        _, _, images, keys = zip(*filled, strict=True)
        result = predict(np.stack(images), jnp.stack(keys))
        for b, (total, where, _, _) in enumerate(now):
            total.add(where, result[:, b], weight)
        while sums and sums[0].left == 0:
            yield sums.popleft().mean()


class PatchSum:
    """The patches of one case, and the sum of their probabilities on its (padded) grid."""

    def __init__(self, case: Sample, patch_shape: Sequence[int], overlap: float):
        padded = [max(size) for size in zip(case.label.shape, patch_shape, strict=True)]
        self.case, self.patch_shape = case, patch_shape
        self.image, self.inside = box_of(case.image, padded)  # a smaller image is in the patch's middle
        self.starts = patch_starts(padded, patch_shape, overlap)
        self.left = len(self.starts)
        self.total: np.ndarray | None = None
        self.count = np.zeros(padded, np.float32)

    def patches(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        for start in self.starts:
            where = tuple(slice(a, a + n) for a, n in zip(start, self.patch_shape, strict=True))
            yield where, self.image[where]

    def add(self, where: tuple[slice, ...], probability: np.ndarray, weight: np.ndarray) -> None:
        if self.total is None:
            K, *_, classes = probability.shape
            self.total = np.zeros((K, *self.count.shape, classes), np.float32)
        self.total[:, *where] += probability * weight[..., None]
        self.count[where] += weight
        self.left -= 1

    def mean(self) -> tuple[Sample, np.ndarray]:
        mean = self.total[:, *self.inside] / self.count[self.inside][..., None]
        return self.case, mean


# --- The model and its file ---------------------------------------------------------------------


class Sampling(NamedTuple):
    """How masks are drawn, and how the patches of an image are put together. Without diffusion, only `blend`
    has a meaning."""

    sampler: str
    K: int
    seed: int
    blend: str


def files_of(text: str | Path) -> list[Path]:
    """The files of an image: one, or one per channel, typed with commas between them."""
    return [Path(text)] if Path(text).exists() else [Path(part) for part in str(text).split(",")]


class Model(NamedTuple):
    """A trained network, the facts about it, and the file that both were read from (in training, a name for
    the file in the run's folder)."""

    network: eqx.Module
    facts: ModelFacts
    path: Path

    def __repr__(self) -> str:
        facts, config = self.facts, self.facts.config
        score = f"{100 * facts.dice:.2f} %" if facts.dice >= 0 else "-"
        return (
            f"{self.path}: {config.strategy}, {facts.step} steps on {config.dataset} ({facts.source}), "
            f"validation Dice {score}\n    patches of {times(config.patch_shape)}, channels "
            f"{', '.join(facts.channel_names) or facts.image_channels}, "
            f"classes {', '.join(facts.class_names)}"
        )

    def __call__(
        self, image: object, spacing: object = (), *, all_steps: bool = False, **sampling: str | int
    ) -> Float[np.ndarray, "..."]:  # fmt: skip
        """Class probabilities [*spatial, classes] of an image, on its own grid; with `all_steps` those of
        every sampling step, [K, *spatial, classes].

        The image is the path of a file (or the paths of one file per channel, with commas between them), or
        an array [*spatial] or [*spatial, channels] whose axes are those of the training images (for volumes:
        right, anterior, superior); a picture's colours are made grey, or grey is repeated, as the network
        needs. `spacing` is given with an array only: in mm for volumes, and in pixels for pictures, where it
        may be left out. The image is prepared like the training images. `sampling` holds arguments of
        `Model.sampling`. Raises InputError.
        """
        facts, path = self.facts, Path("image")
        if isinstance(image, str | Path):
            path, *others = files_of(image)
            if np.size(spacing):
                raise InputError(f"{path}: its spacing is that of the file; leave spacing out")
            volume, grid = self.read([path, *others])
        else:
            dims = len(facts.config.patch_shape)
            volume = as_volume(image, spacing, dims, facts.image_channels, facts.unit)
            grid = Grid((*volume.label.shape, 1)[:3], volume.affine)
        case = self.prepare(volume, path)
        steps = self.predict_image(case, self.sampling(**sampling))
        placed = [classes_on_grid(step, case.affine, grid) for step in (steps if all_steps else steps[-1:])]
        probability = np.stack(placed).reshape(len(placed), *grid.shape[: volume.label.ndim], -1)
        return probability if all_steps else probability[0]

    def read(self, files: Sequence[Path]) -> tuple[Volume, Grid]:
        """A raw image, in one file or in one per channel, for `prepare`, and the first file's grid. Raises
        InputError if the network was trained on images of another kind."""
        facts, first, volumes = self.facts, files[0], self.facts.unit == "mm"
        if not self.recipe().plan:
            fix = "train on real ones to predict real ones"
            raise InputError(f"{self.path}: trained on made-up images; {fix}")
        for file in files:
            if file.is_file() and is_nifti(file) != volumes:
                kind = "NIfTI files: give the one that this picture is a slice of" if volumes else "pictures"
                raise InputError(f"{file}: {self.path} takes {kind}")
        if len(files) == len(facts.channel_names):
            check_channels(files, facts.channel_names)
        volume, grid = read_channels(files, facts.image_channels, facts.geometry)
        if (channels := volume.image.shape[-1]) != facts.image_channels:
            fix = "; give their files with commas between them" if channels < facts.image_channels else ""
            raise InputError(
                f"{first}: {channels} channels, but {self.path} was trained on {facts.image_channels}{fix}"
            )
        return volume, grid

    def prepare(self, volume: Volume, path: Path) -> Sample:
        """A raw image, prepared like the training images (§5.2). Raises InputError, whose message
        begins with `path`."""
        dims = len(self.facts.config.patch_shape)
        if (given := flat(volume).label.ndim) != dims:
            takes = "slices; give them one by one" if dims == 2 else "volumes; give the whole one"
            raise InputError(f"{path}: {given}D, but {self.path} takes {takes}")
        colours = self.facts.unit == "pixel" and self.facts.image_channels == 3
        if colours and (volume.image == volume.image[..., :1]).all():
            print(f"NB: {path} is grey, which is used as red, green and blue", file=sys.stderr)
        prepared = self.recipe().prepare(volume, path)
        return Sample(prepared.image, prepared.label, prepared.spacing(), path.name, prepared.affine)

    def recipe(self) -> Recipe:
        """What is particular to the data set that the network was trained on."""
        return recipe_of(self.facts.config.dataset, self.facts.spacing)

    def sampling(self, *, sampler: str = "", K: int = 0, seed: int = 0, blend: str = "") -> Sampling:
        """How masks are sampled: as in the network's validation, with these changes. Raises InputError if one
        of them is unknown, or if the network was trained on fewer than K noise levels."""
        config = self.facts.config
        chosen = Sampling(sampler or config.sampler, K or config.sampling_steps, seed, blend or config.blend)
        if chosen.blend not in BLENDS:
            raise InputError(f"blend {chosen.blend} is not one of {', '.join(BLENDS)}")
        if self.network.noisy_mask and chosen.sampler not in SAMPLERS:
            raise InputError(f"sampler {chosen.sampler} is not one of {', '.join(SAMPLERS)}")
        if not 1 <= chosen.K <= config.train_timesteps:
            raise InputError(f"{K} sampling steps: the number must be from 1 to {config.train_timesteps}")
        return chosen

    def predict(
        self, cases: Iterable[Sample], sampling: Sampling | None = None, *, first: int = 0,
        batch_size: int = 0, mesh: Mesh | None = None,
    ) -> Iterator[tuple[Sample, Probabilities]]:  # fmt: skip
        """`predict_cases` with this network. The devices of `mesh` share every batch."""
        config, how = self.facts.config, sampling or self.sampling()
        devices = mesh.shape["data"] if mesh else 1
        batch_size = batch_size or -(-PATCHES_PER_BATCH[len(config.patch_shape)] // devices) * devices
        schedule = respace(make_schedule(config.schedule, config.train_timesteps, config.signal), how.K)
        program = prediction_program(self.network, config.patch_shape, how.sampler, config.prediction)

        def probabilities(image: np.ndarray, keys: Keys) -> np.ndarray:
            return gathered(program(self.network, schedule, *spread((image, keys), mesh)))

        return predict_cases(
            probabilities, cases, key_for("sampling", how.seed), patch_shape=config.patch_shape,
            batch_size=batch_size, first=first, blend=how.blend,
        )  # fmt: skip

    def predict_image(self, case: Sample, sampling: Sampling | None = None) -> Probabilities:
        """Probabilities of one prepared image, patch by patch: it has the noise of a first case, and shares
        no batch, so that the result does not depend on other images."""
        return next(self.predict([case], sampling, batch_size=1))[1]

    def dataset(self, data_dir: str = "") -> Dataset:
        """The data set that the network was trained on, from its folder in training or another one.
        Raises InputError if its cases have changed."""
        facts, name = self.facts, self.facts.config.dataset
        dataset = open_dataset(name, Path(data_dir or facts.config.data_dir), facts.config.phantom_shape)
        if facts.cases != fingerprint(dataset):
            raise InputError(
                f"{self.path}: {name} now has other cases, splits, classes or channels, so that its test "
                "cases may be among those trained on; train again"
            )
        spacing = dataset.load("train", 0).spacing if facts.spacing else ()
        if len(spacing) != len(facts.spacing) or not np.allclose(spacing, facts.spacing, rtol=1e-3):
            raise InputError(
                f"{self.path}: trained on images of spacing {times(facts.spacing)}, but {name} now has "
                f"{times(spacing)}; build it as it was for that training"
            )
        return dataset


FORMAT_VERSION = 2  # of a model file; version 1 had some settings twice


def save(path: Path, network: eqx.Module, facts: ModelFacts) -> None:
    """Writes a model file: a line with a checksum, a line of JSON with the facts, then the arrays."""
    arrays = io.BytesIO()
    eqx.tree_serialise_leaves(arrays, network)
    write_signed(path, {"model": FORMAT_VERSION, **dataclasses.asdict(facts)}, arrays.getvalue())


def load(path: str | Path) -> Model:
    """The model in a file, or in a run's folder (its `best`). Raises InputError if it is missing, damaged, of
    another version of this code, or if this copy of the code lacks what it needs."""
    path = Path(path) / "best" if Path(path).is_dir() else Path(path)
    header, arrays = read_signed(path)
    if header.pop("model", None) not in (1, FORMAT_VERSION):
        fix = "give a run's best or final, or train it again"
        raise InputError(f"{path}: not a model file of this version of the code; {fix}")
    kind_of_device()  # raises an error of its own, which is no fault of the file
    try:
        needs = dict(header["config"])
        network = needs.get("network", "UNet")
        recipe_of(str(needs["dataset"]))  # there must be one
        if network not in NETWORKS:
            raise InputError(f"needs the network {network} in NETWORKS of unet.py; add it there")
        facts = read_facts(header)
        arguments = network_arguments(facts.config, facts.image_channels, len(facts.class_names))
        arguments["convolutions"] = way_here(facts.config.convolutions)
        like = eqx.filter_eval_shape(NETWORKS[network], **arguments, key=jax.random.key(0))
        return Model(eqx.tree_deserialise_leaves(io.BytesIO(arrays), like), facts, path)
    except InputError as error:
        raise InputError(f"{path}: not a model of this version of the code: {error}") from error
    except Exception as error:  # facts and arrays that do not belong together can fail anywhere
        why = f"not a model file of this version of the code ({one_line(error)})"
        raise InputError(f"{path}: {why}; train it again") from error


# --- The program --------------------------------------------------------------------------------


def on_own_grid(probability: Probabilities, case: Sample) -> Integer[np.ndarray, "K ..."]:
    """The most probable classes of a prepared case at the voxels of its own label, at every step."""
    grid = Grid((*case.own_label.shape, 1)[:3], case.own_affine)
    return np.stack([most_probable(step, case.affine, grid) for step in probability]).reshape(
        len(probability), *case.own_label.shape
    )


def in_pictures(
    case: Sample, classes: Classes, probability: Probabilities
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], Integer[np.ndarray, "K ..."]]:
    """What is drawn of a case: its image and truth, their spacing, and its predicted classes at every step;
    of a volume, the slice that has the most foreground. They are on the image's own grid, to which
    probabilities and the prepared image are resampled, if that is another one."""
    if case.own_label is None:
        z = fullest_slice(case.label)
        return cut(case.image[..., 0], z), cut(case.label, z), case.spacing, cut(classes, z)
    z = fullest_slice(case.own_label)
    label, affine = cut(case.own_label, z), case.own_affine.copy()
    affine[:, 3] += (z or 0) * affine[:, 2]
    grid, spacing = Grid((*label.shape, 1)[:3], affine), Volume(case.image, label, affine).spacing()
    image = on_grid(case.image[..., 0], case.affine, grid, float(case.image[..., 0].min()))
    placed = on_own_grid(probability, case._replace(own_label=label, own_affine=affine))
    return image.reshape(label.shape), label, spacing, placed


def scores_of(model: Model, sampler: str, cases: Sequence[CaseScores]) -> RunScores:
    """The scores of a model's cases as arrays, with the settings that they belong to."""
    facts, (uids, *arrays) = model.facts, zip(*cases, strict=True)
    return RunScores(
        STRATEGIES[facts.config.strategy].title, dataclasses.asdict(facts.config), sampler, facts.unit,
        facts.source, facts.step, facts.class_names[1:], uids, (model.path.parent,),
        *(np.stack(array)[None] for array in arrays),
    )  # fmt: skip


def score_split(
    model: Model, dataset: Dataset, split: str, *, sampler: str, K: int, seed: int
) -> tuple[RunScores, RunScores | None]:
    """The scores of a split's cases on the prepared grid, and those on the grid of their own files of the
    cases where that is another one (None if there are no such cases). On their own grid distances are
    computed at the last step only, because they are slow on large images. Both are also written to `scores/`
    and `scores/own_grid/` beside the model."""
    count = len(dataset.uids[split])
    facts, run = model.facts, model.path.resolve().parent
    if not count:
        raise InputError(f"{dataset.name}: no {split} cases; build it again with some")
    cases = (dataset.load(split, i) for i in range(count))
    predictions = model.predict(cases, model.sampling(sampler=sampler, K=K, seed=seed))
    scores: list[CaseScores] = []
    own: list[CaseScores] = []
    for case, probability in tqdm(predictions, f"{run.name} {sampler} {K}", count):
        classes = probability.shape[-1]
        scores.append(score(clean(facts.config.dataset, probability.argmax(-1)), case, classes))
        if case.own_label is not None:
            spacing = Volume(case.image, case.own_label, case.own_affine).spacing()
            truth = case._replace(label=case.own_label, spacing=spacing)
            own.append(score(on_own_grid(probability, case), truth, classes, last_distance=True))
    ran = {"split": split, "sampling_steps": K, "seed": seed, "checkpoint": model.path.name, **provenance()}
    prepared, placed = scores_of(model, sampler, scores), scores_of(model, sampler, own) if own else None
    write_scores(run / "scores", prepared, ran)
    if placed:
        write_scores(run / "scores" / "own_grid", placed, ran)
    return prepared, placed


def test(args: argparse.Namespace) -> None:
    """`evaluate.py test`: score runs on a split, with every sampler and every seed asked for."""
    rows = []
    for run in args.runs:
        model, name = load(run / args.checkpoint if run.is_dir() else run), run.resolve().name
        dataset, facts, diffusion = model.dataset(args.data_dir), model.facts, model.network.noisy_mask
        K = (args.sampling_steps or facts.config.sampling_steps) if diffusion else 1
        # Without diffusion there is no noise, so one seed suffices.
        for seed in range(args.seed, args.seed + (args.seeds if diffusion else 1)):
            for sampler in args.sampler.split(",") if diffusion else ["none"]:
                scores, own = score_split(model, dataset, args.split, sampler=sampler, K=K, seed=seed)
                label = " ".join([name, *[sampler] * diffusion, *[f"seed {seed}"] * (args.seeds > 1)])
                rows.append((label, scores))
                if own:
                    rows.append((f"{label}, own grid", own))
    print(table(rows))
    if any(name.endswith("own grid") for name, _ in rows):
        print(
            "\nown grid: that of the image's file, on which predict.py writes masks; report these scores to "
            "others. The other rows are on\nthe grid of prepare.py, as in the paper and in report.py."
        )
    print("\nscores per case and class: the CSV files in scores/ of each run")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("test", help="Score runs at every sampling step.")
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="Run folders of train.py, or model files."
    )
    command.add_argument("--sampler", default="ddpm,ddim", help="ddpm, ddim, or both. Default: both.")
    command.add_argument(
        "--seeds", type=int, default=1, help="How many seeds are scored, starting with --seed. Default: 1."
    )
    add_scoring_options(command)
    add_sampling_options(command)
    args = parser.parse_args(argv)
    check_counts(parser, args, seed=0, seeds=1, sampling_steps=0)
    if unknown := sorted(set(args.sampler.split(",")) - set(SAMPLERS)):
        parser.error(f"--sampler: {unknown[0]!r} is not one of {', '.join(SAMPLERS)}")
    prepare_machine()
    with program():
        test(args)


if __name__ == "__main__":
    main()
