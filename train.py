"""How do diffusion, network, strategy and data make up one training step, and a run?
Section 5.3 of Fu et al. (2023).

    python train.py                                           # phantom_us, rec_xT: minutes on a laptop
    python train.py --dataset muscle_us --strategy rec_xT     # as in the paper (data: see docs/data.md)

The defaults below are replaced by the preset of the data set (PRESETS), for folder:NAME also by what its
file proposes, and by what is typed. Run the same command again to resume; on a CPU the result is bit for bit
that of an uninterrupted run (on a GPU: docs/tpu.md). A run's folder holds the training states `last` and
`previous` (the one before), the model files `best` (of the validation with the highest mean Dice at the last
sampling step, §5.3) and `final`, `log.jsonl`, and pictures. Reading order: Config, TrainState,
make_train_step, train.
"""

import argparse
import dataclasses
import hashlib
import math
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

import evaluate
from data import Batch, Dataset, augment, batch_indices, fingerprint, make_batch, open_dataset, prefetch
from diffusion import (
    SAMPLERS, SCHEDULES, TIMESTEPS, Image, Keys, Mask, Schedule, Time, TimeSampler, key_for, make_schedule,
    make_time_sampler, record_losses, sample_t,
)  # fmt: skip
from strategies import STRATEGIES, batched, make_denoise, noise_loss, one_hot, segmentation_loss, soft_dice
from support.command_line import add_options, check_settings, described
from support.cpu_convolution import way_here
from support.files import InputError, program, replace_file, sha256
from support.machine import (
    exit_all_hosts, first_host_first, is_first_host, join_hosts, make_mesh,
    check_hosts_agree, of_all_hosts, prepare_machine, provenance, rows_of_this_host, shardings,
)  # fmt: skip
from support.model_file import ModelFacts, save
from support.pictures import cases_over_steps, png, training_curve
from support.run_folder import Journal, has_model_alone, interruptible, locked, move_aside, start_or_resume
from support.scores import Score, mean_std, per_case, table
from unet import NETWORKS, count_parameters

SKIP_LIMIT = 10  # a run ends after so many steps in a row without a finite loss and gradient
PerExample = Float[Array, "batch"]


# --- Settings -----------------------------------------------------------------------------------


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the paper's; PRESETS has what differs per data set."""

    dataset: Annotated[str, "Which data set is trained on; each has a preset of its own."] = "phantom_us"
    strategy: Annotated[Literal[*STRATEGIES], "How the network is trained; see strategies.py."] = "rec_xT"
    data_dir: Annotated[str, "The folder of <dataset>.h5."] = "data"
    run_dir: Annotated[str, "The folder of the run; if empty, runs/<dataset>-<strategy>."] = ""
    seed: Annotated[int, "Seed of the weights, the data's order, augmentation, times and noise.", 0] = 0
    init_from: Annotated[str, "A run's folder or a model file from whose weights the training starts; arrays "
                              "of another shape, such as the head for other classes, start anew."] = ""
    # The network (§5.3, Figure 2)
    network: Annotated[str, "Which of unet.NETWORKS is trained."] = "UNet"
    channels: Annotated[tuple[int, ...], "Channels of each level.", 1] = (32, 64, 128, 256)
    strides: Annotated[tuple[tuple[int, ...], ...], "Stride of each down-sampling.", 1] = ((2, 2),) * 3
    transformer: Annotated[bool, "Whether there is a Transformer layer at the lowest level."] = True
    heads: Annotated[int, "Number of attention heads.", 1] = 8
    head_dim: Annotated[int, "Size of each attention head.", 1] = 64
    time_dim: Annotated[int, "Size of the time embedding; with 0 the network is not told t.", 0] = 256
    patch_shape: Annotated[tuple[int, ...], "Size of the patch that the network sees.", 1] = (480, 512)
    dtype: Annotated[Literal["auto", "float32", "bfloat16"],
                     "Precision of the convolutions; auto is bfloat16 except on a CPU."] = "auto"
    convolutions: Annotated[Literal["auto", "native", "cpu", "tpu"],
                            "How convolutions are computed: in XLA's own way, in parts for a CPU, or with "
                            "neighbouring voxels side by side for a TPU; auto chooses."] = "auto"
    remat: Annotated[int, "How many levels, from the top, store only the inputs of their blocks; computing "
                          "the rest again in the backward pass saves memory.", 0] = 0
    # Diffusion (§3, §5.3)
    train_timesteps: Annotated[int, "Number of noise levels in training, 1001 or fewer (Table 10: 5).",
                               2, TIMESTEPS] = TIMESTEPS
    schedule: Annotated[Literal[*SCHEDULES], "How beta_t grows."] = "linear"
    signal: Annotated[float, "How strong masks are beside the noise; above 1, a noisy mask gives more of the "
                      "truth away, as a larger image does.", 1e-3, 1e3] = 1.0
    sampling_steps: Annotated[int, "K, the number of sampling steps.", 1] = 5
    sampler: Annotated[Literal[*SAMPLERS], "How masks are sampled in validation."] = "ddpm"
    blend: Annotated[Literal[*evaluate.BLENDS], "How predictions of overlapping patches are put together: by "
                     "their mean, or one with Gaussian weights of patches that overlap by half."] = "mean"
    prediction: Annotated[Literal["x_0", "eps"], "What the network predicts (eps: App. A.4)."] = "x_0"
    time_sampling: Annotated[Literal["importance", "uniform"], "How t is drawn."] = "importance"
    ema_decay: Annotated[float, "Decay of averaged weights; with 0 none are kept.", 0, 0.9999] = 0.0
    teacher: Annotated[Literal["model", "ema"], "Which weights make the first of two passes (§4)."] = "model"
    evaluate_with: Annotated[Literal["model", "ema"], "Which weights are validated and tested."] = "model"
    # Optimisation (Table 6 is lost; these are the authors' public settings)
    steps: Annotated[int, "Number of optimizer steps.", 1] = 12_500
    batch_size: Annotated[int, "Patches in a step, over all devices.", 1] = 8
    accumulate: Annotated[int, "Number of parts of a batch, computed one by one to save memory.", 1] = 1
    learning_rate: Annotated[float, "The learning rate at its peak.", 1e-9] = 8e-4
    learning_rate_start: Annotated[float, "The learning rate before warm-up.", 0] = 1e-5
    learning_rate_end: Annotated[float, "The learning rate after the cosine.", 0] = 5e-5
    warmup_steps: Annotated[int, "Steps of warm-up; at most half of those until the cosine ends.", 0] = 100
    decay_steps: Annotated[int, "Step at which the cosine ends; with 0, the last.", 0] = 10_000
    weight_decay: Annotated[float, "Weight decay of AdamW.", 0] = 1e-8
    clip_norm: Annotated[float, "Norm to which the whole gradient is clipped.", 1e-9] = 1.0
    # Augmentation (§5.3; limits: the authors' public settings)
    rotation: Annotated[float, "Largest rotation about every axis, in radians.", 0] = 0.088
    scaling: Annotated[float, "Largest scaling of every axis, as a share.", 0, 0.9] = 0.15
    translation: Annotated[tuple[int, ...], "Largest translation along every axis, in voxels.", 0] = (10, 10)
    # The run
    mesh: Annotated[str, "How devices share batch and second axis: data=4,space=2. If empty, all share "
                         "the batch."] = ""
    validate_every: Annotated[int, "Steps between two validations, and checkpoints (§5.3).", 1] = 500
    validation_cases: Annotated[int, "Validate on the first so many cases; with 0, on all.", 0] = 0
    save_every: Annotated[str, "Checkpoints between validations: every 200 (steps) or 10m (minutes)."] = "10m"
    log_every: Annotated[int, "Steps between two lines of the log.", 1] = 50
    phantom_shape: Annotated[tuple[int, ...], "Size of made-up images."] = ()
# fmt: on


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
    },
    "brats_mr": {"patch_shape": (128, 128, 128), "strides": VOLUME, "translation": (20, 20, 4)},
    "hippocampus_mr": SMALL | {
        "patch_shape": (32, 48, 32), "strides": VOLUME[:2], "translation": (3, 3, 3), "batch_size": 2,
        "channels": (8, 16, 32), "steps": 1000, "validate_every": 250, "validation_cases": 8,
    },
    # Your own images: the HDF5 file proposes shapes, strides and translation.
    "folder": SMALL | {
        "batch_size": 4, "steps": 1000, "validate_every": 250, "validation_cases": 16, "blend": "gaussian",
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

# What may differ when a run is resumed: nothing that changes what is learned.
MAY_CHANGE = {"steps", "data_dir", "run_dir", "remat", "mesh", "log_every", "save_every"}
GO_ON = (
    "with --decay-steps 0 the learning rate falls until the last step, so that a longer run is another one "
    "from its beginning; to train on from the weights of this one, use --init-from {} and another --run-dir"
)


def parse_config(argv: Sequence[str] | None) -> tuple[Config, bool]:
    """The settings of a command line: the paper's, replaced by the data set's preset, then by the
    file's proposals (folder:NAME), then by what is typed. Tuples are typed 16,32 and strides
    2x2x1,2x2x2. The second result is --fresh. Raises InputError where the file cannot be read."""
    parser = argparse.ArgumentParser(**described(__doc__))
    add_options(parser, Config)
    parser.add_argument("--fresh", action="store_true", help="Start over; an old run is moved aside.")
    parser.add_argument(
        "--hosts", metavar="ADDRESS:PORT,COUNT,NUMBER", help="Train as one of several processes: the address "
        "of the first, their number, and which one this is (0, 1, ...); auto on a TPU pod or with Slurm.",
    )  # fmt: skip
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if not typed.get("run_dir"):  # an empty one is the default one
        typed.pop("run_dir", None)
    fresh = typed.pop("fresh")
    join_hosts(typed.pop("hosts", ""))  # before anything asks which devices there are
    name = typed.get("dataset", Config.dataset)
    kind, _, own = name.partition(":")
    if kind not in PRESETS or (kind == "folder") != bool(own):
        known = ", ".join(n for n in PRESETS if n != "folder")
        parser.error(f"--dataset {name} is not one of {known}, folder:NAME")
    settings = {"run_dir": run_dir(name, typed.get("strategy", Config.strategy))} | PRESETS[kind]
    if own:
        proposed = open_dataset(name, Path(typed.get("data_dir", Config.data_dir)), ()).settings
        if other := proposed.keys() - {"patch_shape", "strides", "translation"}:
            raise InputError(f"{name}: its file may not propose {', '.join(sorted(other))}; build it again")
        settings |= proposed
    config, on_cpu = Config(**settings | typed), jax.default_backend() == "cpu"
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="float32" if on_cpu else "bfloat16")
    if config.convolutions == "auto":
        config = dataclasses.replace(config, convolutions=way_here())
    return config, fresh


def run_dir(dataset: str, strategy: str) -> str:
    """The default folder of a run."""
    return f"runs/{dataset.replace(':', '-')}-{strategy}"


def check_together(config: Config) -> None:
    """Raises InputError, one line, where settings are wrong by themselves or do not fit together."""
    check_settings(config)
    dims, levels = len(config.patch_shape), len(config.channels)
    wrong = None
    if config.network not in NETWORKS:
        wrong = f"--network {config.network} is not one of {', '.join(NETWORKS)}"
    elif len(config.translation) != dims:
        wrong = f"--translation needs {dims} numbers"
    elif len(config.strides) != levels - 1 or any(len(stride) != dims for stride in config.strides):
        wrong = f"--strides needs entries of {dims} numbers, one entry fewer than --channels"
    elif all(n <= math.prod(axis) for n, *axis in zip(config.patch_shape, *config.strides, strict=True)):
        wrong = "--patch-shape leaves one voxel at the lowest level; use a larger patch or fewer --strides"
    elif "ema" in (config.teacher, config.evaluate_with) and not config.ema_decay:
        wrong = "--ema-decay must be above 0 for --teacher ema and --evaluate-with ema"
    elif config.prediction == "eps" and not STRATEGIES[config.strategy].noisy_mask:
        wrong = "--prediction eps needs a diffusion strategy"
    elif config.sampling_steps > config.train_timesteps:
        wrong = "--sampling-steps must not be more than --train-timesteps"
    elif config.time_dim % 2:
        wrong = "--time-dim must be even"
    elif not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?m", config.save_every):
        wrong = f"--save-every {config.save_every} is neither steps, like 200, nor minutes, like 10m"
    if wrong:
        raise InputError(wrong)


def check_config(config: Config, dataset: Dataset, mesh: Mesh) -> None:
    """Raises InputError, one line, where settings are wrong or do not fit the data and the devices."""
    dims, (data, space) = len(dataset.canvas), mesh.devices.shape
    if len(config.patch_shape) != dims:
        raise InputError(f"--patch-shape {config.patch_shape}: {config.dataset} is {dims}D")
    check_together(config)
    if config.batch_size % (config.accumulate * data):
        raise InputError(
            f"--batch-size {config.batch_size} must be a multiple of --accumulate x {data} devices"
        )
    if config.patch_shape[1] % space:
        raise InputError(
            f"--patch-shape {config.patch_shape}: the second must be a multiple of space={space}"
        )
    if not dataset.uids["validation"]:
        raise InputError(f"{config.dataset} has no validation cases; build it again with some")


# --- State --------------------------------------------------------------------------------------


class TrainState(eqx.Module):
    """All that a run carries from step to step, and all that its checkpoints hold. There is no
    random key, since every draw is a function of (seed, step)."""

    network: eqx.Module
    ema: eqx.Module | None
    opt_state: optax.OptState
    time_sampler: TimeSampler
    step: Int[Array, ""]
    skipped: Int[Array, ""]  # updates skipped because loss or gradient was not finite
    skipped_in_a_row: Int[Array, ""]


def network_arguments(config: Config, image_channels: int, classes: int) -> dict:
    """The keyword arguments of the network that a strategy needs."""
    strategy = STRATEGIES[config.strategy]
    same = ("patch_shape", "channels", "strides", "time_dim", "transformer", "heads", "head_dim", "dtype",
            "convolutions", "remat")  # fmt: skip
    return {name: getattr(config, name) for name in same} | {
        "image_channels": image_channels, "classes": classes, "T": TIMESTEPS,
        "noisy_mask": strategy.noisy_mask, "self_condition": strategy.self_condition,
    }  # fmt: skip


def make_network(config: Config, image_channels: int, classes: int, key: PRNGKeyArray) -> eqx.Module:
    """The network before the first step."""
    return NETWORKS[config.network](**network_arguments(config, image_channels, classes), key=key)


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
    network = make_network(config, image_channels, classes, key_for("weights", config.seed))
    optimizer, _ = make_optimizer(config)
    strategy = STRATEGIES[config.strategy]
    # Without diffusion t has no meaning; drawn uniformly, its weights are 1.
    importance = config.time_sampling == "importance" and strategy.noisy_mask
    return TrainState(
        network=network,
        ema=jax.tree.map(jnp.copy, network) if config.ema_decay else None,
        opt_state=optimizer.init(eqx.filter(network, eqx.is_inexact_array)),
        time_sampler=make_time_sampler(config.train_timesteps - strategy.below_T, importance=importance),
        **{name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")},
    )


def with_weights_of(network: eqx.Module, other: eqx.Module) -> tuple[eqx.Module, list[str]]:
    """`network` with the arrays of `other` that have the same place and shape, and the places of the arrays
    that it keeps."""
    theirs = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(other)}
    own, kept = [], []
    leaves, structure = jax.tree_util.tree_flatten_with_path(network)
    for path, leaf in leaves:
        place = jax.tree_util.keystr(path)
        fits = place in theirs and theirs[place].shape == leaf.shape
        own.append(theirs[place] if fits else leaf)
        kept += [] if fits else [place]
    return jax.tree.unflatten(structure, own), kept


def begin(state: TrainState, init_from: str) -> tuple[TrainState, dict]:
    """The first state of a run, with the weights of another model where `init_from` names one, and a record
    of that model. Raises InputError where it cannot be used."""
    if not init_from:
        return state, {}
    model = evaluate.load(init_from)
    network, kept = with_weights_of(state.network, model.network)
    total = len(jax.tree.leaves(network))
    if 2 * len(kept) > total:
        raise InputError(
            f"{model.path}: {len(kept)} of {total} arrays have another shape or place than in this network; "
            "give the same --channels and --strides, or train without --init-from"
        )
    facts = model.facts
    what = f"{facts.dataset}, {facts.config.get('strategy')}, step {facts.step}"
    new = f"; new are {', '.join(kept)}" if kept else ""
    if is_first_host():
        print(f"starting from the weights of {model.path} ({what}){new}", file=sys.stderr)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, network)
    state = dataclasses.replace(state, network=network, ema=ema)
    record = {"path": str(model.path), "sha256": sha256(model.path), "new": kept}
    return state, {"init_from": record | {"of": what, "commit": facts.provenance.get("commit", "unknown")}}


# --- The training step --------------------------------------------------------------------------


def loss_fn(
    network: eqx.Module, image: Image, x_0: Mask, t: Time, weight: PerExample, keys: Keys, *,
    teacher: eqx.Module | None, config: Config, schedule: Schedule,
) -> tuple[Float[Array, ""], tuple[PerExample, PerExample]]:  # fmt: skip
    """The importance-weighted mean of L, and also L and the soft Dice score of every example (NaN
    for one without foreground)."""
    denoise = make_denoise(batched(network), schedule, config.prediction)
    first = denoise if teacher is None else make_denoise(batched(teacher), schedule, config.prediction)
    denoised = STRATEGIES[config.strategy].predict(denoise, first, schedule, image, x_0, t, keys)
    if config.prediction == "eps":
        loss = noise_loss(schedule, denoised.output, x_0, denoised.x_t, t)
    else:
        loss = segmentation_loss(denoised.output, x_0)
    dice, present = soft_dice((denoised.x_0_hat + 1) / 2, x_0)
    dice = jnp.sum(dice, axis=1) / jnp.sum(present, axis=1)
    return jnp.mean(weight * loss), (loss, dice)


def gradient_in_parts(
    loss: Callable, network: eqx.Module, examples: PyTree, parts: int
) -> tuple[PyTree, tuple[Array, tuple[Array, Array]]]:
    """The gradient of the mean of `loss` over the examples, and the outputs of `loss`, computed part
    by part, so that memory is needed for one part only."""
    value_and_grad = eqx.filter_value_and_grad(loss, has_aux=True)

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        outputs, gradient = value_and_grad(network, *part)
        return jax.tree.map(lambda a, b: a + b / parts, total, gradient), outputs

    zero = jax.tree.map(jnp.zeros_like, eqx.filter(network, eqx.is_inexact_array))
    if parts == 1:  # no loop, so that XLA can overlap this with other work
        return add(zero, examples)

    # A part takes every `parts`-th example, so that all devices share every part.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), examples)
    gradient, (mean, each) = jax.lax.scan(add, zero, split)
    return gradient, (mean, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1), each))


def make_train_step(
    config: Config, network: eqx.Module, mesh: Mesh
) -> Callable[[Batch, TrainState], tuple[TrainState, dict[str, Array]]]:
    """The whole step, from batch and state to state and metrics. It is compiled once, with the options of
    `network`, and the state is donated. The devices of `mesh` share the batch; means are over all of it."""
    schedule = make_schedule(config.schedule, config.train_timesteps, config.signal)
    optimizer, learning_rate = make_optimizer(config)
    per_voxel, per_example, replicated = shardings(mesh)
    limits = {name: getattr(config, name) for name in ("rotation", "scaling", "translation")}
    options = network.compiler_options(config.patch_shape)

    # Every leaf of the state is an array, so jax.jit suffices, whose calls are faster than eqx.filter_jit's.
    @partial(jax.jit, donate_argnames="state", compiler_options=options)
    def train_step(batch: Batch, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        # All that is random in this step follows from the seed and the number of the step.
        key = jax.random.fold_in(key_for("training", config.seed), state.step)
        key_augment, key_t, key_strategy = jax.random.split(key, 3)

        # A random patch of every image, and its label as a mask of -1 and 1.
        with jax.named_scope("augment"):
            keys = jax.random.split(key_augment, config.batch_size)
            image, label = augment(batch, keys, config.patch_shape, **limits)
            x_0 = one_hot(label, network.classes)

        # A time for every example, with the weight that compensates for how often it is drawn.
        t, weight = sample_t(state.time_sampler, key_t, config.batch_size)
        keys = jax.random.split(key_strategy, config.batch_size)
        examples = eqx.filter_shard((image, x_0), per_voxel)
        examples += eqx.filter_shard((t, weight, keys), per_example)

        # The strategy's one or two passes of the network, the loss, and its gradient.
        with jax.named_scope("gradient"):
            teacher = state.ema if config.teacher == "ema" else None
            loss = partial(loss_fn, teacher=teacher, config=config, schedule=schedule)
            gradient, outputs = gradient_in_parts(loss, state.network, examples, config.accumulate)
            mean, (losses, dice) = outputs

        # The new weights, their average, and what importance sampling learns from the losses.
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.network)
            new = eqx.apply_updates(state.network, updates)
            ema = moving_average(state.ema, new, config.ema_decay)
            time_sampler = record_losses(state.time_sampler, t, losses)

            # One NaN in the weights or in the history of losses would stay forever.
            norm = optax.tree.norm(gradient)
            skip = ~jnp.isfinite(norm + jnp.sum(losses) + jnp.sum(mean))
            old = (state.network, state.ema, state.opt_state, state.time_sampler)
            kept = keep(skip, old, (new, ema, opt_state, time_sampler))
            in_a_row = (state.skipped_in_a_row + 1) * skip
            after = TrainState(*kept, state.step + 1, state.skipped + skip, in_a_row)

        metrics = {
            "loss": jnp.mean(losses), "weighted_loss": jnp.mean(mean), "dice": jnp.nanmean(dice),
            "gradient_norm": norm, "learning_rate": learning_rate(state.step),
            "skipped": after.skipped, "skipped_in_a_row": in_a_row,
        }  # fmt: skip
        return eqx.filter_shard((after, metrics), replicated)

    return train_step


def moving_average(ema: PyTree, new: PyTree, decay: float) -> PyTree:
    """The averaged weights after one more step, or None where none are kept."""
    return None if ema is None else jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, ema, new)


def keep(skip: Array, old: PyTree, new: PyTree) -> PyTree:
    """`old` where the update is skipped, else `new`."""
    return jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, old)


# --- Validation ---------------------------------------------------------------------------------


def model_facts(config: Config, dataset: Dataset, begun: dict) -> ModelFacts:
    """The facts in a model file of this run, which began from `begun`; each validation fills in `step` and
    `dice`."""
    same = ("network", "dataset", "schedule", "train_timesteps", "prediction", "sampler", "sampling_steps",
            "patch_shape")  # fmt: skip
    own_images = config.dataset.startswith("folder:")
    return ModelFacts(
        **{name: getattr(config, name) for name in same},
        arguments=network_arguments(config, dataset.image_channels, len(dataset.class_names)),
        class_names=dataset.class_names, image_channels=dataset.image_channels, unit=dataset.unit,
        spacing=dataset.load("train", 0).spacing if own_images else (), source=dataset.source,
        cases=fingerprint(dataset), step=1, dice=-1.0, provenance=provenance() | begun,
        config=dataclasses.asdict(config), channel_names=dataset.channel_names,
    )  # fmt: skip


def validate(model: evaluate.Model, dataset: Dataset, mesh: Mesh) -> tuple[list[Score], bytes]:
    """Scores of the validation cases as in testing (but for distances, at the last step only), and a picture
    of the first few. The noise is the same every time."""
    facts, count = model.facts, len(dataset.uids["validation"])
    cases = (dataset.load("validation", i) for i in range(facts.config["validation_cases"] or count)[:count])
    scores, shown = [], []
    for case, probability in model.predict(cases, seed=facts.config["seed"], mesh=mesh):
        found = evaluate.clean(facts.dataset, probability.argmax(-1)).astype(np.uint8)
        scores.append(evaluate.score(found, case, probability.shape[-1], last_distance=True))
        if len(shown) < 4:
            shown.append((case.image[..., 0], case.label, found, per_case(scores[-1].dice)))
    title = f"{facts.dataset} ({dataset.source}), {facts.config['strategy']}, {facts.sampler}, validation"
    return scores, png(cases_over_steps(shown, title))


# --- The run ------------------------------------------------------------------------------------


def check_finite(config: Config, dataset: Dataset, metrics: dict[str, Array], step: int) -> None:
    """Raises InputError where too many updates in a row were skipped, the last one at `step`."""
    if int(metrics["skipped_in_a_row"]) < SKIP_LIMIT:
        return
    uids = dataset.uids["train"]
    recent = [
        uids[i]
        for s in range(max(step - SKIP_LIMIT, 0), step)
        for i in batch_indices(len(uids), config.seed, s, config.batch_size)
    ]
    names = ", ".join(list(dict.fromkeys(recent))[:10])
    raise InputError(
        f"{config.run_dir}: loss or gradient was not finite in {SKIP_LIMIT} steps in a row, up to "
        f"step {step}; look at their samples ({names} ...), or train again with a lower --learning-rate "
        "and another --run-dir; what was saved before is kept and is finite"
    )


def train(config: Config, *, fresh: bool = False) -> int | None:
    """Trains from the newest state in the run's folder to the last step, or to a signal, whose
    number it returns. Raises InputError."""
    dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
    mesh = make_mesh(config.mesh)
    check_config(config, dataset, mesh)
    run = Path(config.run_dir)
    if fresh or has_model_alone(run):
        if config.init_from and Path(config.init_from).resolve().is_relative_to(run.resolve()):
            raise InputError(f"{run}: would be moved aside with --init-from in it; give another --run-dir")
        move_aside(run)
    with locked(run), interruptible() as caught:
        with first_host_first():
            state, journal = start_or_resume(
                run, lambda: make_state(config, dataset.image_channels, len(dataset.class_names)),
                config=dataclasses.asdict(config),
                facts={"cases": fingerprint(dataset), "content": dataset.content, **provenance()},
                may_change=MAY_CHANGE if config.decay_steps else MAY_CHANGE - {"steps"},
                begin=partial(begin, init_from=config.init_from), advice={"steps": GO_ON.format(run)},
            )  # fmt: skip
        start = int(state.step)
        check_hosts_agree(start, f"{run}: the hosts see different files; --run-dir must be on a shared disk")
        cases = int(hashlib.sha256((fingerprint(dataset) + dataset.content).encode()).hexdigest()[:7], 16)
        check_hosts_agree(cases, f"{config.dataset}: the hosts have different cases; copy one file to all")
        if not start:
            journal.save(state, 0)  # so that a run that is killed never leaves a model without a state
        if is_first_host():
            print(
                f"{config.dataset} ({dataset.source}): {len(dataset.uids['train'])} training cases, "
                f"{config.strategy}, {count_parameters(state.network):,} parameters, "
                f"{journal.facts['devices']}", file=sys.stderr,
            )  # fmt: skip
        _, per_example, replicated = shardings(mesh)
        state = eqx.filter_shard(state, replicated)
        train_step = make_train_step(config, state.network, mesh)
        rows = rows_of_this_host(per_example, config.batch_size)

        def place(step: int) -> Batch:
            batch = make_batch(dataset, config.seed, step, config.batch_size, rows)
            return jax.tree.map(partial(jax.make_array_from_process_local_data, per_example), batch)

        facts, scores, before = model_facts(config, dataset, journal.facts["begun"]), [], None
        with tqdm(total=config.steps, initial=start, disable=not is_first_host()) as bar:
            for step, batch in enumerate(prefetch(place, start, config.steps), start + 1):
                state, metrics = train_step(batch, state)
                if before is not None:  # waiting for this step would leave the device idle
                    check_finite(config, dataset, before, step - 1)
                before = metrics
                bar.update()
                validating = step % config.validate_every == 0 or step == config.steps
                logging = step % config.log_every == 0 or validating
                if logging:
                    journal.write(step, {name: value.item() for name, value in metrics.items()})
                if validating:
                    network = state.ema if config.evaluate_with == "ema" else state.network
                    model = evaluate.Model(network, dataclasses.replace(facts, step=step), run)
                    scores = validated(model, dataset, mesh, journal, last=step == config.steps)
                if logging:
                    bar.set_postfix(journal.newest())
                # All hosts stop at the same step. Several of them ask each other only at a line of the log.
                asking = jax.process_count() == 1 or logging
                stopped = max(of_all_hosts(caught[0] if caught else 0)) if asking else 0
                if validating or stopped or journal.due(config.save_every, step):
                    journal.save(state, step)
                if stopped and step < config.steps:
                    print(f"\nstopped and saved at step {step}; the same command resumes it", file=sys.stderr)
                    return stopped
        if before is not None:
            check_finite(config, dataset, before, config.steps)
        if is_first_host():
            title = f"{config.dataset} ({dataset.source}), {config.strategy}"
            replace_file(run / "curve.png", png(training_curve(journal.lines, title)))
            if scores:  # otherwise the run had ended before
                print(f"\nvalidation after step {config.steps}, {config.sampler}:\n")
                print(table([(config.strategy, scores)], dataset.unit))
            print(
                f"\nbest: validation Dice {100 * journal.best['dice']:.2f} % at step {journal.best['step']}"
            )
            print(f"pictures: {run}/validation-{config.steps:06d}.png, {run}/curve.png")
            print(f"next: python evaluate.py test {run}")
    return None


def validated(
    model: evaluate.Model, dataset: Dataset, mesh: Mesh, journal: Journal, *, last: bool
) -> list[Score]:
    """The scores of a validation; they go to the log, and a picture goes beside it. The model becomes `best`
    if its mean Dice at the last sampling step is the highest so far (§5.3), and `final` at the last step."""
    scores, picture = validate(model, dataset, mesh)
    dice = np.nan_to_num(mean_std([s.dice for s in scores])[0]).tolist()
    facts = dataclasses.replace(model.facts, dice=dice[-1])
    journal.write(facts.step, {"validation_dice": dice})
    names = ["best"] * journal.is_best(facts.step, facts.dice) + ["final"] * last
    if is_first_host():
        replace_file(journal.run / f"validation-{facts.step:06d}.png", picture)
        for name in names:
            save(journal.run / name, model.network, facts)
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    prepare_machine()
    with program(exit_all_hosts):
        config, fresh = parse_config(argv)
        if train(config, fresh=fresh) == signal.SIGINT:
            sys.exit(130)


if __name__ == "__main__":
    main()
