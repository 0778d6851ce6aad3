"""Scores against brute force, patch grids against the paper, and prediction."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from conftest import Mixed
from made import run_scores
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

import data
import diffusion as d
import evaluate as e
import recipes
import train
from support.disk.files import InputError
from support.machine.devices import provenance
from support.disk.run_folder import Journal
from support.results.scores import per_case, table, write_scores


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


def test_what_is_predicted_where_the_truth_is_ignored_does_not_count():
    rng = np.random.default_rng(0)
    truth, found = (rng.integers(0, 3, (12, 14)).astype(np.uint8) for _ in range(2))
    truth[:, 9:] = 255
    case = data.Sample(np.zeros((12, 14, 1), np.float32), truth, (1.0, 1.0), "u", np.eye(4))
    # Two predictions that differ there alone.
    other = np.where(truth == 255, (found + 1) % 3, found)
    whole, same = (e.score(p[None], case, 3) for p in (found, other))
    for values in zip(whole[1:], same[1:], strict=True):
        np.testing.assert_array_equal(*values)
    cut = case._replace(image=case.image[:, :9], label=truth[:, :9])
    np.testing.assert_array_equal(whole.dice, e.score(found[None, :, :9], cut, 3).dice)


def test_masks_of_anybody_are_scored():
    """Dice by hand, the distance by brute force, and a class that only one of the two has."""
    truth = np.zeros((9, 8, 4), int)
    truth[2:6, 2:6, 1:3], truth[8, 0, 0] = 1, 2
    moved = np.roll(truth, 1, axis=0)
    moved[moved == 2], moved[0, 7, 0] = 0, 3
    found = e.score_masks(moved.astype(float), truth.tolist(), (1.0, 2.0, 3.0))
    assert sorted(found) == [1, 2, 3]
    assert found[1]["dice"] == 0.75 and found[1]["outcome"] == "found"
    assert found[1]["hausdorff_95"] == brute_force_hausdorff_95(moved == 1, truth == 1, (1.0, 2.0, 3.0))
    diagonal = np.linalg.norm([9, 16, 12])
    assert found[2] == {"dice": 0.0, "hausdorff_95": pytest.approx(diagonal), "outcome": "missed"}
    assert np.isnan(found[3]["dice"]) and found[3]["outcome"] == "invented"
    assert e.score_masks(truth, truth)[1] == {"dice": 1.0, "hausdorff_95": 0.0, "outcome": "found"}


@pytest.mark.parametrize(
    "prediction, truth, spacing, says",
    [
        (np.zeros((3, 4)), np.zeros((4, 3)), (), "(3, 4) and (4, 3)"),
        (np.zeros(3), np.zeros(3), (), "2D or 3D"),
        (np.full((3, 4), 0.5), np.zeros((3, 4)), (), "class numbers"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), (), "class numbers"),
        (np.full((3, 4), -1), np.zeros((3, 4)), (), "class numbers"),
        (np.zeros((3, 4)), np.zeros((3, 4)), (1.0, 0.0), "positive"),
        (np.zeros((3, 4)), np.zeros((3, 4)), (1.0,), "2 positive numbers"),
    ],
)
def test_masks_that_do_not_fit_are_refused(prediction, truth, spacing, says):
    with pytest.raises(InputError) as error:
        e.score_masks(prediction, truth, spacing)
    assert says in str(error.value) and "\n" not in str(error.value)


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


def cases(shapes):
    rng = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        image = rng.normal(size=(*shape, 1)).astype(np.float32)
        yield data.Sample(image, np.zeros(shape, np.uint8), (1.0, 1.0), f"case{i}", np.eye(4))


SIZES = {"image_channels": 1, "classes": 2, "self_condition": False, "key": jax.random.key(0)}
MODEL = Mixed(**SIZES, noisy_mask=True)
FIVE = d.respace(d.linear_schedule(), 5)


def predict(shapes, batch_size, model=MODEL, prediction="x_0"):
    program = e.prediction_program(model, (8, 8), "ddpm", prediction)
    return in_patches(lambda image, keys: np.asarray(program(model, FIVE, image, keys)), shapes, batch_size)


def in_patches(network, shapes, batch_size, **how):
    """The predictions of a function of patches and keys."""
    key = jax.random.key(0)
    return list(
        e.predict_cases(network, cases(shapes), key, patch_shape=(8, 8), batch_size=batch_size, **how)
    )


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


def first_intensity(image, keys):
    """A network that answers with the patch's own first intensity, which differs between patches."""
    first = np.broadcast_to(image[:, :1, :1], image.shape)
    return np.concatenate([first, 1 - first], -1)[None]


@given(st.integers(5, 60), st.integers(4, 20), st.sampled_from([0.0, 0.25, 0.5]))
def test_patches_overlap_by_their_share_and_cover(size, patch, overlap):
    starts = [start for (start,) in e.patch_starts([max(size, patch)], [patch], overlap)]
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] + patch == max(size, patch)
    assert (steps <= max(int(patch * (1 - overlap)), 1)).all()
    # One patch fewer could not overlap so much.
    fewer = len(starts) - 1
    assert fewer == 0 or patch + (fewer - 1) * max(int(patch * (1 - overlap)), 1) < max(size, patch)


def test_gaussian_weights_are_those_of_scipy():
    """Of a peak in the middle of an odd patch, blurred without a limit of its width, 1 in the middle."""
    peak = np.zeros((17, 25))
    peak[8, 12] = 1
    blurred = gaussian_filter(peak, (17 / 8, 25 / 8), mode="constant", truncate=99)
    np.testing.assert_allclose(e.patch_weight((17, 25), 1 / 8), blurred / blurred.max(), atol=1e-4)
    assert (e.patch_weight((4, 6), float("inf")) == 1).all()


@pytest.mark.parametrize("blend, starts", [("mean", (0, 6)), ("gaussian", (0, 3, 6))])
def test_overlapping_patches_are_put_together_by_their_weighted_mean(blend, starts):
    weight = np.ones(8) if blend == "mean" else np.exp(-((np.arange(8) - 3.5) ** 2) / 2)
    [(case, probability)] = in_patches(first_intensity, [(8, 14)], 4, blend=blend)
    placed = [np.pad(weight, (start, 6 - start)) for start in starts]
    total = sum(w * case.image[0, start, 0] for w, start in zip(placed, starts, strict=True))
    expected = np.tile(total / sum(placed), (8, 1))
    np.testing.assert_allclose(probability[0, :, :, 0], expected, rtol=1e-4, atol=1e-6)


class Given(NamedTuple):
    """A network's stand-in, which keeps what it is given."""

    images: list
    keys: list

    def __call__(self, image, keys):
        self.images.append(np.array(image))
        self.keys.append(np.array(jax.random.key_data(keys)))
        return np.full((1, *image.shape[:-1], 2), 0.5)


def test_every_patch_has_noise_of_its_own_that_does_not_depend_on_the_batch():
    """Of 2 cases with 3 patches each; a case of the same number has the same, wherever counting starts."""
    found = []
    for batch_size, first, shapes in ((6, 0, [(8, 24)] * 2), (4, 0, [(8, 24)] * 2), (3, 1, [(8, 24)])):
        given = Given([], [])
        in_patches(given, shapes, batch_size, first=first)
        found.append(np.concatenate(given.keys)[: 3 * len(shapes)])
    assert len(np.unique(found[0], axis=0)) == 6
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0][3:], found[2])


def test_an_image_smaller_than_the_patch_lies_in_its_middle_amid_its_lowest_intensity():
    given = Given([], [])
    [(case, probability)] = in_patches(given, [(4, 6)], 1)
    [[patch]] = given.images
    np.testing.assert_array_equal(patch[2:6, 1:7], case.image)
    patch[2:6, 1:7] = case.image.min()
    assert (patch == case.image.min()).all() and probability.shape == (1, 4, 6, 2)
    [(case, probability)] = in_patches(lambda image, keys: image[None], [(4, 6)], 1)
    np.testing.assert_array_equal(probability[0], case.image)  # and comes back from there


def test_scores_are_written_with_what_was_run(tmp_path):
    probability = np.zeros((2, 6, 6, 3), np.float32)
    probability[..., 1] = 1
    label = np.ones((6, 6), np.uint8)
    label[:3] = 2
    case = data.Sample(np.zeros((6, 6, 1), np.float32), label, (1.0, 1.0), "u", np.eye(4))
    found = e.score(probability.argmax(-1), case, 3)
    scores = run_scores(
        found.dice[None], found.hausdorff[None], outcome=found.outcome[None, None], uids=("u",)
    )
    ran = {"split": "test", "checkpoint": "best", "sampling_steps": 2, "seed": 0}
    write_scores(tmp_path, scores._replace(classes=("a", "b")), ran | provenance())
    lines = (tmp_path / "test-best-ddpm-2-seed0.csv").read_text().splitlines()
    assert lines[0] == "uid,step,class,dice,hausdorff_95,outcome" and len(lines) == 5
    assert lines[1].startswith("u,1,a,0.666667,") and lines[1].endswith(",found")
    assert lines[2] == "u,1,b,0.000000,8.4853,missed"
    facts = json.loads((tmp_path / "test-best-ddpm-2-seed0.json").read_text())
    assert {"commit", "devices", "jax", "date", "config"} <= set(facts)
    assert "±" not in table([("x", scores)])  # one case has no deviation


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
    journal = Journal(tmp_path, {}, {"dice": -1.0, "step": 0}, [])
    plain = train.validate(model, dataset, mesh, journal, last=False)

    def half(predictions):
        return predictions * (np.arange(16) < 8)

    monkeypatch.setattr(recipes, "MADE_UP", recipes.MADE_UP._replace(post_process=half))
    ours = train.validate(model, dataset, mesh, journal, last=False)
    tested, _ = e.score_split(model, dataset, "validation", sampler="ddpm", K=2, seed=0)
    np.testing.assert_array_equal(ours.dice, tested.dice[:, :3])
    np.testing.assert_array_equal(ours.hausdorff[:, :, -1], tested.hausdorff[:, :3, -1])
    assert len(ours.uids) == 3 and (plain.dice != ours.dice).any(axis=(0, 2, 3)).all()


def test_pictures_are_of_the_images_own_grid():
    """Of a volume whose own voxels are half as long: the slice with the most foreground, with the classes
    that are scored on that grid; the first half of the prepared image is class 1, and brighter."""
    image = np.repeat([1.9, 1.0], 3)[:, None, None, None] * np.ones((1, 5, 4, 1), np.float32)
    probability = np.stack([image[..., 0] - 1, 2 - image[..., 0]], -1)[None, ..., ::-1]
    label, own_label = (np.zeros(shape, np.uint8) for shape in ((6, 5, 4), (12, 10, 8)))
    own_label[:6, :, 5] = 1
    affines = np.eye(4), np.diag([0.5, 0.5, 0.5, 1])
    case = data.Sample(image, label, (1.0,) * 3, "u", affines[0], own_label, affines[1])
    shown, truth, spacing, found = e.in_pictures(case, probability.argmax(-1), probability)
    assert shown.shape == truth.shape == (12, 10, 1) and spacing == (0.5,) * 3 and truth.sum() == 60
    np.testing.assert_array_equal(found, e.on_own_grid(probability, case)[..., 5:6])
    assert (shown[found[0] == 1] > 1.8).all() and (shown[found[0] == 0] < 1.5).all()
    same, *_, classes = e.in_pictures(case._replace(own_label=None), probability.argmax(-1), probability)
    assert same.shape == (6, 5, 1) and classes.shape == (1, 6, 5, 1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice_is_scored_as_a_picture(axis):
    """Whichever axis it is, and also if a class is missed."""
    rng = np.random.default_rng(0)
    prediction, truth = rng.random((2, 12, 15)) > 0.8
    spacing = np.insert([1.0, 2.0], axis, 5.0).tolist()
    for other in (prediction, np.zeros_like(prediction)):
        flat = e.hausdorff_95(other, truth, [1.0, 2.0])
        thick = e.hausdorff_95(np.expand_dims(other, axis), np.expand_dims(truth, axis), spacing)
        assert thick == pytest.approx(flat) and flat > 0


def test_masks_without_a_common_number_are_said():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = 1
    with pytest.warns(UserWarning, match=r"no number in common \(1 and 255\)"):
        e.score_masks(mask, 255 * mask)
