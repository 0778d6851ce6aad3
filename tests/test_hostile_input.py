"""Raw files that are damaged, or not what they should be, end in one line that names them."""

import argparse
import gzip
import json
import re
import resource
import zlib
from collections import Counter

import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest
from made import (
    CLASSES,
    RNG,
    build,
    cases_in,
    classes_in,
    empty,
    error,
    masks,
    nan,
    nifti,
    picture,
    pictures,
    png,
    volumes,
)

import data
import prepare
from support.dataset_file import FORMAT_VERSION
from support.files import InputError

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def infinite(raw):
    image = RNG.normal(size=(12, 14, 10)).astype(np.float32)
    image[3, 3, 3] = np.inf
    nifti(raw / "images" / "v3.nii.gz", image)


def constant(raw):
    nifti(raw / "images" / "v3.nii.gz", np.full((12, 14, 10), 7, np.float32))


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
