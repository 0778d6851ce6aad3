"""Scores against brute force, patch grids against the paper, and prediction."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

import data
import diffusion as d
import evaluate as e
import predict as p
import prepare
import recipes
import train
import unet
from recipes import brats_mr
from support import images
from support.files import InputError, write_signed
from support.machine import provenance
from support.model_file import FORMAT_VERSION, read_facts
from support.pictures import cases_over_steps, png
from support.scores import per_case, table, write_scores


HERE = Path(__file__).parent.parent


def brute_force_hausdorff_95(a, b, spacing):
    """All pairs of surface voxels, a surface voxel having a neighbour along an axis that is not in the
    mask or not in the image."""

    def surface(mask):
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(mask.ndim):
            for shift in (-1, 1):
                inner &= np.roll(padded, shift, axis)[(slice(1, -1),) * mask.ndim]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    pairs = cdist(surface(a), surface(b))
    return max(np.percentile(pairs.min(1), 95), np.percentile(pairs.min(0), 95))


@given(st.integers(0, 10_000), st.sampled_from([(7, 9), (5, 6, 4)]), st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_hausdorff_is_brute_force(seed, shape, density):
    rng = np.random.default_rng(seed)
    a, b = rng.random(shape) < density, rng.random(shape) < 0.5
    a.flat[rng.integers(a.size)] = b.flat[rng.integers(b.size)] = True
    spacing = tuple(rng.uniform(0.5, 5, len(shape)).tolist())
    ours = e.hausdorff_95(a, b, spacing)
    assert ours == pytest.approx(brute_force_hausdorff_95(a, b, spacing))
    assert ours == pytest.approx(e.hausdorff_95(b, a, spacing))


def test_scores_of_known_masks():
    a = np.zeros((20, 20), bool)
    a[5:10, 5:10] = True
    b = np.roll(a, 3, axis=1)
    assert e.dice(a, a) == 1 and e.hausdorff_95(a, a, (1.0, 1.0)) == 0
    assert e.dice(a, b) == pytest.approx(2 * 10 / 50)
    assert e.hausdorff_95(a, b, (1.0, 2.5)) == pytest.approx(7.5)


def test_the_policy_for_empty_masks():
    some, none = np.ones((3, 4), bool), np.zeros((3, 4), bool)
    assert e.dice(some, none) == 0 and e.dice(none, some) == 0 and np.isnan(e.dice(none, none))
    assert e.hausdorff_95(some, none, (1.0, 2.0)) == pytest.approx(np.hypot(3, 8))
    assert e.hausdorff_95(none, some, (1.0, 2.0)) == pytest.approx(np.hypot(3, 8))
    assert np.isnan(e.hausdorff_95(none, none, (1.0, 2.0)))
    assert per_case(np.array([[0.5, np.nan], [np.nan, np.nan]])).tolist()[0] == 0.5
    assert np.isnan(per_case(np.array([[np.nan, np.nan]]))[0])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_dice_is_that_of_sets(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((4, 5)) < 0.4, rng.random((4, 5)) < 0.4
    one, two = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    if one or two:
        assert e.dice(a, b) == pytest.approx(2 * len(one & two) / (len(one) + len(two)))


@pytest.mark.parametrize(
    "shape, patch, overlap",
    [
        ((192, 128, 128), (128, 128, 128), (64, None, None)),
        ((256, 256, 48), (256, 256, 32), (None, None, 16)),
        ((179, 219, 155), (128, 128, 128), (77, 37, 101)),
        ((480, 512), (480, 512), (None, None)),
    ],
)
def test_the_papers_overlaps(shape, patch, overlap):
    """Section 5.2; None where one patch covers the axis, which the paper prints as 0."""
    starts = e.patch_starts(shape, patch)
    for axis, (size, n, expected) in enumerate(zip(shape, patch, overlap, strict=True)):
        places = sorted({start[axis] for start in starts})
        assert places == ([0] if expected is None else [0, n - expected])
        assert places[-1] + n == size


@given(st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_patches_cover(size, patch):
    if size >= patch:
        starts = [s for (s,) in e.patch_starts((size,), (patch,))]
        covered = np.zeros(size, bool)
        for start in starts:
            assert start >= 0 and start + patch <= size
            covered[start : start + patch] = True
        assert covered.all() and len(starts) == -(-size // patch)


def cases(shapes):
    rng = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        image = rng.normal(size=(*shape, 1)).astype(np.float32)
        yield data.Sample(image, np.zeros(shape, np.uint8), (1.0, 1.0), f"case{i}", np.eye(4))


MODEL = unet.UNet(
    image_channels=1, classes=2, patch_shape=(8, 8), channels=(4,), strides=(), transformer=False,
    key=jax.random.key(0),
)  # fmt: skip
FIVE = d.respace(d.linear_schedule(), 5)


def predict(shapes, batch_size, sampler="ddpm", model=MODEL, prediction="x_0"):
    return list(
        e.predict_cases(
            model, FIVE, cases(shapes), jax.random.key(0),
            patch_shape=(8, 8), batch_size=batch_size, sampler=sampler, prediction=prediction,
        )
    )  # fmt: skip


def test_prediction_of_every_size_does_not_depend_on_the_batch():
    shapes = [(8, 8), (13, 8), (5, 20), (3, 3), (9, 9)]
    three, seven = predict(shapes, 3), predict(shapes, 7)
    for shape, (case, a), (_, b) in zip(shapes, three, seven, strict=True):
        assert case.label.shape == shape and a.shape == (5, *shape, 2)
        np.testing.assert_allclose(a.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [case.uid for case, _ in three] == [f"case{i}" for i in range(5)]


def test_a_predicted_noise_gives_probabilities():
    """Their sum is 1, although masks from eps are clipped class by class; at worst all of them to -1."""
    for _, probability in predict([(8, 8), (13, 8)], 2, prediction="eps"):
        assert probability.min() >= 0
        np.testing.assert_allclose(probability.sum(-1), 1, atol=1e-5)
    found = e.normalised(jnp.array([[0.0, 0, 0, 0], [1, 1, 0, 0], [0.2, 0.1, 0, 0.1]]))
    np.testing.assert_allclose(found, [[0.25] * 4, [0.5, 0.5, 0, 0], [0.5, 0.25, 0, 0.25]], atol=1e-6)


def test_overlapping_patches_are_averaged(monkeypatch):
    """A network that answers with the patch's own first intensity, which differs between patches."""

    def fake(network, schedule, image, keys):
        first = jnp.broadcast_to(image[:, :1, :1], image.shape)
        return jnp.concatenate([first, 1 - first], -1)[None]

    monkeypatch.setattr(e, "prediction_program", lambda *_: fake)
    [(case, probability)] = predict([(8, 12)], 4)
    first, second = case.image[0, 0, 0], case.image[0, 4, 0]
    np.testing.assert_allclose(probability[0, :, :4, 0], first, rtol=1e-5)
    np.testing.assert_allclose(probability[0, :, 4:8, 0], (first + second) / 2, rtol=1e-5)
    np.testing.assert_allclose(probability[0, :, 8:, 0], second, rtol=1e-5)


class Given(NamedTuple):
    """A network's stand-in for `prediction_program`."""

    images: list
    keys: list

    def __call__(self, network, schedule, image, keys):
        self.images.append(np.array(image))
        self.keys.append(np.array(jax.random.key_data(keys)))
        return jnp.full((1, *image.shape[:-1], 2), 0.5)


def test_every_patch_has_noise_of_its_own_that_does_not_depend_on_the_batch(monkeypatch):
    """Of 2 cases with 3 patches each; a case of the same number has the same, wherever counting starts."""
    found = []
    for batch_size, first, shapes in ((6, 0, [(8, 24)] * 2), (4, 0, [(8, 24)] * 2), (3, 1, [(8, 24)])):
        given = Given([], [])
        monkeypatch.setattr(e, "prediction_program", lambda *_, given=given: given)
        arguments = {"patch_shape": (8, 8), "batch_size": batch_size, "sampler": "ddpm", "prediction": "x_0"}
        list(e.predict_cases(MODEL, FIVE, cases(shapes), jax.random.key(0), first=first, **arguments))
        found.append(np.concatenate(given.keys)[: 3 * len(shapes)])
    assert len(np.unique(found[0], axis=0)) == 6
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0][3:], found[2])


def test_an_image_smaller_than_the_patch_lies_in_its_middle_amid_its_lowest_intensity(monkeypatch):
    given = Given([], [])
    monkeypatch.setattr(e, "prediction_program", lambda *_: given)
    [(case, probability)] = predict([(4, 6)], 1)
    [[patch]] = given.images
    np.testing.assert_array_equal(patch[2:6, 1:7], case.image)
    patch[2:6, 1:7] = case.image.min()
    assert (patch == case.image.min()).all() and probability.shape == (1, 4, 6, 2)
    monkeypatch.setattr(
        e, "prediction_program", lambda *_: lambda network, schedule, image, keys: jnp.asarray(image)[None]
    )
    [(case, probability)] = predict([(4, 6)], 1)
    np.testing.assert_array_equal(probability[0], case.image)  # and comes back from there


def test_a_self_conditioned_network_is_given_its_last_prediction():
    """Otherwise every step would be as if there had been none."""
    settings = {"channels": (4,), "strides": (), "transformer": False, "key": jax.random.key(0)}
    model = unet.UNet(image_channels=1, classes=2, patch_shape=(8, 8), self_condition=True, **settings)
    [(case, found)] = predict([(8, 8)], 1, model=model)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    x_t, x_0_hat, wrong = jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 2)), jnp.zeros((8, 8, 2)), []
    for step, (k, t) in enumerate(zip(range(5, 0, -1), (1001, 751, 501, 251, 1), strict=True)):
        probability = jax.nn.softmax(model(jnp.asarray(case.image), jnp.array(t), x_t, x_0_hat))
        np.testing.assert_allclose(found[step], probability, atol=2e-3)
        wrong.append(jax.nn.softmax(model(jnp.asarray(case.image), jnp.array(t), x_t)) - probability)
        x_0_hat = 2 * probability - 1
        eps = jax.random.normal(jax.random.fold_in(key, k), x_t.shape)
        x_t = d.ddpm_step(FIVE, x_0_hat[None], x_t[None], jnp.array([k]), eps[None])[0]
    assert np.abs(wrong[0]).max() == 0 and all(np.abs(w).max() > 1e-2 for w in wrong[1:])


def test_ddim_and_ddpm_differ_after_the_first_step_and_no_diff_has_one():
    [(_, ddpm)], [(_, ddim)] = predict([(8, 8)], 1), predict([(8, 8)], 1, "ddim")
    np.testing.assert_allclose(ddpm[0], ddim[0], atol=1e-6)
    assert np.abs(ddpm[4] - ddim[4]).max() > 1e-3
    plain = unet.UNet(
        image_channels=1, classes=2, patch_shape=(8, 8), channels=(4,), strides=(), transformer=False,
        noisy_mask=False, key=jax.random.key(0),
    )  # fmt: skip
    [(_, one)] = predict([(8, 8)], 1, model=plain)
    assert one.shape == (1, 8, 8, 2)


def test_scores_are_written_with_what_was_run(tmp_path):
    probability = np.zeros((2, 6, 6, 3), np.float32)
    probability[..., 1] = 1
    label = np.ones((6, 6), np.uint8)
    label[:3] = 2
    case = data.Sample(np.zeros((6, 6, 1), np.float32), label, (1.0, 1.0), "u", np.eye(4))
    scores = [e.score(probability.argmax(-1), case, 3)]
    facts = {
        "split": "test",
        "checkpoint": "best",
        "sampler": "ddpm",
        "sampling_steps": 2,
        "seed": 0,
        **provenance(),
    }
    write_scores(tmp_path, scores, ["background", "a", "b"], facts)
    lines = (tmp_path / "test-best-ddpm-2-seed0.csv").read_text().splitlines()
    assert lines[0] == "uid,step,class,dice,hausdorff_95,outcome" and len(lines) == 5
    assert lines[1].startswith("u,1,a,0.666667,") and lines[1].endswith(",found")
    assert lines[2] == "u,1,b,0.000000,8.4853,missed"
    summary = json.loads((tmp_path / "test-best-ddpm-2-seed0.json").read_text())
    assert summary["dice_mean"] == pytest.approx([1 / 3, 1 / 3])
    assert summary["missed"] == [1, 1] and summary["invented"] == [0, 0]
    far, near = summary["hausdorff_95_mean"][1], summary["hausdorff_95_of_found_mean"][1]
    assert near == pytest.approx(scores[0].hausdorff[1, 0]) and far == pytest.approx((near + 72**0.5) / 2)
    assert {"commit", "devices", "jax", "date"} <= set(summary)
    shown = table([("x", scores)], "mm")
    assert "33.33" in shown and "1 of 2" in shown and f"{near:.2f}" in shown and "0 of 0" in shown
    fine = e.score(label[None], case, 3)
    alone = table([("x", [fine])], "mm")
    assert "missed" not in alone and "100.00 ±     -" in alone and "nan" not in alone


def test_the_truth_says_which_classes_count():
    """For every prediction of a case alike: one that invents a class is compared over the same classes as
    one that does not, and what it invents is told."""
    label = np.zeros((8, 8), int)
    label[2:5, 2:5] = 1
    invents = label.copy()
    invents[6:, 6:] = 2
    case = data.Sample(np.zeros((8, 8, 1), np.float32), label, (1.0, 1.0), "u", np.eye(4))
    one, other, empty = (e.score(p[None], case, 3) for p in (label, invents, np.zeros_like(label)))
    assert one.outcome.tolist() == [["found", "absent"]] and other.outcome.tolist() == [["found", "invented"]]
    assert empty.outcome.tolist() == [["missed", "absent"]]
    for kind in ("dice", "hausdorff"):
        np.testing.assert_array_equal(getattr(one, kind), getattr(other, kind))
        assert (np.isfinite(getattr(one, kind)) == np.isfinite(getattr(empty, kind))).all()
    assert per_case(other.dice)[0] == 1 and per_case(other.hausdorff)[0] == 0
    assert empty.dice[0, 0] == 0 and empty.hausdorff[0, 0] == pytest.approx(128**0.5)


def test_validation_scores_what_testing_scores(tmp_path, save_run, monkeypatch):
    """Post-processed, where the data set is (§5.2.1), so that `best` is chosen by what is tested."""
    small = {"patch_shape": (16, 16), "phantom_shape": (16, 16), "sampling_steps": 2, "validation_cases": 3}
    save_run(tmp_path / "run", "phantom_us", tmp_path, "diff", **small)
    model = e.load(tmp_path / "run")
    dataset, mesh = model.dataset(), train.make_mesh("")
    plain, _ = train.validate(model, dataset, mesh)

    def half(predictions):
        return predictions * (np.arange(16) < 8)

    recipe = recipes.RECIPES["muscle_us"]._replace(post_process=half)
    monkeypatch.setitem(recipes.RECIPES, "phantom_us", recipe)
    ours, _ = train.validate(model, dataset, mesh)
    tested = e.score_split(model, dataset, "validation", sampler="ddpm", K=2, seed=0)
    for before, one, other in zip(plain, ours, tested, strict=False):
        np.testing.assert_array_equal(one.dice, other.dice)
        assert (before.dice != one.dice).any()
    assert len(ours) == 3


def test_the_last_distance_alone():
    rng = np.random.default_rng(0)
    predictions = rng.integers(0, 3, (4, 6, 6))
    case = data.Sample(np.zeros((6, 6, 1), np.float32), predictions[0], (1.0, 1.0), "u", np.eye(4))
    every, last = e.score(predictions, case, 3), e.score(predictions, case, 3, last_distance=True)
    assert (every.dice == last.dice).all() and np.isnan(last.hausdorff[:-1]).all()
    assert (every.hausdorff[-1] == last.hausdorff[-1]).all() and every.hausdorff[0, 0] == 0


def test_picture_is_a_png_of_volumes_too():
    case = data.Sample(
        np.zeros((6, 5, 4, 1), np.float32), np.ones((6, 5, 4), np.uint8), (1.0, 1.0, 1.0), "u", np.eye(4)
    )
    shown = [(case.image[..., 0], case.label, np.zeros((5, 6, 5, 4), np.uint8), np.zeros(5))]
    assert png(cases_over_steps(shown, "title")).startswith(b"\x89PNG")


# --- predict.py ------------------------------------------------------------------------


def ball(shape, affine, radius=11.0):
    """A ball about a fixed place in the world, in mm, as the voxels of a grid."""
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    world = nibabel.affines.apply_affine(affine, voxels)
    return np.linalg.norm(world - np.array([5.0, -3.0, 20.0]), axis=-1) < radius


def grid(codes, spacing, turn=(0.0, 0.0, 0.0)):
    """Shape and affine of a grid about that place: axes along `codes`, then turned by angles."""
    shape = np.rint(np.array([44.0, 40.0, 36.0]) / spacing).astype(int)
    ornt = nibabel.orientations.axcodes2ornt(codes)
    axes = np.zeros((3, 3))
    axes[ornt[:, 0].astype(int), range(3)] = ornt[:, 1]
    affine = np.eye(4)
    affine[:3, :3] = nibabel.eulerangles.euler2mat(*turn) @ axes * spacing
    affine[:3, 3] = np.array([5.0, -3.0, 20.0]) - affine[:3, :3] @ ((shape - 1) / 2)
    return tuple(int(n) for n in shape), affine


def volume(path, shape, affine, channels=1):
    """A NIfTI file whose ball is bright, in noise."""
    rng = np.random.default_rng(0)
    image = 100.0 * ball(shape, affine) + rng.normal(scale=5, size=shape)
    image = image if channels == 1 else np.stack([image] * channels, -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nibabel.Nifti1Image(image.astype(np.float32), affine)
    file.set_qform(affine, 2)
    file.set_sform(affine, 1)
    file.header.set_xyzt_units("mm")
    nibabel.save(file, path)
    return path


@pytest.fixture(scope="module")
def volumes(tmp_path_factory, save_run):
    """A run on a folder of volumes, resampled to 2 mm."""
    root = tmp_path_factory.mktemp("volumes")
    shape, affine = grid("LPI", (1.5, 1.5, 2.5))
    for i in range(3):
        path = volume(root / "raw" / "images" / f"{i}.nii.gz", shape, affine)
        label = nibabel.Nifti1Image(ball(shape, affine).astype(np.uint8), affine)
        (root / "raw" / "labels").mkdir(exist_ok=True)
        nibabel.save(label, root / "raw" / "labels" / path.name)
    (root / "split").write_text("0 train\n1 validation\n2 test\n")
    words = ["build", "folder:balls", "--raw", str(root / "raw"), "--data-dir", str(root), "--workers", "1"]
    prepare.main([*words, "--split", str(root / "split"), "--spacing", "2,2,2"])
    return save_run(root / "run", "folder:balls", root, patch_shape=(16, 16, 16))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, save_run):
    """A diffusion run on a folder of pictures, as they are."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(3):
        for folder, values in (("images", rng.integers(0, 256, (20, 28))), ("labels", np.eye(20, 28) * 255)):
            (root / "raw" / folder).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(values.astype(np.uint8)).save(root / "raw" / folder / f"{i}.png")
    (root / "split").write_text("0 train\n1 validation\n2 test\n")
    words = ["build", "folder:dots", "--raw", str(root / "raw"), "--data-dir", str(root), "--workers", "1"]
    prepare.main([*words, "--split", str(root / "split")])
    return save_run(root / "run", "folder:dots", root, "diff", patch_shape=(8, 8))


def bright(network, schedule, image, keys):
    """A program that finds what is bright, with a smooth probability."""
    p = jax.nn.sigmoid(4 * (image - 0.5))
    return jnp.concatenate([1 - p, p], -1)[None]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("spacing, turn", [((2.0, 2.0, 2.0), (0, 0, 0)), ((1.3, 2.6, 3.0), (0.3, -0.2, 0.4))])
def test_the_mask_lies_on_the_image_in_the_world(volumes, tmp_path, monkeypatch, codes, spacing, turn):
    """Flipped, swapped and turned axes: what the mask's own affine says of it is where the ball is."""
    monkeypatch.setattr(e, "prediction_program", lambda *_: bright)
    image = volume(tmp_path / "case.nii", *grid(codes, spacing, turn))
    p.main([str(volumes), str(image), "-o", str(tmp_path / "out")])
    mask, given = nibabel.load(tmp_path / "out" / "case-mask.nii"), nibabel.load(image)
    assert mask.shape == given.shape and mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, given.affine)
    assert mask.header["qform_code"] == 2 and mask.header["sform_code"] == 1
    found = np.asarray(mask.dataobj) == 1
    assert e.dice(found, ball(mask.shape, mask.affine)) > (0.999 if turn == (0, 0, 0) else 0.93)


def test_a_slice_saved_as_a_volume(tmp_path, monkeypatch, save_run):
    """2D in mm: one slice, in whichever axis, resampled, flipped, and back."""
    monkeypatch.setattr(e, "prediction_program", lambda *_: bright)
    _, affine = grid("LSP", (1.5, 2.0, 1.0))
    shape, affine = (29, 1, 40), affine @ nibabel.affines.from_matvec(np.eye(3), (0, 9, 0))
    for i in range(3):
        volume(tmp_path / "raw" / "images" / f"{i}.nii.gz", shape, affine)
        label = nibabel.Nifti1Image(ball(shape, affine).astype(np.uint8), affine)
        (tmp_path / "raw" / "labels").mkdir(exist_ok=True)
        nibabel.save(label, tmp_path / "raw" / "labels" / f"{i}.nii.gz")
    (tmp_path / "split").write_text("0 train\n1 validation\n2 test\n")
    words = ["build", "folder:thin", "--raw", str(tmp_path / "raw"), "--data-dir", str(tmp_path)]
    prepare.main([*words, "--workers", "1", "--split", str(tmp_path / "split"), "--spacing", "1,1"])
    run = save_run(tmp_path / "run", "folder:thin", tmp_path, patch_shape=(16, 16))
    p.main([str(run), str(tmp_path / "raw" / "images" / "2.nii.gz")])
    mask = nibabel.load(run / "predictions" / "2-mask.nii.gz")
    assert mask.shape == shape and e.dice(np.asarray(mask.dataobj) == 1, ball(shape, affine)) > 0.95


def test_a_gif_is_predicted_like_the_same_png(pictures, tmp_path):
    image = pictures.parent / "raw" / "images" / "2.png"
    PIL.Image.open(image).save(tmp_path / "2.gif")
    p.main([str(pictures), str(image), "-o", str(tmp_path / "png")])
    p.main([str(pictures), str(tmp_path / "2.gif"), "-o", str(tmp_path / "gif")])
    masks = [(tmp_path / kind / "2-mask.png").read_bytes() for kind in ("png", "gif")]
    assert masks[0] == masks[1]


def test_images_are_prepared_as_in_training(volumes, pictures):
    """Bit for bit: volumes, which are turned and resampled, and pictures."""
    for folder, ending in ((volumes, "nii.gz"), (pictures, "png")):
        model = e.load(folder)
        target = p.read_target([folder.parent / "raw" / "images" / f"2.{ending}"], model)
        case = model.dataset().load("test", 0)
        np.testing.assert_array_equal(target.case.image, case.image)
        np.testing.assert_array_equal(target.case.affine, case.affine)


def test_beyond_the_prepared_grid_there_is_background(pictures):
    """A centre crop that is narrower than the picture along one axis and wider along the other."""
    target = p.read_target([pictures.parent / "raw" / "images" / "2.png"], e.load(pictures))
    whole = images.Volume(target.case.image, target.case.label, target.case.affine)
    cut = images.crop(whole, (10, 40))
    target = target._replace(case=target.case._replace(label=cut.label, affine=cut.affine))
    probability = np.zeros((10, 40, 2), np.float32)
    probability[..., 1] = 1
    expected = np.zeros((20, 28, 1), np.uint8)
    expected[5:15] = 1
    np.testing.assert_array_equal(p.classify(probability, target), expected)


def test_what_predict_writes_for_a_picture(pictures, tmp_path):
    """One seed's mask is the argmax of its probabilities; over seeds, mean and variance are numpy's."""
    image = str(pictures.parent / "raw" / "images" / "2.png")
    for seed in range(2):
        words = ["--seed", str(seed), "--probabilities", "-o", str(tmp_path / str(seed))]
        p.main([str(pictures), image, *words])
    words = ["--seeds", "2", "--probabilities", "--all-steps", "-o", str(tmp_path / "both")]
    p.main([str(pictures), image, *words])

    def pages(path):
        with PIL.Image.open(path) as file:
            return np.stack([np.array(file) for _ in range(file.n_frames) if not file.seek(_)], -1)

    one, two, both = (pages(tmp_path / f / "2-probabilities.tif") for f in ("0", "1", "both"))
    assert one.shape == (20, 28, 2) and np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(both, (one + two) / 2, atol=1e-6)
    mask = PIL.Image.open(tmp_path / "both" / "2-mask.png")
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.array(mask), both.argmax(-1))
    np.testing.assert_array_equal(np.array(mask), np.array(PIL.Image.open(tmp_path / "both" / "2-step5.png")))
    variance = pages(tmp_path / "both" / "2-variance.tif")
    np.testing.assert_allclose(variance[..., 0], np.stack([one, two])[..., 1].var(0), atol=1e-6)
    facts = json.loads((tmp_path / "both" / "2.json").read_text())
    assert facts["classes"] == {"0": "background", "1": "class 255"} and facts["seeds"] == 2
    assert sorted(facts["files"].values()) == sorted(
        p.name for p in (tmp_path / "both").iterdir() if p.name not in ("2.json", "2-overlay.png")
    )


def test_a_folder_of_images_gives_the_masks_of_each_alone(pictures, tmp_path):
    folder = pictures.parent / "raw" / "images"
    p.main([str(pictures), str(folder), "-o", str(tmp_path / "all")])
    p.main([str(pictures), str(folder / "1.png"), "-o", str(tmp_path / "one")])
    assert len(list((tmp_path / "all").glob("*-mask.png"))) == 3
    assert (tmp_path / "all" / "1-mask.png").read_bytes() == (tmp_path / "one" / "1-mask.png").read_bytes()


def alone(run, folder):
    """The model file of a run, and nothing else, in a folder of its own."""
    folder.mkdir()
    return shutil.copy(run / "best", folder / "somebodys model")


def files_of(folder):
    """What predict.py wrote that says nothing of the model's path or the time."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".tif", ".nii")
    }


@pytest.mark.parametrize("which, ending", [("pictures", "png"), ("volumes", "nii")])
def test_a_model_file_alone_predicts_the_same_bytes(request, tmp_path, monkeypatch, which, ending):
    """Without the data set, the run, and the folder in which it was trained; from Python as well."""
    run = request.getfixturevalue(which)
    if which == "pictures":
        image = shutil.copy(run.parent / "raw" / "images" / "2.png", tmp_path / "2.png")
        values, spacing = np.array(PIL.Image.open(image)), ()
    else:
        image = volume(tmp_path / "2.nii", *grid("RAS", (1.5, 1.5, 2.5)))
        values, spacing = np.asarray(nibabel.load(image).dataobj), (1.5, 1.5, 2.5)
    words = [str(image), "--probabilities", "--all-steps", "-o"]
    p.main([str(run), *words, str(tmp_path / "with")])
    model = alone(run, tmp_path / "alone")
    monkeypatch.chdir(tmp_path / "alone")
    monkeypatch.setattr(e, "open_dataset", None)  # nobody may ask for it
    p.main([str(model), *words, str(tmp_path / "without")])
    names = files_of(tmp_path / "with").keys()
    assert f"2-mask.{ending}" in names and names == files_of(tmp_path / "without").keys()
    for name in names:  # the overlay, too: its title says what the facts say
        assert files_of(tmp_path / "with")[name] == files_of(tmp_path / "without")[name]

    steps = e.load(model)(values, spacing, all_steps=True)
    if which == "pictures":
        with PIL.Image.open(tmp_path / "without" / "2-probabilities.tif") as file:
            written = np.stack([np.array(file) for n in range(file.n_frames) if file.seek(n) is None], -1)
    else:
        written = np.asarray(nibabel.load(tmp_path / "without" / "2-probabilities.nii").dataobj)
    # A NIfTI file's origin is far from 0, which costs a last digit on the way to its own grid and back.
    np.testing.assert_allclose(steps[-1], written, atol=0 if which == "pictures" else 2e-7)
    np.testing.assert_array_equal(e.load(model)(values, spacing), steps[-1])
    assert steps.shape == (len(steps), *values.shape, 2) and np.allclose(steps.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "shape, spacing, says",
    [((20, 28, 3), (), "1 channels"), ((20,), (), "2 axes"), ((20, 28), (1.0,), "2 positive numbers"),
     ((20, 28), (1.0, 0.0), "2 positive numbers"), ((2, 20, 28, 1), (), "2 axes")],
)  # fmt: skip
def test_an_array_that_does_not_suit_is_refused(pictures, shape, spacing, says):
    with pytest.raises(InputError, match=says):
        e.load(pictures)(np.zeros(shape), spacing)
    with pytest.raises(InputError, match="no NaN"):
        e.load(pictures)(np.full((20, 28), np.nan))


@pytest.mark.parametrize(
    "image, words, says",
    [("image.png", {}, "real numbers"), (np.zeros((20, 28), complex), {}, "real numbers"),
     ([[1], [1, 2]], {}, "real numbers"), (np.zeros((0, 28)), {}, "2 axes"),
     (np.zeros((20, 28)), {"spacing": 1.0}, "real numbers"), (np.zeros((20, 28)), {"spacing": "ab"}, "real"),
     (np.zeros((20, 28)), {"sampler": "foo"}, "not one of ddpm, ddim"),
     (np.zeros((20, 28)), {"sampler": "none"}, "not one of ddpm, ddim"),
     (np.zeros((20, 28)), {"K": 5000}, "5000 sampling steps")],
)  # fmt: skip
def test_whatever_python_may_give_is_refused_in_one_line(pictures, image, words, says):
    with pytest.raises(InputError, match=says) as error:
        e.load(pictures)(image, **words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, says",
    [({"dataset": "liver_ct"}, "needs recipes/liver_ct.py"), ({"spacing": []}, "do not agree"),
     ({"spacing": [1.0] * 3}, "do not agree"), ({"patch_shape": [16, 16]}, "do not agree"),
     ({"class_names": ["background"]}, "do not agree"), ({"config": {}}, "do not agree"),
     ({"train_timesteps": 5000}, "does not know"),
     ({"schedule": "flat"}, "does not know"), ({"unit": "inch"}, "not a model file"),
     ({"network": "Nothing"}, "Nothing"), ({"sampler": "euler"}, "does not know")],
)  # fmt: skip
def test_facts_that_do_not_agree_are_refused(pictures, tmp_path, changes, says):
    """By whoever reads the file; signed as they are, so that nothing is damaged."""
    facts, arrays = read_facts(pictures / "best")
    path = tmp_path / "model"
    write_signed(path, {"model": FORMAT_VERSION, **dataclasses.asdict(facts), **changes}, arrays)
    with pytest.raises(InputError, match=says) as error:
        e.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_slice_given_to_a_model_of_volumes(volumes, tmp_path):
    with pytest.raises(InputError, match="2D, the others are 3D"):
        e.load(volumes)(np.random.default_rng(0).random((20, 30, 1)), (1, 1, 1))


def test_a_volume_needs_its_spacing(volumes):
    with pytest.raises(InputError, match="3 positive numbers are needed, in mm"):
        e.load(volumes)(np.zeros((20, 20, 20)))


def test_predict_has_a_program_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        e.main(["predict", "-o", "out", "run", "image.png"])
    assert stop.value.code == 2 and "python predict.py" in capsys.readouterr().err


def test_channels_in_several_files(tmp_path):
    """As brain scans come: in their own order, joined by commas or found in a folder of cases."""
    shape, affine = grid("RAS", (2.0, 2.0, 2.0))
    case = tmp_path / "raw" / "BraTS_1"
    files = [volume(case / f"BraTS_1_{kind}.nii.gz", shape, affine) for kind in brats_mr.CHANNELS]
    assert p.find_images([str(tmp_path / "raw")], "brats_mr") == [tuple(files)]
    assert p.find_images([",".join(map(str, files))], "brats_mr") == [tuple(files)]


def broken(case, volumes, pictures, tmp_path, save_run):
    """A command that cannot work, and what its one line must say."""
    shape, affine = grid("RAS", (2.0, 2.0, 2.0))
    good = str(pictures.parent / "raw" / "images" / "2.png")
    run, image, out = str(pictures), good, str(tmp_path / "out")
    if case == "no checkpoint":
        (tmp_path / "empty").mkdir()
        run, says = str(tmp_path / "empty"), "train first"
    elif case == "damaged checkpoint":
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "best").write_bytes((pictures / "best").read_bytes()[:-7])
        run, says = str(tmp_path / "bad"), "the file is damaged"
    elif case == "channels":
        run, image = str(volumes), str(volume(tmp_path / "four.nii.gz", shape, affine, channels=4))
        says = "4 channels"
    elif case == "a picture for volumes":
        run, says = str(volumes), "takes NIfTI"
    elif case == "no such image":
        image, says = str(tmp_path / "nothing.png"), "no such file"
    elif case == "two of one name":
        shutil.copy(good, tmp_path / "2.png")
        return [run, image, str(tmp_path / "2.png"), "-o", out], "rename one"
    elif case == "an empty folder":
        (tmp_path / "empty").mkdir()
        image, says = str(tmp_path / "empty"), "no images"
    elif case == "made-up images":
        run = save_run(tmp_path / "run", "phantom_us", tmp_path, patch_shape=(16, 16), phantom_shape=(16, 16))
        run, says = str(run), "made-up"
    elif case == "output":
        (tmp_path / "file").touch()
        out, says = str(tmp_path / "file"), str(tmp_path / "file")
    return [run, image, "-o", out], says


@pytest.mark.parametrize(
    "case",
    ["no checkpoint", "damaged checkpoint", "channels", "a picture for volumes",
     "no such image", "two of one name", "an empty folder", "made-up images", "output"],
)  # fmt: skip
def test_bad_input_is_one_line(case, volumes, pictures, tmp_path, save_run, capsys):
    words, says = broken(case, volumes, pictures, tmp_path, save_run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        p.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and says in lines[0]
    assert not [p for p in (tmp_path / "out").glob("*") if "2" not in p.name]  # nothing of the bad image


def test_hausdorff_of_a_large_volume_is_fast():
    """15 organs in 192 x 128 x 128: measured 0.15 s on one core; the bound leaves room for slow machines."""
    rng = np.random.default_rng(0)
    places = np.ogrid[0:1:192j, 0:1:128j, 0:1:128j]
    labels = np.zeros((2, 192, 128, 128), np.uint8)
    for c in range(1, 16):
        centre, radius = rng.uniform(0.2, 0.8, 3), rng.uniform(0.05, 0.15, 3)
        for label, shift in zip(labels, (0, 0.01), strict=True):
            away = [(x - m - shift) / r for x, m, r in zip(places, centre, radius, strict=True)]
            label[sum(x**2 for x in away) < 1] = c
    pairs = [(labels[0] == c, labels[1] == c) for c in range(1, 16)]
    start = time.process_time()
    far = [e.hausdorff_95(a, b, (1.5, 1.5, 5.0)) for a, b in pairs]
    assert time.process_time() - start < 1
    assert np.isfinite(far).all() and max(far) > 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="for glibc")
def test_memory_is_kept_for_the_next_step():
    """What conftest.py has asked for: a block as large as one freed before is not new memory."""

    def pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages()
    assert pages() < 20  # some 300 otherwise, of 2 MiB or less each


@pytest.mark.skipif(any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists(), reason="a TPU")
@pytest.mark.parametrize("platforms, asked", [("", False), ("tpu,cpu", True)])
def test_libtpu_is_asked_only_where_there_may_be_a_tpu(tmp_path, platforms, asked):
    """One that is installed, asked, and finds nothing writes a page of warnings."""
    (tmp_path / "libtpu.py").write_text(
        "import os\nget_library_path = lambda: __file__\nos.environ['TPU_LIBRARY_PATH'] = __file__\n"
    )
    code = (
        "from support.machine import ignore_absent_tpu; import jax; ignore_absent_tpu()\n"
        "from jax._src.cloud_tpu_init import get_tpu_library_path; print(get_tpu_library_path())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": platforms}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=HERE, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (str(tmp_path / "libtpu.py") if asked else "None")


def test_every_seed_has_its_own_scores(pictures, capsys):
    words = ["test", str(pictures), "--split", "test", "--sampler", "ddim", "--sampling-steps", "2"]
    e.main([*words, "--seed", "3", "--seeds", "2"])
    names = {path.name for path in (pictures / "scores").iterdir()}
    assert names == {f"test-best-ddim-2-seed{n}.{kind}" for n in (3, 4) for kind in ("csv", "json")}
    table = capsys.readouterr().out
    assert "ddim seed 3" in table and "ddim seed 4" in table
