"""What the recipes say of their data sets, beside what the data sets' own pages and the paper say."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data import SPLITS
from recipes import RECIPES, amos_ct, brats_mr, hippocampus_mr, muscle_us, prostate_mr
from support.images import Volume


def hippocampus(tmp_path, n=25):
    for i in range(n):
        for kind in ("images", "labels"):
            (tmp_path / f"{kind}Tr").mkdir(exist_ok=True)
            (tmp_path / f"{kind}Tr" / f"hippocampus_{i:03d}.nii.gz").touch()
    return hippocampus_mr.plan(tmp_path)


def test_hippocampus_is_split_by_tens(tmp_path):
    """Of every ten cases in the order of their names, seven train, the next validates, the last two test."""
    splits = [case.split for case in hippocampus(tmp_path).cases]
    ten = ["train"] * 7 + ["validation"] + ["test"] * 2
    assert splits == (ten * 3)[:25] and set(SPLITS) == set(splits)


def plans(tmp_path):
    """Every plan of a data set that is known beforehand, from the least that lists a case."""
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [], "validation": []}))
    (tmp_path / "institution.txt").write_text("a A\n")
    for name in ("data", "train", "trainannot"):
        (tmp_path / name).mkdir()
    brats = tmp_path / "BraTS_1"
    brats.mkdir()
    (brats / "BraTS_1_seg.nii.gz").touch()
    return {
        "amos_ct": amos_ct.plan(tmp_path), "prostate_mr": prostate_mr.plan(tmp_path),
        "brats_mr": brats_mr.plan(tmp_path), "muscle_us": muscle_us.plan(tmp_path),
        "hippocampus_mr": hippocampus(tmp_path, 1),
    }  # fmt: skip


def test_labels_have_the_numbers_that_their_publishers_give_them(tmp_path):
    """AMOS's dataset.json; the pelvic set's page; the decathlon's dataset.json; 0/255 in the muscle masks;
    BraTS's 1, 2 and 4, with no 3."""
    found = plans(tmp_path)
    assert set(found) == set(RECIPES)
    names = {name: dict(zip(plan.numbers, plan.class_names, strict=False)) for name, plan in found.items()}
    ct = {1: "spleen", 2: "right kidney", 3: "left kidney", 6: "liver", 8: "aorta", 10: "pancreas",
          11: "right adrenal gland", 12: "left adrenal gland", 15: "prostate/uterus"}  # fmt: skip
    assert ct.items() <= names["amos_ct"].items() and len(names["amos_ct"]) == 16
    mr = {1: "bladder", 2: "bone", 4: "transition zone", 5: "central gland", 8: "neurovascular bundle"}
    assert mr.items() <= names["prostate_mr"].items() and len(names["prostate_mr"]) == 9
    assert names["hippocampus_mr"] == {0: "background", 1: "anterior", 2: "posterior"}
    assert names["muscle_us"] == {0: "background", 255: "muscle cross-section"}
    assert tuple(found["brats_mr"].numbers) == (0, 1, 2, 4)
    assert {name: plan.class_names[0] for name, plan in found.items()} == dict.fromkeys(found, "background")
    units = {name: plan.unit for name, plan in found.items()}
    assert units == dict.fromkeys(found, "mm") | {"muscle_us": "pixel"}
    assert Counter(plan.channels for plan in found.values()) == {1: 4, 4: 1}
    counts = {name: plan.counts for name, plan in found.items() if plan.counts}
    assert counts == {"muscle_us": (2531, 666, 713), "amos_ct": (200, 10, 90), "prostate_mr": (411, 14, 164),
                      "brats_mr": (938, 31, 282)}  # fmt: skip


def test_hounsfield_units_are_clipped_and_magnetic_resonance_is_not():
    """§5.2: only CT is limited, to [-991, 362]; beyond, intensities are as far apart as they were."""
    image = np.random.default_rng(0).normal(0, 100, (30, 20, 10)).astype(np.float32)
    image[0, 0, :4] = -3000, -991, 362, 3000
    volume = Volume(image[..., None], np.zeros(image.shape, np.uint8), np.diag([1.5, 1.5, 5.0, 1]))
    ct = amos_ct.prepare(volume, Path("image")).image[..., 0]
    corner = ct[(192 - 30) // 2, (128 - 20) // 2, (128 - 10) // 2 :][:4]
    assert corner[0] == corner[1] < corner[2] == corner[3]
    clipped = np.clip(image, -991, 362)
    np.testing.assert_allclose(corner, (clipped[0, 0, :4] - clipped.mean()) / clipped.std(), rtol=1e-3)
    mr = prostate_mr.prepare(volume._replace(affine=np.diag([0.75, 0.75, 2.5, 1])), Path("image")).image
    corner = mr[(256 - 30) // 2, (256 - 20) // 2, (48 - 10) // 2 :][:4, 0]
    np.testing.assert_allclose(corner, (image[0, 0, :4] - image.mean()) / image.std(), rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in RECIPES if not isinstance(RECIPES[name].download, str)])
def test_downloads_name_their_licence_and_whom_to_cite(name):
    what = RECIPES[name].download
    assert what.licence and what.citation
    assert all(url.startswith("https://") for url, _ in what.files.values())


# --- Muscle post-processing (Marzola et al. 2021) -----------------------------------------------


def squares(*places):
    """A mask of squares: top, left, size."""
    mask = np.zeros((200, 200), bool)
    for top, left, size in places:
        mask[top : top + size, left : left + size] = True
    return mask


def test_holes_close_whatever_their_size():
    """A ring becomes a whole, before anything is eroded and, of a hole that opening makes, after."""
    ring = squares((40, 40, 100)) & ~squares((50, 50, 80))
    clean = muscle_us.clean(ring)
    assert clean[45:135, 45:135].all()


@pytest.mark.parametrize("size, stays", [(22, True), (10, False)])
def test_what_is_narrower_than_the_opening_goes(size, stays):
    """An opening with a disk 19 pixels wide; erosion by 5 and dilation by 9 before it widen by 4."""
    assert muscle_us.clean(squares((80, 80, size))).any() == stays


def test_a_bridge_between_two_pieces_breaks_and_diagonal_neighbours_are_one():
    two = squares((20, 20, 60), (110, 20, 70))
    two[80:110, 45:50] = True  # a bridge 5 pixels wide
    assert not muscle_us.clean(two)[:85].any()
    one = squares((20, 20, 60), (80, 80, 61))  # they touch at a corner, as dilation joins them
    assert muscle_us.clean(one)[30, 30] and muscle_us.clean(one)[100, 100]


def test_masks_keep_their_size():
    """Erosion by 2 pixels and dilation by 4 on each side let a mask grow by 2."""
    clean = muscle_us.clean(squares((60, 60, 80)))
    rows = np.flatnonzero(clean.any(1))
    assert (rows.min(), rows.max()) == (58, 141)


@pytest.mark.parametrize("seed", range(6))
def test_cleaning_a_box_is_cleaning_the_whole(seed):
    """Blobs anywhere, some at the image's edges."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(200, 240)), 12)
    mask = noise > np.quantile(noise, [0.7, 0.97][seed % 2])
    mask[:, 230:] &= seed > 2
    np.testing.assert_array_equal(muscle_us.clean(mask), muscle_us.clean_box(mask))
