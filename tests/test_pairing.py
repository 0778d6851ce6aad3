"""Which images and labels of an archive belong together?"""

import hashlib
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import RNG, build, cases_in, error, mask, nifti, organ, picture, png, scan, split_of

import data
from support import pairing

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
