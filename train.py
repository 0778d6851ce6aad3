"""How do diffusion, network, strategy and data compose into one training step, and a run?
Section 5.3 of Fu et al. (2023).

    python train.py                                           # phantom_us, rec_xT: minutes on a laptop
    python train.py --dataset muscle_us --strategy rec_xT     # the paper's (needs the data: README)

The same command again goes on from the last checkpoint. A run's folder holds the checkpoints `last`,
`previous` (the one before) and `best`, `log.jsonl`, and pictures. Reading order: Config, TrainState,
make_train_step, train.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from tqdm import tqdm

from data import (
    Batch,
    Dataset,
    InputError,
    augment,
    batch_indices,
    fingerprint,
    make_batch,
    one_line,
    open_dataset,
    prefetch,
    replace_file,
    tuples,
)
from diffusion import (
    SAMPLERS,
    Keys,
    Schedule,
    TimeSampler,
    cosine_schedule,
    linear_schedule,
    make_time_sampler,
    respace,
    sample_t,
    update,
)
from evaluate import (
    COLOURS,
    Score,
    keep_compiled,
    keep_memory,
    mean_std,
    network,
    picture,
    predict_cases,
    provenance,
    score,
    table,
)
from strategies import (
    STRATEGIES,
    Denoised,
    make_denoise,
    noise_loss,
    one_hot,
    segmentation_loss,
    soft_dice,
)
from unet import UNet, compiler_options, count_parameters

T = 1001  # §5.3: the noise levels of the paper's schedule
PATCHES_PER_BATCH = {2: 16, 3: 2}  # in prediction, per number of spatial dimensions


# --- Settings -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the paper's; PRESETS has what differs per data set."""

    dataset: Annotated[str, "which data; see PRESETS"] = "phantom_us"
    strategy: Annotated[str, "how to train; see strategies.STRATEGIES"] = "rec_xT"
    data_dir: Annotated[str, "where <dataset>.h5 is"] = "data"
    run_dir: Annotated[str, "where the run goes; empty: runs/<dataset>-<strategy>"] = ""
    seed: Annotated[int, "of weights, data order, augmentation, times and noise"] = 0
    # The network (§5.3, Figure 2)
    channels: Annotated[tuple[int, ...], "per level"] = (32, 64, 128, 256)
    strides: Annotated[tuple[tuple[int, ...], ...], "per down-sampling"] = ((2, 2), (2, 2), (2, 2))
    transformer: Annotated[bool, "at the lowest level"] = True
    heads: Annotated[int, "of the Transformer"] = 8
    head_dim: Annotated[int, "of the Transformer"] = 64
    time_dim: Annotated[int, "of the time embedding; 0: the network is not told t"] = 256
    patch_shape: Annotated[tuple[int, ...], "voxels that the network sees at once"] = (480, 512)
    dtype: Annotated[str, "of convolutions: float32, bfloat16; auto: bfloat16 but on a CPU"] = "auto"
    convolutions: Annotated[str, "XLA's own: native; in parts, for XLA on a CPU: cpu; auto"] = "auto"
    remat: Annotated[int, "levels, from the top, whose blocks are recomputed to save memory"] = 0
    # Diffusion (§3, §5.3)
    train_timesteps: Annotated[int, "noise levels to train at, of T = 1001 (Table 10: 5)"] = 1001
    schedule: Annotated[str, "of beta_t: linear, cosine"] = "linear"
    sampling_steps: Annotated[int, "K"] = 5
    sampler: Annotated[str, "in validation: ddpm, ddim"] = "ddpm"
    prediction: Annotated[str, "what the network predicts: x_0, eps (App. A.4)"] = "x_0"
    time_sampling: Annotated[str, "of t: importance, uniform"] = "importance"
    time_history: Annotated[int, "losses per t before importance sampling starts"] = 10
    ema_decay: Annotated[float, "of averaged weights; 0: none are kept"] = 0.0
    teacher: Annotated[str, "makes the first of two predictions: model, ema (§4)"] = "model"
    evaluate_with: Annotated[str, "validated and tested: model, ema"] = "model"
    # Optimisation (Table 6 is lost: the authors' public settings)
    steps: Annotated[int, "optimizer steps"] = 12_500
    batch_size: Annotated[int, "patches per step, over all devices"] = 8
    accumulate: Annotated[int, "a batch is passed in so many parts"] = 1
    learning_rate: Annotated[float, "at its peak"] = 8e-4
    learning_rate_start: Annotated[float, "before warm-up"] = 1e-5
    learning_rate_end: Annotated[float, "after the cosine"] = 5e-5
    warmup_steps: Annotated[int, "at most half of decay_steps"] = 100
    decay_steps: Annotated[int, "where the cosine ends; 0: at the last step"] = 10_000
    weight_decay: Annotated[float, "of AdamW"] = 1e-8
    clip_norm: Annotated[float, "of the whole gradient"] = 1.0
    # Augmentation (§5.3; limits: the authors' public settings)
    rotation: Annotated[float, "radians, about every axis, at most"] = 0.088
    scaling: Annotated[float, "share, per axis, at most"] = 0.15
    translation: Annotated[tuple[int, ...], "voxels, per axis, at most"] = (10, 10)
    # The run
    mesh: Annotated[str, "devices, over batch and first axis: data=4,space=2; empty: data alone"] = ""
    validate_every: Annotated[int, "steps; also the time between checkpoints (§5.3)"] = 500
    validation_cases: Annotated[int, "the first so many; 0: all"] = 0
    save_every: Annotated[str, "checkpoint between validations: in steps (200) or minutes (10m)"] = "10m"
    log_every: Annotated[int, "steps"] = 50
    skip_limit: Annotated[int, "steps in a row without a finite loss and gradient, that end a run"] = 10
    phantom_shape: Annotated[tuple[int, ...], "size of the made-up images"] = ()


VOLUME = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
SMALL = {  # networks and runs for a laptop, too short for importance sampling to see every t often
    "heads": 4, "head_dim": 16, "channels": (16, 32, 64), "decay_steps": 0, "learning_rate_end": 1e-5,
    "time_sampling": "uniform",
}  # fmt: skip
PRESETS: dict[str, dict] = {
    "muscle_us": {"batch_size": 64, "steps": 8000},
    "amos_ct": {"patch_shape": (128, 128, 128), "strides": VOLUME, "translation": (10, 10, 10)},
    "prostate_mr": {
        "patch_shape": (256, 256, 32), "translation": (20, 20, 4),
        "strides": ((2, 2, 1), (2, 2, 2), (2, 2, 2)),  # 32 slices are few
        "remat": 1,  # else it takes a little more than a core of the paper's TPU v3 has
    },
    "brats_mr": {"patch_shape": (128, 128, 128), "strides": VOLUME, "translation": (20, 20, 4)},
    "hippocampus_mr": SMALL | {
        "patch_shape": (32, 48, 32), "strides": VOLUME[:2], "translation": (3, 3, 3), "batch_size": 2,
        "channels": (8, 16, 32), "steps": 1000, "validate_every": 250, "validation_cases": 8,
    },
    # One's own images: shapes, strides and translation are written in the file.
    "folder": SMALL | {
        "batch_size": 4, "steps": 1000, "validate_every": 250, "validation_cases": 16,
    },
    "phantom_us": SMALL | {
        "patch_shape": (32, 32), "phantom_shape": (32, 32), "strides": ((2, 2), (2, 2)),
        "translation": (2, 2), "steps": 1500, "learning_rate": 1e-3,
    },
    "phantom_ct": SMALL | {
        "patch_shape": (32, 32, 16), "phantom_shape": (40, 40, 16), "strides": ((2, 2, 1), (2, 2, 2)),
        "translation": (3, 3, 1), "batch_size": 4, "steps": 600, "validate_every": 200,
    },
}  # fmt: skip

# What may differ when a run goes on: nothing that changes what is learned.
MAY_CHANGE = {"steps", "data_dir", "run_dir", "remat", "mesh", "log_every", "save_every"}
CHOICES: dict[str, list] = {
    "strategy": list(STRATEGIES), "dtype": ["auto", "float32", "bfloat16"],
    "convolutions": ["auto", "native", "cpu"],
    "schedule": ["linear", "cosine"], "sampler": list(SAMPLERS), "prediction": ["x_0", "eps"],
    "time_sampling": ["importance", "uniform"], "teacher": ["model", "ema"],
    "evaluate_with": ["model", "ema"],
}  # fmt: skip


def parse_config(argv: Sequence[str] | None) -> tuple[Config, bool]:
    """The settings of a command line: the paper's, the data set's preset, for folder:NAME what its file
    proposes, then what is typed. Tuples are typed 16,32,64 and strides 2x2x1,2x2x2. The second result
    is --fresh. Raises InputError where that file cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = get_type_hints(Config, include_extras=True)
    for field in dataclasses.fields(Config):
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        text = f"{hints[field.name].__metadata__[0]} (default: {field.default}, where no preset says more)"
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        elif kind is tuple:
            nested = field.name == "strides"
            read = _strides if nested else _numbers
            parser.add_argument(option, type=read, metavar="NxN,NxN" if nested else "N,N", help=text)
        else:
            parser.add_argument(option, type=kind, choices=CHOICES.get(field.name), help=text)
    parser.add_argument("--fresh", action="store_true", help="start over; an old run is moved aside")
    parser.add_argument(
        "--hosts", metavar="ADDRESS:PORT,COUNT,NUMBER", help="one of several processes: the address of the "
        "first, how many they are, and which this one is (0, 1, ...); on a TPU pod or with Slurm: auto",
    )  # fmt: skip
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    fresh = typed.pop("fresh")
    join_hosts(typed.pop("hosts", ""))  # before anything asks which devices there are
    name = typed.get("dataset", Config.dataset)
    kind, _, own = name.partition(":")
    if kind not in PRESETS or (kind == "folder") != bool(own):
        known = ", ".join(n for n in PRESETS if n != "folder")
        parser.error(f"--dataset {name} is none of {known}, folder:NAME")
    preset = PRESETS[kind]
    if own:
        data_dir = Path(typed.get("data_dir", Config.data_dir))
        preset = preset | open_dataset(name, data_dir, ()).settings
    settings = preset | typed
    if settings.get("dtype", "auto") == "auto":
        settings["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if settings.get("convolutions", "auto") == "auto":
        settings["convolutions"] = "cpu" if jax.default_backend() == "cpu" else "native"
    run_dir = f"runs/{name.replace(':', '-')}-{settings.get('strategy', Config.strategy)}"
    return Config(**{"run_dir": run_dir} | settings), fresh


def _numbers(text: str) -> tuple[int, ...]:
    """ "16,32" -> (16, 32)."""
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16,32,64") from None


def _strides(text: str) -> tuple[tuple[int, ...], ...]:
    """ "2x2,2x1" -> ((2, 2), (2, 1))."""
    try:
        return tuple(_numbers(part.replace("x", ",")) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2x2,2x1") from None


LEAST = {  # the lowest value of every number that has one, also of each number in a tuple
    0: ["seed", "remat", "time_dim", "ema_decay", "learning_rate_start", "learning_rate_end", "warmup_steps",
        "decay_steps", "weight_decay", "rotation", "scaling", "translation", "validation_cases"],
    1: ["channels", "strides", "heads", "head_dim", "patch_shape", "sampling_steps", "time_history",
        "steps", "batch_size", "accumulate", "validate_every", "log_every", "skip_limit"],
    2: ["train_timesteps"],
}  # fmt: skip


def check_settings(config: Config) -> None:
    """Raises InputError, one line, where settings are of a wrong kind, or cannot work together."""
    for field in dataclasses.fields(Config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        kind = type(field.default)
        numbers = kind is not tuple or all(type(n) is int for n in jax.tree.leaves(value))
        if type(value) not in (kind, int if kind is float else kind) or not numbers:
            raise InputError(f"{option} {value!r} is not like {field.default!r}")
        if kind is float and not math.isfinite(value):
            raise InputError(f"{option} {value} is not finite")
        if value not in CHOICES.get(field.name, [value]):
            raise InputError(f"{option} {value} is none of {', '.join(CHOICES[field.name])}")
    for least, names in LEAST.items():
        for name in names:
            if min(jax.tree.leaves(getattr(config, name)), default=least) < least:
                raise InputError(f"--{name.replace('_', '-')} must be {least} or more")
    dims, levels = len(config.patch_shape), len(config.channels)
    wrong = None
    if len(config.translation) != dims:
        wrong = f"--translation needs {dims} numbers"
    elif len(config.strides) != levels - 1 or any(
        type(stride) is not tuple or len(stride) != dims for stride in config.strides
    ):
        wrong = f"--strides needs one entry of {dims} numbers per entry of --channels, less one"
    elif (np.array(config.patch_shape) <= np.prod([(1,) * dims, *config.strides], axis=0)).all():
        wrong = "--patch-shape leaves one voxel at the lowest level; use a larger patch or fewer --strides"
    elif config.ema_decay >= 1 or ("ema" in (config.teacher, config.evaluate_with) and not config.ema_decay):
        wrong = "--ema-decay must be under 1, and above 0 for --teacher ema and --evaluate-with ema"
    elif config.prediction == "eps" and not STRATEGIES[config.strategy].noisy_mask:
        wrong = "--prediction eps needs a diffusion strategy"
    elif not config.sampling_steps <= config.train_timesteps <= T:
        wrong = f"--sampling-steps <= --train-timesteps <= {T} is needed"
    elif config.time_dim % 2 or config.scaling >= 1 or min(config.learning_rate, config.clip_norm) <= 0:
        wrong = "--time-dim must be even, --scaling under 1, --learning-rate and --clip-norm above 0"
    elif config.mesh and not re.fullmatch(r"data=[1-9]\d*(,space=[1-9]\d*)?", config.mesh):
        wrong = f"--mesh {config.mesh} is not like data=4,space=2"
    elif not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?m", config.save_every):
        wrong = f"--save-every {config.save_every} is neither steps, like 200, nor minutes, like 10m"
    if wrong:
        raise InputError(wrong)


def check_config(config: Config, dataset: Dataset, mesh: Mesh) -> None:
    """Raises InputError, one line, where settings cannot work, alone or with the data and devices."""
    dims = len(dataset.canvas)
    if len(config.patch_shape) != dims:
        raise InputError(f"--patch-shape {config.patch_shape}: {config.dataset} is {dims}D")
    check_settings(config)
    data, space = mesh.shape["data"], mesh.shape["space"]
    if config.batch_size % (config.accumulate * data):
        raise InputError(
            f"--batch-size {config.batch_size} must be a multiple of --accumulate x {data} devices"
        )
    if config.patch_shape[0] % space:
        raise InputError(f"--patch-shape {config.patch_shape}: the first must be a multiple of space={space}")
    if not dataset.uids["validation"]:
        raise InputError(f"{config.dataset} has no validation cases; build it again with some")


# --- Devices and hosts --------------------------------------------------------------------------


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (all, where not given) on two axes: a batch is split over `data`, the first axis of its
    images, and of all that the network makes of them, over `space`; XLA exchanges the borders. Raises
    InputError."""
    count = len(jax.devices() if devices is None else devices)
    axes = dict(part.split("=") for part in (config.mesh or f"data={count}").split(","))
    shape = (int(axes["data"]), int(axes.get("space", 1)))
    if math.prod(shape) != count:
        raise InputError(f"--mesh {config.mesh} is for {math.prod(shape)} devices, here are {count}")
    return jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding, NamedSharding]:
    """For images and masks; for what has one entry per example; for what every device has whole."""
    specs = PartitionSpec("data", "space"), PartitionSpec("data"), PartitionSpec()
    return tuple(NamedSharding(mesh, spec) for spec in specs)


def join_hosts(hosts: str) -> None:
    """Makes this process one of several that train together, each on its own devices and with its own part
    of every batch. Raises InputError."""
    try:
        if hosts == "auto":
            jax.distributed.initialize()
        elif hosts:
            address, count, number = hosts.split(",")
            jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=30)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--hosts {hosts}: {one_line(error)}; give ADDRESS:PORT,COUNT,NUMBER") from error


@contextmanager
def first_host_first() -> Iterator[None]:
    """The first process does it, then all others. It alone writes files."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("first host")
    yield
    if jax.process_index() == 0:
        multihost_utils.sync_global_devices("first host")


def of_all_hosts(value: int) -> list[int]:
    """A number of every process, known to all."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.asarray(value)).reshape(-1).tolist()


# --- State --------------------------------------------------------------------------------------


class TrainState(eqx.Module):
    """All that a run carries from step to step, and all that a checkpoint holds. No random key: every
    draw is a function of (seed, step)."""

    model: UNet
    ema: UNet | None
    opt_state: optax.OptState
    time_sampler: TimeSampler
    step: Int[Array, ""]
    skipped: Int[Array, ""]  # updates, for want of a finite loss and gradient
    skipped_in_a_row: Int[Array, ""]


def make_schedule(config: Config) -> Schedule:
    """The noise levels of training: all T, or fewer of them (Table 10), told to the network by their
    original times."""
    make = {"linear": linear_schedule, "cosine": cosine_schedule}[config.schedule]
    return respace(make(T), config.train_timesteps)


def key_for(use: str, seed: int) -> PRNGKeyArray:
    """Independent random streams of one seed: for the weights, for training, for sampling."""
    return jax.random.split(jax.random.key(seed), 3)[["weights", "training", "sampling"].index(use)]


def make_model(config: Config, image_channels: int, classes: int, key: PRNGKeyArray) -> UNet:
    """The network that a strategy needs."""
    strategy = STRATEGIES[config.strategy]
    return UNet(
        image_channels=image_channels, classes=classes, patch_shape=config.patch_shape,
        channels=config.channels, strides=config.strides, T=T,
        noisy_mask=strategy.noisy_mask, self_condition=strategy.self_condition,
        time_dim=config.time_dim, transformer=config.transformer, heads=config.heads,
        head_dim=config.head_dim, dtype=config.dtype, for_cpu=config.convolutions == "cpu",
        remat=config.remat, key=key,
    )  # fmt: skip


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping; its learning rate warms up, falls along a cosine, then stays."""
    decay = config.decay_steps or config.steps
    learning_rate = optax.warmup_cosine_decay_schedule(
        config.learning_rate_start, config.learning_rate, min(config.warmup_steps, decay // 2),
        decay, config.learning_rate_end,
    )  # fmt: skip
    adamw = optax.adamw(learning_rate, b1=0.9, b2=0.999, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), learning_rate


def make_state(config: Config, image_channels: int, classes: int) -> TrainState:
    """The state before the first step."""
    model = make_model(config, image_channels, classes, key_for("weights", config.seed))
    optimizer, _ = make_optimizer(config)
    t_max = config.train_timesteps - STRATEGIES[config.strategy].below_T
    # Without diffusion t means nothing: uniform sampling makes its weights 1.
    importance = config.time_sampling == "importance" and STRATEGIES[config.strategy].noisy_mask
    return TrainState(
        model=model,
        ema=jax.tree.map(jnp.copy, model) if config.ema_decay else None,
        opt_state=optimizer.init(eqx.filter(model, eqx.is_inexact_array)),
        time_sampler=make_time_sampler(t_max, importance=importance, length=config.time_history),
        **{name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")},
    )


# --- The training step --------------------------------------------------------------------------


def loss_fn(
    model: UNet,
    teacher: UNet | None,
    config: Config,
    schedule: Schedule,
    image: Float[Array, "batch *spatial channels"],
    x_0: Float[Array, "batch *spatial classes"],
    t: Int[Array, "batch"],
    weight: Float[Array, "batch"],
    keys: Keys,
) -> tuple[Float[Array, ""], tuple[Float[Array, "batch"], Float[Array, "batch"]]]:
    """The importance-weighted mean of L; beside it L and the soft Dice score of every example (NaN for
    one without foreground)."""
    denoise = make_denoise(network(model), schedule, config.prediction)
    first = denoise if teacher is None else make_denoise(network(teacher), schedule, config.prediction)
    strategy = STRATEGIES[config.strategy]
    denoised: Denoised = strategy.predict(denoise, first, schedule, image, x_0, t, keys)
    if config.prediction == "eps":
        loss = noise_loss(schedule, denoised.output, x_0, denoised.x_t, t)
    else:
        loss = segmentation_loss(denoised.output, x_0)
    dice, present = soft_dice((denoised.x_0_hat + 1) / 2, x_0)
    dice = jnp.sum(dice, axis=1) / jnp.sum(present, axis=1)
    return jnp.mean(weight * loss), (loss, dice)


def make_train_step(
    config: Config, classes: int, mesh: Mesh
) -> Callable[[Batch, TrainState], tuple[TrainState, dict[str, Array]]]:
    """The whole step: batch and state in, state and metrics out. Compiled once, the state donated,
    the batch split over the devices of `mesh`; means over the batch are global means."""
    schedule = make_schedule(config)
    optimizer, learning_rate = make_optimizer(config)
    voxels, rows, whole = shardings(mesh)

    options = compiler_options(config.convolutions == "cpu", config.patch_shape, config.channels[0])

    # Every leaf of the state is an array, so that jax.jit serves, which calls faster than eqx.filter_jit.
    @partial(jax.jit, donate_argnames="state", compiler_options=options)
    def train_step(batch: Batch, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key_for("training", config.seed), state.step)
        key_augment, key_t, key_strategy = jax.random.split(key, 3)

        with jax.named_scope("augment"):
            keys = jax.random.split(key_augment, config.batch_size)
            image, label = augment(
                batch, keys, config.patch_shape,
                rotation=config.rotation, scaling=config.scaling, translation=config.translation,
            )  # fmt: skip
            x_0 = one_hot(label, classes)

        t, weight = sample_t(state.time_sampler, key_t, config.batch_size)
        keys = jax.random.split(key_strategy, config.batch_size)
        examples = *eqx.filter_shard((image, x_0), voxels), *eqx.filter_shard((t, weight, keys), rows)
        teacher = state.ema if config.teacher == "ema" else None

        def part(gradient, examples):
            grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
            (loss, aux), more = grad(state.model, teacher, config, schedule, *examples)
            return jax.tree.map(lambda a, b: a + b / config.accumulate, gradient, more), (loss, aux)

        with jax.named_scope("gradient"):
            # Every part takes each accumulate-th example, so that all devices share every part. One
            # part needs no loop, in which XLA could not overlap it with anything else.
            parts = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, config.accumulate, *x.shape[1:]), 1, 0),
                examples,
            )
            zero = jax.tree.map(jnp.zeros_like, eqx.filter(state.model, eqx.is_inexact_array))
            if config.accumulate == 1:
                gradient, outputs = part(zero, examples)
            else:
                gradient, outputs = jax.lax.scan(part, zero, parts)
            loss, (losses, dice) = outputs
            losses = jnp.moveaxis(losses.reshape(config.accumulate, -1), 0, 1).reshape(-1)

        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.model)
            model, ema = eqx.apply_updates(state.model, updates), state.ema
            if ema is not None:
                ema = jax.tree.map(lambda a, b: config.ema_decay * a + (1 - config.ema_decay) * b, ema, model)
            time_sampler = update(state.time_sampler, t, losses)
            # One NaN in the weights or in the history of losses would stay for ever.
            norm = optax.tree.norm(gradient)
            skip = ~jnp.isfinite(norm + jnp.sum(losses) + jnp.sum(loss))
            kept = jax.tree.map(
                lambda new, old: jnp.where(skip, old, new),
                (model, ema, opt_state, time_sampler),
                (state.model, state.ema, state.opt_state, state.time_sampler),
            )
            in_a_row = (state.skipped_in_a_row + 1) * skip
            new = TrainState(*kept, state.step + 1, state.skipped + skip, in_a_row)
        metrics = {
            "loss": jnp.mean(losses), "weighted_loss": jnp.mean(loss), "dice": jnp.nanmean(dice),
            "gradient_norm": norm, "learning_rate": learning_rate(state.step),
            "skipped": new.skipped, "skipped_in_a_row": in_a_row,
        }  # fmt: skip
        return eqx.filter_shard((new, metrics), whole)

    return train_step


# --- Checkpoints --------------------------------------------------------------------------------


def save(path: Path, state: TrainState, header: dict) -> None:
    """A line with the SHA-256 of the rest, a line of JSON (settings, step, best so far), the arrays."""
    arrays = io.BytesIO()
    eqx.tree_serialise_leaves(arrays, state)
    content = json.dumps(header).encode() + b"\n" + arrays.getvalue()
    replace_file(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_checkpoint(path: Path) -> tuple[dict, bytes]:
    """Header and arrays of a checkpoint; the header's "config" is a Config. Raises InputError where it is
    missing, damaged, or of another version of this code."""
    if not path.exists():
        raise InputError(f"{path}: no checkpoint; train first: python train.py --help")
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged checkpoint; delete it, or train again with --fresh")
    head, _, leaves = content.partition(b"\n")
    try:
        header = json.loads(head)
        config = Config(**{name: tuples(value) for name, value in header["config"].items()})
        check_settings(config)
        channels, classes, step, best = (header[k] for k in ("image_channels", "classes", "step", "best"))
        sound = all(type(n) is int and n > 0 for n in (channels, classes, step))
        if not sound or best.keys() != {"dice", "step"}:
            raise InputError("impossible numbers")
        return header | {"config": config}, leaves
    except (InputError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: of another version of this code ({one_line(error)}); train it again"
        ) from error


def restore(path: Path, leaves: bytes, config: Config, image_channels: int, classes: int) -> TrainState:
    """The state that `save` wrote. Raises InputError where it is of another version of this code."""
    try:
        like = eqx.filter_eval_shape(make_state, config, image_channels, classes)
        return eqx.tree_deserialise_leaves(io.BytesIO(leaves), like)
    except Exception as error:  # arrays that belong to other settings can fail anywhere
        raise InputError(
            f"{path}: of another version of this code ({one_line(error)}); train it again"
        ) from error


def load_run(run: str, checkpoint: str = "best") -> tuple[Config, UNet, dict]:
    """The settings, the network to evaluate, and the header of a run's checkpoint. Raises InputError."""
    path = Path(run) / checkpoint
    header, leaves = read_checkpoint(path)
    config = header["config"]
    state = restore(path, leaves, config, header["image_channels"], header["classes"])
    return config, state.ema if config.evaluate_with == "ema" else state.model, header


def check_same(run: Path, old: Config, new: Config) -> None:
    """Raises InputError that names the first setting in which a run would not go on as it began."""
    for name, value in dataclasses.asdict(new).items():
        before = getattr(old, name)
        fixed = name not in MAY_CHANGE or (name == "steps" and not new.decay_steps)
        if fixed and before != value:
            raise InputError(
                f"{run}: this run has {name} = {before}, not {value}; give another --run-dir, or --fresh to "
                "start over (the old run is moved aside)"
            )


# --- The run ------------------------------------------------------------------------------------


def validate(config: Config, dataset: Dataset, model: UNet, mesh: Mesh) -> tuple[list[Score], bytes]:
    """Scores of the validation cases (distances at the last step), and a picture of the first few. The
    same noise every time."""
    count = len(dataset.uids["validation"])
    count = min(config.validation_cases or count, count)
    data, (voxels, rows, _) = mesh.shape["data"], shardings(mesh)
    predictions = predict_cases(
        model, respace(make_schedule(config), config.sampling_steps),
        (dataset.load("validation", i) for i in range(count)), key_for("sampling", config.seed),
        patch_shape=config.patch_shape, sampler=config.sampler, prediction=config.prediction,
        batch_size=-(-PATCHES_PER_BATCH[len(config.patch_shape)] // data) * data,
        shardings=(voxels, rows),
    )  # fmt: skip
    scores, shown = [], []
    for case, probability in predictions:
        predicted = probability.argmax(-1).astype(np.uint8)
        scores.append(score(predicted, case, probability.shape[-1], last_distance=True))
        if len(shown) < 4:
            shown.append((case, predicted))
    title = f"{config.dataset} ({dataset.source}), {config.strategy}, {config.sampler}, validation"
    return scores, picture(shown, title)


def read_log(path: Path, step: int) -> list[dict]:
    """The log's lines up to a step. What a killed run wrote after its last checkpoint is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # a line that was cut when the machine stopped
            break
    return [line for line in lines if line["step"] <= step]


def newest(lines: list[dict]) -> dict[str, str]:
    """What the progress bar shows: the newest values of the log."""
    line = {name: value for line in lines for name, value in line.items()}
    line["validation"] = line.pop("validation_dice", [None])[-1]
    shown = ("loss", "dice", "validation", "skipped")
    return {name: f"{line[name]:.3g}" for name in shown if line.get(name)}


def curve(lines: list[dict], title: str) -> bytes:
    """A PNG: training loss, and validation Dice at every sampling step, over training steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [line for line in lines if "loss" in line]
    losses = np.array([line["loss"] for line in trained], float)  # null becomes NaN, a gap
    left.plot([line["step"] for line in trained], losses, color=COLOURS[4])
    left.set(xlabel="training step", ylabel="loss (20 CE + Dice, or MSE of noise)", yscale="log")
    checked = [line for line in lines if "validation_dice" in line]
    for k, dices in enumerate(zip(*(line["validation_dice"] for line in checked), strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        right.plot([line["step"] for line in checked], [100 * d for d in dices], "o-", color=colour,
                   label=f"sampling step {k + 1}", markersize=3)  # fmt: skip
    right.set(xlabel="training step", ylabel="validation Dice (%)")
    right.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """No other process trains in this folder meanwhile. The system lets go of the lock when a process
    ends, however it ends. Raises InputError."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run}: another process is training here; wait for it, or give another --run-dir"
            ) from None
        yield


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT (Ctrl-C); a second acts at once."""
    caught: list[int] = []

    def catch(number: int, _) -> None:
        caught.append(number)
        restore_handlers()
        print("\nfinishing the step, then saving; once more to stop at once", file=sys.stderr)

    old = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore_handlers() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    try:
        yield caught
    finally:
        restore_handlers()


class Journal:
    """What a run leaves in its folder as it goes on: log, checkpoints, pictures. `facts` is in every
    checkpoint's header. Of several hosts the first alone writes."""

    def __init__(self, run: Path, facts: dict, best: dict, lines: list[dict]):
        self.run, self.facts, self.best, self.lines = run, facts, best, lines
        self.saved, self.writes = time.monotonic(), jax.process_index() == 0
        if self.writes:
            replace_file(run / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write(self, step: int, values: dict) -> None:
        """A line of the log. JSON has no NaN: what is not finite is null."""
        line = {name: value if np.isfinite(value).all() else None for name, value in values.items()}
        self.lines.append({"step": step} | line)
        if not self.writes:
            return
        with open(self.run / "log.jsonl", "a") as log:
            log.write(json.dumps(self.lines[-1]) + "\n")

    def save(self, state: TrainState, step: int) -> None:
        """`last`; the one before it becomes `previous`, so that a damaged one costs little."""
        if not self.writes:
            return
        save(self.run / "new", state, self.facts | {"step": step, "best": self.best})
        promote(self.run)
        self.saved = time.monotonic()

    def due(self, every: str, step: int) -> bool:
        """Whether it is time to save: `every` is in steps (200) or in minutes (10m)."""
        if every.endswith("m"):
            return time.monotonic() - self.saved >= 60 * float(every[:-1])
        return step % int(every) == 0

    def validated(self, state: TrainState, step: int, scores: list[Score], png: bytes) -> None:
        """Keeps scores and picture of a validation, and the state, where it is the best so far."""
        dice = np.nan_to_num(mean_std([s.dice for s in scores])[0]).tolist()
        self.write(step, {"validation_dice": dice})
        better = dice[-1] > self.best["dice"]
        if better:
            self.best = {"dice": dice[-1], "step": step}
        if self.writes:
            replace_file(self.run / f"validation-{step:06d}.png", png)
        if self.writes and better:
            save(self.run / "best", state, self.facts | {"step": step, "best": self.best})


def promote(run: Path) -> None:
    """Makes the checkpoint `new` the `last` one, and the last one `previous`."""
    if (run / "last").exists():
        os.replace(run / "last", run / "previous")
    os.replace(run / "new", run / "last")


def newest_checkpoint(run: Path) -> tuple[dict, bytes] | None:
    """Header and arrays of `last`, or, where it is damaged, of the one before; None for a new run.
    Raises InputError where all are damaged."""
    # A process that was killed while it saved can leave these. `new` is whole: it was moved into place.
    for unfinished in run.glob("*.partial"):
        unfinished.unlink()
    if (run / "new").exists():
        promote(run)
    there = [run / name for name in ("last", "previous") if (run / name).exists()]
    for path in there:
        try:
            found = read_checkpoint(path)
        except InputError as error:
            if path == there[-1]:
                raise
            print(f"{error}; going back to {there[-1]}", file=sys.stderr)
            continue
        if path != there[0]:  # or the next save would make of the damaged one the one before
            os.replace(there[0], run / "last.damaged")
        return found
    return None


def open_run(config: Config, dataset: Dataset) -> tuple[TrainState, Journal]:
    """The state and the journal with which a run goes on: those of its newest checkpoint, or new ones.
    Raises InputError."""
    run, classes = Path(config.run_dir), len(dataset.class_names)
    facts = {
        "config": dataclasses.asdict(config), "image_channels": dataset.image_channels,
        "classes": classes, "cases": fingerprint(dataset),
        "source": dataset.source, **provenance(),
    }  # fmt: skip
    found = newest_checkpoint(run)
    if found is None:
        state = make_state(config, dataset.image_channels, classes)
        return state, Journal(run, facts, {"dice": -1.0, "step": 0}, [])
    header, leaves = found
    check_same(run, header["config"], config)
    if header.get("cases") != facts["cases"]:
        raise InputError(f"{run}: {config.dataset} now has other cases or classes; use --fresh")
    print(f"going on from step {header['step']}", file=sys.stderr)
    if header.get("devices") != facts["devices"]:
        print(
            f"it ran on {header.get('devices')}, now on {facts['devices']}: it goes on within rounding, not "
            "bit for bit", file=sys.stderr,
        )  # fmt: skip
    state = restore(run / "last", leaves, config, dataset.image_channels, classes)
    return state, Journal(run, facts, header["best"], read_log(run / "log.jsonl", header["step"]))


def check_finite(config: Config, dataset: Dataset, metrics: dict[str, Array], step: int) -> None:
    """Raises InputError where too many updates in a row were skipped, the last one at `step`."""
    if int(metrics["skipped_in_a_row"]) < config.skip_limit:
        return
    uids = dataset.uids["train"]
    recent = [
        uids[i]
        for s in range(max(step - config.skip_limit, 0), step)
        for i in batch_indices(len(uids), config.seed, s, config.batch_size)
    ]
    names = ", ".join(list(dict.fromkeys(recent))[:10])
    raise InputError(
        f"{config.run_dir}: loss or gradient was not finite in {config.skip_limit} steps in a row, up to "
        f"step {step}; look at their samples ({names} ...), or train again with a lower --learning-rate "
        "and another --run-dir; what was saved before is kept and is finite"
    )


def train(config: Config, *, fresh: bool = False) -> int | None:
    """A run, from where its folder is to its last step, or to a signal, whose number is the result.
    Raises InputError."""
    dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
    mesh = make_mesh(config)
    check_config(config, dataset, mesh)
    run, is_first = Path(config.run_dir), jax.process_index() == 0
    if fresh and is_first and run.exists():
        with locked(run):
            aside = run.with_name(f"{run.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            os.replace(run, aside)
        print(f"the old run is now {aside}", file=sys.stderr)
    with locked(run) if is_first else nullcontext(), interruptible() as caught:
        with first_host_first():
            state, journal = open_run(config, dataset)
        start = int(state.step)
        if len(set(of_all_hosts(start))) > 1:
            raise InputError(
                f"{run}: the hosts do not see the same files; --run-dir must be on a shared disk"
            )
        if len(set(of_all_hosts(int(journal.facts["cases"][:7], 16)))) > 1:
            raise InputError(f"{config.dataset}: the hosts have other cases or classes; copy one file to all")
        if is_first:
            print(
                f"{config.dataset} ({dataset.source}): {len(dataset.uids['train'])} training cases, "
                f"{config.strategy}, {count_parameters(state.model):,} parameters, "
                f"{journal.facts['devices']}", file=sys.stderr,
            )  # fmt: skip
        _, rows, whole = shardings(mesh)
        state = eqx.filter_shard(state, whole)
        train_step = make_train_step(config, len(dataset.class_names), mesh)
        mine = sorted(
            {row for (part,) in rows.addressable_devices_indices_map((config.batch_size,)).values()
             for row in range(config.batch_size)[part]}
        )  # fmt: skip

        def place(step: int) -> Batch:
            batch = make_batch(dataset, config.seed, step, config.batch_size, mine)
            return jax.tree.map(partial(jax.make_array_from_process_local_data, rows), batch)

        before = None
        with tqdm(total=config.steps, initial=start, disable=not is_first) as bar:
            for step, batch in enumerate(prefetch(place, start, config.steps), start + 1):
                state, metrics = train_step(batch, state)
                if before is not None:  # to wait for this step would leave the device idle until the next
                    check_finite(config, dataset, before, step - 1)
                before = metrics
                bar.update()
                validating = step % config.validate_every == 0 or step == config.steps
                logging = step % config.log_every == 0 or validating
                if logging:
                    journal.write(step, {name: value.item() for name, value in metrics.items()})
                if validating:
                    model = state.ema if config.evaluate_with == "ema" else state.model
                    scores, png = validate(config, dataset, model, mesh)
                    journal.validated(state, step, scores, png)
                if logging:
                    bar.set_postfix(newest(journal.lines))
                # All hosts stop at the same step; one alone knows at once, several ask each other seldom.
                asking = jax.process_count() == 1 or logging
                stopped = max(of_all_hosts(caught[0] if caught else 0)) if asking else 0
                if validating or stopped or journal.due(config.save_every, step):
                    journal.save(state, step)
                if stopped and step < config.steps:
                    print(f"\nstopped and saved at step {step}; the same command goes on", file=sys.stderr)
                    return stopped
        if before is not None:
            check_finite(config, dataset, before, config.steps)

        if is_first:
            title = f"{config.dataset} ({dataset.source}), {config.strategy}"
            replace_file(run / "curve.png", curve(journal.lines, title))
    if not is_first:
        return None
    if start < config.steps:
        print(f"\nvalidation after step {config.steps}, {config.sampler}:\n")
        print(table([(config.strategy, scores)], dataset.unit))
    print(f"\nbest: validation Dice {100 * journal.best['dice']:.2f} % at step {journal.best['step']}")
    print(f"pictures: {run}/validation-{config.steps:06d}.png, {run}/curve.png")
    print(f"next: python evaluate.py test {run}")
    return None


def main(argv: Sequence[str] | None = None) -> None:
    keep_compiled()
    keep_memory()
    try:
        config, fresh = parse_config(argv)
        if train(config, fresh=fresh) == signal.SIGINT:
            sys.exit(130)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"error: a host is gone ({one_line(error)}); start all again: they go on", file=sys.stderr)
        leave(1)


def leave(status: int) -> None:
    """Ends this process. Of several hosts it is the end of all: at a usual exit, JAX would wait for those
    that wait for this one."""
    if jax.process_count() > 1:
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
