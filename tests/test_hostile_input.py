"""Raw files that are damaged, or not what they should be, end in one line that names them."""

import gzip
import json
import re
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from made import (
    CLASSES, RNG, build, cases_in, empty, error, masks, mutated, nan, nifti, palette, picture,
    pictures, png, volumes,
)  # fmt: skip

import prepare
from support.raw import images
from support.disk.files import InputError

pytestmark = pytest.mark.usefixtures("elsewhere")


IMAGE, LABEL = "images/v3.nii.gz", "labels/v3.nii.gz"
SIZE = (12, 14, 10)
ONES, NOISE = np.ones(SIZE, np.uint8), RNG.normal(size=SIZE).astype(np.float32)


def gone(place):
    return lambda raw: (raw / place).unlink()


def edited(place, change):
    return lambda raw: (raw / place).write_bytes(change((raw / place).read_bytes()))


def holds(place, values, affine=None):
    return lambda raw: nifti(raw / place, values, affine)


def drawn(place, values):
    return lambda raw: png(raw / place, values)


def flipped(content, place):
    """One bit is another: of a checksum, all that is checked by it can still be read."""
    content = bytearray(content)
    content[place] ^= 1
    return bytes(content)


def header(place, *numbers):
    """Written into the header's bytes: nibabel would not write it, and mends it silently on reading."""

    def change(raw):
        (raw / IMAGE).unlink()
        path = raw / "images" / "v3.nii"
        nifti(path, NOISE)
        content = bytearray(path.read_bytes())
        content[place : place + 4 * len(numbers)] = np.array(numbers, np.float32).tobytes()
        path.write_bytes(content)

    return change


def voxels(size):
    """Resampling to the others' size would take all memory, or leave nothing."""

    def change(raw):
        for place, values in ((IMAGE, NOISE), (LABEL, ONES)):
            nifti(raw / place, values, np.diag([size, size, size, 1]))

    return change


def a_picture(raw):
    (raw / IMAGE).unlink()
    png(raw / "images" / "v3.png", CLASSES)


VOLUMES = [
    (gone(LABEL), "1 image, 0 labels of"),
    (gone(IMAGE), "0 images, 1 label of"),
    (edited(IMAGE, lambda content: b"version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
    (edited(LABEL, lambda content: content[:-20]), "not a readable NIfTI"),
    (edited(LABEL, lambda content: flipped(content, -8)), "CRC check failed"),
    (edited(IMAGE, lambda content: b"<html>please log in</html>"), "not a readable NIfTI"),
    (holds(LABEL, np.full(SIZE, 0.5, np.float32)), "whole numbers"),
    (holds(LABEL, np.full(SIZE, -1, np.int16)), "whole numbers"),
    (holds(LABEL, ONES, nibabel.affines.from_matvec(np.eye(3), (1, 0, 0))), "corners up to 1 mm apart"),
    (holds(LABEL, np.ones((6, 7, 5), np.uint8), np.diag([2.0, 2, 2, 1])), "12 x 14 x 10"),
    (holds(LABEL, ONES, np.diag([1, 1, 2.5, 1])), "spacings 1 x 1 x 1 and 1 x 1 x 2.5"),
    (holds(LABEL, np.resize([0, 1, 255], SIZE).astype(np.uint8)), "is none of the classes 0, 1;"),
    (holds(LABEL, np.ones((*SIZE, 2), np.uint8)), "4 dimensions"),
    (empty, "no foreground"),
    (nan, "NaN or infinite"),
    (holds(IMAGE, np.full(SIZE, 7, np.float32)), "constant (7)"),
    (holds(IMAGE, np.ones((*SIZE, 1, 3), np.float32)), "5 dimensions"),
    (holds(IMAGE, RNG.normal(size=(*SIZE, 2)).astype(np.float32)), "2 channels"),
    (holds("images/v3.nii", np.ones(SIZE, np.float32)), "2 images, 1 label of"),
    (header(280 + 12, np.nan), "affine holds NaN"),  # the last number of the affine's first row
    (header(80, 0), "spacing 0,"),
    (header(80, -1), "spacing -1,"),
    (header(296, 0, 0, 0, 0), "must be positive"),
    (lambda raw: nifti(raw / IMAGE, NOISE, xyzt_units=1), "meter"),
    *((voxels(size), "is too far") for size in (1e-20, 1e6)),
    (a_picture, "sizes 12 x 16 and 12 x 14 x 10"),
]
SHOWN, DRAWN = "images/case2.png", "labels/case2.png"
PICTURES = [
    (edited(SHOWN, lambda content: content[: len(content) // 2]), "not a readable picture"),
    (edited(DRAWN, lambda content: content[: len(content) // 2]), "not a readable picture"),
    (edited(DRAWN, lambda content: flipped(content, -13)), "not a readable picture"),
    (drawn(DRAWN, CLASSES[:5, :5]), "5 x 5"),
    (drawn(SHOWN, np.full((12, 16), 9, np.uint8)), "constant (9)"),
    (drawn(DRAWN, CLASSES + 3), "label 3, 4, 5, found in 1"),
    (lambda raw: (raw / DRAWN).rename(raw / "labels" / "case2.jpg"), "JPEG"),
]


def colours(path):
    values = np.zeros(SIZE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.5, 2, 2.5, 1])), path)


def other_sform(path):
    file = nibabel.load(path, mmap=False)
    file.set_sform(np.eye(4), 2)
    nibabel.save(file, path)


def linked(path):
    path.unlink()
    path.symlink_to(path.parent / ".git" / "annex" / "objects" / "v.nii")


def huge(path):
    PIL.Image.new("1", (20_000, 20_000)).save(path)  # has more pixels than Pillow reads


def pages(path):
    first, *others = [PIL.Image.fromarray(CLASSES * 50) for _ in range(3)]
    first.save(path, save_all=True, append_images=others)


def wide_png(path):
    """A PNG of 16 bits in three channels, which Pillow cannot write."""
    raw = b"".join(b"\0" + bytes(6 * 16) for _ in range(12))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 16, 12, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(raw))]
    chunks = [(*part, zlib.crc32(b"".join(part))) for part in [*parts, (b"IEND", b"")]]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", crc) for t, d, crc in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    "name, harm, says",
    [
        ("v.nii", colours, "save red, green and blue as a file each"),
        ("v.nii", other_sform, "1 x 1 x 1 by its sform, but 1.5 x 2 x 2.5 by its pixdim"),
        ("v.nii", lambda path: path.write_bytes(b"/annex/objects/SHA256E-s1--0.nii"), "run git annex get"),
        ("v.nii", lambda path: nifti(path, NOISE[None]), "drop its first axis, which has length 1"),
        ("v.nii", linked, "is a link to a file that is not here; run git annex get"),
        ("v.png", huge, "cut it into tiles"),
        ("v.mha", lambda path: path.touch(), "s.WriteImage(s.ReadImage('v.mha'), 'v.nii.gz')"),
        ("v.dcm", lambda path: path.touch(), "dcm2niix"),
        ("v.tif", pages, "3 pages; save each page as a picture"),
        ("v.png", wide_png, "16 bits per channel, of which Pillow reads 8"),
    ],
)
def test_advice_is_right(tmp_path, name, harm, says):
    path = tmp_path / name
    if name.startswith("v.nii"):
        nibabel.save(nibabel.Nifti1Image(NOISE, np.diag([1.5, 2, 2.5, 1])), path)
    harm(path)
    with pytest.raises(InputError) as caught:
        images.read_label(path, images.Reading())
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "affine, says",
    [
        # The grids share their first voxel and the one that is furthest from it.
        (2 * np.eye(4)[[1, 0, 2, 3]], "corners up to"),
        (np.diag([-1.0, -1, 1, 1]), "b.nii has no geometry of its own: give it that of a.nii"),
        (np.diag([2.0, 2, 3, 1]), "spacings 2 x 2 x 2 and 2 x 2 x 3"),
    ],
)
def test_grids_are_compared(affine, says):
    with pytest.raises(InputError, match=says):
        shapes, affines = [(8, 8, 4)] * 2, [np.diag([2.0, 2, 2, 1]), affine]
        images.check_grid(Path("a.nii"), Path("b.nii"), shapes, affines)


@pytest.mark.parametrize(
    "make, bad, options, harm, says",
    [(volumes, "v3", [], *row) for row in VOLUMES]
    + [(pictures, "case2", ["--classes", "a,b,c"], *row) for row in PICTURES],
)
def test_bad_files_are_named_or_skipped(tmp_path, capsys, make, bad, options, harm, says):
    raw = make(tmp_path / "raw")
    names = {path.name.partition(".")[0] for path in (raw / "images").iterdir()}
    harm(raw)
    line = error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path, *options)
    assert bad in line and says in line and ("; " in line or "/" in line)
    assert not (tmp_path / "f.h5").exists()
    with build("folder:f", raw, tmp_path, "--skip-bad", *options) as file:
        assert set(cases_in(file)) == names - {bad}
    assert sum(map(int, re.findall(r"(\d+) (?:train|val|test)", capsys.readouterr().out))) == 5
    report = (tmp_path / "f-skipped.txt").read_text()
    assert report.count("\n") == 1 and says in report


@pytest.mark.parametrize("name, other", [("v.nii", "v.nii.gz"), ("v.nii.gz", "v.nii")])
def test_an_ending_may_not_say_whether_a_file_is_compressed(tmp_path, name, other):
    """And its label may have a fourth axis, of length 1."""
    label = np.resize(CLASSES, SIZE)
    nifti(tmp_path / name, label[..., None])
    (tmp_path / name).rename(tmp_path / other)
    assert (images.read_label(tmp_path / other, images.Reading())[0] == label).all()


STRAY = [[0, 9, 2]]
COMMON = [[0, 1, 2]]
USUAL = 9 * [[0, 255]] + [[0, 130, 233, 255]]
FEW = 3 * [[0, 255]] + [[0, 130, 255]]
MANY = 3 * COMMON + [range(192)]
LARGE = 19 * COMMON + 2 * STRAY
FREESURFER = "background,class 2,class 3,class 41,class 42"
NAMES = ",".join(f"class{i}" for i in range(192))
TENS = 3 * [range(0, 90, 10)]
HOLDS = "3 names, but the masks hold 4 numbers: 0 in 10, 130 in 1, 233 in 1, 255 in 10; name all"
TWO, THREE = "--classes background,axon", "--classes background,axon,myelin"


@pytest.mark.parametrize(
    "values, options, says",
    [
        (LARGE, "", "case19.png: label 9, found in 2 labels, is none of the classes 0, 1, 2; repair it, or "
                    "name all 4 numbers with --classes, or use --ignore"),
        (FEW, "", "case3.png: label 130, found in 1 label, is none of the classes 0, 255; "),
        (USUAL, TWO, "label 130, 233, found in 1 label, is none of the classes 0, 255; "),
        (USUAL, f"{THREE} --skip-bad", f"{HOLDS}, or leave some out with --ignore"),
        (TENS, TWO, "9 numbers: 0 in 3, 10 in 3, 20 in 3, 30 in 3, 40 in 3, 50 in 3, and 3 more; "),
        (5 * COMMON + [[0, 255]], "--ignore 255", "case5.png: no foreground"),
        (3 * COMMON, "--ignore=0", "0 is background"),
        (3 * COMMON, "--ignore=x", "neither"),
        (3 * COMMON, "--ignore=#12", "neither"),
        (3 * [[0]], "--allow-empty", "all 3 labels are background alone"),
        (3 * [[0]], "--classes background,lesion", "all 3 labels are background alone"),
        # A number for each mask, and edges that were smoothed, as by a JPEG.
        ([[0, 1], [0, 2], [0, 3]], "", "if all mean one thing, use --threshold 0; if not"),
        ([[0, 10 + 3 * i] for i in range(8)], "", "0 in 8, 10 in 1, 13 in 1"),
        (8 * [[0, 1, 2, 3, 252, 253, 254, 255]], "", "one class, use --threshold 127; else save"),
        (8 * [[1, 2, 3, 240, 246, 249]], "", "6 different label values (1 in 8, 2 in 8, 3 in 8, 240 in 8, "),
        (8 * [[0, 245, 246, 248, 250]], "", "if they show one class, use --threshold 125; else save"),
        (3 * [[0, 9]], "--threshold 8 --ignore 9", "--ignore has no meaning beside --class-per-file or"),
        (3 * [[0, 9]], "--threshold 8 --classes a,b,c", "--threshold makes two classes, but"),
        (8 * [[0, 16, 48, 64, 112, 143, 191, 207, 239, 255]], "", "): smooth edges have such; if they show"),
        # Objects that are counted, and a photograph, or edges between black and white that are smooth.
        (MANY, "", "and 186 more): if they count objects, use --threshold 0"),
        (3 * COMMON + [range(64, 256)], "", "and 189 more): smooth edges have such; if they show one"),
    ],
)  # fmt: skip
def test_numbers_in_masks_are_asked_about(tmp_path, capsys, values, options, says):
    raw = masks(tmp_path / "raw", *values)
    assert says in error(capsys, "build", "folder:f", "--raw", raw, *options.split())
    assert not (tmp_path / "data" / "f.h5").exists()


@pytest.mark.parametrize(
    "values, options, classes, found",
    [
        (LARGE, "--skip-bad", "background,class 1,class 2", 19 * COMMON),
        (LARGE, "--classes background,a,b,c", "background,a,b,c", 19 * COMMON + 2 * [[0, 3, 2]]),
        (18 * COMMON + 3 * STRAY, "", "background,class 1,class 2,class 9", 18 * COMMON + 3 * [[0, 3, 2]]),
        (FEW, "--ignore 130", "background,class 255", 3 * [[0, 1]] + [[0, 255, 1]]),
        (3 * [[0, 1, 9, 255]], "--ignore 9,255", "background,class 1", 3 * [[0, 1, 255, 255]]),
        (FEW, "--classes background,a,b", "background,a,b", 3 * [[0, 2]] + [[0, 1, 2]]),
        (USUAL, f"{TWO} --skip-bad", "background,axon", 9 * [[0, 1]]),
        ([[0, 1], [0, 2]], "", "background,class 1,class 2", [[0, 1], [0, 2]]),
        (3 * [[0, 255]], TWO, "background,axon", 3 * [[0, 1]]),
        ([[0, 7], [0, 9], [0, 3]], f"{TWO} --threshold 0", "background,axon", 3 * [[0, 1]]),
        (3 * [[0, 2, 3, 41, 42]], "", FREESURFER, 3 * [range(5)]),  # of the left and the right half
        (3 * [[0, 3]], "--classes background,a,b,c", "background,a,b,c", 3 * [[0, 3]]),
        ([[0, 1], [0, 1], [0]], "--allow-empty", "background,class 1", [[0, 1], [0, 1], [0]]),
        (MANY, f"--classes {NAMES}", NAMES, MANY),
    ],
)
def test_numbers_in_masks_become_classes(tmp_path, values, options, classes, found):
    """Two labels are too few to ask about a number, and in three of twenty-one it is a class. Numbers that
    are classes already stay, though no label has the others."""
    raw = masks(tmp_path / "raw", *values)
    with build("folder:f", raw, tmp_path, *options.split()) as file:
        assert ",".join(json.loads(file.attrs["class_names"])) == classes
        cases = cases_in(file)
        assert len(cases) == len(found)
        for i, numbers in enumerate(found):
            assert (cases[f"case{i}"]["label"][()] == np.resize(numbers, (12, 16))).all()


def test_masks_without_0(tmp_path, capsys):
    """As DRIVE's second observer saved them: GIF files in nearly black and nearly white; here with a third
    colour, which is to be ignored."""
    raw, values = masks(tmp_path / "raw", *[[0]] * 3), np.resize([0, 0, 1, 2], (12, 16)).astype(np.uint8)
    for path in sorted((raw / "labels").iterdir()):
        path.unlink()
        png(path.with_suffix(".gif"), palette(values, [4, 2, 4, 252, 254, 252, 128, 128, 128]))
    line = error(capsys, "build", "folder:f", "--raw", raw, "--ignore", "#808080")
    assert "(#040204 in 3, #fcfefc in 3): no mask holds 0, the background; name the numbers, lowest" in line
    options = line.split("as in ")[1].split()
    with build("folder:f", raw, tmp_path, *options, "--ignore", "#808080") as file:
        assert json.loads(file.attrs["class_names"]) == ["background", "vessel"]
        for case in cases_in(file).values():
            assert (case["label"][()] == np.array([0, 1, 255])[values]).all()
    assert "#040204 is background, #fcfefc is vessel" in capsys.readouterr().err


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


def test_wrong_commands(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=3)
    assert "no such folder" in error(capsys, "build", "amos_ct", "--raw", tmp_path / "nothing")
    for name, marker in (
        ("muscle_us", "trainannot"), ("amos_ct", "dataset.json"), ("prostate_mr", "institution.txt"),
        ("brats_mr", "_seg.nii.gz"), ("hippocampus_mr", "labelsTr"),
    ):  # fmt: skip
        assert marker in error(capsys, "build", name, "--raw", raw)
    for text in (b"[" * 200_000, b'{"training": [{"image": "x"}]}', b"\xff"):
        (tmp_path / "dataset.json").write_bytes(text)
        assert "json: not AMOS's list of pairs" in error(capsys, "build", "amos_ct", "--raw", tmp_path)
    assert "images and labels" in error(capsys, "build", "folder:f", "--raw", raw / "images")
    assert "choose another NAME" in error(capsys, "build", "folder:amos_ct", "--raw", raw)
    assert "choose another NAME" in error(capsys, "build", "folder:../x", "--raw", raw)
    assert "three shares" in error(capsys, "build", "folder:f", "--raw", raw, "--split", "0.5,0.2,0.2")
    assert "regular expression" in error(capsys, "build", "folder:f", "--raw", raw, "--group", "(")
    assert "2 to 255" in error(capsys, "build", "folder:f", "--raw", raw, "--classes", "a,a")
    assert "2 numbers are needed, 3 given" in error(
        capsys, "build", "folder:f", "--raw", raw, "--spacing", "1,1,1"
    )
    assert "no such file" in error(capsys, "show", "folder:nothing", "--data-dir", tmp_path)
    assert "made up in training" in error(capsys, "show", "phantom_us", "--data-dir", tmp_path)
    assert "cannot be written" in error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", "/proc")
    for wrong in (["amos_ct", "--classes", "a,b"], ["nothing"], ["folder:f", "--spacing", "1,-1"]):
        with pytest.raises(SystemExit):
            prepare.main(["build", wrong[0], "--raw", str(raw), *wrong[1:]])


def damaged(rng, kind, content):
    """A file's bytes after a mishap, half the time within its header."""
    if kind == ".nii.gz" and rng.random() < 0.7:
        return gzip.compress(damaged(rng, ".nii", gzip.decompress(content)), 1)
    front = 400 if rng.random() < 0.5 else len(content)
    return mutated(content[:front], rng) + content[front:]


@pytest.mark.parametrize("count", [10, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".png", ".jpg"])
def test_damaged_files_are_named(tmp_path, capsys, kind, count):
    """One file of a sound tree, time and again: the build succeeds, or ends in one line that names it."""
    raw, rng, refused = tmp_path / "raw", np.random.default_rng(count), 0
    if kind.startswith(".nii"):
        volumes(raw, count=3, ending=kind)
    else:
        pictures(raw, count=3, ending=kind[1:])
    files = [*raw.glob("*/*1.*")]
    sound = [path.read_bytes() for path in files]
    for number in range(count):
        which = rng.integers(len(files))
        files[which].write_bytes(damaged(rng, kind, sound[which]))
        try:
            prepare.main(["build", "folder:f", "--raw", str(raw), "--workers", "1"])
        except SystemExit:
            [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert files[which].name in line or str(raw) in line, number
            refused += 1
        files[which].write_bytes(sound[which])
    assert refused > count / 4
