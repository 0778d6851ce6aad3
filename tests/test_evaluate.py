"""Scores against brute force, patch grids against the paper, and prediction."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

import data
import diffusion as d
import evaluate as e
import unet


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
    assert e.per_case(np.array([[0.5, np.nan], [np.nan, np.nan]])).tolist()[0] == 0.5
    assert np.isnan(e.per_case(np.array([[np.nan, np.nan]]))[0])


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


def predict(shapes, batch_size, sampler="ddpm", model=MODEL):
    return list(
        e.predict_cases(
            model, FIVE, cases(shapes), jax.random.key(0),
            patch_shape=(8, 8), batch_size=batch_size, sampler=sampler, prediction="x_0",
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


def test_overlapping_patches_are_averaged(monkeypatch):
    """A network that answers with the patch's own first intensity, which differs between patches."""

    def fake(model, schedule, image, keys, *, sampler, prediction):
        first = jnp.broadcast_to(image[:, :1, :1], image.shape)
        return jnp.concatenate([first, 1 - first], -1)[None]

    monkeypatch.setattr(e, "predict_patches", fake)
    [(case, probability)] = predict([(8, 12)], 4)
    first, second = case.image[0, 0, 0], case.image[0, 4, 0]
    np.testing.assert_allclose(probability[0, :, :4, 0], first, rtol=1e-5)
    np.testing.assert_allclose(probability[0, :, 4:8, 0], (first + second) / 2, rtol=1e-5)
    np.testing.assert_allclose(probability[0, :, 8:, 0], second, rtol=1e-5)


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
        **e.provenance(),
    }
    e.write_scores(tmp_path, scores, ["background", "a", "b"], facts)
    lines = (tmp_path / "test-best-ddpm-2-seed0.csv").read_text().splitlines()
    assert lines[0] == "uid,step,class,dice,hausdorff_95" and len(lines) == 5
    assert lines[1].startswith("u,1,a,0.666667,") and lines[2].startswith("u,1,b,0.000000,8.4853")
    summary = json.loads((tmp_path / "test-best-ddpm-2-seed0.json").read_text())
    assert summary["dice_mean"] == pytest.approx([1 / 3, 1 / 3])
    assert {"commit", "devices", "jax", "date"} <= set(summary)
    assert "33.33" in e.table([("x", scores)], "mm")


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
    png = e.picture([(case, np.zeros((5, 6, 5, 4), np.uint8))], "title")
    assert png.startswith(b"\x89PNG")
