"""Raw data as small as it goes, and the commands that are run on it."""

import dataclasses
import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest

import data
import prepare
import settings
from support.results.scores import RunScores

RNG = np.random.default_rng(0)


def nifti(path, values, affine=None, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        file.header[name] = value
    nibabel.save(file, path)


def png(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = values if isinstance(values, PIL.Image.Image) else PIL.Image.fromarray(values)
    (picture.convert(mode) if mode else picture).save(path)


def build(name, raw, out, *options):
    prepare.main(
        ["build", name, "--raw", str(raw), "--data-dir", str(out), "--workers", "1", *map(str, options)]
    )
    return h5py.File(out / f"{name.removeprefix('folder:')}.h5")


def error(capsys, *argv):
    """The one line with which a command ends."""
    capsys.readouterr()
    workers = ["--workers", "1"] if argv[0] == "build" else []
    with pytest.raises(SystemExit) as stop:
        prepare.main([*map(str, argv), *workers])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def palette(values):
    picture = PIL.Image.fromarray(values).convert("P")
    picture.putdata(values.ravel().tolist())
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * 759)
    return picture


CLASSES = np.arange(3).repeat(64).reshape(12, 16).astype(np.uint8)


KINDS = {
    "palette": lambda c: palette(c),
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


def scan(path, channels=()):
    nifti(path, RNG.normal(size=(6, 7, 5, *channels)).astype(np.float32))


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


def classes_in(file):
    """The classes' names, and how many there are in every label."""
    count = {uid: len(np.unique(case["label"][()])) for uid, case in cases_in(file).items()}
    return json.loads(file.attrs["class_names"]), count


def contents(path):
    """What a file holds of each case, but for when its files were written."""
    with h5py.File(path) as file:
        return {
            f"{split}/{uid}": (
                case["image"][()].tobytes(),
                case["label"][()].tobytes(),
                {key: value for key, value in case.attrs.items() if key != "origin"},
            )
            for split in data.SPLITS
            for uid, case in file[split].items()
        }


def same(a, b):
    return a.keys() == b.keys() and all(
        x[:2] == y[:2] and all((x[2][k] == y[2][k]).all() for k in x[2])
        for x, y in ((a[key], b[key]) for key in a)
    )


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
