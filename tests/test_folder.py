"""A folder of images and labels: kinds of labels, sizes, spacing and `show`."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from made import CLASSES, KINDS, RNG, build, cases_in, error, nifti, palette, picture, pictures, png

import data
import evaluate
import prepare
import settings
from recipes import folder as own
from support.disk.files import InputError
from support.machine.devices import make_mesh
from support.raw import images
from support.results.pictures import COLOURS

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_label_pictures(tmp_path, kind):
    with build("folder:f", pictures(tmp_path / "raw", kind=kind), tmp_path) as file:
        cases, names = cases_in(file), json.loads(file.attrs["class_names"])
        assert len(cases) == 6 and len(names) == 3 and names[0] == "background"
        for i in range(6):
            assert (cases[f"case{i}"]["label"][()] == np.roll(CLASSES, i)).all()


@pytest.mark.parametrize(
    "said, names, found",
    [
        ({"background": 0, "liver": 1, "tumour": 2}, "background,liver,tumour", [0, 1, 2]),
        ({"0": "background", "1": "liver", "2": "a", "3": "cyst"}, "background,liver,a,cyst", [0, 1, 2]),
        ({"background": 0, "tumour": 1, "ignore": 2}, "background,tumour", [0, 1, 255]),
        ({"background": 0, "whole": [1, 2], "core": 2}, "background,class 1,class 2", [0, 1, 2]),
        ("not of nnU-Net", "background,class 1,class 2", [0, 1, 2]),
    ],
)
def test_names_of_nnunet(tmp_path, capsys, said, names, found):
    """Of its two versions; a number that it ignores is left out of loss and scores, regions are not known."""
    raw = pictures(tmp_path / "raw" / "Dataset001", masks="labelsTr")
    (raw / "images").rename(raw / "imagesTr")
    (raw / "dataset.json").write_text(json.dumps({"labels": said}))
    with build("folder:f", raw.parent, tmp_path) as file:
        assert json.loads(file.attrs["class_names"]) == names.split(",")
        assert (cases_in(file)["case0"]["label"][()] == np.array(found)[CLASSES]).all()
    assert ("no label has the class cyst" in capsys.readouterr().err) == ("cyst" in names)
    with build("folder:f", raw.parent, tmp_path, "--classes", "a,b,c") as file:
        assert json.loads(file.attrs["class_names"]) == ["a", "b", "c"]


def test_colour_grey_sizes_and_endings_mix(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=5, masks="masks")
    colour = RNG.integers(0, 256, (20, 14, 3)).astype(np.uint8)
    png(raw / "images" / "naïve 1.tif", colour)
    png(raw / "masks" / "nai\u0308ve 1.PNG", np.resize(CLASSES, (20, 14)))  # the accent by itself
    (raw / "images" / "notes.txt").write_text("left out")
    with build("folder:f", raw, tmp_path) as file:
        image = cases_in(file)["naïve 1"]["image"][()]
        assert image.shape == (20, 14, 1) and cases_in(file)["case0"]["image"].shape == (12, 16, 1)
    said = capsys.readouterr().err
    assert "1 other file left out" in said and "read as grey" in said
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.corrcoef(image.ravel(), luma.ravel())[0, 1] > 0.9999


def test_colour_stays_where_all_is_colour(tmp_path):
    raw, images = pictures(tmp_path / "raw", count=4), {}
    for i in range(4):
        images[f"case{i}"] = RNG.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        png(raw / "images" / f"case{i}.png", PIL.Image.fromarray(images[f"case{i}"]).convert("RGBA"))
    with build("folder:f", raw, tmp_path) as file:
        for uid, case in cases_in(file).items():
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
        case = cases_in(file)["v2"]
        assert case["image"].shape == (20, 18, 16, 2) and np.allclose(case.attrs["spacing"], [1, 1, 3])
        # The second channel is the height in mm, but for level and scale; beyond the last voxels it stays.
        z = case.attrs["affine"][2, 2] * np.arange(16) + case.attrs["affine"][2, 3]
        height = case["image"][5, 5, 1:-1, 1]
        assert np.abs(height - np.polyval(np.polyfit(z[1:-1], height, 1), z[1:-1])).max() < 1e-3
        assert (case["label"][5, 5, 1:-1] == (z[1:-1] > 22)).all()
    assert settings["strides"] == [[2, 2, 1], [2, 2, 2]]


@given(st.lists(st.tuples(st.floats(1, 900), st.floats(0.2, 8)), min_size=2, max_size=3))
@examples(max_examples=100, deadline=None)
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
    config, _ = settings.parse_config(["--dataset", "folder:f", "--data-dir", str(tmp_path)])
    assert list(config.patch_shape) == proposed["patch_shape"] == [40, 52]
    assert [list(s) for s in config.strides] == proposed["strides"]
    assert list(config.translation) == proposed["translation"] and ":" not in config.run_dir
    assert config.blend == "gaussian"
    typed = ["--dataset", "folder:f", "--data-dir", str(tmp_path), "--patch-shape", "16,16"]
    assert settings.parse_config(typed)[0].patch_shape == (16, 16)
    settings.check(config, data.open_dataset("folder:f", tmp_path, ()), make_mesh("", jax.devices()[:1]))
    for name in ("folder", "folder:", "phantom_us:x", "nothing"):
        with pytest.raises(SystemExit):
            settings.parse_config(["--dataset", name])
        assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize("voxels, proposed", [(3, 0.33), (30, None)])
def test_rare_foreground_is_proposed_for_patches(tmp_path, capsys, voxels, proposed):
    """Below 1 % of the voxels, over all cases."""
    for i in range(4):
        label = np.zeros((40, 40), np.uint8)
        label.ravel()[: voxels + 5 * (i % 2)] = 1 + i % 2
        png(tmp_path / "raw" / "images" / f"{i}.png", picture((40, 40)))
        png(tmp_path / "raw" / "labels" / f"{i}.png", label)
    with build("folder:f", tmp_path / "raw", tmp_path) as file:
        assert json.loads(file.attrs["settings"]).get("foreground") == proposed
    assert ("; --foreground 0.33" in capsys.readouterr().err) == bool(proposed)


def test_gif_pictures(tmp_path):
    """A GIF's colours count, as its palette has any order: some here have white first, one white alone."""
    labels = [(np.roll(CLASSES, i) > 0).astype(np.uint8) for i in range(4)] + [np.ones((12, 16), np.uint8)]
    for i, label in enumerate(labels):
        png(tmp_path / "raw" / "images" / f"{i}.gif", image := picture())
        drawn = palette(1 - label, [255] * 3 + [0] * 3) if i % 2 else palette(label, [0] * 3 + [255] * 3)
        png(tmp_path / "raw" / "labels" / f"{i}.gif", drawn)
    with build("folder:f", tmp_path / "raw", tmp_path) as file:
        cases = cases_in(file)
        assert all((cases[f"{i}"]["label"][()] == label).all() for i, label in enumerate(labels))
        assert np.allclose(cases["4"]["image"][..., 0], (image - image.mean()) / image.std(), atol=1e-5)


def as_jpeg(path, mask, mode="L"):
    PIL.Image.fromarray(255 * mask).convert(mode).save(path.with_suffix(".jpg"), quality=90)
    return path.with_suffix(".jpg")


def jpeg_as_png(path, mask):
    png(path, PIL.Image.open(as_jpeg(path, mask)))
    return path


def enlarged(path, mask):
    small = PIL.Image.fromarray(255 * mask[::2, ::2])
    png(path, small.resize(mask.shape[::-1], PIL.Image.BILINEAR))
    return path


def probability(path, mask):
    nifti(path.with_suffix(".nii"), (0.2 + 0.6 * mask).astype(np.float32))
    return path.with_suffix(".nii")


@pytest.mark.parametrize(
    "write, threshold, says",
    [
        (as_jpeg, 127, "JPEG changes a label's values; with one class, use --threshold 127"),
        (partial(as_jpeg, mode="RGB"), 127, "JPEG changes"),
        (jpeg_as_png, 127, ""),
        (enlarged, 127, ""),
        (probability, 0.5, "labels must be whole numbers from 0 to 16777216; repair it, or use --threshold"),
    ],
)
def test_smooth_masks_with_a_threshold(tmp_path, write, threshold, says):
    mask = np.kron(RNG.integers(0, 2, (8, 9)), np.ones((6, 6))).astype(np.uint8)
    path = write(tmp_path / "mask.png", mask)
    found, _ = images.read_label(path, images.Reading(threshold=threshold))
    assert (found.squeeze() == mask).all()
    if says:
        with pytest.raises(InputError, match=says):
            images.read_label(path, images.Reading())
    else:
        assert len(np.unique(images.read_label(path, images.Reading())[0])) > 4


def model_of(tmp_path):
    """The data set that was built, and what the file of a model of it says, written and read again."""
    config, _ = settings.parse_config(["--dataset", "folder:f", "--data-dir", str(tmp_path)])
    dataset = data.open_dataset("folder:f", tmp_path, ())
    facts = dataclasses.asdict(settings.model_facts(config, dataset, {}))
    return dataset, settings.read_facts(json.loads(json.dumps(facts)))


def test_a_model_remembers_the_threshold_of_its_labels(tmp_path):
    raw, mask = tmp_path / "raw", np.kron([[0, 1, 0, 1], [0, 0, 1, 0]], np.ones((16, 8))).astype(np.uint8)
    for i in range(3):
        png(raw / "images" / f"{i}.png", picture(mask.shape))
        (raw / "masks").mkdir(exist_ok=True)
        truth = np.asarray(PIL.Image.open(as_jpeg(raw / "masks" / f"{i}.png", mask)))
    build("folder:f", raw, tmp_path, "--threshold", 127, "--classes", "background,polyp").close()
    dataset, facts = model_of(tmp_path)
    label = dataset.load("train", 0).label
    assert (label == mask).all() and dataset.threshold == facts.threshold == 127
    assert evaluate.score_masks(label, truth, threshold=facts.threshold)[1]["dice"] == 1


@pytest.mark.parametrize("geometry, spacing", [("sform", (1, 1, 1)), ("pixdim", (1.5, 1.5, 10))])
def test_which_of_two_spacings_holds(tmp_path, capsys, geometry, spacing):
    """As in ACDC: the sform's scales are 1, those of pixdim (and qform) are true. A model remembers it."""
    raw, unit, true = tmp_path / "raw", np.diag([-1.0, -1, 1, 1]), np.diag([-1.5, -1.5, 10, 1])
    for place in (raw / kind / f"v{i}.nii.gz" for kind in ("images", "labels") for i in range(3)):
        values = (RNG.normal(size=(16, 18, 6)) > 1).astype(np.uint8)
        place.parent.mkdir(parents=True, exist_ok=True)
        file = nibabel.Nifti1Image(values, true)
        file.set_qform(true, 1)
        file.set_sform(unit, 2)
        nibabel.save(file, place)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "is 1 x 1 x 1 by its sform, but 1.5 x 1.5 x 10 by its pixdim; say which is true by" in line
    build("folder:f", raw, tmp_path, "--geometry", geometry).close()
    dataset, facts = model_of(tmp_path)
    case = dataset.load("train", 0)
    assert case.spacing == facts.spacing == spacing and facts.geometry == geometry
    one = np.zeros(case.label.shape, bool)
    one[8, 9, 3] = True
    assert evaluate.hausdorff_95(one, np.roll(one, 1, axis=2), case.spacing) == spacing[2]  # mm
    model = evaluate.Model(None, facts, Path("best"))
    read, grid = model.read([place])
    assert model.prepare(read, place).spacing == spacing
    assert np.allclose(grid.affine, true if geometry == "pixdim" else unit)
    ending, content = images.encode_like(values, place, [])
    (tmp_path / f"mask{ending}").write_bytes(content)
    headers = [nibabel.load(path).header for path in (tmp_path / f"mask{ending}", place)]
    for read in (lambda h: h.get_zooms(), lambda h: h.get_sform(), lambda h: h.get_qform()):
        assert np.allclose(*map(read, headers))  # a viewer shows both in one place


def test_show_counts_and_draws(tmp_path, capsys):
    """Also where a name is beyond ASCII."""
    raw = pictures(tmp_path / "raw", count=10, shape=(40, 52))
    for kind in ("images", "labels"):
        (raw / kind / "case0.png").rename(raw / kind / "Löwe 肝 №1.png")
    for i in (4, 7):
        png(raw / "labels" / f"case{i}.png", (np.resize(CLASSES, (40, 52)) == 1).astype(np.uint8))
    with build("folder:f", raw, tmp_path, "--split", "1,0,0", "--classes", "background,nerve,vessel") as file:
        assert "Löwe 肝 №1" in file["train"]
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


def test_what_resampling_loses_is_said_with_its_cause(tmp_path, capsys):
    """An object of one voxel beside a large one in two cases, and alone in a third."""
    raw = pictures(tmp_path / "raw", count=6, shape=(40, 40))
    for i in range(6):
        label = np.zeros((40, 40), np.uint8)
        label[10:30, 10:30] = i < 5
        label[3, 3] = 2 if i in (2, 3, 5) else 0
        png(raw / "labels" / f"case{i}.png", label)
    words = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path, "--spacing", "3.1,3.1"]
    line = error(capsys, *words)
    assert "its foreground is lost in resampling from spacing 1 x 1 to 3.1 x 3.1" in line
    build("folder:f", raw, tmp_path / "other", "--spacing", "3.1,3.1", "--allow-empty").close()
    assert "class 2 is lost in resampling in 3 of 6 cases, such as case2" in capsys.readouterr().err
