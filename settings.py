"""Which settings does a run have, which values may they take, and what does a trained network need to keep of
them? Section 5.3, Table 6 and Appendix D of Fu et al. (2023) in one place.

The defaults of `Config` are the paper's where a section is named, and otherwise the authors' public settings
or ours. They are replaced by the preset of the data set (PRESETS), for folder:NAME also by what its file
proposes, and by what is typed. Reading order: Config, PRESETS, the command line, check, ModelFacts.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from jax.sharding import Mesh

from data import Dataset, fingerprint, open_dataset
from diffusion import SAMPLERS, SCHEDULES, TIMESTEPS
from strategies import STRATEGIES
from support.disk.command_line import Parser, add_options, check_settings
from support.machine.cpu_convolution import way_here
from support.disk.files import InputError, tuples
from support.machine.devices import join_hosts, kind_of_device, provenance
from unet import NETWORKS


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. PRESETS has what differs from these defaults per data set."""

    dataset: Annotated[str, "Which data set is trained on; each has a preset of its own."] = "phantom_us"
    strategy: Annotated[str, "How the network is trained; see strategies.py.", STRATEGIES] = "rec_xT"
    data_dir: Annotated[str, "The folder of <dataset>.h5."] = "data"
    run_dir: Annotated[str, "The folder of the run; if empty, runs/<dataset>-<strategy>."] = ""
    seed: Annotated[int, "Seed of the weights, the data's order, augmentation, times and noise.", 0] = 0
    init_from: Annotated[str, "A run's folder or a model file from whose weights the training starts; arrays "
                              "of another shape, such as the head for other classes, start anew."] = ""
    # The network (§5.3, Figure 2)
    network: Annotated[str, "Which network is trained; see the end of unet.py.", NETWORKS] = "UNet"
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
    schedule: Annotated[str, "How beta_t grows.", SCHEDULES] = "linear"
    signal: Annotated[float, "How strong masks are against the noise; above 1, a noisy mask gives more of "
                      "the truth away, as a larger image does.", 1e-3, 1e3] = 1.0
    sampling_steps: Annotated[int, "K, the number of sampling steps.", 1] = 5
    sampler: Annotated[Literal[*SAMPLERS], "How masks are sampled in validation."] = "ddpm"
    blend: Annotated[Literal["mean", "gaussian"],
                     "How predictions of overlapping patches are put together: by their mean, or one with "
                     "Gaussian weights of patches that overlap by half."] = "mean"
    prediction: Annotated[Literal["x_0", "eps"], "What the network predicts (eps: App. A.4)."] = "x_0"
    time_sampling: Annotated[Literal["importance", "uniform"], "How t is drawn."] = "importance"
    ema_decay: Annotated[float, "Decay of averaged weights; with 0 none are kept.", 0, 0.9999] = 0.0
    teacher: Annotated[Literal["model", "ema"], "Which weights make the first of two passes (§4)."] = "model"
    evaluate_with: Annotated[Literal["model", "ema"], "Which weights are validated and tested."] = "model"
    # Optimisation (Table 6 is missing from our copy; these are the authors' public settings)
    steps: Annotated[int, "Number of optimizer steps.", 1] = 12_500
    batch_size: Annotated[int, "Patches in a step, over all devices.", 1] = 8
    accumulate: Annotated[int, "Number of parts of a batch, computed one by one to save memory.", 1] = 1
    learning_rate: Annotated[float, "The learning rate at its peak.", 1e-9] = 8e-4
    learning_rate_start: Annotated[float, "The learning rate before warm-up.", 0] = 1e-5
    learning_rate_end: Annotated[float, "The learning rate after the cosine.", 0] = 5e-5
    warmup_steps: Annotated[int, "Steps of warm-up; at most half of those until the cosine ends.", 0] = 100
    decay_steps: Annotated[int, "Steps until the cosine ends, from --restart-at on; with 0, all of them.",
                           0] = 10_000
    restart_at: Annotated[int, "Step at which a run that has come so far goes on with a new warm-up and "
                               "cosine, to train longer than was planned; with 0 there is none.", 0] = 0
    weight_decay: Annotated[float, "Weight decay of AdamW.", 0] = 1e-8
    clip_norm: Annotated[float, "Norm to which the whole gradient is clipped.", 1e-9] = 1.0
    # Augmentation (§5.3; limits: the authors' public settings)
    rotation: Annotated[float, "Largest rotation about every axis, in radians.", 0] = 0.088
    scaling: Annotated[float, "Largest stretching along every axis, as a share.", 0, 0.9] = 0.15
    translation: Annotated[tuple[int, ...], "Largest translation along every axis, in voxels.", 0] = (10, 10)
    foreground: Annotated[float, "Share of the patches that show a random voxel of the foreground, at any "
                          "place in them; without effect if a patch is as large as the image.", 0, 1] = 0.0
    # The run
    mesh: Annotated[str, "How devices share batch and second axis: data=4,space=2. If empty, all share "
                         "the batch."] = ""
    validate_every: Annotated[int, "Steps between two validations, and checkpoints (§5.3).", 1] = 500
    validation_cases: Annotated[int, "Number of validation cases, from the first on; with 0, all.", 0] = 0
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


# --- The command line ---------------------------------------------------------------------------


def parser_of(doc: str, defaults: Config | None = None) -> Parser:
    """The options of train.py, whose help names these defaults, or the paper's."""
    parser = Parser(doc, add_help=False)
    asked = "Show this text, with the defaults of the --dataset that is typed."
    parser.add_argument("-h", "--help", action="store_true", help=asked)
    add_options(parser, Config, defaults)
    parser.add_argument("--fresh", action="store_true", help="Start over; an old run is moved aside.")
    parser.add_argument(
        "--hosts", metavar="ADDRESS:PORT,COUNT,NUMBER", help="Train as one of several processes: the address "
        "of the first, their number, and which one this is (0, 1, ...); auto on a TPU pod or with Slurm.",
    )  # fmt: skip
    return parser


def parse_config(argv: Sequence[str] | None, doc: str = "") -> tuple[Config, bool]:
    """The settings of a command line: the defaults, replaced by the data set's preset, then by the
    file's proposals (folder:NAME), then by what is typed. Tuples are typed 16,32 and strides
    2x2x1,2x2x2. The second result is --fresh; `doc` heads the --help, which has the defaults of the data set
    that is typed. Raises InputError if the file cannot be read."""
    parser = parser_of(doc)
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if not typed.get("run_dir"):  # an empty one is the default one
        typed.pop("run_dir", None)
    fresh, help_is_asked_for, hosts = typed.pop("fresh"), typed.pop("help"), typed.pop("hosts", "")
    if not help_is_asked_for:
        join_hosts(hosts)  # before anything asks which devices there are
    name, data_dir = typed.get("dataset", Config.dataset), Path(typed.get("data_dir", Config.data_dir))
    kind, _, own = name.partition(":")
    if kind not in PRESETS or (kind == "folder") != bool(own):
        known = ", ".join(n for n in PRESETS if n != "folder")
        hint = f"; did you mean folder:{name}?" if (data_dir / f"{name}.h5").exists() else ""
        parser.error(f"--dataset {name} is not one of {known}, folder:NAME{hint}")
    settings = {"run_dir": run_dir(name, typed.get("strategy", Config.strategy))} | PRESETS[kind]
    if own:
        proposed = open_dataset(name, data_dir, ()).settings
        if other := proposed.keys() - {"patch_shape", "strides", "translation", "foreground"}:
            raise InputError(f"{name}: its file may not propose {', '.join(sorted(other))}; build it again")
        settings |= proposed
    if help_is_asked_for:
        parser_of(doc, Config(**settings)).print_help()
        parser.exit()
    return resolved(Config(**settings | typed)), fresh


def resolved(config: Config) -> Config:
    """The settings with `auto` replaced by what suits this machine."""
    dtype = "float32" if kind_of_device() == "cpu" else "bfloat16"
    dtype = dtype if config.dtype == "auto" else config.dtype
    convolutions = way_here() if config.convolutions == "auto" else config.convolutions
    return dataclasses.replace(config, dtype=dtype, convolutions=convolutions)


def run_dir(dataset: str, strategy: str) -> str:
    """The default folder of a run."""
    return f"runs/{dataset.replace(':', '-')}-{strategy}"


# --- What fits together -------------------------------------------------------------------------


def check(config: Config, dataset: Dataset | None = None, mesh: Mesh | None = None) -> None:
    """Raises InputError, one line, if a setting is wrong by itself, if settings do not fit together, or if
    they do not fit the data set or the devices that are given."""
    check_settings(config)
    dims, levels = len(config.patch_shape), len(config.channels)
    data, space = mesh.devices.shape if mesh else (1, 1)
    wrong = None
    if dataset and dims != len(dataset.canvas):
        wrong = f"--patch-shape {config.patch_shape}: {config.dataset} is {len(dataset.canvas)}D"
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
    elif config.restart_at >= config.steps:
        wrong = "--restart-at must be below --steps"
    elif config.time_dim % 2:
        wrong = "--time-dim must be even"
    elif not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?m", config.save_every):
        wrong = f"--save-every {config.save_every} is neither steps, like 200, nor minutes, like 10m"
    elif config.batch_size % (config.accumulate * data):
        wrong = f"--batch-size {config.batch_size} must be a multiple of --accumulate x {data} devices"
    elif dims > 1 and config.patch_shape[1] % space:
        wrong = f"--patch-shape {config.patch_shape}: the second must be a multiple of space={space}"
    elif dataset and not dataset.uids["validation"]:
        wrong = f"{config.dataset} has no validation cases; build it again with some"
    if wrong:
        raise InputError(wrong)


# --- What a model keeps -------------------------------------------------------------------------


def network_arguments(config: Config, image_channels: int, classes: int) -> dict:
    """The keyword arguments of the network that a strategy needs."""
    strategy = STRATEGIES[config.strategy]
    same = ("patch_shape", "channels", "strides", "time_dim", "transformer", "heads", "head_dim", "dtype",
            "convolutions", "remat")  # fmt: skip
    return {name: getattr(config, name) for name in same} | {
        "image_channels": image_channels, "classes": classes, "T": TIMESTEPS,
        "noisy_mask": strategy.noisy_mask, "self_condition": strategy.self_condition,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a model file holds besides the weights: the settings of its training and all that prediction needs
    to know of the data."""

    config: Annotated[Config, "All settings of the training."]
    class_names: Annotated[tuple[str, ...], "The names of the classes, background first."]
    image_channels: Annotated[int, "The number of channels of an image.", 1]
    channel_names: Annotated[tuple[str, ...], "The names of an image's channels, if they have any."]
    unit: Annotated[Literal["mm", "pixel"], "The unit of lengths."]
    spacing: Annotated[tuple[float, ...], "The spacing of prepared images, if all have the same."]
    source: Annotated[str, "Where the data set came from."]
    cases: Annotated[str, "The data set's fingerprint."]
    step: Annotated[int, "The number of training steps.", 0]
    dice: Annotated[float, "Dice on the validation cases, last sampling step."]
    provenance: Annotated[dict, "Hardware, versions, commit, date."]
    numbers: Annotated[tuple, "The classes' numbers in the label files, if known."] = ()
    geometry: Annotated[Literal["", "sform", "pixdim"], "What holds if a NIfTI header has two."] = ""
    threshold: Annotated[float, "Above which the label files show class 1; none below 0.", -1] = -1.0


def model_facts(config: Config, dataset: Dataset, begun: dict) -> ModelFacts:
    """The facts about a run's network before its first step; `begun` says from which weights it began. Each
    validation fills in `step` and `dice`."""
    own_images = config.dataset.startswith("folder:")
    return ModelFacts(
        config, class_names=dataset.class_names, image_channels=dataset.image_channels,
        channel_names=dataset.channel_names, unit=dataset.unit,
        spacing=dataset.load("train", 0).spacing if own_images else (), source=dataset.source,
        cases=fingerprint(dataset), step=0, dice=-1.0, provenance=provenance() | begun,
        numbers=dataset.numbers, geometry=dataset.geometry, threshold=dataset.threshold,
    )  # fmt: skip


def read_facts(header: dict) -> ModelFacts:
    """The facts in the header of a model file. Settings that are newer than the file have their defaults, and
    files of version 1 have some facts twice. Raises InputError, ValueError, TypeError or KeyError if they are
    no facts, or do not agree with each other."""
    names = {field.name for field in dataclasses.fields(Config)}
    known = header["config"] | {name: header[name] for name in header.keys() & names}
    known |= {name: value for name, value in header.get("arguments", {}).items() if name in names}
    config = Config(**{name: tuples(value) for name, value in known.items() if name in names})
    fields = {field.name for field in dataclasses.fields(ModelFacts)} - {"config"}
    given = {name: tuples(header[name]) for name in fields & header.keys()}
    facts = ModelFacts(config, **{"channel_names": ()} | given)
    check(config)
    check_settings(facts)
    dims = len(config.patch_shape)
    if dims not in (2, 3) or len(facts.spacing) != (dims if config.dataset.startswith("folder:") else 0):
        raise ValueError(f"{dims}D with a spacing of {len(facts.spacing)} numbers")
    if len(facts.class_names) < 2 or len(facts.channel_names) not in (0, facts.image_channels):
        raise ValueError(f"{len(facts.class_names)} classes, {len(facts.channel_names)} names of channels")
    if any(type(number) is not int or number < 0 for number in facts.numbers):
        raise ValueError(f"{facts.numbers} are no numbers of classes")
    return facts
