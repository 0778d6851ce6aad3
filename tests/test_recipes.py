"""What the recipes say of their data sets, beside what the data sets' own pages and the paper say."""

import json
from collections import Counter

import nibabel
import numpy as np
import pytest
from made import RNG, build, directions, nifti, png
from nibabel.processing import resample_from_to

import evaluate
from data import SPLITS
from recipes import RECIPES, amos_ct, brats_mr, hippocampus_mr, muscle_us, prostate_mr

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Every plan of a data set that is known beforehand, from a complete tree of empty files (in
    hippocampus_mr of 25 cases)."""
    root = tmp_path_factory.mktemp("trees")
    for folder, first, n in (("train", 0, 2531), ("val", 2531, 666), ("test", 3197, 713)):
        (root / "muscle" / f"{folder}annot").mkdir(parents=True)
        for i in range(first, first + n):
            (root / "muscle" / f"{folder}annot" / f"BB_anon_{i}_1.png").touch()

    def pairs(kind, numbers):
        return [{"image": f"./images{kind}/amos_{i:04d}.nii.gz", "label": f"./l/{i}.nii.gz"} for i in numbers]

    lists = {"training": pairs("Tr", [*range(1, 201), *range(507, 547)])}
    lists["validation"] = pairs("Va", [*range(400, 500), *range(550, 570)])
    (root / "dataset.json").write_text(json.dumps(lists))

    (root / "data").mkdir()
    sizes = {"A": 85, "B": 85, "C": 85, "D": 86, "E": 84, "F": 84, "G": 80}
    lines = [f"{name}{i:03d} {name}" for name, n in sizes.items() for i in range(n)]
    (root / "institution.txt").write_text("\n".join(lines[::-1]))

    for i in range(1251):
        folder = root / "brats" / f"BraTS2021_{(7 * i) % 1251:05d}"
        folder.mkdir(parents=True)
        (folder / f"{folder.name}_seg.nii.gz").touch()
    for kind in ("images", "labels"):
        (root / f"{kind}Tr").mkdir()
        for i in range(25):
            (root / f"{kind}Tr" / f"hippocampus_{i:03d}.nii.gz").touch()
    return {
        "amos_ct": amos_ct.plan(root), "prostate_mr": prostate_mr.plan(root),
        "brats_mr": brats_mr.plan(root / "brats"), "muscle_us": muscle_us.plan(root / "muscle"),
        "hippocampus_mr": hippocampus_mr.plan(root),
    }  # fmt: skip


def test_the_splits_of_the_paper(plans):
    """2531/666/713, 200/10/90, 411/14/164, 938/31/282 (§5.2), which is also what a download is held against;
    of every ten hippocampi, by name, seven train, the next validates, and the last two test."""
    counts = {"muscle_us": (2531, 666, 713), "amos_ct": (200, 10, 90), "prostate_mr": (411, 14, 164),
              "brats_mr": (938, 31, 282)}  # fmt: skip
    for name, expected in counts.items():
        cases, plan = plans[name].cases, plans[name]
        count = Counter(case.split for case in cases)
        assert plan.counts == tuple(count[split] for split in SPLITS) == expected
        assert len({case.uid for case in cases}) == len(cases)
    amos, prostate = (
        [case.uid for case in plans[name].cases if case.split == "validation"]
        for name in ("amos_ct", "prostate_mr")
    )
    assert amos[-1] == "amos_0409" and [uid for uid in prostate if uid[0] == "B"] == ["B084", "B083"]
    brats = plans["brats_mr"].cases
    assert brats[938].uid == "BraTS2021_00938" and brats[-1].split == "test"
    ten = ["train"] * 7 + ["validation"] + ["test"] * 2
    assert [case.split for case in plans["hippocampus_mr"].cases] == (ten * 3)[:25]


def test_labels_have_the_numbers_that_their_publishers_give_them(plans):
    """AMOS's dataset.json; the pelvic set's page; the decathlon's dataset.json; 0/255 in the muscle masks;
    BraTS's 1, 2 and 4, with no 3."""
    assert set(plans) == set(RECIPES)
    names = {name: dict(zip(plan.numbers, plan.class_names, strict=False)) for name, plan in plans.items()}
    ct = {1: "spleen", 2: "right kidney", 3: "left kidney", 6: "liver", 8: "aorta", 10: "pancreas",
          11: "right adrenal gland", 12: "left adrenal gland", 15: "prostate/uterus"}  # fmt: skip
    assert ct.items() <= names["amos_ct"].items() and len(names["amos_ct"]) == 16
    mr = {1: "bladder", 2: "bone", 4: "transition zone", 5: "central gland", 8: "neurovascular bundle"}
    assert mr.items() <= names["prostate_mr"].items() and len(names["prostate_mr"]) == 9
    assert names["hippocampus_mr"] == {0: "background", 1: "anterior", 2: "posterior"}
    assert names["muscle_us"] == {0: "background", 255: "muscle cross-section"}
    assert tuple(plans["brats_mr"].numbers) == (0, 1, 2, 4)
    assert {name: plan.class_names[0] for name, plan in plans.items()} == dict.fromkeys(plans, "background")
    units = {name: plan.unit for name, plan in plans.items()}
    assert units == dict.fromkeys(plans, "mm") | {"muscle_us": "pixel"}
    assert Counter(plan.channels for plan in plans.values()) == {1: 4, 4: 1}


# --- Geometry

SIZE, SPACING = (26, 34, 14), (1.1, 0.8, 3.1)


def orientation(which):
    """A voxel-to-world matrix: axes swapped, turned round, or oblique."""
    how = ("RAS", SPACING, (0.2, -0.15, 0.1)) if which == "oblique" else (which, SPACING)
    return nibabel.affines.from_matvec(directions(*how), (12.0, -31.0, 7.5))


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


@pytest.mark.parametrize(
    "name, which, spacing, shape",
    [
        *(("amos_ct", which, (1.5, 1.5, 5.0), (192, 128, 128)) for which in ("RAS", "LPS", "PIR", "oblique")),
        ("prostate_mr", "oblique", (0.75, 0.75, 2.5), (256, 256, 48)),
        ("hippocampus_mr", "oblique", None, None),
    ],
)
def test_every_voxel_stays_at_its_place_in_the_world(tmp_path, name, which, spacing, shape):
    affine = orientation(which)
    noise = RNG.normal(scale=600, size=SIZE).astype(np.float32)  # beyond [-991, 362]
    inside = np.moveaxis(np.indices(SIZE), 0, -1)
    right = nibabel.affines.apply_affine(affine, inside)[..., 0]
    label = np.where(right > np.median(right), 2, 1).astype(np.uint8)
    tree(name, tmp_path / "raw", noise, label, affine)
    with build(name, tmp_path / "raw", tmp_path, "--skip-bad") as file:  # prostate_mr's others are not there
        ((_, case),) = file["train"].items()
        image, found = case["image"][..., 0], case["label"][()]
        world, measured = case.attrs["affine"], case.attrs["spacing"]

    # Directions are the closest to right, anterior, superior; sizes are as §5.2 says.
    assert nibabel.aff2axcodes(world) == ("R", "A", "S")
    assert np.allclose(nibabel.affines.voxel_sizes(world), measured, rtol=1e-6)
    assert image.shape == found.shape and (shape is None or found.shape == shape)
    expected_spacing = spacing or sorted_by_axis(affine)
    assert np.allclose(measured, expected_spacing, rtol=1e-5)

    # Intensities: nibabel samples the raw file at the world's places; only level and scale may differ. Those
    # of CT are limited to [-991, 362] (§5.2), and those of prostate MR are not.
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


def test_muscle_us(tmp_path, capsys):
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
        assert "NB: the whole data set has 2531, 666, 713." in capsys.readouterr().err
        for folder, split in (("train", "train"), ("val", "validation"), ("test", "test")):
            assert list(file[split]) == [f"BB_anon_{folder}_1", f"TA_anon_{folder}_2"]
            for uid, case in file[split].items():
                image, mask = masks[folder, uid]
                assert (case["label"][()] == mask).all()
                standard = (image - image.mean(dtype=float)) / image.std(dtype=float)
                assert np.allclose(case["image"][..., 0], standard, atol=1e-5)
        assert list(file["train/BB_anon_train_1"].attrs["spacing"]) == [1, 1]


# --- Muscle post-processing (Marzola et al. 2021) -----------------------------------------------


def test_disks_are_matlabs():
    """Published shapes: 5 x 5 ones; 9 x 9 with corners cut by 2; 19 x 19 with corners cut by 4."""
    for radius, cut in ((3, 0), (5, 2), (10, 4)):
        disk = muscle_us.disk(radius)
        n = 2 * radius - 1
        y, x = np.indices((n, n))
        corners = np.minimum(y, n - 1 - y) + np.minimum(x, n - 1 - x) < cut
        assert disk.shape == (n, n) and (disk == ~corners).all()


@pytest.mark.parametrize("share, keeps_upper", [(0.6, False), (0.9, True)])
def test_the_more_superficial_of_two_like_pieces_stays(share, keeps_upper):
    """The upper piece is smaller, and further right: its top edge decides, not its left one."""
    mask = np.zeros((480, 512), bool)
    mask[250:400, 20:220] = mask[40:190, 280 : 280 + int(200 * share)] = True
    clean = muscle_us.clean(mask)
    assert clean[:200].any() == keeps_upper and clean[250:].any() != keeps_upper


def test_only_muscle_is_post_processed():
    steps = np.zeros((3, 480, 512), int)
    for step, height in zip(steps, (2, 90, 120), strict=True):
        step[200 : 200 + height, 100:240] = 1
    assert (evaluate.clean("phantom_us", steps) == steps).all()
    cleaned = evaluate.clean("muscle_us", steps)
    assert [bool(step.any()) for step in cleaned] == [False, True, True]  # the first is a mere line
    assert cleaned[1].sum() < cleaned[2].sum() and set(np.unique(cleaned)) == {0, 1}


def squares(*places):
    """A mask of squares: top, left, size."""
    mask = np.zeros((200, 200), bool)
    for top, left, size in places:
        mask[top : top + size, left : left + size] = True
    return mask


RING = squares((40, 40, 100)) & ~squares((50, 50, 80))
BRIDGE = squares((20, 20, 60), (110, 20, 70))
BRIDGE[80:110, 45:50] = True  # 5 pixels wide


@pytest.mark.parametrize(
    "mask, muscle, background",
    [
        (squares((0, 0, 150)), [(0, 0), (100, 0), (0, 100)], []),  # touching the edge costs nothing
        (RING, [np.s_[45:135, 45:135]], []),  # holes close before anything is eroded
        # An opening with a disk 19 pixels wide; erosion by 5 and dilation by 9 before it widen by 4.
        (squares((80, 80, 22)), [(90, 90)], []),
        (squares((80, 80, 10)), [], [np.s_[:]]),
        (BRIDGE, [(140, 50)], [np.s_[:85]]),  # it breaks, and the smaller piece goes
        (squares((20, 20, 60), (80, 80, 61)), [(30, 30), (100, 100)], []),  # dilation joins corners
        # Erosion by 2 pixels and dilation by 4 on each side let a mask grow by 2.
        (squares((60, 60, 80)), [(58, 100), (141, 100)], [np.s_[:58], np.s_[142:]]),
    ],
)
def test_what_cleaning_keeps(mask, muscle, background):
    clean = muscle_us.clean(mask)
    assert all(clean[place].all() for place in muscle)
    assert not any(clean[place].any() for place in background)
