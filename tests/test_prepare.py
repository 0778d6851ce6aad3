"""Raw downloads and folders, made here as small as they go, against what is computed by hand."""

import argparse
import fcntl
import gzip
import hashlib
import http.server
import io
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import h5py
import jax
import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to

import data
import evaluate
import prepare
from settings import check
import train
from recipes import RECIPES, amos_ct, brats_mr, muscle_us, prostate_mr
from recipes import folder as own
from support import download, pairing, workers
from support.dataset_file import FORMAT_VERSION
from support.files import InputError
from support.machine import make_mesh
from support.pictures import COLOURS
from support.recipe import Case

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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What is written where nobody said is written there."""
    monkeypatch.chdir(tmp_path)


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


# --- Geometry, on the data sets of volumes --------------------------------------------------------

SIZE, SPACING = (26, 34, 14), (1.1, 0.8, 3.1)


def orientation(which):
    """A voxel-to-world matrix: axes swapped, turned round, or oblique."""
    if which == "oblique":
        turn = nibabel.eulerangles.euler2mat(0.2, -0.15, 0.1)
    else:
        codes = nibabel.orientations.axcodes2ornt(which)
        turn = np.zeros((3, 3))
        turn[codes[:, 0].astype(int), range(3)] = codes[:, 1]
    affine = np.eye(4)
    affine[:3, :3] = turn * SPACING
    affine[:3, 3] = (12.0, -31.0, 7.5)
    return affine


def tree(name, raw, image, label, affine):
    """A raw tree of one case."""
    if name == "amos_ct":
        pair = {"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0001.nii.gz"}
        paths = pair.values()
        (raw / "amos22").mkdir(parents=True)
        (raw / "amos22" / "dataset.json").write_text(json.dumps({"training": [pair], "validation": []}))
        paths = [raw / "amos22" / path for path in paths]
    elif name == "prostate_mr":
        paths = [raw / "data" / "data" / f"c7_{kind}.nii" for kind in ("img", "mask")]
        paths[0].parent.mkdir(parents=True)
        (raw / "institution.txt").write_text("a1 X\na2 X\nc7 X\na4 X\na5 X\na6 X\na7 X\na8 X\n")
    else:
        paths = [raw / f"{kind}Tr" / "hippocampus_001.nii.gz" for kind in ("images", "labels")]
    for path, values in zip(paths, (image, label), strict=True):
        nifti(path, values, affine)


@pytest.mark.parametrize("which", ["RAS", "LPS", "PIR", "oblique"])
@pytest.mark.parametrize(
    "name, spacing, shape",
    [
        ("amos_ct", (1.5, 1.5, 5.0), (192, 128, 128)),
        ("prostate_mr", (0.75, 0.75, 2.5), (256, 256, 48)),
        ("hippocampus_mr", None, None),
    ],
)
def test_every_voxel_stays_at_its_place_in_the_world(tmp_path, monkeypatch, name, which, spacing, shape):
    affine = orientation(which)
    noise = RNG.normal(scale=100, size=SIZE).astype(np.float32)
    inside = np.moveaxis(np.indices(SIZE), 0, -1)
    right = nibabel.affines.apply_affine(affine, inside)[..., 0]
    label = np.where(right > np.median(right), 2, 1).astype(np.uint8)
    tree(name, tmp_path / "raw", noise, label, affine)
    if name == "prostate_mr":  # the others are listed, not there
        only = prostate_mr.RECIPE._replace(plan=one_case(prostate_mr.plan, "c7"))
        monkeypatch.setitem(RECIPES, name, only)
    with build(name, tmp_path / "raw", tmp_path) as file:
        ((_, case),) = file["train"].items()
        image, found = case["image"][..., 0], case["label"][()]
        world, measured = case.attrs["affine"], case.attrs["spacing"]

    # Directions are the closest to right, anterior, superior; sizes are as §5.2 says.
    assert nibabel.aff2axcodes(world) == ("R", "A", "S")
    assert np.allclose(nibabel.affines.voxel_sizes(world), measured, rtol=1e-6)
    assert image.shape == found.shape and (shape is None or found.shape == shape)
    expected_spacing = spacing or sorted_by_axis(affine)
    assert np.allclose(measured, expected_spacing, rtol=1e-5)

    # Intensities: nibabel samples the raw file at the world's places; only level and scale may differ.
    raw = nibabel.Nifti1Image(noise, affine)
    here = resample_from_to(raw, (found.shape, world), order=1, cval=np.nan).get_fdata()
    seen = np.isfinite(here)
    low, high = np.percentile(noise, [0.5, 99.5]) if spacing is None else (-991, 362)
    here = np.clip(here[seen], low, high) if name != "prostate_mr" else here[seen]
    assert seen.sum() > 500
    slope, level = np.polyfit(here, image[seen], 1)
    assert slope > 0 and np.abs(image[seen] - slope * here - level).max() < 1e-3

    # The label's boundary is where the world says it is, to half a raw voxel.
    places = nibabel.affines.apply_affine(world, np.moveaxis(np.indices(found.shape), 0, -1))[..., 0]
    sure = seen & (np.abs(places - np.median(right)) > 0.51 * np.linalg.norm(SPACING))
    assert (found[sure] == np.where(places[sure] > np.median(right), 2, 1)).all()

    # §5.2: zero mean and unit variance before the crop, which cuts nothing off here; the rest is padding.
    field = found > 0
    assert abs(image[field].mean()) < 1e-3 and abs(image[field].std() - 1) < 1e-3
    assert np.allclose(image[~field], image[field].min())


def one_case(plan, uid):
    def only(raw):
        whole = plan(raw)
        return whole._replace(cases=[case for case in whole.cases if case.uid == uid])

    return only


def sorted_by_axis(affine):
    """Voxel sizes in the order right, anterior, superior."""
    order = np.abs(affine[:3, :3] / SPACING).argmax(axis=0)
    return np.array(SPACING)[np.argsort(order)]


def test_a_large_volume_is_cut_in_the_middle(tmp_path):
    image = RNG.integers(-900, 300, (200, 130, 137)).astype(np.int16)
    label = (image > 0).astype(np.uint8)
    tree("amos_ct", tmp_path / "raw", image, label, np.diag([1.5, 1.5, 5.0, 1]))
    with build("amos_ct", tmp_path / "raw", tmp_path) as file:
        case = file["train/amos_0001"]
        middle = image[4:196, 1:129, 4:132].astype(float)
        assert np.allclose(case["image"][..., 0], (middle - image.mean()) / image.std(), atol=1e-4)
        assert (case["label"][()] == (middle > 0)).all()
        assert np.allclose(case.attrs["affine"][:3, 3], [6, 1.5, 20])


def test_brats_in_its_own_orientation(tmp_path):
    """The files' order is left, posterior, superior; there the crop is [37:216, 10:229, 0:155]."""
    affine = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    folder = tmp_path / "BraTS2021_Training_Data" / "BraTS2021_00002"
    images = {}
    for factor, kind in enumerate(("t1", "t1ce", "t2", "flair"), 1):
        images[kind] = np.zeros((240, 240, 155), np.int16)
        images[kind][30:200, 5:220, 3:150] = factor * RNG.integers(1, 9, (170, 1, 1))
        nifti(folder / f"{folder.name}_{kind}.nii.gz", images[kind], affine)
    label = np.zeros((240, 240, 155), np.uint8)
    label[37, 10, 0], label[215, 228, 154], label[100, 80, 60] = 1, 2, 4
    nifti(folder / f"{folder.name}_seg.nii.gz", label, affine)
    with build("brats_mr", tmp_path, tmp_path) as file:
        case = file[f"train/{folder.name}"]
        cut = (slice(37, 216), slice(10, 229), slice(0, 155))
        assert (case["label"][()] == (label[cut] > 0)[::-1, ::-1]).all() and case["label"][()].sum() == 3
        for channel, kind in enumerate(images):
            standard = (images[kind] - images[kind].mean()) / images[kind].std()
            assert np.allclose(case["image"][..., channel], standard[cut][::-1, ::-1], atol=1e-4)


def test_muscle_us(tmp_path):
    root = tmp_path / "Polito" / "data" / "MuscleCNN"
    masks = {}
    for folder, mode in (("train", "RGBA"), ("val", "L"), ("test", "1")):
        for uid in (f"BB_anon_{folder}_1", f"TA_anon_{folder}_2"):
            image = RNG.integers(0, 256, (480, 512)).astype(np.uint8)
            masks[folder, uid] = image, RNG.integers(0, 2, (480, 512)).astype(bool)
            png(root / folder / f"{uid}.png", image)
            png(root / f"{folder}annot" / f"{uid}.png", 255 * masks[folder, uid][1].astype(np.uint8), mode)
    png(root / "train" / "no_mask.png", image)
    (root / "trainannot" / "._BB_anon_train_1.png").write_bytes(b"of macOS")
    with build("muscle_us", tmp_path, tmp_path) as file:
        for folder, split in (("train", "train"), ("val", "validation"), ("test", "test")):
            assert list(file[split]) == [f"BB_anon_{folder}_1", f"TA_anon_{folder}_2"]
            for uid, case in file[split].items():
                image, mask = masks[folder, uid]
                assert (case["label"][()] == mask).all()
                standard = (image - image.mean(dtype=float)) / image.std(dtype=float)
                assert np.allclose(case["image"][..., 0], standard, atol=1e-5)
        assert list(file["train/BB_anon_train_1"].attrs["spacing"]) == [1, 1]


def test_the_splits_of_the_paper(tmp_path):
    """Complete trees, of empty files: 2531/666/713, 200/10/90, 411/14/164, 938/31/282 (§5.2)."""

    def counts(plan):
        assert len({case.uid for case in plan.cases}) == len(plan.cases)
        return tuple(sum(case.split == split for case in plan.cases) for split in data.SPLITS)

    for folder, first, n in (("train", 0, 2531), ("val", 2531, 666), ("test", 3197, 713)):
        (tmp_path / "muscle" / f"{folder}annot").mkdir(parents=True)
        for i in range(first, first + n):
            (tmp_path / "muscle" / f"{folder}annot" / f"BB_anon_{i}_1.png").touch()
    assert counts(muscle_us.plan(tmp_path / "muscle")) == (2531, 666, 713)

    def pairs(kind, numbers):
        return [{"image": f"./images{kind}/amos_{i:04d}.nii.gz", "label": f"./l/{i}.nii.gz"} for i in numbers]

    lists = {"training": pairs("Tr", [*range(1, 201), *range(507, 547)])}
    lists["validation"] = pairs("Va", [*range(400, 500), *range(550, 570)])
    (tmp_path / "dataset.json").write_text(json.dumps(lists))
    plan = amos_ct.plan(tmp_path)
    assert counts(plan) == (200, 10, 90) and len(plan.class_names) == 16
    assert [case.uid for case in plan.cases if case.split == "validation"][-1] == "amos_0409"

    (tmp_path / "data").mkdir()
    sizes = {"A": 85, "B": 85, "C": 85, "D": 86, "E": 84, "F": 84, "G": 80}
    lines = [f"{name}{i:03d} {name}" for name, n in sizes.items() for i in range(n)]
    (tmp_path / "institution.txt").write_text("\n".join(lines[::-1]))
    plan = prostate_mr.plan(tmp_path)
    assert counts(plan) == (411, 14, 164) and len(plan.class_names) == 9
    assert [c.uid for c in plan.cases if c.split == "validation" and c.uid[0] == "B"] == ["B084", "B083"]

    for i in range(1251):
        folder = tmp_path / "brats" / f"BraTS2021_{(7 * i) % 1251:05d}"
        folder.mkdir(parents=True)
        (folder / f"{folder.name}_seg.nii.gz").touch()
    plan = brats_mr.plan(tmp_path / "brats")
    assert counts(plan) == (938, 31, 282)
    assert plan.cases[938].uid == "BraTS2021_00938" and plan.cases[-1].split == "test"


@pytest.mark.parametrize(
    "shape, patch, overlap",
    [
        ((480, 512), (480, 512), None),
        ((192, 128, 128), (128, 128, 128), (64, 0, 0)),
        ((256, 256, 48), (256, 256, 32), (0, 0, 16)),
        ((179, 219, 155), (128, 128, 128), (77, 37, 101)),
    ],
)
def test_patch_grids_overlap_as_in_the_paper(shape, patch, overlap):
    starts = np.array(evaluate.patch_starts(shape, patch))
    assert starts.min() == 0 and (starts.max(axis=0) + patch == shape).all()
    if overlap is None:
        assert len(starts) == 1
    else:
        found = [patch[a] - steps[1] if len(steps := np.unique(starts[:, a])) > 1 else 0 for a in range(3)]
        assert tuple(found) == overlap


# --- Muscle post-processing -----------------------------------------------------------------------


def test_disks_are_matlabs():
    """Published shapes: 5 x 5 ones; 9 x 9 with corners cut by 2; 19 x 19 with corners cut by 4."""
    for radius, cut in ((3, 0), (5, 2), (10, 4)):
        disk = muscle_us.disk(radius)
        n = 2 * radius - 1
        y, x = np.indices((n, n))
        corners = np.minimum(y, n - 1 - y) + np.minimum(x, n - 1 - x) < cut
        assert disk.shape == (n, n) and (disk == ~corners).all()


def blob(mask, top, left, height, width):
    mask[top : top + height, left : left + width] = True
    return mask


def test_muscle_pieces_holes_and_specks():
    mask = blob(np.zeros((480, 512), bool), 200, 100, 120, 140)
    mask[250:255, 150:155] = False  # a hole
    mask[20:24, 20:24] = True  # a speck
    clean = muscle_us.clean(mask)
    assert clean[252, 152] and not clean[:60].any()
    assert evaluate.dice(clean, blob(np.zeros_like(mask), 200, 100, 120, 140)) > 0.97
    assert not muscle_us.clean(np.zeros((480, 512), bool)).any()


@pytest.mark.parametrize("share, keeps_upper", [(0.6, False), (0.9, True)])
def test_the_more_superficial_of_two_like_pieces_stays(share, keeps_upper):
    """The upper piece is smaller, and further right: its top edge decides, not its left one."""
    mask = blob(np.zeros((480, 512), bool), 250, 20, 150, 200)
    blob(mask, 40, 280, 150, int(200 * share))
    clean = muscle_us.clean(mask)
    assert clean[:200].any() == keeps_upper and clean[250:].any() != keeps_upper


def test_only_muscle_is_post_processed():
    steps = np.stack([blob(np.zeros((480, 512), int) > 0, 200, 100, n, 140) for n in (2, 90, 120)]).astype(
        int
    )
    assert (evaluate.clean("phantom_us", steps) == steps).all()
    cleaned = evaluate.clean("muscle_us", steps)
    assert [bool(step.any()) for step in cleaned] == [False, True, True]  # the first is a mere line
    assert cleaned[1].sum() < cleaned[2].sum() and set(np.unique(cleaned)) == {0, 1}


def test_touching_the_edge_costs_nothing():
    mask = blob(np.zeros((480, 512), bool), 0, 0, 200, 300)
    clean = muscle_us.clean(mask)
    assert clean[0, 0] and clean[100, 0] and clean[0, 150]


# --- A folder -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_label_pictures(tmp_path, capsys, kind):
    with build("folder:f", pictures(tmp_path / "raw", kind=kind), tmp_path) as file:
        cases = {uid: case["label"][()] for split in data.SPLITS for uid, case in file[split].items()}
        names = json.loads(file.attrs["class_names"])
    assert len(cases) == 6 and len(names) == 3 and names[0] == "background"
    for i in range(6):
        assert (cases[f"case{i}"] == np.roll(CLASSES, i)).all()
    assert f"6 {kind.split(' 0/')[0].replace('16 bits', 'grey')}"[:6] in capsys.readouterr().err


def test_0_and_255_with_named_classes(tmp_path):
    raw = pictures(tmp_path / "raw", kind="grey")
    for path in (raw / "labels").iterdir():
        png(path, np.where(np.asarray(PIL.Image.open(path)) == 1, 255, 0).astype(np.uint8))
    with build("folder:f", raw, tmp_path, "--classes", "background,nerve") as file:
        assert json.loads(file.attrs["class_names"]) == ["background", "nerve"]
        assert {int(c["label"][()].max()) for s in data.SPLITS for c in file[s].values()} == {1}


def test_named_classes_that_no_label_shows(tmp_path, capsys):
    """Class 2 exists, though no case has it: numbers that are classes already stay."""
    raw = pictures(tmp_path / "raw")
    for path in (raw / "labels").iterdir():
        png(path, 3 * (np.asarray(PIL.Image.open(path)) == 1).astype(np.uint8))
    with build("folder:f", raw, tmp_path, "--classes", "background,a,b,c") as file:
        assert {int(c["label"][()].max()) for s in data.SPLITS for c in file[s].values()} == {3}
    assert "no label has the class a, b." in capsys.readouterr().err


def test_colour_grey_sizes_and_endings_mix(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=5, masks="masks")
    colour = RNG.integers(0, 256, (20, 14, 3)).astype(np.uint8)
    png(raw / "images" / "naïve 1.tif", colour)
    png(raw / "masks" / "nai\u0308ve 1.PNG", np.resize(CLASSES, (20, 14)))  # the accent by itself
    (raw / "images" / "notes.txt").write_text("left out")
    with build("folder:f", raw, tmp_path) as file:
        shapes = {uid: c["image"].shape for s in data.SPLITS for uid, c in file[s].items()}
        (image,) = (file[s]["naïve 1/image"][..., 0] for s in data.SPLITS if "naïve 1" in file[s])
    said = capsys.readouterr().err
    assert "1 other files left out" in said and "read as grey" in said
    assert shapes["naïve 1"] == (20, 14, 1) and shapes["case0"] == (12, 16, 1)
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.corrcoef(image.ravel(), luma.ravel())[0, 1] > 0.9999


def test_colour_stays_where_all_is_colour(tmp_path):
    raw, images = pictures(tmp_path / "raw", count=4), {}
    for i in range(4):
        images[f"case{i}"] = RNG.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        png(raw / "images" / f"case{i}.png", PIL.Image.fromarray(images[f"case{i}"]).convert("RGBA"))
    with build("folder:f", raw, tmp_path) as file:
        for split in data.SPLITS:
            for uid, case in file[split].items():
                flat = images[uid].reshape(-1, 3).astype(float)
                standard = ((flat - flat.mean(0)) / flat.std(0)).reshape(12, 16, 3)
                assert np.allclose(case["image"][()], standard, atol=1e-4)


def test_volumes_with_channels_go_to_the_median_spacing(tmp_path):
    raw = tmp_path / "raw"
    for i, z in enumerate((3.0, 3.0, 4.0)):
        size = (20, 18, round(48 / z))
        ramp = np.broadcast_to(np.arange(size[2]) * z, size)
        image = np.stack([RNG.normal(size=size), ramp], -1).astype(np.float32)
        nifti(raw / "images" / f"v{i}.nii.gz", image, np.diag([-1, 1, z, 1]))
        nifti(raw / "labels" / f"v{i}.nii.gz", (ramp > 20).astype(np.float32), np.diag([-1, 1, z, 1]))
    with build("folder:f", raw, tmp_path) as file:
        assert file.attrs["unit"] == "mm"
        settings = json.loads(file.attrs["settings"])
        (case,) = (file[s]["v2"] for s in data.SPLITS if "v2" in file[s])
        assert case["image"].shape == (20, 18, 16, 2) and np.allclose(case.attrs["spacing"], [1, 1, 3])
        # The second channel is the height in mm, but for level and scale; beyond the last voxels it stays.
        z = case.attrs["affine"][2, 2] * np.arange(16) + case.attrs["affine"][2, 3]
        height = case["image"][5, 5, 1:-1, 1]
        assert np.abs(height - np.polyval(np.polyfit(z[1:-1], height, 1), z[1:-1])).max() < 1e-3
        assert (case["label"][5, 5, 1:-1] == (z[1:-1] > 22)).all()
    assert settings["strides"] == [[2, 2, 1], [2, 2, 2]]


def test_slices_saved_as_volumes_are_2d(tmp_path):
    for i in range(4):
        affine = np.diag([0.5, 1.0, 0.7, 1])
        image = RNG.normal(size=(20, 1, 24)).astype(np.float32)
        nifti(tmp_path / "raw" / "images" / f"s{i}.nii", image, affine)
        nifti(tmp_path / "raw" / "labels" / f"s{i}.nii", (image > 0).astype(np.uint8), affine)
    with build("folder:f", tmp_path / "raw", tmp_path) as file:
        case = next(c for s in data.SPLITS for c in file[s].values())
        assert case["image"].shape == (20, 24, 1) and np.allclose(case.attrs["spacing"], [0.5, 0.7])
        assert ((case["image"][..., 0] > 0) == case["label"][()].astype(bool)).mean() > 0.9


def test_coarser_spacing_keeps_areas(tmp_path):
    raw = pictures(tmp_path / "raw", count=3, shape=(48, 64))
    for i in range(3):
        label = blob(np.zeros((48, 64), bool), 10, 12, 20, 30)
        png(raw / "labels" / f"case{i}.png", label.astype(np.uint8))
    with build("folder:f", raw, tmp_path, "--spacing", "2,2") as file:
        case = next(c for s in data.SPLITS for c in file[s].values())
        assert case["label"].shape == (24, 32) and list(case.attrs["spacing"]) == [2, 2]
        assert abs(4 * int(case["label"][()].sum()) - 600) < 60
        assert np.allclose(case.attrs["affine"][:2, 3], 0)  # begins on a pixel, not half-way between two


def split_of(raw, out, *options):
    with build("folder:f", raw, out, *options) as file:
        return {uid: split for split in data.SPLITS for uid in file[split]}


def test_adding_cases_moves_none(tmp_path):
    before = split_of(pictures(tmp_path / "raw", count=30), tmp_path)
    for i in range(30):
        png(tmp_path / "raw" / "images" / f"more{i}.png", RNG.integers(0, 256, (12, 16)).astype(np.uint8))
        png(tmp_path / "raw" / "labels" / f"more{i}.png", CLASSES)
    after = split_of(tmp_path / "raw", tmp_path)
    assert before.items() <= after.items() and len(after) == 60
    assert all(list(after.values()).count(split) > 2 for split in data.SPLITS)


@given(st.lists(st.floats(0.05, 1), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_shares_are_kept(parts):
    shares = np.array(parts) / sum(parts)
    split = own.splitter(",".join(map(str, shares)), "")
    found = [part for part, _ in split([f"name {i}" for i in range(2000)]).values()]
    assert np.allclose([found.count(s) / 2000 for s in data.SPLITS], shares, atol=0.06)


def test_a_patient_stays_on_one_side(tmp_path):
    split = own.splitter("0.5,0.2,0.3", r"^(p\d+)_")
    found = split([f"p{p}_{visit}" for p in range(30) for visit in range(20)])
    places = {p: {found[f"p{p}_{visit}"][0] for visit in range(20)} for p in range(30)}
    assert all(len(where) == 1 for where in places.values())
    assert set.union(*places.values()) == set(data.SPLITS)
    assert "does not match" in split(["q1_2"])["q1_2"][1]


@given(st.sets(st.text(st.characters(codec="ascii"), min_size=1), min_size=3, max_size=12))
@settings(max_examples=300, deadline=None)
def test_from_three_cases_on_no_part_is_empty(names):
    found = own.splitter("0.7,0.1,0.2", "")(sorted(names))
    assert {split for split, _ in found.values()} == set(data.SPLITS)
    whole = own.splitter("1,0,0", "")(sorted(names))
    assert {split for split, _ in whole.values()} == {"train"}  # where no share is asked for, none is taken


def test_adding_cases_to_a_large_set_moves_none():
    """Beyond some size no part is empty, and the places alone decide, which do not depend on others."""
    split, names = own.splitter("0.7,0.1,0.2", ""), [f"case {i}" for i in range(3000)]
    before, after = split(names[:100]), split(names)
    assert {split for split, _ in before.values()} == set(data.SPLITS) and before.items() <= after.items()


@given(st.integers(2, 6), st.integers(6, 60), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_case_is_tested_in_one_fold(folds, count, salt):
    names = [f"{salt} {i}" for i in range(count)]
    every = [own.splitter("0.7,0.1,0.2", "", folds, fold)(names) for fold in range(1, folds + 1)]
    tested = [[name for name in names if found[name][0] == "test"] for found in every]
    assert sorted(chain(*tested)) == sorted(names)
    assert {len(cases) for cases in tested} <= {count // folds, -(-count // folds)}
    for found in every:
        rest = Counter(split for split, _ in found.values() if split != "test")
        assert rest["train"] and abs(rest["validation"] - max(rest.total() / 8, 1)) <= 0.5


def test_folds_keep_shares_and_patients():
    names = [f"p{p}_{visit}" for p in range(1000) for visit in range(2)]
    for fold in range(1, 6):
        found = own.splitter("0.6,0.2,0.2", r"p\d+", 5, fold)(names)
        assert all(found[name] == found[f"{name[:-1]}0"] for name in names)
        counts = Counter(split for split, _ in found.values())
        assert counts["test"] == 400 and counts["validation"] == 400


def test_a_fold_has_a_file_of_its_own(tmp_path, capsys):
    raw, tested = pictures(tmp_path / "raw", count=9), []
    for fold in (1, 2, 3):
        prepare.main(
            ["build", "folder:f", "--raw", str(raw), "--workers", "1", "--folds", "3", "--fold", str(fold)]
        )
        assert f"train.py --dataset folder:f-fold{fold}" in capsys.readouterr().out
        dataset = data.open_dataset(f"folder:f-fold{fold}", Path("data"), ())
        assert dataset.name == f"f-fold{fold}" and dataset.source == f"folder raw, fold {fold} of 3"
        assert all(dataset.uids.values())
        tested += dataset.uids["test"]
    assert sorted(tested) == [f"case{i}" for i in range(9)]
    command = ["build", "folder:f", "--raw", raw, "--folds"]
    assert "9 cases" in error(capsys, *command, 10, "--fold", 1)
    (tmp_path / "split.txt").write_text("case0 test")
    assert "three shares" in error(capsys, *command, 3, "--fold", 1, "--split", tmp_path / "split.txt")
    for wrong in (["--folds", "3"], ["--fold", "1"], ["--folds", "3", "--fold", "4"], ["--folds", "1"]):
        with pytest.raises(SystemExit):
            prepare.main(["build", "folder:f", "--raw", str(raw), *wrong])
        assert "--fold from 1" in capsys.readouterr().err


def test_three_cases_can_be_trained_on(tmp_path, capsys):
    """It does not matter which three they are, or that others are bad."""
    for first in range(5):
        raw = pictures(tmp_path / f"raw{first}", count=4)
        for path in sorted(raw.glob("*/*.png")):
            path.rename(path.with_name(f"{first}{path.name}"))
        (raw / "labels" / f"{first}case1.png").write_text("no picture")
        found = split_of(raw, tmp_path, "--skip-bad")
        assert len(found) == 3 and set(found.values()) == set(data.SPLITS)
        assert "needs all three" not in capsys.readouterr().err


def test_a_split_from_a_file(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=3)
    text = tmp_path / "split.txt"
    text.write_text("case0 test\ncase1 train\n\ncase2 validation\n")
    assert split_of(raw, tmp_path, "--split", text) == {
        "case0": "test", "case1": "train", "case2": "validation"
    }  # fmt: skip
    text.write_text("case0 test\ncase1 train\ncase2 val\n")
    assert "line 3" in error(capsys, "build", "folder:f", "--raw", raw, "--split", text)
    text.write_text("case0 test\ncase1 train\n")
    assert "no line for case2" in error(capsys, "build", "folder:f", "--raw", raw, "--split", text)


@given(st.lists(st.tuples(st.floats(1, 900), st.floats(0.2, 8)), min_size=2, max_size=3))
@settings(max_examples=100, deadline=None)
def test_proposed_patches_suit_the_network(axes):
    size, spacing = zip(*axes, strict=True)
    found = own.propose(size, spacing)
    unit = np.prod(found["strides"], axis=0)
    patch = np.array(found["patch_shape"])
    assert (patch % unit == 0).all() and 0 < patch.prod() <= 2**16
    assert (patch <= np.maximum(size, unit)).all()
    coarse = np.array(spacing) >= 2 * min(spacing)
    assert (np.array(found["strides"][0])[coarse] == 1).all()


def test_train_uses_what_the_file_proposes(tmp_path, capsys):
    with build("folder:f", pictures(tmp_path / "raw", count=12, shape=(40, 52)), tmp_path) as file:
        proposed = json.loads(file.attrs["settings"])
    config, _ = train.parse_config(["--dataset", "folder:f", "--data-dir", str(tmp_path)])
    assert list(config.patch_shape) == proposed["patch_shape"] == [40, 52]
    assert [list(s) for s in config.strides] == proposed["strides"]
    assert list(config.translation) == proposed["translation"] and ":" not in config.run_dir
    typed = ["--dataset", "folder:f", "--data-dir", str(tmp_path), "--patch-shape", "16,16"]
    assert train.parse_config(typed)[0].patch_shape == (16, 16)
    check(config, data.open_dataset("folder:f", tmp_path, ()), make_mesh("", jax.devices()[:1]))
    for name in ("folder", "folder:", "phantom_us:x", "nothing"):
        with pytest.raises(SystemExit):
            train.parse_config(["--dataset", name])
        assert "--dataset" in capsys.readouterr().err


# --- From the archive as it is --------------------------------------------------------------------


def picture(shape=(12, 16)):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def mask(shape=(12, 16)):
    return 255 * RNG.integers(0, 2, shape).astype(np.uint8)


def scan(path, channels=()):
    nifti(path, RNG.normal(size=(6, 7, 5, *channels)).astype(np.float32))


def organ(path, classes=2):
    nifti(path, np.resize(np.arange(classes), (6, 7, 5)).astype(np.uint8))


def drive(raw):
    """Two observers' masks would be a choice, and so is the field of view in `mask`."""
    for i in range(21, 27):
        png(raw / "training" / "images" / f"{i}_training.tif", picture((12, 16, 3)))
        png(raw / "training" / "1st_manual" / f"{i}_manual1.gif", mask())
        png(raw / "training" / "mask" / f"{i}_training_mask.gif", np.full((12, 16), 255, np.uint8))
    for i in range(1, 4):
        png(raw / "test" / "images" / f"{i:02d}_test.tif", picture((12, 16, 3)))
    return [f"{i}" for i in range(21, 27)]


def busi(raw):
    for kind in ("benign", "malignant"):
        for i in range(1, 4):
            png(raw / kind / f"{kind} ({i}).png", picture())
            png(raw / kind / f"{kind} ({i})_mask.png", mask())
    return [f"{kind} ({i})" for kind in ("benign", "malignant") for i in range(1, 4)]


def isbi(raw):
    for i in range(4):
        png(raw / "membrane" / "train" / "image" / f"{i}.png", picture())
        png(raw / "membrane" / "train" / "label" / f"{i}.png", mask())
        png(raw / "membrane" / "test" / f"{i}.png", picture())
    return list("0123")


def acdc(raw):
    for i in range(1, 4):
        patient = raw / "database" / "training" / f"patient00{i}"
        scan(patient / f"patient00{i}_4d.nii.gz", (2,))
        for frame in ("frame01", "frame12"):
            scan(patient / f"patient00{i}_{frame}.nii.gz")
            organ(patient / f"patient00{i}_{frame}_gt.nii.gz", 4)
        (patient / "Info.cfg").write_text("ED: 1")
    return [f"patient00{i}_{frame}" for i in range(1, 4) for frame in ("frame01", "frame12")]


def brats(raw):
    for i in range(3):
        for kind in ("t1", "t1ce", "t2", "flair"):
            scan(raw / f"BraTS_{i}" / f"BraTS_{i}_{kind}.nii.gz")
        organ(raw / f"BraTS_{i}" / f"BraTS_{i}_seg.nii.gz")
    return [f"BraTS_{i}" for i in range(3)]


def nnunet(raw):
    for i in range(3):
        for channel in range(2):
            scan(raw / "Dataset001_X" / "imagesTr" / f"case_{i}_{channel:04d}.nii.gz")
        organ(raw / "Dataset001_X" / "labelsTr" / f"case_{i}.nii.gz")
        scan(raw / "Dataset001_X" / "imagesTs" / f"case_{i + 3}_0000.nii.gz")
    (raw / "Dataset001_X" / "dataset.json").write_text("{}")
    return [f"case_{i}" for i in range(3)]


def generic(raw):
    """Files of the same names in every folder, which then gives the name."""
    for i in range(3):
        scan(raw / f"case {i}" / "image.nii.gz")
        organ(raw / f"case {i}" / "label.nii.gz")
    return [f"case {i}" for i in range(3)]


def own_split(raw):
    """Files of one name in several folders."""
    for part in ("train", "val"):
        for i in range(2):
            png(raw / part / "images" / f"{i}.jpg", picture())
            png(raw / part / "masks" / f"{i}_mask.png", mask())
    return [f"{part}-{i}" for part in ("train", "val") for i in range(2)]


def btcv(raw):
    for i in range(1, 4):
        scan(raw / "imagesTr" / f"img{i:04d}.nii.gz")
        organ(raw / "labelsTr" / f"label{i:04d}.nii.gz")
    return [f"{i:04d}" for i in range(1, 4)]


def lits(raw):
    for i in (7, 31, 45):
        scan(raw / "batch" / f"volume-{i}.nii")
        organ(raw / "batch" / f"segmentation-{i}.nii")
    return ["7", "31", "45"]


def words_in_front(raw):
    """One patient's name begins with such a word, too, and the folder holds a picture that is no case."""
    for name in ("anna", "ben", "segovia"):
        png(raw / f"image_{name}.bmp", picture())
        png(raw / f"mask_{name}.bmp", mask())
    png(raw / "overview.png", picture())
    return ["anna", "ben", "segovia"]


def dsb(raw):
    """An image in a folder of its own, with a mask per nucleus under other names."""
    for case in ("0a1", "1c9", "77f"):
        png(raw / "stage1_train" / case / "images" / f"{case}.png", picture())
        for nucleus in range(7):
            png(raw / "stage1_train" / case / "masks" / f"{nucleus}{case[::-1]}.png", mask())
    return ["0a1", "1c9", "77f"]


def word(raw):
    for part, numbers in (("Tr", (1, 2, 3)), ("Val", (4,))):
        for i in numbers:
            scan(raw / f"images{part}" / f"word_{i:04d}.nii.gz")
            organ(raw / f"labels{part}" / f"word_{i:04d}.nii.gz")
    return [f"word_{i:04d}" for i in (1, 2, 3)]


DRIVE = ("--images", "images/{}_training.tif", "--labels", "1st_manual/{}_manual1.gif")
ARCHIVES = {  # options, channels, what is left out
    drive: (DRIVE, 3, 9), busi: ((), 1, 0), isbi: ((), 1, 4), acdc: ((), 1, 6), brats: ((), 4, 0),
    nnunet: ((), 2, 4), generic: ((), 1, 0), own_split: ((), 1, 0), btcv: ((), 1, 0), lits: ((), 1, 0),
    words_in_front: ((), 1, 1), dsb: (("--unite",), 1, 0), word: ((), 1, 2),
}  # fmt: skip


def cases_in(file):
    return {uid: case for split in data.SPLITS for uid, case in file[split].items()}


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.__name__)
def test_archives_as_they_are(tmp_path, capsys, archive):
    options, channels, others = ARCHIVES[archive]
    names = archive(tmp_path / "raw")
    with build("folder:f", tmp_path / "raw", tmp_path, *options) as file:
        cases = cases_in(file)
        assert sorted(cases) == sorted(names)
        assert all(case["image"].shape[-1] == channels and case["label"][()].any() for case in cases.values())
    said = capsys.readouterr().err
    assert f"{len(names)} images with labels" in said
    assert (f"{others} other files left out" in said) == bool(others)
    assert all(f"  {name}: " in said for name in (min(names), max(names)))
    assert ("NB: labelsVal may hold labels, but is left out" in said) == (archive is word)
    assert said.count("may hold labels") == (archive is word)
    dataset = data.open_dataset("folder:f", tmp_path, ())
    assert dataset.load("train", 0).image.shape[-1] == dataset.image_channels == channels


@pytest.mark.parametrize(
    "name, names",
    [
        ("CHASE_DB1", [f"Image_{i:02d}{eye}" for i in range(1, 15) for eye in "LR"]),
        ("sarcoma", [f"STS_00{i}_{kind}" for i in (1, 2, 3) for kind in ("CT", "MR_T1", "PET")]),
        ("ACDC", [f"patient00{i}_frame{j:02d}" for i, end in ((1, 12), (2, 9), (3, 15)) for j in (1, end)]),
        ("numbers", [f"{i}-{visit}" for i in range(9) for visit in (1, 2)]),
    ],
)
def test_names_of_one_patient_are_noticed(name, names):
    found = pairing.of_one_patient(names)
    keys = {re.search(pairing.PATIENT, name)[0] for name in names}  # the pattern that is shown fits all names
    assert len(found) == 2 and len({re.search(pairing.PATIENT, name)[0] for name in found}) == 1
    assert set(found) <= set(names) and 1 < len(keys) < len(names)


@pytest.mark.parametrize(
    "name, names",
    [
        ("BUSI", [f"{kind} ({i})" for kind in ("benign", "malignant", "normal") for i in range(1, 50)]),
        ("DRIVE", [f"{i}_training" for i in range(21, 41)]),
        ("DSB", [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]),
        ("short", [hashlib.sha256(bytes([i])).hexdigest()[:8] for i in range(200)]),
        ("decathlon", [f"hippocampus_{i:03d}" for i in range(260)]),
        ("BraTS", [f"BraTS2021_{i:05d}" for i in range(50)]),
        ("one is without a number", ["a1_x", "a1_y", "a2_x", "a2_y", "phantom"]),
        ("none", []),
    ],
)
def test_names_of_many_patients_are_no_patient(name, names):
    assert pairing.of_one_patient(names) == []


def test_cases_that_may_be_of_one_patient_are_said(tmp_path, capsys):
    acdc(tmp_path / "raw")
    build("folder:f", tmp_path / "raw", tmp_path).close()
    said = capsys.readouterr().err
    assert "NB: the names of patient001_frame01 and patient001_frame12 begin alike" in said
    (pattern,) = re.findall('--group "([^"]+)"', said)
    found = split_of(tmp_path / "raw", tmp_path, "--group", pattern)
    assert all(found[f"patient00{i}_frame01"] == found[f"patient00{i}_frame12"] for i in (1, 2, 3))
    assert len(set(found.values())) == 3 and "--group" not in capsys.readouterr().err


def test_image_and_label_of_an_archive_belong_together(tmp_path):
    """The label says where the image is bright, so that a wrong pair would show; here channels differ too."""
    for i in range(4):
        label = np.resize(RNG.integers(0, 2, 210), (6, 7, 5)).astype(np.uint8)
        folder = tmp_path / "raw" / f"p{i}"
        nifti(folder / f"p{i}_seg.nii", label)
        nifti(folder / f"p{i}_t2.nii", 5.0 * label)
        nifti(folder / f"p{i}_t1.nii", -3.0 * label)
    with build("folder:f", tmp_path / "raw", tmp_path) as file:
        assert "channels t1, t2" in file.attrs["preprocessing"]
        for case in cases_in(file).values():
            assert ((case["image"][..., 0] < 0) == case["label"][()].astype(bool)).all()
            assert ((case["image"][..., 1] > 0) == case["label"][()].astype(bool)).all()


def as_shown(line):
    """The options that a line says to type."""
    return shlex.split(re.search(r'--images "[^"]+" --labels "[^"]+"', line)[0])


def test_a_choice_of_labels_is_asked_for(tmp_path, capsys):
    """The line says what to type, and that works as it stands there."""
    raw = tmp_path / "DRIVE"
    drive(raw)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "1st_manual and mask may each hold the labels" in line and not (tmp_path / "data").exists()
    assert as_shown(line) == list(DRIVE)
    for i in range(1, 4):  # as in the first edition, whose test images have labels, too
        png(raw / "test" / "1st_manual" / f"{i:02d}_manual1.gif", mask())
    shown = as_shown(error(capsys, "build", "folder:f", "--raw", raw))
    assert shown == ["--images", "images/{}_*.tif", *DRIVE[2:]]
    with build("folder:f", raw, tmp_path, *shown) as file:
        assert len(cases_in(file)) == 9
    for kind, folder in (("img", "img"), ("label", "label"), ("vein", "masks")):
        png(tmp_path / "prefix" / folder / f"{kind}007.png", picture())
    line = error(capsys, "build", "folder:f", "--raw", tmp_path / "prefix")
    assert '--images "img/img{}.png" --labels "label/label{}.png"' in line
    png(tmp_path / "flat" / "a.png", picture())
    for kind in ("mask", "gt"):
        png(tmp_path / "flat" / f"a_{kind}.png", mask())
    line = error(capsys, "build", "folder:f", "--raw", tmp_path / "flat")
    assert "_gt and _mask may each end" in line and '--images "{}.png" --labels "{}_gt.png"' in line


def test_names_without_anything_in_common(tmp_path, capsys):
    """Then the folder is what image and label have in common."""
    raw = tmp_path / "raw"
    for case in ("a", "b", "c"):
        scan(raw / case / "t2.nii.gz")
        organ(raw / case / "labels.nii.gz")
    organ(raw / "d" / "seg.nii.gz")
    scan(raw / "d" / "t2.nii.gz")
    shown = as_shown(error(capsys, "build", "folder:f", "--raw", raw))
    assert shown == ["--images", "{}/t2.nii.gz", "--labels", "{}/labels.nii.gz"]
    scan(tmp_path / "c" / "t2.nii.gz")  # not even a folder: what to type for other labels is shown
    organ(tmp_path / "c" / "labels.nii.gz")
    scan(tmp_path / "c" / "x.nii.gz")
    organ(tmp_path / "c" / "x_manual.nii.gz")
    others = as_shown(error(capsys, "build", "folder:f", "--raw", tmp_path / "c"))
    assert others == ["--images", "{}.nii.gz", "--labels", "{}_manual.nii.gz"]
    with build("folder:f", raw, tmp_path, *shown, "--skip-bad") as file:
        assert sorted(cases_in(file)) == ["a", "b", "c"]


def test_files_whose_names_begin_alike_are_shown(tmp_path, capsys):
    """Two graders of each eye, in one folder; and labels in a tree of their own beside that of the images."""
    for i in range(3):
        png(tmp_path / "eyes" / f"Image_{i:02d}L.jpg", picture())
        for grader in ("1stHO", "2ndHO"):
            png(tmp_path / "eyes" / f"Image_{i:02d}L_{grader}.png", mask())
        rat = Path(f"sub-rat{i}", "micr", f"sub-rat{i}_SEM.png")
        png(tmp_path / "bids" / rat, picture())
        png(tmp_path / "bids" / "derivatives" / "labels" / rat.with_stem(f"{rat.stem}_axon-manual"), mask())
    line = error(capsys, "build", "folder:f", "--raw", tmp_path / "eyes")
    assert "no pairs" in line
    assert as_shown(line) == ["--images", "{}.jpg", "--labels", "{}_1stHO.png"]
    for raw in ("eyes", "bids"):
        shown = as_shown(error(capsys, "build", "folder:f", "--raw", tmp_path / raw))
        with build("folder:f", tmp_path / raw, tmp_path, *shown) as file:
            assert len(cases_in(file)) == 3
    for i in (1, 10):  # 10 begins with 1, but is another number
        png(tmp_path / "numbers" / f"{i}.png", picture())
    assert pairing.EXAMPLE in error(capsys, "build", "folder:f", "--raw", tmp_path / "numbers")


NAME = st.text('a1_-. (,{}*$!`"\\é', min_size=1, max_size=5)


@given(st.lists(NAME, max_size=2), st.tuples(*[st.lists(NAME, max_size=2)] * 2), st.tuples(NAME, NAME))
@settings(max_examples=300, deadline=None)
def test_what_is_shown_finds_the_pair(shared, inside, stems):
    raw = Path("raw")
    image, label = (
        Path(raw, *shared, *folders, f"{stem}.{ending}")
        for folders, stem, ending in zip(inside, stems, ("tif", "png"), strict=True)
    )
    shown = pairing.typed(raw, [image, label], image, label)
    if shown != pairing.EXAMPLE:
        assert pair_of(raw, [image, label], shown) == {"images": image, "labels": label}


@given(NAME, st.lists(NAME, max_size=2))
@settings(max_examples=100, deadline=None)
def test_names_that_begin_alike_can_be_shown(name, folders):
    image, label = (Path("raw", *folders, f"1{name}{end}.png") for end in ("_scan", "_truth"))
    shown = pairing.typed(Path("raw"), [image, label], image, label)
    assert pair_of(Path("raw"), [image, label], shown) == {"images": image, "labels": label}


def pair_of(raw, files, shown):
    """The image and the label that the options find, as they come out of a shell."""
    _, images, _, labels = shlex.split(shown)
    (group,) = pairing.matched(raw, files, images, labels).values()
    ((_, image),), (label,) = group.images, group.labels
    return {"images": image, "labels": label}


def test_several_labels_of_an_image(tmp_path, capsys):
    raw, second = tmp_path / "raw", mask()
    busi(raw)
    first = np.asarray(PIL.Image.open(raw / "benign" / "benign (2)_mask.png"))
    png(raw / "benign" / "benign (2)_mask_1.png", second)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "benign (2)_mask.png, benign (2)_mask_1.png: 2 labels of one image" in line and "--unite" in line
    with build("folder:f", raw, tmp_path, "--unite") as file:
        cases = cases_in(file)
        assert len(cases) == 6
        assert (cases["benign (2)"]["label"][()] == ((first > 0) | (second > 0))).all()
    with build("folder:f", raw, tmp_path, "--skip-bad") as file:
        assert len(cases_in(file)) == 5
    png(raw / "benign" / "benign (2)_mask_1.png", np.where(first > 0, 7, 0).astype(np.uint8))
    line = error(capsys, "build", "folder:f", "--raw", raw, "--unite")
    assert "(2)_mask_1.png: different labels at one place" in line
    png(raw / "benign" / "benign (2)_mask_1.png", second[:5])
    assert "not on the same grid" in error(capsys, "build", "folder:f", "--raw", raw, "--unite")
    for i in range(1, 29):
        png(raw / "benign" / f"benign (1)_mask_{i}.png", second)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "benign (1)_mask_10.png, and 26 more: 29 labels of one image" in line and "mask_11" not in line


def test_patterns(tmp_path):
    """A folder's name in common, several labels, and channels in the order that was typed."""
    for i in range(3):
        case = tmp_path / "raw" / f"n{i}"
        png(case / "z" / "z.png", np.resize([1, 0], (12, 16)).astype(np.uint8))
        png(case / "a" / "x.png", np.resize([0, 1, 1], (12, 16)).astype(np.uint8))
        for cell in range(2):
            png(case / "cells" / f"{cell}.png", np.resize([0, 0, 255], (12, 16)).astype(np.uint8))
    patterns = ("--images", "{}/z/*.png,{}/a/*.png", "--labels", "{}/cells/*.png")
    with build("folder:f", tmp_path / "raw", tmp_path, *patterns, "--unite") as file:
        case = cases_in(file)["n1"]
        assert len(cases_in(file)) == 3 and case["label"][()].sum() == 64
        assert len(np.unique(case["image"][..., 0].ravel()[::2])) == 1  # the first channel has period 2


def test_labels_that_look_like_images(tmp_path):
    for i in range(3):
        png(tmp_path / "raw" / f"{i}.png", picture())
        png(tmp_path / "raw" / f"{i}_vessels.png", mask())
    patterns = ("--images", "*.png", "--labels", "*_vessels.png")
    with build("folder:f", tmp_path / "raw", tmp_path, *patterns) as file:
        assert sorted(cases_in(file)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "options, says",
    [
        (("--images", "{}.png"), "belong together"),
        (("--images", "[.png", "--labels", "{}_mask.png"), "have in common"),
        (("--images", "*/*.png", "--labels", "{}_mask.png"), "have in common"),
        (("--images", "{}.png,*{}.png", "--labels", "{}_mask.png"), "2 patterns of --images match it"),
        (("--images", "{}.tif", "--labels", "{}_mask.png"), "matches 0 cases, and --labels"),
        (("--images", "{}.png", "--labels", "{}mask.png"), "without a common {}"),
    ],
)
def test_patterns_that_match_nothing(tmp_path, capsys, options, says):
    busi(tmp_path / "raw")
    assert says in error(capsys, "build", "folder:f", "--raw", tmp_path / "raw", *options)
    assert not (tmp_path / "data").exists()


def test_what_would_match_is_said(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    assert "no .png, .tif" in error(capsys, "build", "folder:f", "--raw", raw)
    png(raw / "scan_1.png", picture())
    png(raw / "vein_1.png", mask())
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "no pairs" in line and "images and labels" in line and "_mask" in line and "--labels" in line
    png(raw / "pair" / "a_image.png", picture())
    png(raw / "pair" / "a_img.png", picture())
    png(raw / "pair" / "a_mask.png", mask())
    assert "a_mask.png: 2 images, 1 label of" in error(capsys, "build", "folder:f", "--raw", raw)
    (raw / "pair" / "a_mask.png").unlink()
    (raw / "loop").symlink_to(raw)
    assert "no pairs" in error(capsys, "build", "folder:f", "--raw", raw)


def test_a_channel_that_is_missing_or_another(tmp_path, capsys):
    raw = tmp_path / "raw"
    brats(raw)
    (raw / "BraTS_1" / "BraTS_1_t2.nii.gz").rename(raw / "BraTS_1" / "BraTS_1_dwi.nii.gz")
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "BraTS_1" in line and "channels dwi, flair, t1, t1ce, but most cases have flair, t1" in line
    with build("folder:f", raw, tmp_path, "--skip-bad") as file:
        assert sorted(cases_in(file)) == ["BraTS_0", "BraTS_2"]


def test_gif_pictures(tmp_path):
    """A GIF's colours count, as its palette has any order: some here have white first, one white alone."""
    labels = [(np.roll(CLASSES, i) > 0).astype(np.uint8) for i in range(4)] + [np.ones((12, 16), np.uint8)]
    for i, label in enumerate(labels):
        png(tmp_path / "raw" / "images" / f"{i}.gif", image := picture())
        drawn = PIL.Image.fromarray(1 - label if i % 2 else label).convert("P")
        drawn.putdata((1 - label if i % 2 else label).ravel().tolist())
        drawn.putpalette([255] * 3 + [0] * 3 if i % 2 else [0] * 3 + [255] * 3)
        png(tmp_path / "raw" / "labels" / f"{i}.gif", drawn)
    with build("folder:f", tmp_path / "raw", tmp_path) as file:
        cases = cases_in(file)
        assert all((cases[f"{i}"]["label"][()] == label).all() for i, label in enumerate(labels))
        assert np.allclose(cases["4"]["image"][..., 0], (image - image.mean()) / image.std(), atol=1e-5)


# --- Hostile input --------------------------------------------------------------------------------


def volumes(raw, count=6, ending=".nii.gz"):
    """A folder of volumes with one clean pair each."""
    for i in range(count):
        image = RNG.normal(size=(12, 14, 10)).astype(np.float32)
        nifti(raw / "images" / f"v{i}{ending}", image)
        nifti(raw / "labels" / f"v{i}{ending}", (image > 1).astype(np.uint8))
    return raw


def no_label(raw):
    (raw / "labels" / "v3.nii.gz").unlink()


def no_image(raw):
    (raw / "images" / "v3.nii.gz").unlink()


def truncated(raw):
    path = raw / "images" / "v3.nii.gz"
    path.write_bytes(path.read_bytes()[:1500])


def truncated_label(raw):
    path = raw / "labels" / "v3.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])


def wrong_checksum(raw):
    """All voxels can be read; what is wrong is found by the checksum at the end alone."""
    path = raw / "labels" / "v3.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])


def nan_offset(raw):
    header(raw, 280 + 12, np.nan)  # the last number of the affine's first row


def pointer(raw):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (raw / "images" / "v3.nii.gz").write_text(text)


def not_nifti(raw):
    (raw / "images" / "v3.nii.gz").write_text("<html>please log in</html>")


def fractions(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.full((12, 14, 10), 0.5, np.float32))


def negative_label(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.full((12, 14, 10), -1, np.int16))


def moved_label(raw):
    affine = np.eye(4)
    affine[0, 3] = 1.0
    nifti(raw / "labels" / "v3.nii.gz", np.ones((12, 14, 10), np.uint8), affine)


def other_size(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.ones((6, 7, 5), np.uint8), np.diag([2.0, 2, 2, 1]))


def nan(raw):
    image = RNG.normal(size=(12, 14, 10)).astype(np.float32)
    image[3, 3, 3] = np.nan
    nifti(raw / "images" / "v3.nii.gz", image)


def infinite(raw):
    image = RNG.normal(size=(12, 14, 10)).astype(np.float32)
    image[3, 3, 3] = np.inf
    nifti(raw / "images" / "v3.nii.gz", image)


def constant(raw):
    nifti(raw / "images" / "v3.nii.gz", np.full((12, 14, 10), 7, np.float32))


def empty(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.zeros((12, 14, 10), np.uint8))


def header(raw, place, *numbers):
    """Written into the header's bytes: nibabel would not write it, and mends it silently on reading."""
    path = raw / "images" / "v3.nii"
    (raw / "images" / "v3.nii.gz").unlink()
    nifti(path, RNG.normal(size=(12, 14, 10)).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[place : place + 4 * len(numbers)] = np.array(numbers, np.float32).tobytes()
    path.write_bytes(content)


def no_spacing(raw):
    header(raw, 80, 0)


def negative_spacing(raw):
    header(raw, 80, -1)


def flat_affine(raw):
    header(raw, 296, 0, 0, 0, 0)


def metres(raw):
    path = raw / "images" / "v3.nii.gz"
    file = nibabel.load(path)
    file.header.set_xyzt_units("meter")
    nibabel.save(nibabel.Nifti1Image(file.get_fdata(), None, file.header), path)


def other_spacing(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.ones((12, 14, 10), np.uint8), np.diag([1, 1, 2.5, 1]))


def unknown(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.resize([0, 1, 255], (12, 14, 10)).astype(np.uint8))


def four_d_label(raw):
    nifti(raw / "labels" / "v3.nii.gz", np.ones((12, 14, 10, 2), np.uint8))


def five_d(raw):
    nifti(raw / "images" / "v3.nii.gz", np.ones((12, 14, 10, 1, 3), np.float32))


def channels(raw):
    nifti(raw / "images" / "v3.nii.gz", RNG.normal(size=(12, 14, 10, 2)).astype(np.float32))


def twice(raw):
    nifti(raw / "images" / "v3.nii", np.ones((12, 14, 10), np.float32))


def a_picture(raw):
    (raw / "images" / "v3.nii.gz").unlink()
    png(raw / "images" / "v3.png", CLASSES)


FAULTS = {
    no_label: "1 image, 0 labels of", no_image: "0 images, 1 label of", pointer: "run git lfs pull",
    truncated: "not a readable NIfTI", wrong_checksum: "CRC check failed", nan_offset: "affine holds NaN",
    truncated_label: "not a readable NIfTI", not_nifti: "not a readable NIfTI", fractions: "whole numbers",
    negative_label: "whole numbers", moved_label: "corners up to 1 mm apart", other_size: "12 x 14 x 10",
    nan: "NaN or infinite", infinite: "NaN or infinite", constant: "constant (7)", empty: "no foreground",
    no_spacing: "spacing 0,", negative_spacing: "spacing -1,", flat_affine: "must be positive",
    metres: "meter", four_d_label: "4 dimensions", five_d: "5 dimensions", channels: "2 channels",
    twice: "2 images, 1 label of", a_picture: "a picture and a volume",
    other_spacing: "spacings 1 x 1 x 1 and 1 x 1 x 2.5", unknown: "label 255 is none of the classes 0, 1,",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_bad_volumes_are_named_or_skipped(tmp_path, capsys, fault):
    raw = volumes(tmp_path / "raw")
    fault(raw)
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path]
    line = error(capsys, *command)
    assert "v3" in line and FAULTS[fault] in line and ("; " in line or "/" in line)
    assert not (tmp_path / "f.h5").exists()
    with build("folder:f", raw, tmp_path, "--skip-bad") as file:
        found = {uid for split in data.SPLITS for uid in file[split]}
    assert found == {f"v{i}" for i in range(6) if i != 3}
    assert sum(map(int, re.findall(r"(\d+) (?:train|val|test)", capsys.readouterr().out))) == 5
    report = (tmp_path / "f-skipped.txt").read_text()
    assert report.count("\n") == 1 and FAULTS[fault] in report


def test_a_label_with_a_fourth_axis_of_one(tmp_path):
    raw = volumes(tmp_path / "raw")
    with build("folder:f", raw, tmp_path) as file:
        before = {uid: case["label"][()] for uid, case in cases_in(file).items()}
    for path in raw.glob("*/*.nii.gz"):
        values = nibabel.load(path).get_fdata()
        nifti(path, values[..., None].astype(np.uint8 if path.parent.name == "labels" else np.float32))
    with build("folder:f", raw, tmp_path) as file:
        assert all((case["label"][()] == before[uid]).all() for uid, case in cases_in(file).items())
        assert all(case["image"].shape == (12, 14, 10, 1) for case in cases_in(file).values())


def test_a_number_in_few_labels_is_asked_about(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=21)
    rare = np.where(CLASSES == 1, 9, CLASSES)
    for i in (4, 11):
        png(raw / "labels" / f"case{i}.png", rare)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "case11.png: label 9 is none of the classes 0, 1, 2, and in 2 labels" in line
    assert "name all 4 numbers with --classes" in line and not (tmp_path / "data").exists()
    with build("folder:f", raw, tmp_path, "--skip-bad") as file:
        assert len(cases_in(file)) == 19 and len(json.loads(file.attrs["class_names"])) == 3
    with build("folder:f", raw, tmp_path, "--classes", "background,a,b,rare") as file:
        assert (cases_in(file)["case4"]["label"][()] == np.where(CLASSES == 1, 3, CLASSES)).all()
    png(raw / "labels" / "case8.png", rare)  # in 3 of 21 labels it is a class
    with build("folder:f", raw, tmp_path) as file:
        assert len(json.loads(file.attrs["class_names"])) == 4


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


def test_masks_without_0(tmp_path, capsys):
    """As DRIVE's second observer saved them: GIF files in nearly black and nearly white."""
    raw = masks(tmp_path / "raw", *[[0]] * 3)
    for path in sorted((raw / "labels").iterdir()):
        drawn = PIL.Image.fromarray(np.resize([0, 0, 1], (12, 16)).astype(np.uint8)).convert("P")
        drawn.putdata(np.resize([0, 0, 1], 192).tolist())
        drawn.putpalette([4, 2, 4, 252, 254, 252])
        path.unlink()
        drawn.save(path.with_suffix(".gif"))
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "no mask holds 0, the background, but #040204 in 3, #fcfefc in 3; name the numbers, lowest" in line
    with build("folder:f", raw, tmp_path, *line.split("as in ")[1].split()) as file:
        assert classes_in(file) == (["background", "vessel"], {f"case{i}": 2 for i in range(3)})
        assert all(
            (case["label"][()] == np.resize([0, 0, 1], (12, 16))).all() for case in cases_in(file).values()
        )
    assert "#040204 is background, #fcfefc is vessel" in capsys.readouterr().err


def test_a_number_in_one_of_few_labels_is_asked_about(tmp_path, capsys):
    """Two labels are too few to tell."""
    raw = masks(tmp_path / "raw", *[[0, 255]] * 3, [0, 130, 255])
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert (
        "case3.png: label 130 is none of the classes 0, 255, and in 1 label; " in line and "--ignore" in line
    )
    with build("folder:f", raw, tmp_path, "--ignore", "130") as file:
        assert classes_in(file)[0] == ["background", "class 255"] and len(cases_in(file)) == 4
    with build("folder:f", raw, tmp_path, "--classes", "background,a,b") as file:
        assert classes_in(file)[1] == {"case0": 2, "case1": 2, "case2": 2, "case3": 3}
    with build("folder:two", masks(tmp_path / "two", [0, 1], [0, 2]), tmp_path) as file:
        assert len(classes_in(file)[0]) == 3


def test_names_for_the_usual_numbers(tmp_path, capsys):
    """A stray mask is at fault, and no other. Names that fit nothing are one error, with what there is."""
    raw = masks(tmp_path / "raw", *[[0, 255]] * 9, [0, 130, 233, 255])
    line = error(capsys, "build", "folder:f", "--raw", raw, "--classes", "background,axon")
    assert "case9.png: label 130, 233 is none of the classes 0, 255, and in 1 label; " in line
    with build("folder:f", raw, tmp_path, "--classes", "background,axon", "--skip-bad") as file:
        assert classes_in(file) == (["background", "axon"], {f"case{i}": 2 for i in range(9)})
    for options in ((), ("--skip-bad",)):
        line = error(
            capsys, "build", "folder:f", "--raw", raw, "--classes", "background,axon,myelin", *options
        )
        holds = "the masks hold 4 numbers: 0 in 10, 130 in 1, 233 in 1, 255 in 10"
        assert f"3 names, but {holds}; name all, or leave some out with --ignore" in line
    raw = masks(tmp_path / "many", *[[*range(0, 90, 10)]] * 3)
    line = error(capsys, "build", "folder:f", "--raw", raw, "--classes", "background,a")
    assert "9 numbers: 0 in 3, 10 in 3, 20 in 3, 30 in 3, 40 in 3, 50 in 3, and 3 more; " in line


def test_the_fault_of_whole_cases_is_shown(tmp_path, capsys):
    """Every label is damaged; that one image has none is not the reason why nothing can be used."""
    raw = masks(tmp_path / "raw", *[[0, 1]] * 3)
    png(raw / "images" / "alone.png", picture())
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "images/alone.png: 1 image, 0 labels of one name" in line and "--skip-bad" in line
    for path in (raw / "labels").iterdir():
        path.write_text("no picture")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        prepare.main(["build", "folder:f", "--raw", str(raw), "--workers", "1", "--classes", "background,a"])
    said = capsys.readouterr().err
    assert "labels/case0.png: not a readable picture" in said and "alone.png: 1 image" not in said
    assert "no label has the class" not in said  # nobody knows, as no label could be read


@pytest.mark.parametrize(
    "ending, number, option", [("png", 255, "255"), ("png", 9, "9,255"), ("gif", 128, "#808080")]
)
def test_ignored_numbers_are_kept_apart(tmp_path, capsys, ending, number, option):
    """They are no class, and stay where they are when the image is resampled."""
    raw = pictures(tmp_path / "raw", count=6)
    for i in range(6):
        (raw / "labels" / f"case{i}.png").unlink()
        values = CLASSES.astype(np.uint8).copy()
        values[-3:] = number
        PIL.Image.fromarray(values).save(raw / "labels" / f"case{i}.{ending}")
    with build("folder:f", raw, tmp_path, "--ignore", option) as file:
        assert json.loads(file.attrs["class_names"]) == ["background", "class 1", "class 2"]
        assert f"{option} is ignored" in file.attrs["preprocessing"]
        for case in cases_in(file).values():
            label = case["label"][()]
            assert (label[-3:] == 255).all() and (label[:-3] == CLASSES[:-3]).all()
    prepare.main(["show", "folder:f", "--data-dir", str(tmp_path)])
    assert "class 2" in capsys.readouterr().out


def test_what_is_ignored_is_no_foreground(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=6)
    png(raw / "labels" / "case2.png", np.where(CLASSES == 2, 255, 0).astype(np.uint8))
    assert "case2.png: no foreground" in error(capsys, "build", "folder:f", "--raw", raw, "--ignore", "255")


@pytest.mark.parametrize(
    "option, says", [("0", "0 is background"), ("x", "neither"), ("-1", "neither"), ("#12", "neither")]
)
def test_what_cannot_be_ignored(tmp_path, capsys, option, says):
    raw = pictures(tmp_path / "raw")
    assert says in error(capsys, "build", "folder:f", "--raw", raw, f"--ignore={option}")


def test_background_alone_is_no_data_set(tmp_path, capsys):
    raw = volumes(tmp_path / "raw", 3)
    for i in range(3):
        nifti(raw / "labels" / f"v{i}.nii.gz", np.zeros((12, 14, 10), np.uint8))
    for options in ([], ["--allow-empty"], ["--skip-bad"], ["--classes", "background,lesion"]):
        line = error(capsys, "build", "folder:f", "--raw", raw, *options)
        assert "all 3 labels are background alone" in line and not (tmp_path / "data").exists()


def test_empty_labels_can_be_meant(tmp_path):
    raw = volumes(tmp_path / "raw")
    empty(raw)
    with build("folder:f", raw, tmp_path, "--allow-empty") as file:
        assert sum(len(file[split]) for split in data.SPLITS) == 6


def truncate_picture(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_picture_checksum(path):
    """The last byte of the checksum of the pixels, after which there is the end: 12 bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:-13] + bytes([content[-13] ^ 1]) + content[-12:])


@pytest.mark.parametrize(
    "harm, where, says",
    [
        (truncate_picture, "images/case2.png", "not a readable picture"),
        (wrong_picture_checksum, "labels/case2.png", "not a readable picture"),
        (truncate_picture, "labels/case2.png", "not a readable picture"),
        (lambda path: path.write_text("version https://git-lfs.github.com"), "labels/case2.png", "lfs pull"),
        (lambda path: png(path, np.zeros((5, 5), np.uint8) + CLASSES[:5, :5]), "labels/case2.png", "5 x 5"),
        (lambda path: png(path, np.full((12, 16), 9, np.uint8)), "images/case2.png", "constant (9)"),
        (lambda path: png(path, CLASSES + 3), "labels/case2.png", "label 3, 4, 5 is none"),
        (lambda path: path.rename(path.with_suffix(".jpg")), "labels/case2.png", "JPEG"),
    ],
)
def test_bad_pictures(tmp_path, capsys, harm, where, says):
    raw = pictures(tmp_path / "raw")
    harm(raw / where)
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path, "--classes", "a,b,c"]
    line = error(capsys, *command)
    assert "case2" in line and says in line and not (tmp_path / "f.h5").exists()
    with build("folder:f", raw, tmp_path, "--skip-bad", "--classes", "a,b,c") as file:
        assert sum(len(file[split]) for split in data.SPLITS) == 5


def test_more_numbers_than_classes(tmp_path, capsys):
    """A photograph, or edges between black and white that are smooth; and objects that are counted."""
    raw = pictures(tmp_path / "raw")
    png(raw / "labels" / "case2.png", np.arange(192).reshape(12, 16).astype(np.uint8))
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "192 different label values; if they count objects, save all as one number" in line
    png(raw / "labels" / "case2.png", np.arange(64, 256).reshape(12, 16).astype(np.uint8))
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "195 different label values; save masks without smooth edges" in line and "--classes" in line
    names = ",".join(map(str, range(192)))
    png(raw / "labels" / "case2.png", np.arange(192).reshape(12, 16).astype(np.uint8))
    with build("folder:f", raw, tmp_path, "--classes", names) as file:
        assert cases_in(file)["case2"]["label"][()].max() == 191


def test_pages_of_a_tiff(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", ending="tif")
    pages = [PIL.Image.fromarray(CLASSES * 50) for _ in range(3)]
    pages[0].save(raw / "images" / "case2.tif", save_all=True, append_images=pages[1:])
    assert "3 pages" in error(capsys, "build", "folder:f", "--raw", raw)


def test_names_beyond_ascii(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=3)
    for kind in ("images", "labels"):
        (raw / kind / "case0.png").rename(raw / kind / "Löwe 肝 №1.png")
    assert "Löwe 肝 №1" in split_of(raw, tmp_path)
    prepare.main(["show", "folder:f", "--data-dir", str(tmp_path)])
    assert (tmp_path / "f.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"training": 5}', b'{"training": [{"image": "x"}]}', b"\xff"]
)
def test_a_list_that_is_not_amos(tmp_path, capsys, text):
    (tmp_path / "dataset.json").write_bytes(text)
    line = error(capsys, "build", "amos_ct", "--raw", tmp_path, "--data-dir", tmp_path)
    assert "dataset.json: not AMOS's list of pairs" in line


def test_wrong_commands(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=3)
    assert "no such folder" in error(capsys, "build", "amos_ct", "--raw", tmp_path / "nothing")
    for name, marker in (
        ("muscle_us", "trainannot"), ("amos_ct", "dataset.json"), ("prostate_mr", "institution.txt"),
        ("brats_mr", "_seg.nii.gz"), ("hippocampus_mr", "labelsTr"),
    ):  # fmt: skip
        assert marker in error(capsys, "build", name, "--raw", raw)
    assert "images and labels" in error(capsys, "build", "folder:f", "--raw", raw / "images")
    assert "choose another NAME" in error(capsys, "build", "folder:amos_ct", "--raw", raw)
    assert "choose another NAME" in error(capsys, "build", "folder:../x", "--raw", raw)
    assert "three shares" in error(capsys, "build", "folder:f", "--raw", raw, "--split", "0.5,0.2,0.2")
    assert "regular expression" in error(capsys, "build", "folder:f", "--raw", raw, "--group", "(")
    assert "2 to 255" in error(capsys, "build", "folder:f", "--raw", raw, "--classes", "a,a")
    assert "2 given" not in error(capsys, "build", "folder:f", "--raw", raw, "--spacing", "1,1,1")
    assert "no such file" in error(capsys, "show", "folder:nothing", "--data-dir", tmp_path)
    for wrong in (["amos_ct", "--classes", "a,b"], ["nothing"], ["folder:f", "--spacing", "1,-1"]):
        with pytest.raises(SystemExit):
            prepare.main(["build", wrong[0], "--raw", str(raw), *wrong[1:]])


def test_a_file_of_a_newer_version(tmp_path, capsys):
    with build("folder:f", pictures(tmp_path / "raw"), tmp_path):
        pass
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file.attrs["format_version"] = FORMAT_VERSION + 1
    assert "newer code" in error(capsys, "show", "folder:f", "--data-dir", tmp_path)


# Places and types of NIfTI-1 header fields: dimensions, type, voxel sizes, offset, scaling, units, forms.
FIELDS = [
    *((place, "<i2") for place in (*range(40, 56, 2), 70, 72, 252, 254)),
    *((place, "<f4") for place in (*range(76, 120, 4), *range(256, 328, 4))),
    *((place, "u1") for place in (0, 123, 344, 345, 346, 347)),
]
EXTREMES = {
    "<i2": [-32768, -1, 0, 1, 2, 7, 30000, 32767, 2, 4, 8, 16, 32, 64, 128, 512, 768, 1024, 2304],
    "<f4": [np.nan, np.inf, -np.inf, 0, -1, 1e-30, 1e30, 3e38, 1, 352, 1e6],
    "u1": range(256),
}


def damaged(rng, kind, content):
    """A file's bytes after one mishap: some flipped, the end missing, or a field of its header changed."""
    if kind == ".nii.gz" and rng.random() < 0.7:
        return gzip.compress(damaged(rng, ".nii", gzip.decompress(content)), 1)
    content, mishap = bytearray(content), rng.integers(3)
    if mishap == 0:
        return bytes(content[: rng.integers(len(content))])
    if mishap == 1 and kind == ".nii":
        place, type_ = FIELDS[rng.integers(len(FIELDS))]
        value = np.array(EXTREMES[type_][rng.integers(len(EXTREMES[type_]))]).astype(type_).tobytes()
        content[place : place + len(value)] = value
    elif mishap == 1 and kind == ".png":  # IHDR: sizes, depth, colour; with the checksum of what it is now
        place = 16 + rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        content[place] = rng.integers(256)
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    else:
        first = 0 if rng.random() < 0.5 else rng.integers(len(content))  # half of them near the front
        for place in first + rng.integers(0, min(400, len(content) - first), rng.integers(1, 9)):
            content[place] ^= rng.integers(1, 256)
    return bytes(content)


def everything(data_dir):
    """All that a data set's file says, to be compared."""
    dataset = data.open_dataset("folder:f", data_dir, ())
    loaded = [dataset.load(split, i) for split in data.SPLITS for i in range(len(dataset.uids[split]))]
    return dataset._replace(load=None), [
        (case.uid, case.spacing, *(part.tobytes() for part in (case.image, case.label, case.affine)))
        for case in loaded
    ]


def fuzz(tmp_path, kind, count, seed=0):
    """Damages one file of a sound tree, time and again; every outcome is success or one line that
    names the file. Of a prepared file, success means that nothing else is read. Counts both."""
    raw, rng, outcomes = tmp_path / "raw", np.random.default_rng(seed), Counter()
    if kind in (".png", ".tif", ".jpg"):
        pictures(raw, count=3, ending=kind[1:])
    else:
        volumes(raw, count=3, ending=kind.replace(".h5", ".nii"))
    build("folder:f", raw, tmp_path).close()
    whole = everything(tmp_path)
    files = [tmp_path / "f.h5"] if kind == ".h5" else [*raw.glob("*/*1.*")]
    sound = [path.read_bytes() for path in files]
    arguments = argparse.Namespace(
        name="folder:f", raw=raw, data_dir=tmp_path / "out", workers=1, skip_bad=False, allow_empty=False,
        classes="", split="0.7,0.1,0.2", group="", spacing=None, images="", labels="", unite=False, ignore="",
        folds=0, fold=0,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        which = rng.integers(len(files))
        files[which].unlink()  # HDF5 would know the old file again, and what it read of it
        files[which].write_bytes(damaged(rng, kind, sound[which]))
        try:
            if kind == ".h5":
                assert everything(tmp_path) == whole, number
            else:
                prepare.build(arguments)
            outcomes["success"] += 1
        except InputError as error:
            assert "\n" not in str(error), number
            assert files[which].name in str(error) or str(raw) in str(error), number
            outcomes["error"] += 1
        files[which].write_bytes(sound[which])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
    return outcomes


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".png"])
def test_a_header_that_promises_too_much_takes_no_memory(tmp_path, capsys, kind):
    raw = pictures(tmp_path / "raw", 3) if kind == ".png" else volumes(tmp_path / "raw", 3, kind)
    (path,) = (raw / "images").glob("*1.*")
    content = path.read_bytes()
    if kind == ".png":
        content = content[:16] + 2 * (12_000).to_bytes(4, "big") + content[24:]
        content = content[:29] + zlib.crc32(content[12:29]).to_bytes(4, "big") + content[33:]
    else:
        content = gzip.decompress(content) if kind == ".nii.gz" else content
        content = content[:42] + np.array([30_000] * 3, "<i2").tobytes() + content[48:]
        content = gzip.compress(content) if kind == ".nii.gz" else content
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    assert path.name in line and "cannot hold" in line and "000 x " in line
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_a_voxel_size_out_of_reach_is_named(tmp_path, capsys):
    """Resampling to the others' would take all memory, or leave nothing."""
    for size in (1e-20, 1e-3, 1e6, 1e30):
        raw = volumes(tmp_path / "raw", 3)
        nifti(raw / "images" / "v1.nii.gz", RNG.normal(size=(12, 14, 10)), np.diag([size, size, size, 1]))
        nifti(raw / "labels" / "v1.nii.gz", np.ones((12, 14, 10), np.uint8), np.diag([size, size, size, 1]))
        line = error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
        assert "v1.nii.gz" in line and "is too far" in line


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".png", ".h5"])
def test_damaged_files_are_named(tmp_path, kind):
    assert fuzz(tmp_path, kind, 40)["error"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".png", ".tif", ".jpg", ".h5"])
def test_thousands_of_damaged_files_are_named(tmp_path, kind):
    assert fuzz(tmp_path, kind, 3000, seed=1)["error"] > 1000


# --- Going on -------------------------------------------------------------------------------------


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


def test_a_mended_build_goes_on(tmp_path, capsys, monkeypatch):
    raw = volumes(tmp_path / "raw")
    build("folder:f", raw, tmp_path).close()
    whole = contents(tmp_path / "f.h5")
    good = (raw / "images" / "v3.nii.gz").read_bytes()
    nan(raw)
    assert "v3" in error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    assert same(contents(tmp_path / "f.h5"), whole)  # the old file is still there
    (raw / "images" / "v3.nii.gz").write_bytes(good)
    make, calls = prepare.make_sample, []
    monkeypatch.setattr(prepare, "make_sample", lambda case, **k: calls.append(case.uid) or make(case, **k))
    build("folder:f", raw, tmp_path).close()
    assert calls == ["v3", "v4", "v5"] and same(contents(tmp_path / "f.h5"), whole)
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_start_over(tmp_path, capsys):
    raw = volumes(tmp_path / "raw")
    nan(raw)
    error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    with build("folder:f", raw, tmp_path, "--skip-bad", "--spacing", "2,2,2") as file:
        shapes = {case["label"].shape for split in data.SPLITS for case in file[split].values()}
    assert shapes == {(6, 7, 5)}


def test_what_was_found_good_is_kept_where_empty_labels_are_meant(tmp_path, capsys, monkeypatch):
    """And only there: without --allow-empty, the same build ends at the empty label again."""
    raw = volumes(tmp_path / "raw")
    empty(raw)
    nifti(raw / "images" / "v5.nii.gz", np.full((12, 14, 10), 7, np.float32))
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path]
    assert "no foreground" in error(capsys, *command)
    make, calls = prepare.make_sample, []
    monkeypatch.setattr(prepare, "make_sample", lambda case, **k: calls.append(case.uid) or make(case, **k))
    assert "constant" in error(capsys, *command, "--allow-empty")
    assert calls == ["v3", "v4", "v5"]
    assert "no foreground" in error(capsys, *command)


def test_what_has_changed_is_made_again(tmp_path, capsys):
    """A build that continues has no sample of a file that is another one now, or was read in another way."""
    raw = pictures(tmp_path / "raw")
    shutil.copytree(raw / "labels", raw / "reader2")
    for path in (raw / "reader2").iterdir():
        png(path, CLASSES[::-1])
    good = (raw / "images" / "case5.png").read_bytes()
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path, "--classes", "a,b,c"]
    command += ["--images", "images/{}.png"]
    for labels in ("labels/{}.png", "reader2/{}.png"):
        png(raw / "images" / "case5.png", np.full((12, 16), 9, np.uint8))
        error(capsys, *command, "--labels", labels)
        with h5py.File(tmp_path / "f.h5.partial") as file:
            assert len(file["train"]) >= 3
    (raw / "images" / "case5.png").write_bytes(good)
    picture = np.asarray(PIL.Image.open(raw / "images" / "case0.png"))
    png(raw / "images" / "case0.png", picture[::-1])
    prepare.main([*map(str, command), "--workers", "1", "--labels", "reader2/{}.png"])
    found = contents(tmp_path / "f.h5")
    (tmp_path / "f.h5").unlink()
    prepare.main([*map(str, command), "--workers", "1", "--labels", "reader2/{}.png"])
    assert same(found, contents(tmp_path / "f.h5"))


KILLED = """
import os, sys
import prepare
from support import dataset_file
add, count = dataset_file.DatasetWriter.add, []
def stop(self, split, **sample):
    add(self, split, **sample)
    count.append(1)
    if len(count) == 3:
        os.kill(os.getpid(), 9)
dataset_file.DatasetWriter.add = stop
prepare.main(sys.argv[1:])
"""


def test_a_killed_build_goes_on(tmp_path, capsys):
    raw = volumes(tmp_path / "raw")
    command = ["build", "folder:f", "--raw", str(raw), "--data-dir", str(tmp_path), "--workers", "1"]
    here = Path(prepare.__file__).parent
    done = subprocess.run([sys.executable, "-c", KILLED, *command], cwd=here, capture_output=True)
    assert done.returncode == -9 and not (tmp_path / "f.h5").exists()
    prepare.main(command)
    assert "3 of 6 cases are there" in capsys.readouterr().err
    after = contents(tmp_path / "f.h5")
    build("folder:f", raw, tmp_path).close()
    assert same(after, contents(tmp_path / "f.h5")) and len(after) == 6


def test_a_full_disk(tmp_path, capsys):
    """A limit on file sizes stands in for the disk's: the system refuses the write."""
    raw = volumes(tmp_path / "raw", count=30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        line = error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "f.h5.partial: cannot be written" in line and "free some space" in line
    assert not (tmp_path / "f.h5").exists()
    build("folder:f", raw, tmp_path).close()
    assert "cases are there" in capsys.readouterr().err and len(contents(tmp_path / "f.h5")) == 30


def test_two_builds_do_not_meet(tmp_path, capsys):
    raw = volumes(tmp_path / "raw")
    nan(raw)
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path]
    error(capsys, *command)
    before = (tmp_path / "f.h5.partial").read_bytes()
    with open(tmp_path / "f.h5.partial", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as HDF5 does while it writes
        assert "another build" in error(capsys, *command)
        assert (tmp_path / "f.h5.partial").read_bytes() == before


def test_several_processes_write_the_same(tmp_path):
    raw = volumes(tmp_path / "raw", count=8)
    nan(raw)
    build("folder:f", raw, tmp_path, "--skip-bad").close()
    alone = contents(tmp_path / "f.h5")
    prepare.main(
        ["build", "folder:f", "--raw", str(raw), "--data-dir", str(tmp_path), "--workers", "2", "--skip-bad"]
    )
    assert same(alone, contents(tmp_path / "f.h5")) and len(alone) == 7


@pytest.mark.parametrize("cores, start, pools", [(2, 1e9, 0), (2, 0.0, 1), (1, 0.0, 0)])
def test_processes_start_where_they_pay(monkeypatch, cores, start, pools):
    """They must save WORTHWHILE seconds, which only several cores can. The results are the same."""
    made, pool = [], workers.ProcessPoolExecutor
    monkeypatch.setattr(workers.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(workers, "WORTHWHILE", start)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *a: made.append(a) or pool(*a))
    cases = [Case("train", f"{i}", (), Path(), fault="" if i % 5 else "bad") for i in range(20)]
    found = [(case, str(result)) for case, result in workers.each_case(repr, cases, 0, "cases")]
    assert found == [(case, case.fault or repr(case)) for case in cases] and len(made) == pools


# --- show -----------------------------------------------------------------------------------------


def test_show_counts_and_draws(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=10, shape=(40, 52))
    for i in (4, 7):
        png(raw / "labels" / f"case{i}.png", (np.resize(CLASSES, (40, 52)) == 1).astype(np.uint8))
    build("folder:f", raw, tmp_path, "--split", "1,0,0", "--classes", "background,nerve,vessel").close()
    capsys.readouterr()
    prepare.main(["show", "folder:f", "--data-dir", str(tmp_path)])
    said = capsys.readouterr().out
    labels = [np.asarray(PIL.Image.open(path)) for path in (raw / "labels").iterdir()]
    share = 100 * np.mean([label == 2 for label in labels])
    (vessel,) = (line for line in said.splitlines() if line.startswith("vessel"))
    assert f"{share:.3f} %" in vessel and vessel.endswith("2, 0, 0")
    (row,) = (line for line in said.splitlines() if line.startswith("train"))
    assert row.split()[1] == "10" and row.count("40 x 52") == 3 and "1 x 1" in row
    drawn = np.asarray(PIL.Image.open(tmp_path / "f.png").convert("RGB")).reshape(-1, 3)
    for colour in COLOURS[:2]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(drawn - np.array(wanted)).max(axis=1) < 8).sum() > 50


# --- download -------------------------------------------------------------------------------------


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Serves `content` in the way that `manner` says."""

    content, manner, ranges = b"", "", []

    def do_GET(self):
        whole, manner = type(self).content, type(self).manner
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.ranges.append(begin)
        if manner == "missing":
            return self.send_error(404)
        if manner == "busy" and len(self.ranges) < 3:
            return self.send_error(503)
        if begin >= len(whole) and begin:
            return self.send_error(416)
        partial = begin and manner != "no ranges"
        body = whole[begin:] if partial else whole
        self.send_response(206 if partial else 200)
        if partial:
            first = begin - 1 if manner == "other range" else begin
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        promised = len(body) + 1000 * (manner == "promises more") - 1000 * (manner == "promises less")
        self.send_header("Content-Length", str(promised))
        self.end_headers()
        if manner in ("breaks", "other range") or (manner == "no ranges" and len(self.ranges) < 3):
            body = body[: max(len(body) // 2, 20_000)]
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def start(content, manner="", name="Task04_Hippocampus.tar", md5=""):
        Unreliable.content, Unreliable.manner, Unreliable.ranges = content, manner, []
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        source = download.Download({name: (url, md5)}, "a licence", "a paper")
        recipe = RECIPES["hippocampus_mr"]._replace(download=source)
        monkeypatch.setitem(RECIPES, "hippocampus_mr", recipe)
        return ["download", "hippocampus_mr", "--raw-dir", str(tmp_path / "raw")]

    yield start
    server.shutdown()
    server.server_close()


def tar(names, size=60_000):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(RNG.bytes(size)))
    return buffer.getvalue()


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, RNG.bytes(60_000))
    return buffer.getvalue()


@pytest.mark.parametrize("manner", ["", "breaks", "no ranges", "busy"])
def test_download_survives(serve, tmp_path, capsys, manner):
    content = tar(["Task04/labelsTr/a", "Task04/imagesTr/a"])
    prepare.main(serve(content, manner))
    target = tmp_path / "raw" / "hippocampus_mr"
    assert (target / "Task04_Hippocampus.tar").read_bytes() == content
    assert (target / "Task04_Hippocampus" / "Task04" / "labelsTr" / "a").stat().st_size == 60_000
    said = capsys.readouterr().out
    assert said.index("a licence") < said.index("next: python prepare.py build hippocampus_mr")
    if manner == "breaks":
        assert len(Unreliable.ranges) > 2 and Unreliable.ranges == sorted(Unreliable.ranges)
    assert not list(target.glob("*.partial"))
    before = len(Unreliable.ranges)
    prepare.main(serve(content, manner))  # all is there: nothing is asked for
    assert before and not Unreliable.ranges


def test_download_goes_on_from_a_piece(serve, tmp_path):
    content = zipped(["a.txt"])
    piece = tmp_path / "raw" / "hippocampus_mr" / "x.zip.partial"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(content[:1234])
    prepare.main(serve(content, name="x.zip"))
    assert Unreliable.ranges == [1234] and (piece.parent / "x" / "a.txt").stat().st_size == 60_000
    (piece.parent / "x.zip").unlink()
    piece.write_bytes(content + b"too much")  # of another, longer file
    prepare.main(serve(content, name="x.zip"))
    assert (piece.parent / "x.zip").read_bytes() == content


@pytest.mark.parametrize(
    "manner, says",
    [
        ("promises more", "announced"),
        ("promises less", "cannot be unpacked"),
        ("missing", "404"),
        ("other range", "run it again later"),
    ],
)
def test_download_gives_up(serve, tmp_path, capsys, manner, says):
    command = serve(zipped(["a.txt", "b.txt"]), manner, name="x.zip")
    assert says in error(capsys, *command)
    target = tmp_path / "raw" / "hippocampus_mr"
    assert not (target / "x").exists() and not list(target.glob("x.partial"))


def test_download_checks_md5(serve, tmp_path, capsys):
    assert "MD5" in error(capsys, *serve(tar(["a"]), md5="0" * 32))
    assert not list((tmp_path / "raw" / "hippocampus_mr").iterdir())


@pytest.mark.parametrize("pack, name", [(tar, "x.tar"), (zipped, "x.zip")])
@pytest.mark.parametrize("evil", ["../../evil", "{root}/evil"])
def test_nothing_lands_outside(serve, tmp_path, capsys, pack, name, evil):
    evil = evil.format(root=tmp_path)
    try:
        prepare.main(serve(pack([evil, "good"]), name=name))
    except SystemExit as stop:
        assert stop.code == 2
    inside = tmp_path / "raw" / "hippocampus_mr"
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(inside)]
    assert not outside


def test_links_out_of_a_tar_are_refused(serve, tmp_path, capsys):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        member = tarfile.TarInfo("link/evil")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    assert "cannot be unpacked" in error(capsys, *serve(buffer.getvalue()))
    assert not (tmp_path / "evil").exists()


def bomb(kind):
    """An archive that would fill a disk, or waits for the end of time."""
    if kind == "compressed.tar":
        return gzip.compress(tar(["labelsTr/a"], 1 << 20))
    if kind == "sparse.tar":  # one hole of 4 GB, as GNU tar stores it
        header = bytearray(tarfile.TarInfo("labelsTr/a").tobuf())
        header[156:157], header[386:410], header[483:495] = (
            b"S",
            b"%011o\0" % (1 << 32) + b"0" * 11 + b"\0",
            (b"%011o\0" % (1 << 32)),
        )
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + bytes(1024)
    buffer, method = io.BytesIO(), zipfile.ZIP_LZMA if kind == "lzma.zip" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        if kind == "many.zip":
            for i in range(101):
                archive.writestr(f"labelsTr/{i}", b"")
        elif kind == "deep.zip":
            archive.writestr("a/" * 3000 + "labelsTr", b"x")
        else:
            archive.writestr("labelsTr/a", bytes((100 << 20) if method == zipfile.ZIP_DEFLATED else 1))
    if kind == "lie.zip":  # in the table and before the file
        return buffer.getvalue().replace((100 << 20).to_bytes(4, "little"), (50_000).to_bytes(4, "little"))
    return buffer.getvalue()


BOMBS = ["zeros.zip", "lzma.zip", "lie.zip", "many.zip", "deep.zip", "compressed.tar", "sparse.tar"]


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_grows_too_much_is_refused(serve, tmp_path, capsys, monkeypatch, name):
    """Nothing of it is left but itself."""
    monkeypatch.setattr(download, "MOST_FILES", 100)
    says = {"lie.zip": "CRC", "lzma.zip": "deflate", "compressed.tar": "header"}.get(name, "would become")
    line = error(capsys, *serve(bomb(name), name=name))
    assert f"{name}: cannot be unpacked (" in line
    assert {"many.zip": "101 files", "deep.zip": "3000 folders deep"}.get(name, says) in line
    assert [path.name for path in (tmp_path / "raw" / "hippocampus_mr").iterdir()] == [name]


def test_download_says_what_it_did_not_check(serve, tmp_path, capsys, monkeypatch):
    """A checksum that is not known, cases that are missing, and another data set."""
    content = tar([f"labelsTr/case_{i}.nii.gz" for i in range(10)] + ["imagesTr/case_0.nii.gz"])
    recipe = RECIPES["hippocampus_mr"]

    def said(content, md5=""):
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        command = serve(content, md5=md5)
        plan = lambda raw: recipe.plan(raw)._replace(counts=(7, 1, 2))  # noqa: E731
        monkeypatch.setitem(RECIPES, "hippocampus_mr", RECIPES["hippocampus_mr"]._replace(plan=plan))
        capsys.readouterr()
        prepare.main(command)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("NB: ")]

    unchecked, differs = said(content)
    assert "no checksum of it is known" in unchecked
    assert "holds 1, 0, 0 cases" in differs and "7, 1, 2" in differs
    whole = tar([f"{folder}/case_{i}.nii.gz" for i in range(10) for folder in ("imagesTr", "labelsTr")])
    assert said(whole, hashlib.md5(whole).hexdigest()) == []
    (other,) = said(other := tar(["a"]), hashlib.md5(other).hexdigest())
    assert "this is not all of hippocampus_mr (" in other


def test_brats_says_where_it_is(capsys):
    line = error(capsys, "download", "brats_mr")
    assert "Kaggle account" in line and "https://www.kaggle.com/datasets/" in line
