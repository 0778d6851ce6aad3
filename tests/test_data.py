"""The file format, the phantoms, batches, augmentation and hostile files."""

import os
import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import python
from scipy.ndimage import affine_transform, gaussian_filter

import data
from support.disk.dataset_file import DatasetWriter, check_sample
from support.disk.files import InputError
from support.raw.workers import prefetch
from support.raw.phantoms import phantom_us


LIMITS = ("patch_shape", "rotation", "scaling", "translation", "foreground")
compiled = jax.jit(data.augment, static_argnames=LIMITS)  # one program instead of one for each operation


def augment(*given, **limits):
    return map(np.asarray, compiled(*given, **limits))


def sample(uid="a", shape=(6, 5)):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(*shape, 1)).astype(np.float32)
    label = rng.integers(0, 2, shape).astype(np.uint8)
    return data.Sample(image, label, (1.0,) * len(shape), uid, np.eye(4))


FACTS = {"name": "t", "class_names": ["background", "x"], "source": "test", "preprocessing": "", "unit": "mm"}


def write(path, samples):
    with DatasetWriter(path, **FACTS) as writer:
        for split, case in samples:
            writer.add(split, **case._asdict())


GOOD = [("train", sample("a")), ("train", sample("b", (8, 4))), ("validation", sample("c"))]


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "t.h5", GOOD)
    dataset = data.open_dataset("t", tmp_path, ())
    assert dataset.uids == {"train": ("a", "b"), "validation": ("c",), "test": ()}
    assert dataset.canvas == (8, 5) and dataset.class_names == ("background", "x")
    case = dataset.load("train", 1)
    assert (case.image == GOOD[1][1].image).all() and (case.label == GOOD[1][1].label).all()
    assert not list(tmp_path.glob("*.partial"))


def test_every_fact_that_matters_changes_the_fingerprint(tmp_path):
    """Cases, their splits and order (which batches follow), classes and channels; not where the file is."""
    write(tmp_path / "t.h5", GOOD)
    dataset = data.open_dataset("t", tmp_path, ())
    uids = dataset.uids
    others = [
        dataset._replace(uids=uids | {"train": uids["train"][:1]}),
        dataset._replace(uids=uids | {"train": uids["train"][::-1]}),
        dataset._replace(uids={"train": uids["train"], "validation": (), "test": uids["validation"]}),
        dataset._replace(class_names=("background", "y")),
        dataset._replace(image_channels=2),
    ]
    assert len({data.fingerprint(one) for one in (dataset, *others)}) == 6
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert data.fingerprint(data.open_dataset("t", tmp_path / "copy", ())) == data.fingerprint(dataset)


def test_a_sample_that_differs_changes_the_content(tmp_path):
    content = []
    first = GOOD[0][1]
    for name, label in (("t", first.label), ("u", first.label), ("v", 1 - first.label)):
        write(tmp_path / f"{name}.h5", [("train", first._replace(label=label)), *GOOD[1:]])
        content.append(data.open_dataset(name, tmp_path, ()).content)
    assert content[0] == content[1] != content[2]


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda file: file.attrs.update(format_version=99), "format version 99"),
        (lambda file: file.attrs.update(settings="[]"), "damaged"),
        (lambda file: file.pop("test"), "damaged"),
        (lambda file: file["train/a"].pop("label"), "train/a unreadable"),
        (lambda file: file["train/a/image"].__setitem__((0, 0), np.nan), "NaN or infinite"),
        (lambda file: file["train/a/label"].__setitem__((0, 0), 2), "label values 0..2"),
        (lambda file: file["train/a"].attrs.update(spacing=[1.0, 0.0]), "positive"),
        (lambda file: file["train/a"].attrs.update(spacing=[1.0, 1.5]), "differs from what was written"),
    ],
)
def test_a_file_that_was_changed_gets_one_line_with_its_name(tmp_path, edit, says):
    write(tmp_path / "t.h5", GOOD)
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        edit(file)
    with pytest.raises(InputError) as error:
        data.open_dataset("t", tmp_path, ()).load("train", 0)
    assert says in str(error.value) and "t.h5" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_copy_is_noticed(tmp_path):
    """One bit of an image or a label is another, even where the value that it gives is a likely one; or only
    the beginning is there."""
    path = tmp_path / "t.h5"
    write(path, GOOD)
    content, case = path.read_bytes(), GOOD[0][1]
    for part in (case.image, case.label):
        place = content.index(part.tobytes()) + part.nbytes // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"t\.h5: train/a differs from what was written"):
            data.open_dataset("t", tmp_path, ()).load("train", 0)
    path.write_bytes(content[:2000])
    with pytest.raises(InputError, match=r"t\.h5: not a readable HDF5"):
        data.open_dataset("t", tmp_path, ())


def test_a_file_that_is_cut_off_in_the_middle_of_a_training_is_noticed(tmp_path):
    write(tmp_path / "t.h5", [(split, sample(case.uid, (60, 50))) for split, case in GOOD])
    dataset = data.open_dataset("t", tmp_path, ())
    os.truncate(tmp_path / "t.h5", 3000)
    with pytest.raises(InputError, match=r"t\.h5: train/[ab]") as error:
        for i in (0, 1):
            dataset.load("train", i)
    assert "\n" not in str(error.value)


def test_files_from_before_the_checksums_open(tmp_path):
    path = tmp_path / "t.h5"
    write(path, GOOD)
    with h5py.File(path) as new, h5py.File(tmp_path / "old.h5", "w") as old:
        old.attrs.update(new.attrs)
        for split in data.SPLITS:
            new.copy(split, old)
            for case in old[split].values():
                del case.attrs["crc32"]
    dataset = data.open_dataset("old", tmp_path, ())
    assert (dataset.load("train", 1).image == GOOD[1][1].image).all()


KILLED = """
import os, sys
from pathlib import Path
from support.disk import dataset_file
sys.path.insert(0, "tests")
from test_data import FACTS, GOOD
dataset_file.checksum = lambda **_: os.kill(os.getpid(), 9)  # the voxels are written, the sample is not whole
with dataset_file.DatasetWriter(Path(sys.argv[1]), **FACTS) as writer:
    writer.remove("train", "a")
    writer.add("test", **GOOD[0][1]._replace(uid="new", image=-GOOD[0][1].image)._asdict())
"""


def test_a_sample_that_was_taken_out_does_not_come_back_with_other_voxels(tmp_path):
    """The space of "a" is used for the voxels of another sample, and the process is killed in its midst."""
    path = tmp_path / "t.h5"
    with pytest.raises(KeyboardInterrupt), DatasetWriter(path, **FACTS) as writer:
        for split, case in GOOD:
            writer.add(split, **case._asdict())
        raise KeyboardInterrupt
    done = python("-c", KILLED, path)
    assert done.returncode == -9, done.stderr
    with DatasetWriter(path, **FACTS) as writer:
        assert [uid for _, uid in writer.done] == ["b", "c"]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
@settings(max_examples=40, deadline=None)
def test_normalise_in_float32_is_that_in_float64(level, scale):
    image = (level + scale * np.random.default_rng(0).normal(size=(9, 8, 7, 2))).astype(np.float32)
    exact = image.astype(np.float64) - image.mean((0, 1, 2), np.float64)
    deviation = exact.std((0, 1, 2))
    expected = exact / np.where(deviation > 0, deviation, 1)
    np.testing.assert_allclose(data.normalise(image), expected, rtol=1e-6, atol=1e-6)
    assert not data.normalise(np.full((9, 8, 1), scale, np.float32)).any()


# --- Phantoms ---


@pytest.mark.parametrize("name, shape", [("phantom_us", (32, 32)), ("phantom_us", (33, 47)),
                                         ("phantom_us", (96, 64)), ("phantom_ct", (32, 24, 16))])  # fmt: skip
def test_phantoms(name, shape):
    dataset = data.open_dataset(name, Path(), shape)
    again, classes = data.open_dataset(name, Path(), shape), len(dataset.class_names)
    assert "MADE UP" in dataset.source
    cases = [dataset.load(split, i) for split in data.SPLITS for i in range(4)]
    for case in cases:
        check_sample("phantom", case._asdict(), classes, 1)
        assert case.label.shape == shape and set(np.unique(case.label)) == set(range(classes))
        assert 0.01 < (case.label > 0).mean() < 0.4
        assert abs(case.image.mean()) < 1e-5 and case.image.std() == pytest.approx(1, abs=1e-4)
    assert (again.load("test", 3).image == cases[-1].image).all()
    assert len({case.image.tobytes() for case in cases}) == len(cases)  # no case stands in two splits


def test_the_phantoms_boundary_is_ambiguous_and_its_place_is_clear():
    """The label's outline differs from the one the image shows, as in two readers' drawings of one
    image: the same image has several labels, and their Dice is well under 1 and well over 0."""
    dices = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, label = phantom_us(rng, (64, 64))
        # What the image shows: the darkest smooth region near the label's own middle.
        smooth = gaussian_filter(image[..., 0], 2)
        y, x = np.nonzero(label)
        near = np.hypot(*(np.indices(label.shape) - np.array([y.mean(), x.mean()])[:, None, None])) < 20
        level = np.sort(smooth[near])[int(label.sum()) - 1]
        seen = near & (smooth <= level)
        dices.append(2 * (seen & (label > 0)).sum() / (seen.sum() + label.sum()))
    assert 0.5 < np.mean(dices) < 0.95


# --- Batches ---


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_case_comes_once_per_epoch(n, batch_size, seed):
    steps = [data.batch_indices(n, seed, step, batch_size) for step in range(3 * n)]
    flat = [i for step in steps for i in step]
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert data.batch_indices(n, seed, 2, batch_size) == steps[2]


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [tuple(data.batch_indices(30, seed, epoch, 30)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and tuple(range(30)) not in orders


def test_a_batch_is_padded_with_the_lowest_intensity(tmp_path):
    write(tmp_path / "t.h5", GOOD)
    dataset = data.open_dataset("t", tmp_path, ())
    batch = data.make_batch(dataset, seed=0, step=0, batch_size=2)
    assert batch.image.shape == (2, 8, 5, 1) and batch.label.dtype == np.uint8
    for b in range(2):
        h, w = batch.size[b]
        case = next(c for _, c in GOOD if c.label.shape == (h, w))
        assert (batch.image[b, :h, :w] == case.image).all()
        assert (batch.image[b, h:] == case.image.min()).all() and (batch.label[b, h:] == 0).all()


def test_a_host_reads_its_rows_of_the_batch(tmp_path):
    """Each with the size and spacing of its own case."""
    spaced = [(split, case._replace(spacing=(1.0 + i, 2.0))) for i, (split, case) in enumerate(GOOD)]
    write(tmp_path / "t.h5", spaced)
    dataset = data.open_dataset("t", tmp_path, ())
    whole = data.make_batch(dataset, seed=0, step=0, batch_size=6)
    some = data.make_batch(dataset, seed=0, step=0, batch_size=6, rows=[1, 3, 4])
    for leaf, part in zip(whole, some, strict=True):
        np.testing.assert_array_equal(leaf[[1, 3, 4]], part)
    order = data.batch_indices(2, 0, 0, 6)
    assert [order[i] for i in (1, 3, 4)] != order[:3]
    np.testing.assert_array_equal(whole.spacing, [spaced[i][1].spacing for i in order])
    np.testing.assert_array_equal(whole.size, [spaced[i][1].label.shape for i in order])


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetch(lambda step: step**2, 3, 9)) == [s**2 for s in range(3, 9)]

    def make(step):
        if step == 4:
            raise InputError("gone")
        return step

    with pytest.raises(InputError):
        list(prefetch(make, 0, 9))


# --- Augmentation ---


def batch_of(shape, canvas, channels=2, n=3):
    rng = np.random.default_rng(0)
    image = np.full((n, *canvas, channels), -3, np.float32)
    label = np.zeros((n, *canvas), np.uint8)
    inside = (slice(None), *(slice(s) for s in shape))
    image[inside] = rng.uniform(-3, 3, (n, *shape, channels))
    label[inside] = rng.integers(0, 4, (n, *shape))
    size = np.tile(np.array(shape, np.int32), (n, 1))
    return data.Batch(image, label, size, np.ones((n, len(shape)), np.float32))


@pytest.mark.parametrize("shape", [(9, 7), (6, 7, 5)])
def test_beyond_the_image_there_is_its_lowest_intensity_and_background(shape):
    """Twice as large and turned: what the patch shows beyond the image is each channel's lowest intensity,
    not 0; where it shows none of the image's label, it is background."""
    batch = batch_of(shape, shape)
    batch = batch._replace(image=5 + batch.image * np.float32([1, 9]))
    patch = tuple(3 * n for n in shape)
    keys = jax.random.split(jax.random.key(0), 3)
    image, label = augment(batch, keys, patch, rotation=0.3, scaling=0.0, translation=(0,) * len(shape))
    corner = (slice(None), *(0,) * len(shape))
    lowest = batch.image.min(tuple(range(1, len(shape) + 1)))
    np.testing.assert_allclose(image[corner], lowest, rtol=1e-5)
    assert (label[corner] == 0).all() and (image > lowest.min() - 1e-3).all()
    assert (label > 0).any()


@pytest.mark.parametrize("shape", [(15, 13), (11, 13, 9)])
def test_every_axis_has_a_scale_and_a_shift_of_its_own(shape):
    """Read off images of their own coordinates: the map's diagonal and offset, over many examples."""
    dims, n = len(shape), 60
    coordinates = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.float32)
    label, spacing = np.zeros((1, *shape), np.uint8), np.ones((1, dims), np.float32)
    one = coordinates[None], label, np.int32([shape]), spacing
    batch = data.Batch(*(np.repeat(part, n, axis=0) for part in one))
    keys = jax.random.split(jax.random.key(0), n)
    image, _ = augment(batch, keys, shape, rotation=0.0, scaling=0.2, translation=(1, 2, 3)[:dims])
    middle = tuple(s // 2 for s in shape)
    scales, shifts = np.empty((2, n, dims))
    for axis in range(dims):
        next_ = tuple(m + (i == axis) for i, m in enumerate(middle))
        here = image[(slice(None), *middle, axis)]
        scales[:, axis] = image[(slice(None), *next_, axis)] - here
        shifts[:, axis] = here - middle[axis]
    limits = np.array([0.2] * dims + [1, 2, 3][:dims])
    found = np.concatenate([scales - 1, shifts], 1)
    assert (np.abs(found) <= limits + 1e-4).all() and (np.abs(found).max(0) > 0.8 * limits).all()
    apart = np.corrcoef(found.T) - np.eye(2 * dims)
    assert np.abs(apart).max() < 4.5 / np.sqrt(n)
    assert (np.abs(found.mean(0)) < 4 * limits / np.sqrt(3 * n)).all()


@pytest.mark.parametrize("shape", [(9, 7), (6, 7, 5)])
def test_what_an_image_is_padded_to_and_its_batch_do_not_matter(shape):
    """A batch holds images of several sizes: each is turned and scaled about its own centre."""
    tight = batch_of(shape, shape)
    low = tight.image.min(axis=tuple(range(1, len(shape) + 1)), keepdims=True)
    more = [(0, 0), *((0, 4 + n) for n in range(len(shape)))]
    image = low + np.pad(tight.image - low, [*more, (0, 0)])
    keys, settings = jax.random.split(jax.random.key(0), 3), {"rotation": 0.5, "scaling": 0.3}
    settings["translation"] = (2,) * len(shape)
    wide = tight._replace(image=image, label=np.pad(tight.label, more))
    one = data.Batch(*(leaf[1:2] for leaf in tight))
    found, padded = (augment(batch, keys, shape, **settings) for batch in (tight, wide))
    for a, b, c in zip(found, padded, augment(one, keys[1:2], shape, **settings), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        np.testing.assert_allclose(a[1:2], c, atol=1e-6)


STILL = {"rotation": 0.0, "scaling": 0.0}


@pytest.mark.parametrize(
    "shape, canvas, patch", [((9, 7), (10, 12), (4, 5)), ((6, 5, 7), (6, 6, 7), (3, 5, 4))]
)
def test_without_augmentation_a_patch_is_a_crop_from_first_to_last_place(shape, canvas, patch):
    """Its first voxel is the floor of a uniform number, drawn with the fourth of the keys into which an
    example's key is split; and so it is with a share of foreground, if there is none."""
    batch, keys, dims = batch_of(shape, canvas, n=200), jax.random.split(jax.random.key(0), 200), len(shape)
    places = np.subtract(shape, patch, dtype=np.float32) + 1
    drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.split(key, 4)[3], (dims,)))(keys)
    starts = np.floor(drawn * places).astype(int)
    for share, label in ((0.0, batch.label), (1.0, 0 * batch.label)):
        how, one = {"translation": (0,) * dims, "foreground": share, **STILL}, batch._replace(label=label)
        image, found = augment(one, keys, patch, **how)
        for b, start in enumerate(starts):
            where = (b, *(slice(a, a + n) for a, n in zip(start, patch, strict=True)))
            np.testing.assert_allclose(image[b], batch.image[where], atol=1e-5)
            np.testing.assert_array_equal(found[b], label[where])
    assert {(0,) * dims, tuple(places.astype(int) - 1)} <= set(map(tuple, starts))


@pytest.mark.parametrize("shape, patch", [((20, 21), (3, 4)), ((12, 13, 11), (2, 3, 4))])
def test_a_share_of_the_patches_shows_foreground_at_any_place(shape, patch):
    """One voxel in the middle, which a patch at a random place seldom shows. If foreground is asked for, it
    is as likely at each place of the patch, so that its place says nothing."""
    n, size, middle = 2000, np.prod(patch), tuple(s // 2 for s in shape)
    batch = batch_of(shape, shape, channels=1, n=n)
    label = np.zeros_like(batch.label)
    label[:, *middle], label[:, *(0,) * len(shape)] = 1, 255
    how = {"translation": (0,) * len(shape), **STILL}
    keys = jax.random.split(jax.random.key(0), n)
    _, found = augment(batch._replace(label=label), keys, patch, foreground=0.3, **how)
    shown = found == 1
    by_chance = size / np.prod([s - p + 1 for s, p in zip(shape, patch, strict=True)])
    expected = 0.3 + 0.7 * by_chance
    assert abs(shown.sum() / n - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    at_each, usual = shown.sum(0), n * expected / size
    assert np.abs(at_each - usual).max() < 4.5 * np.sqrt(usual)


@pytest.mark.parametrize("shape", [(30, 26), (16, 20, 18)])
def test_foreground_is_shown_where_augmentation_moves_it(shape):
    """Turned, scaled, and moved in voxels that are no cubes, and as near to an edge as it stays inside."""
    dims = len(shape)
    batch = batch_of(shape, shape, channels=1, n=100)
    corner = tuple(slice(8, 11) for _ in shape)
    label = np.zeros_like(batch.label)
    label[:, *corner] = 3
    batch = batch._replace(label=label, spacing=np.tile(np.float32([1, 2, 0.7])[:dims], (100, 1)))
    keys, how = jax.random.split(jax.random.key(1), 100), {"rotation": 0.3, "scaling": 0.2}
    _, found = augment(batch, keys, (5,) * dims, translation=(2,) * dims, foreground=1.0, **how)
    assert (found == 3).any(tuple(range(1, dims + 1))).all()


def test_an_image_smaller_than_the_patch_is_centred():
    batch = batch_of((3, 4), (6, 6), n=1)
    keys = jax.random.split(jax.random.key(0), 1)
    image, label = augment(batch, keys, (6, 4), translation=(0, 0), **STILL)
    assert (label[0, 2:5] == batch.label[0, :3, :4]).all() and (label[0, [0, 1, 5]] == 0).all()
    np.testing.assert_allclose(image[0, 2:5], batch.image[0, :3, :4], atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_augmentation_is_scipys_affine_transform(dims):
    """The patch is as large as the image, so that its place is known; the map is read off where the
    coordinates themselves are the image."""
    shape = (12, 14, 10)[:dims]
    coordinates = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.float32)
    rng = np.random.default_rng(0)
    picture, truth = rng.uniform(0, 1, shape), rng.integers(0, 3, shape)
    image = np.concatenate([coordinates, picture[..., None]], -1, dtype=np.float32)
    spacing = np.float32([1, 2, 0.5])[:dims]
    batch = data.Batch(image[None], truth.astype(np.uint8)[None], np.int32([shape]), spacing[None])
    keys, settings = jax.random.split(jax.random.key(4), 1), {"rotation": 0.3, "scaling": 0.15}
    image, label = augment(batch, keys, shape, translation=(1,) * dims, **settings)
    middle = tuple(slice(4, -4) for _ in shape)  # where nothing comes from outside
    grid = coordinates[middle].reshape(-1, dims)
    mapped = image[0, ..., :dims][middle].reshape(-1, dims)
    solved, *_ = np.linalg.lstsq(np.c_[grid, np.ones(len(grid))], mapped, rcond=None)
    matrix, offset = solved[:dims].T, solved[dims]
    assert np.abs(matrix - np.eye(dims)).max() > 0.02  # something was done
    inside = tuple(slice(3, -3) for _ in shape)
    expected = affine_transform(picture, matrix, offset, order=1)
    np.testing.assert_allclose(image[0, ..., dims][inside], expected[inside], atol=1e-3)
    expected = affine_transform(truth, matrix, offset, order=0)
    assert (label[0][inside] == expected[inside]).mean() > 0.97  # ties at half voxels
    # In mm, the map is a rotation of scaled axes: its columns are orthogonal, 0.85 to 1.15 long.
    physical = spacing[:, None] * matrix / spacing
    gram = physical.T @ physical
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-3
    assert (np.sqrt(np.diag(gram)) > 0.84).all() and (np.sqrt(np.diag(gram)) < 1.16).all()
