"""Raw data and trainings as small as they go, and the commands that are run on them."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import h5py
import jax
import nibabel
import numpy as np
import PIL.Image
import pytest

import data
import evaluate
import prepare
import settings
import train
from support.disk import run_folder
from support.disk.files import InputError, read_signed
from support.machine.devices import make_mesh, shardings
from support.results.scores import RunScores

HERE = Path(data.__file__).parent
RNG = np.random.default_rng(0)


def nifti(path, values, affine=None, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        file.header[name] = value
    nibabel.save(file, path)


def directions(codes, spacing, turn=(0.0, 0.0, 0.0)):
    """The first columns of an affine: axes along `codes`, as long as a voxel, then turned by angles."""
    ornt = nibabel.orientations.axcodes2ornt(codes)
    axes = np.zeros((3, 3))
    axes[ornt[:, 0].astype(int), range(3)] = ornt[:, 1]
    return nibabel.eulerangles.euler2mat(*turn) @ axes * spacing


def png(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = values if isinstance(values, PIL.Image.Image) else PIL.Image.fromarray(values)
    (picture.convert(mode) if mode else picture).save(path)


def build(name, raw, out, *options):
    prepare.main(
        ["build", name, "--raw", str(raw), "--data-dir", str(out), "--workers", "1", *map(str, options)]
    )
    return h5py.File(out / f"{name.removeprefix('folder:')}.h5")


def one_line(capsys, main, *words):
    """The one line with which a program ends that cannot do what it is asked to."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    [line] = [line for line in said if line.startswith("error: ")]
    assert not any(line.startswith("usage: ") for line in said)
    return line


def error(capsys, *argv):
    """The one line with which a command of prepare.py ends."""
    return one_line(capsys, prepare.main, *argv, *(["--workers", "1"] if argv[0] == "build" else []))


def python(*words, cwd=HERE, **variables):
    """What a process of Python says, by default one that is run in the project's folder."""
    command, environment = [sys.executable, *map(str, words)], os.environ | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def mutated(content, rng):
    """Bytes flipped, cut off, doubled, or overwritten."""
    content, where = bytearray(content), int(rng.integers(len(content)))
    kind = rng.integers(4)
    if kind == 0:
        for i in rng.integers(len(content), size=rng.integers(1, 20)):
            content[i] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[where:]
    elif kind == 2:
        content[where:where] = content[where : where + 100]
    else:
        content[where : where + 8] = rng.bytes(8)
    return bytes(content)


def palette(values, colours):
    """A picture whose pixels are numbers of colours, which are three numbers each."""
    picture = PIL.Image.fromarray(values).convert("P")
    picture.putdata(values.ravel().tolist())
    picture.putpalette(colours)
    return picture


CLASSES = np.arange(3).repeat(64).reshape(12, 16).astype(np.uint8)


KINDS = {
    "palette": lambda c: palette(c, [0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * 759),
    "grey": lambda c: PIL.Image.fromarray(c),
    "grey 0/127/255": lambda c: PIL.Image.fromarray(np.array([0, 127, 255], np.uint8)[c]),
    "16 bits": lambda c: PIL.Image.fromarray(np.array([0, 300, 700], np.uint16)[c]),
    "grey RGB": lambda c: PIL.Image.fromarray(np.array([0, 127, 255], np.uint8)[c]).convert("RGB"),
    "grey RGBA": lambda c: PIL.Image.fromarray(np.array([0, 127, 255], np.uint8)[c]).convert("RGBA"),
    "grey with alpha": lambda c: PIL.Image.fromarray(np.array([0, 127, 255], np.uint8)[c]).convert("LA"),
    "colours": lambda c: PIL.Image.fromarray(np.array([[0, 0, 0], [0, 0, 200], [255, 0, 0]], np.uint8)[c]),
}


def pictures(raw, count=6, kind="grey", shape=(12, 16), ending="png", masks="labels"):
    """A folder of `count` pairs, image i with the level 20 i in its first pixel."""
    for i in range(count):
        image = RNG.integers(0, 256, shape).astype(np.uint8)
        png(raw / "images" / f"case{i}.{ending}", image)
        label = np.roll(np.resize(CLASSES, shape), i)
        png(raw / masks / f"case{i}.png", KINDS[kind](label))
    return raw


def split_of(raw, out, *options):
    with build("folder:f", raw, out, *options) as file:
        return {uid: split for split in data.SPLITS for uid in file[split]}


def picture(shape=(12, 16)):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def mask(shape=(12, 16)):
    return 255 * RNG.integers(0, 2, shape).astype(np.uint8)


def scan(path):
    nifti(path, RNG.normal(size=(6, 7, 5)).astype(np.float32))


def organ(path, classes=2):
    nifti(path, np.resize(np.arange(classes), (6, 7, 5)).astype(np.uint8))


def cases_in(file):
    return {uid: case for split in data.SPLITS for uid, case in file[split].items()}


def volumes(raw, count=6, ending=".nii.gz"):
    """A folder of volumes with one clean pair each."""
    for i in range(count):
        image = RNG.normal(size=(12, 14, 10)).astype(np.float32)
        nifti(raw / "images" / f"v{i}{ending}", image)
        nifti(raw / "labels" / f"v{i}{ending}", (image > 1).astype(np.uint8))
    return raw


def nan(raw):
    image = RNG.normal(size=(12, 14, 10)).astype(np.float32)
    image[3, 3, 3] = np.nan
    nifti(raw / "images" / "v3.nii.gz", image)


def empty(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.zeros((12, 14, 10), np.uint8))


def masks(raw, *values):
    """A folder of pairs, whose masks hold these values."""
    for i, numbers in enumerate(values):
        png(raw / "images" / f"case{i}.png", picture())
        png(raw / "labels" / f"case{i}.png", np.resize(np.array(numbers, np.uint8), (12, 16)))
    return raw


def contents(path):
    """What a file holds of each case, except for when its files were written."""
    with h5py.File(path) as file:
        return {
            case.name: [part[()].tobytes() for part in case.values()]
            + [np.asarray(value).tobytes() for name, value in case.attrs.items() if name != "origin"]
            for case in cases_in(file).values()
        }


def run_scores(dice, hausdorff=None, **changes):
    """The scores of a run, as they are read, from Dice [case, step, class]. Where that is 0, the class is
    missed, at the distance 100; where it is NaN, neither truth nor prediction has it. Other distances are
    10 (1 - Dice) if none are given."""
    outcome = np.where(np.isnan(dice), "absent", np.where(dice == 0, "missed", "found")).astype("<U8")
    if hausdorff is None:
        hausdorff = np.where(dice == 0, 100, 10 * (1 - dice))
    cases, steps, classes = dice.shape
    config = dataclasses.asdict(settings.Config(sampling_steps=steps))
    uids, names = (tuple(f"{word}{i}" for i in range(n)) for word, n in (("case", cases), ("class", classes)))
    run = "Diff.", config, "ddpm", "mm", "somewhere", 7, names, uids, (Path("run"),)
    return RunScores(*run, dice[None], hausdorff[None], outcome[None])._replace(**changes)


# --- Trainings ---

TINY = {
    "phantom_shape": (16, 16), "patch_shape": (16, 16), "channels": (4,), "strides": (),
    "translation": (1, 1), "heads": 1, "head_dim": 4, "decay_steps": 0, "warmup_steps": 2,
    "transformer": False, "dtype": "float32", "convolutions": "native",
    "validation_cases": 2, "log_every": 1, "steps": 4, "validate_every": 2, "batch_size": 8,
}  # fmt: skip


def tiny(**settings):
    return train.Config(**TINY | settings)


def quick(**settings):
    """The same with a network that takes a moment to compile."""
    return tiny(network="Mixed", **settings)


def mesh(config, devices=1):
    return make_mesh(config.mesh, jax.devices()[:devices])


def dataset_of(config):
    return data.open_dataset(config.dataset, Path(), config.phantom_shape)


def batch_number(config, step=0):
    return data.make_batch(dataset_of(config), config.seed, step, config.batch_size)


def stepper(config, devices=1):
    """The compiled step of a run, from the first weights on: a function from the number of the step (and a
    history of losses, and a batch) to metrics and state."""
    _, rows, whole = shardings(mesh(config, devices))
    first = train.make_state(config, 1, len(dataset_of(config).class_names))
    compiled = train.make_train_step(config, first.network, mesh(config, devices))

    def step(number=0, sampler=None, batch=None, state=None):
        state = state or first
        state = dataclasses.replace(state, time_sampler=sampler) if sampler else state
        state = jax.tree.map(np.array, state)  # NumPy compiles no program for each shape
        state = eqx.tree_at(lambda s: s.step, state, np.array(number, np.int32))
        batch = batch_number(config) if batch is None else batch
        state, metrics = compiled(jax.device_put(batch, rows), eqx.filter_shard(state, whole))
        jax.effects_barrier()
        return {name: float(value) for name, value in metrics.items()}, state

    return step


def leaves(path):
    """What must not differ between two runs: of a training state, or of a model file."""
    if path.name == "last":
        header, content = run_folder.read_state(path)
        return header["step"], header["best"], content
    facts = evaluate.load(path).facts
    return facts.step, facts.dice, read_signed(path)[1]


def state_of(config, name="last"):
    """A training state that a run has left."""
    like = eqx.filter_eval_shape(train.make_state, config, 1, 2)
    _, content = run_folder.read_state(Path(config.run_dir) / name)
    return eqx.tree_deserialise_leaves(io.BytesIO(content), like)


def left_behind(run):
    """The same of all states and models of a run, and its log."""
    files = [run / name for name in ("last", "best", "final") if (run / name).exists()]
    return [leaves(file) for file in files], (run / "log.jsonl").read_text()


def train_until_killed(config, moment):
    """A training whose process dies when it asks for the batch of this step."""
    real = train.make_batch

    def dies(dataset, seed, step, *more):
        if step == moment:
            raise InputError("killed")
        return real(dataset, seed, step, *more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="killed"):
        patch.setattr(train, "make_batch", dies)
        train.train(config)
