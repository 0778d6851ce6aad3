"""Which images and labels of an archive belong together?"""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made import RNG, build, cases_in, error, mask, nifti, organ, picture, png, scan

import data
from support.raw import pairing
from support.raw.images import counted

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def brats(raw):
    for i in range(3):
        for kind in ("t1", "t1ce", "t2", "flair"):
            scan(raw / f"BraTS_{i}" / f"BraTS_{i}_{kind}.nii.gz")
        organ(raw / f"BraTS_{i}" / f"BraTS_{i}_seg.nii.gz")
    return [f"BraTS_{i}" for i in range(3)]


def dsb(raw):
    """An image in a folder of its own, with a mask per nucleus under other names."""
    for case in ("0a1", "1c9", "77f"):
        png(raw / "stage1_train" / case / "images" / f"{case}.png", picture())
        for nucleus in range(7):
            shown = 255 * (np.arange(12 * 16).reshape(12, 16) == 20 * nucleus).astype(np.uint8)
            png(raw / "stage1_train" / case / "masks" / f"{nucleus}{case[::-1]}.png", shown)
    return ["0a1", "1c9", "77f"]


DRIVE = ("--images", "images/{}_training.tif", "--labels", "1st_manual/{}_manual1.gif")


# The names of cases, with a hyphen or an underscore where they have two parts; how the files of a case are
# named; the names of others.
ARCHIVES = {
    "ISBI": ("0 1 2 3", "m/train/image/{name}.png", "m/train/label/{name}.png", "m/test/0.png m/test/1.png"),
    "ACDC": (
        "patient001_frame01 patient001_frame12 patient002_frame01",
        "database/training/{first}/{name}.nii.gz",
        "database/training/{first}/{name}_gt.nii.gz",
        "database/training/patient001/patient001_4d.nii.gz database/training/patient001/Info.cfg",
    ),
    "BraTS": (
        "BraTS_0 BraTS_1 BraTS_2",
        "{name}/{name}_flair.nii {name}/{name}_t1.nii {name}/{name}_t1ce.nii {name}/{name}_t2.nii",
        "{name}/{name}_seg.nii",
        "",
    ),
    "nnU-Net": (
        "case_0 case_1 case_2",
        "D1/imagesTr/{name}_0000.nii.gz D1/imagesTr/{name}_0001.nii.gz",
        "D1/labelsTr/{name}.nii.gz",
        "D1/imagesTs/case_3_0000.nii.gz D1/imagesTs/case_4_0000.nii.gz D1/dataset.json",
    ),
    "the folder gives the name": ("c0 c1 c2", "{name}/image.nii.gz", "{name}/label.nii.gz", ""),
    "a split of its own": (
        "train-0 train-1 val-0 val-1", "{first}/images/{second}.jpg", "{first}/masks/{second}_mask.png", ""
    ),
    "BTCV": ("0001 0002 0003", "imagesTr/img{name}.nii.gz", "labelsTr/label{name}.nii.gz", ""),
    "TotalSegmentator": (
        "s0001 s0002 s0003", "{name}/ct.nii.gz",
        "{name}/segmentations/liver.nii.gz {name}/segmentations/spleen.nii.gz", "meta.csv",
    ),
    "LiTS": ("31 45 7", "batch/volume-{name}.nii", "batch/segmentation-{name}.nii", ""),
    "words in front": ("anna ben segovia", "image_{name}.bmp", "mask_{name}.bmp", "overview.png"),
    "WORD": (
        "word_0001 word_0002 word_0003",
        "imagesTr/{name}.nii.gz",
        "labelsTr/{name}.nii.gz",
        "imagesVal/word_0004.nii.gz labelsVal/word_0004.nii.gz",
    ),
}  # fmt: skip


def touch(paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("names, images, labels, others", ARCHIVES.values(), ids=ARCHIVES)
def test_archives_are_paired_by_their_names(tmp_path, capsys, names, images, labels, others):
    """One patient's name begins with `seg`, too."""

    def places(words, name):
        first, _, second = name.replace("_", "-").partition("-")
        return tuple(
            tmp_path / place.format(name=name, first=first, second=second) for place in words.split()
        )

    expected = {name: (places(images, name), places(labels, name)) for name in names.split()}
    left = [tmp_path / other for other in others.split()]
    touch(chain(left, *chain(*expected.values())))
    found = pairing.find_pairs(tmp_path)
    assert [(case.uid, (case.images, case.labels)) for case in found] == [*expected.items()]
    assert (f"{counted(len(left), 'other file')} left out" in capsys.readouterr().err) == bool(left)


@pytest.mark.parametrize(
    "archive, options, channels", [(drive, DRIVE, 3), (busi, (), 1), (dsb, ("--unite",), 1)]
)
def test_archives_are_built_as_they_are(tmp_path, capsys, archive, options, channels):
    names = archive(tmp_path / "raw")
    with build("folder:f", tmp_path / "raw", tmp_path, *options) as file:
        cases = cases_in(file)
        assert sorted(cases) == sorted(names)
        assert all(case["image"].shape[-1] == channels and case["label"][()].any() for case in cases.values())
    said = capsys.readouterr().err
    assert f"{len(names)} images with labels" in said
    assert ("9 other files left out" in said) == (archive is drive)
    assert all(f"  {name}: " in said for name in (min(names), max(names)))
    dataset = data.open_dataset("folder:f", tmp_path, ())
    assert dataset.load("train", 0).image.shape[-1] == dataset.image_channels == channels


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


def test_a_choice_of_labels_is_asked_for(tmp_path, capsys):
    raw = tmp_path / "DRIVE"
    drive(raw)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "1st_manual and mask may each hold the labels" in line and not (tmp_path / "data").exists()
    png(tmp_path / "flat" / "a.png", picture())
    for kind in ("mask", "gt"):
        png(tmp_path / "flat" / f"a_{kind}.png", mask())
    line = error(capsys, "build", "folder:f", "--raw", tmp_path / "flat")
    assert "_gt and _mask may each end" in line


def test_several_labels_of_an_image(tmp_path, capsys):
    raw, second = tmp_path / "raw", mask()
    busi(raw)
    first = np.asarray(PIL.Image.open(raw / "benign" / "benign (2)_mask.png"))
    png(raw / "benign" / "benign (2)_mask_1.png", second)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "benign/benign (2)_mask.png, benign/benign (2)_mask_1.png: 2 labels of one image" in line
    assert "--unite if they are one class, or --class-per-file if each is a class by its name" in line
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


ORGANS = {"liver": np.s_[1:4], "spleen": np.s_[3:6], "rib": np.s_[0:1]}


def organs(raw):
    """Volumes with a mask per organ, of which liver and spleen have a slab in common, and rib is in two."""
    for case in ("s1", "s2", "s3"):
        scan(raw / case / "ct.nii.gz")
        for name, where in ORGANS.items():
            values = np.zeros((6, 7, 5), np.uint8)
            values[where] = 255 if case == "s1" else 1
            if case != "s3" or name != "rib":
                nifti(raw / case / "segmentations" / f"{name}.nii.gz", values)
    return raw


@pytest.mark.parametrize(
    "options, names, expected, said",
    [
        ((), "liver,rib,spleen", [2, 1, 1, 3, 3, 3], "liver and spleen overlap in 3 of 3 cases"),
        (("--classes", "background,spleen,liver"), "spleen,liver", [0, 2, 2, 2, 1, 1], "liver lies above"),
        (("--classes", "background,liver"), "liver", [0, 1, 1, 1, 0, 0], "1 is liver"),
    ],
)
def test_each_label_file_is_a_class(tmp_path, capsys, options, names, expected, said):
    """By its name; a case may lack a class, and what is above is the later of --classes."""
    raw = organs(tmp_path / "raw")
    with build("folder:f", raw, tmp_path, "--class-per-file", *options) as file:
        assert json.loads(file.attrs["class_names"]) == ["background", *names.split(",")]
        for case, found in cases_in(file).items():
            values = np.array(expected)
            if "rib" in names and case == "s3":
                values[0] = 0
            assert (found["label"][()] == values[:, None, None]).all()
    assert said in capsys.readouterr().err


def test_label_files_that_are_no_classes(tmp_path, capsys):
    raw = organs(tmp_path / "raw")
    command = ("build", "folder:f", "--raw", raw, "--class-per-file")
    assert "no label is named lung, but liver, rib" in error(capsys, *command, "--classes", "background,lung")
    assert "no label of the classes rib" in error(capsys, *command, "--classes", "background,rib")
    assert "several; type one" in error(capsys, *command, "--unite")
    assert "--ignore has no meaning" in error(capsys, *command, "--ignore", "3")
    organ(raw / "s2" / "segmentations" / "rib.nii.gz", 3)
    assert "s2/segmentations/rib.nii.gz: 2 numbers above 0" in error(capsys, *command)
    organ(raw / "s2" / "segmentations" / "liver-s2.nii.gz")
    assert "two labels of one class" in error(capsys, *command)
    dsb(tmp_path / "dsb")
    line = error(capsys, "build", "folder:f", "--raw", tmp_path / "dsb", "--class-per-file")
    assert "21 labels have names of their own" in line and "--unite" in line


@pytest.mark.parametrize(
    "label, case, name",
    [
        ("s1/liver.nii.gz", "s1", "liver"),
        ("s1_adrenal_gland_seg.nii.gz", "s1", "adrenal_gland"),
        ("mask-liver-s1.nii", "s1", "liver"),
        ("s1_mask.png", "s1", "mask"),
        ("s10.png", "s1", "s10"),
        ("labels/liver/s1.png", "s1", "liver"),
    ],
)
def test_a_label_names_its_class(label, case, name):
    assert pairing.class_of(Path(label), case) == name


@pytest.mark.parametrize(
    "images, labels, cases",
    [
        # Labels that look like images.
        ("*.png", "*_vessels.png", {"0": ("0.png", "0_vessels.png"), "1": ("1.png", "1_vessels.png")}),
        # A folder's name in common, several labels, and channels in the order that was typed.
        ("{}/z/*.png,{}/a/*.png", "{}/cells/*.png", {
            "n0": ("n0/z/z.png n0/a/x.png", "n0/cells/0.png n0/cells/1.png"),
            "n1": ("n1/z/y.png n1/a/x.png", "n1/cells/0.png"),
        }),
        # The longest name of an image that fits is meant: names of images end before those of organs.
        ("images/{}.png", "labels/{}_*.png", {
            "a": ("images/a.png", "labels/a_left_lung.png labels/a_liver.png"),
            "a_2": ("images/a_2.png", "labels/a_2_left_lung.png"),
            "b": ("images/b.png", "labels/b_left_lung.png"),
        }),
    ],
)  # fmt: skip
def test_files_are_paired_by_patterns(tmp_path, images, labels, cases):
    expected = {
        name: tuple(tuple(tmp_path / place for place in places.split()) for places in both)
        for name, both in cases.items()
    }
    touch(chain(*chain(*expected.values())))
    found = pairing.find_pairs(tmp_path, images, labels)
    assert {case.uid: (case.images, case.labels) for case in found} == expected


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
    (raw / "scan_2.MHA").touch()
    assert "scan_2.MHA: convert it to NIfTI first" in error(capsys, "build", "folder:f", "--raw", raw)
    (raw / "scan_2.MHA").unlink()
    (raw / "loop").symlink_to(raw)
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "no pairs" in line and "images and labels" in line and "_mask" in line and "--labels" in line
    for name in ("image", "img", "mask"):
        png(raw / "pair" / f"a_{name}.png", picture())
    assert "a_mask.png: 2 images, 1 label of" in error(capsys, "build", "folder:f", "--raw", raw)


def test_a_channel_that_is_missing_or_another(tmp_path, capsys):
    raw = tmp_path / "raw"
    brats(raw)
    (raw / "BraTS_1" / "BraTS_1_t2.nii.gz").rename(raw / "BraTS_1" / "BraTS_1_dwi.nii.gz")
    line = error(capsys, "build", "folder:f", "--raw", raw)
    assert "BraTS_1" in line and "channels dwi, flair, t1, t1ce, but most cases have flair, t1" in line
    with build("folder:f", raw, tmp_path, "--skip-bad") as file:
        assert sorted(cases_in(file)) == ["BraTS_0", "BraTS_2"]
