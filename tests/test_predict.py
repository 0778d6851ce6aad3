"""Masks for one's own images: on their own grids, from a model file alone, and what cannot be used."""

import csv
import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import PIL.Image
import pytest
from made import directions, nifti, one_line, png

import evaluate as e
import made
import predict as p
from support.raw import images, pairing
from support.disk.files import InputError, read_signed, write_signed


HERE = Path(__file__).parent.parent


def ball(shape, affine, radius=11.0):
    """A ball about a fixed place in the world, in mm, as the voxels of a grid."""
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    world = nibabel.affines.apply_affine(affine, voxels)
    return np.linalg.norm(world - np.array([5.0, -3.0, 20.0]), axis=-1) < radius


def grid(codes, spacing, turn=(0.0, 0.0, 0.0)):
    """Shape and affine of a grid about that place: axes along `codes`, then turned by angles."""
    shape = np.rint(np.array([44.0, 40.0, 36.0]) / spacing).astype(int)
    axes = directions(codes, spacing, turn)
    origin = np.array([5.0, -3.0, 20.0]) - axes @ ((shape - 1) / 2)
    return tuple(int(n) for n in shape), nibabel.affines.from_matvec(axes, origin)


def volume(path, shape, affine, channels=1):
    """A NIfTI file whose ball is bright, in noise."""
    rng = np.random.default_rng(0)
    image = (100 * ball(shape, affine) + rng.normal(scale=5, size=shape)).astype(np.float32)
    image = image if channels == 1 else np.stack([image] * channels, -1)
    nifti(path, image, affine, qform_code=2, sform_code=1, xyzt_units=2)
    return path


def build(root, name, *words, data_dir=None):
    """Builds a data set from root/raw, whose cases 0, 1 and 2 are one for each split."""
    (root / "split").write_text("0 train\n1 validation\n2 test\n")
    made.build(f"folder:{name}", root / "raw", data_dir or root, "--split", root / "split", *words).close()


def three_volumes(root, shape, affine):
    for i in range(3):
        volume(root / "raw" / "images" / f"{i}.nii.gz", shape, affine)
        nifti(root / "raw" / "labels" / f"{i}.nii.gz", ball(shape, affine).astype(np.uint8), affine)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory, save_run):
    """A run on a folder of volumes, resampled to 2 mm."""
    root = tmp_path_factory.mktemp("volumes")
    three_volumes(root, *grid("LPI", (1.5, 1.5, 2.5)))
    build(root, "balls", "--spacing", "2,2,2")
    return save_run(root / "run", "folder:balls", root, patch_shape=(16, 16, 16))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, save_run):
    """A diffusion run on a folder of pictures, as they are."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(3):
        png(root / "raw" / "images" / f"{i}.png", rng.integers(0, 256, (20, 28)).astype(np.uint8))
        png(root / "raw" / "labels" / f"{i}.png", np.eye(20, 28, dtype=np.uint8) * 255)
    build(root, "dots")
    return save_run(root / "run", "folder:dots", root, "diff", patch_shape=(8, 8))


def test_images_of_another_spacing_are_refused(pictures, tmp_path, capsys):
    """Under the same names and splits, of which a model knows more than that."""
    root = pictures.parent
    build(root, "dots", "--spacing", "2,2", data_dir=tmp_path)
    model = e.load(pictures)
    model.dataset(str(root))
    with pytest.raises(InputError, match="spacing 1 x 1, but folder:dots now has 2 x 2"):
        model.dataset(str(tmp_path))
    solid = dataclasses.replace(model.facts, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="spacing 1 x 1 x 1, but folder:dots now has 1 x 1"):
        model._replace(facts=solid).dataset(str(root))


def pages(path):
    """The values of an image's file: of a TIFF file, its pages as the last axis."""
    if path.suffix == ".nii":
        return np.asarray(nibabel.load(path).dataobj)
    with PIL.Image.open(path) as file:
        return np.stack([np.array(file) for n in range(file.n_frames) if file.seek(n) is None], -1)


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


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_saved_as_a_volume(tmp_path, monkeypatch, save_run, axis):
    """2D in mm: one slice, in whichever axis, resampled, flipped, back, and drawn. The dollar signs in its
    name are no mathematics."""
    monkeypatch.setattr(e, "prediction_program", lambda *_: bright)
    shown, draw = [], p.overlay
    monkeypatch.setattr(p, "overlay", lambda panel, **how: shown.append(panel) or draw(panel, **how))
    whole, affine = grid("LSP", (1.5, 2.0, 1.0))
    shape = tuple(np.where(np.arange(3) == axis, 1, whole))
    affine = affine @ nibabel.affines.from_matvec(np.eye(3), np.where(np.arange(3) == axis, 9, 0))
    three_volumes(tmp_path, shape, affine)
    build(tmp_path, "thin", "--spacing", "1,1")
    run = save_run(tmp_path / "run", "folder:thin", tmp_path, patch_shape=(16, 16))
    shutil.copy(tmp_path / "raw" / "images" / "2.nii.gz", tmp_path / "a$_$.nii.gz")
    p.main([str(run), str(tmp_path / "a$_$.nii.gz")])
    mask = nibabel.load(run / "predictions" / "a$_$-mask.nii.gz")
    assert (run / "predictions" / "a$_$-overlay.png").exists()
    assert sorted(shown[0].image.squeeze().shape) == sorted(n for n in shape if n > 1)
    assert mask.shape == shape and e.dice(np.asarray(mask.dataobj) == 1, ball(shape, affine)) > 0.95
    if axis == 2:  # a file of two dimensions
        image = nibabel.load(tmp_path / "a$_$.nii.gz")
        nibabel.Nifti1Image(image.get_fdata()[..., 0], image.affine).to_filename(tmp_path / "q.nii.gz")
        p.main([str(run), str(tmp_path / "q.nii.gz"), "--probabilities"])
        assert nibabel.load(run / "predictions" / "q-probabilities.nii.gz").shape == (*shape, 2)


def test_images_are_prepared_as_in_training(volumes, pictures):
    """Bit for bit: volumes, which are turned and resampled, and pictures."""
    for folder, ending in ((volumes, "nii.gz"), (pictures, "png")):
        model = e.load(folder)
        path = folder.parent / "raw" / "images" / f"2.{ending}"
        ours, case = model.prepare(model.read([path])[0], path), model.dataset().load("test", 0)
        np.testing.assert_array_equal(ours.image, case.image)
        np.testing.assert_array_equal(ours.affine, case.affine)


def test_beyond_the_prepared_grid_there_is_background(pictures):
    """A centre crop that is narrower than the picture along one axis and wider along the other."""
    whole, grid = e.load(pictures).read([pictures.parent / "raw" / "images" / "2.png"])
    cut = images.crop(whole, (10, 40))
    probability = np.zeros((10, 40, 2), np.float32)
    probability[..., 1] = 1
    expected = np.zeros((20, 28, 1), np.uint8)
    expected[5:15] = 1
    placed = images.most_probable(probability, cut.affine, grid)
    np.testing.assert_array_equal(placed, expected)


def test_what_predict_writes_for_a_picture(pictures, tmp_path):
    """One seed's mask is the argmax of its probabilities; over seeds, mean and variance are numpy's."""
    image = str(pictures.parent / "raw" / "images" / "2.png")
    for seed in range(2):
        words = ["--seed", str(seed), "--probabilities", "-o", str(tmp_path / str(seed))]
        p.main([str(pictures), image, *words])
    words = ["--seeds", "2", "--probabilities", "--all-steps", "-o", str(tmp_path / "both")]
    p.main([str(pictures), image, *words])

    one, two, both = (pages(tmp_path / f / "2-probabilities.tif") for f in ("0", "1", "both"))
    assert one.shape == (20, 28, 2) and np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(both, (one + two) / 2, atol=1e-6)
    mask = PIL.Image.open(tmp_path / "both" / "2-mask.png")
    assert mask.mode == "P"
    sure = np.abs(both[..., 1] - 0.5) > 1e-5  # where the seeds are not certain of different classes
    assert (np.array(mask) == both.argmax(-1))[sure].all() and sure.mean() > 0.9
    np.testing.assert_array_equal(np.array(mask), np.array(PIL.Image.open(tmp_path / "both" / "2-step5.png")))
    variance = pages(tmp_path / "both" / "2-variance.tif")
    np.testing.assert_allclose(variance[..., 0], np.stack([one, two])[..., 1].var(0), atol=1e-6)
    facts = json.loads((tmp_path / "both" / "2.json").read_text())
    assert facts["classes"] == {"0": "background", "1": "class 255"} and facts["seeds"] == 2
    assert sorted(facts["files"].values()) == sorted(
        p.name for p in (tmp_path / "both").iterdir() if p.name not in ("2.json", "2-overlay.png")
    )


def test_of_each_seed_its_last_step_alone_is_held(pictures, tmp_path, monkeypatch):
    """All the steps of a seed are let go before the next but one is drawn."""
    alive, most = weakref.WeakValueDictionary(), []

    def all_steps(model, case, sampling):
        most.append(len(alive))
        alive[sampling.seed] = steps = np.full((5, *case.label.shape, 2), 0.5, np.float32)
        return steps

    monkeypatch.setattr(e.Model, "predict_image", all_steps)
    image = str(pictures.parent / "raw" / "images" / "2.png")
    p.main([str(pictures), image, "--seeds", "6", "-o", str(tmp_path)])
    assert most == [0, 1, 1, 1, 1, 1] and list(tmp_path.glob("2-variance.*"))


def files_of(folder):
    """What predict.py wrote that says nothing of the model's path or the time."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".tif", ".nii")
    }


@pytest.mark.parametrize("way, here", [("tpu", "cpu"), ("native", "native"), ("cpu", "cpu")])
def test_a_model_from_another_machine_is_computed_in_the_way_of_this_one(save_run, tmp_path, way, here):
    """The last two ways are for a CPU."""
    size = {"patch_shape": (16, 16), "phantom_shape": (16, 16)}
    run = save_run(tmp_path / "run", "phantom_us", tmp_path, network="UNet", convolutions=way, **size)
    assert e.load(run).network.stem.convolutions == here


@pytest.mark.parametrize("which, spacing", [("pictures", ()), ("volumes", (1.5, 1.5, 2.5))])
def test_a_model_file_alone_predicts_the_same_bytes(request, tmp_path, monkeypatch, which, spacing):
    """Without the data set, the run, and the folder in which it was trained; from Python as well."""
    run = request.getfixturevalue(which)
    if spacing:
        image = volume(tmp_path / "2.nii", *grid("RAS", spacing))
    else:
        image = shutil.copy(run.parent / "raw" / "images" / "2.png", tmp_path / "2.png")
    values = pages(image).squeeze()
    words = [str(image), "--probabilities", "--all-steps", "-o"]
    p.main([str(run), *words, str(tmp_path / "with")])
    (tmp_path / "alone").mkdir()
    model = shutil.copy(run / "best", tmp_path / "alone" / "somebodys model")
    monkeypatch.chdir(tmp_path / "alone")
    monkeypatch.setattr(e, "open_dataset", None)  # nobody may ask for it
    p.main([str(model), *words, str(tmp_path / "without")])
    names = files_of(tmp_path / "with").keys()
    assert f"2-mask{image.suffix}" in names and names == files_of(tmp_path / "without").keys()
    for name in names:  # the overlay, too: its title says what the facts say
        assert files_of(tmp_path / "with")[name] == files_of(tmp_path / "without")[name]

    steps = e.load(model)(values, spacing, all_steps=True)
    [written] = (tmp_path / "without").glob("2-probabilities.*")
    # A NIfTI file's origin is far from 0, which costs a last digit on the way to its own grid and back.
    np.testing.assert_allclose(steps[-1], pages(written), atol=2e-7 if spacing else 0)
    np.testing.assert_array_equal(e.load(model)(values, spacing), steps[-1])
    np.testing.assert_allclose(e.load(model)(str(image), all_steps=True), steps, atol=2e-7)
    assert steps.shape == (len(steps), *values.shape, 2) and np.allclose(steps.sum(-1), 1, atol=1e-5)


SLICE, SOLID = np.random.default_rng(0).random((20, 30, 1)), np.zeros((20, 20, 20))
PICTURE = np.zeros((20, 28))


@pytest.mark.parametrize(
    "which, image, words, says",
    [("pictures", np.zeros((20, 28, 5)), {}, "1 channels"), ("pictures", np.zeros(20), {}, "2 axes"),
     ("pictures", np.full((20, 28, 3), 0.5), {}, "whole numbers from 0 to 255; give it in grey"),
     ("pictures", np.zeros((2, 20, 28, 1)), {}, "2 axes"), ("pictures", np.zeros((0, 28)), {}, "2 axes"),
     ("pictures", np.full((20, 28), np.nan), {}, "holds NaN"), ("pictures", "image.png", {}, "no such file"),
     ("pictures", "image.png", {"spacing": (1.0, 1.0)}, "leave spacing out"),
     ("pictures", PICTURE.astype(complex), {}, "real numbers"),
     ("pictures", [[1], [1, 2]], {}, "real numbers"),
     ("pictures", PICTURE, {"spacing": (1.0,)}, "2 positive numbers"),
     ("pictures", PICTURE, {"spacing": (1.0, 0.0)}, "2 positive numbers"),
     ("pictures", PICTURE, {"spacing": 1.0}, "real numbers"),
     ("pictures", PICTURE, {"spacing": "ab"}, "real"),
     ("pictures", PICTURE, {"sampler": "foo"}, "not one of ddpm, ddim"),
     ("pictures", PICTURE, {"sampler": "none"}, "not one of ddpm, ddim"),
     ("pictures", PICTURE, {"K": 5000}, "5000 sampling steps"),
     ("volumes", SLICE, {"spacing": (1, 1, 1)}, "2D, but .* takes volumes; give the whole"),
     ("volumes", SOLID, {}, "3 positive numbers are needed, in mm"),
     ("volumes", SOLID, {"spacing": (2, 2, 2), "blend": "maximum"}, "not one of mean, gaussian")],
)  # fmt: skip
def test_whatever_python_may_give_is_refused_in_one_line(request, which, image, words, says):
    with pytest.raises(InputError, match=says) as error:
        e.load(request.getfixturevalue(which))(image, **words)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory, save_run):
    """A run on volumes of two channels, a folder per case."""
    root = tmp_path_factory.mktemp("channels")
    shape, affine = grid("RAS", (4.0, 4.0, 4.0))
    for i in range(3):
        case = root / "raw" / f"case_{i}"
        for kind in ("t1", "flair"):
            volume(case / f"case_{i}_{kind}.nii.gz", shape, affine)
        nifti(case / f"case_{i}_seg.nii.gz", ball(shape, affine).astype(np.uint8), affine)
    made.build("folder:two", root / "raw", root).close()
    return save_run(root / "run", "folder:two", root, patch_shape=(8, 8, 8))


def test_channels_have_names_that_the_model_knows(two_channels, tmp_path, capsys):
    """A folder of cases is understood, and its labels are left out; the order of channels is said."""
    assert e.load(two_channels).facts.channel_names == ("flair", "t1")
    raw = two_channels.parent / "raw"
    p.main([str(two_channels), str(raw), "-o", str(tmp_path / "all")])
    assert "channels, in this order: flair, t1" in capsys.readouterr().err
    assert len(list((tmp_path / "all").glob("*-mask.nii.gz"))) == 3
    facts = json.loads((tmp_path / "all" / "case_1_flair.json").read_text())
    assert facts["channels"] == ["flair", "t1"]
    assert [Path(file).name for file in facts["images"]] == ["case_1_flair.nii.gz", "case_1_t1.nii.gz"]
    one = ",".join(str(raw / "case_1" / f"case_1_{kind}.nii.gz") for kind in ("flair", "t1"))
    p.main([str(two_channels), one, "-o", str(tmp_path / "one")])
    name = "case_1_flair-mask.nii.gz"
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    found = e.load(two_channels)(one)  # as Python is given them
    np.testing.assert_array_equal(found.argmax(-1), nibabel.load(tmp_path / "one" / name).dataobj)


@pytest.mark.parametrize(
    "names, files, says",
    [
        (("flair", "t1"), ("x_t1.nii", "x_flair.nii"), "x_t1.nii: by its name the channel t1"),
        (("0000", "0001"), ("x_0001.nii", "x_0000.nii"), "x_0001.nii: by its name the channel 0001"),
        (("01 {}_pre.nii", "02 {}_post.nii"), ("x_post.nii", "x_pre.nii"), "x_post.nii: by its name"),
    ],
)
def test_swapped_channels_are_refused(names, files, says):
    with pytest.raises(InputError, match=says):
        pairing.check_channels([Path(file) for file in files], names)
    pairing.check_channels([Path(file) for file in files[::-1]], names)
    pairing.check_channels([Path("a.nii"), Path("b.nii")], names)  # whose names say nothing


def test_an_image_that_lacks_a_channel_is_named(tmp_path):
    for name in ("a_t1.nii", "a_flair.nii", "b_t1.nii", "a_seg.nii"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"b_t1\.nii: .* has t1, but flair, t1 are needed"):
        pairing.by_channels(tmp_path, ("flair", "t1"))
    (tmp_path / "b_flair.nii").touch()
    for names in (("flair", "t1"), ("t1", "flair")):  # the order is the model's, not the alphabet's
        expected = [tuple(tmp_path / f"{case}_{name}.nii" for name in names) for case in "ab"]
        assert pairing.by_channels(tmp_path, names) == expected


def test_bad_images_are_skipped_and_named(pictures, tmp_path, capsys):
    """A truncated one, a constant one and a missing one between good ones; the others get their masks."""
    raw = pictures.parent / "raw" / "images"
    (tmp_path / "cut.png").write_bytes((raw / "0.png").read_bytes()[:-60])
    PIL.Image.new("L", (20, 20)).save(tmp_path / "constant.png")
    bad = [tmp_path / f"{name}.png" for name in ("cut", "gone", "constant")]
    words = [str(pictures), *map(str, [raw / "0.png", *bad, raw / "2.png"]), "-o", str(tmp_path / "out")]
    p.main([*words, "--skip-bad"])
    said = capsys.readouterr()
    assert "2 masks in" in said.out and "3 of 5 images skipped" in said.err
    assert all(f"{path}: " in said.err for path in bad)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{n}{end}" for n in (0, 2) for end in (".json", "-mask.png", "-overlay.png")
    }
    one_line(capsys, p.main, pictures, tmp_path / "cut.png", "-o", tmp_path / "out2", "--skip-bad")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    "files, names",
    [("a_0000.nii.gz b_0000.nii.gz", "a b"), ("a_0000.png a_0001.png", "a_0000 a_0001"),  # frames of a film
     ("x/a_0000.png y/a_0000.png", "x-a y-a"), ("a.b.nii.gz", "a.b"),
     ("case0/image.png case1/image.png 2.png", "case0-image case1-image 2")],  # a folder per case
)  # fmt: skip
def test_a_mask_is_called_as_the_label_would_be(files, names):
    assert p.names_of([(Path(file),) for file in files.split()]) == names.split()


def test_colours_are_made_grey_and_grey_is_repeated(pictures, tmp_path, capsys):
    """In the command as in Python, from a file as from an array."""
    colour = np.random.default_rng(1).integers(0, 256, (20, 28, 4)).astype(np.uint8)
    png(tmp_path / "colour.png", colour)
    png(tmp_path / "grey.png", colour[..., 0])
    PIL.Image.open(tmp_path / "colour.png").convert("RGB").convert("L").save(tmp_path / "made_grey.png")
    p.main([str(pictures), str(tmp_path), "-o", str(tmp_path / "out"), "--probabilities"])
    written = [(tmp_path / "out" / f"{name}-mask.png").read_bytes() for name in ("colour", "made_grey")]
    assert written[0] == written[1]
    model = e.load(pictures)
    expected = model(tmp_path / "made_grey.png")
    for image in (str(tmp_path / "colour.png"), colour, colour[..., :3], colour[..., :3].astype(float)):
        np.testing.assert_array_equal(model(image), expected)

    red = model._replace(facts=dataclasses.replace(model.facts, image_channels=3))
    for name, array in (("grey.png", colour[..., 0]), ("colour.png", colour)):
        file, _ = red.read([tmp_path / name])
        for read in (file, images.as_volume(array, (), 2, 3, "pixel")):
            capsys.readouterr()
            red.prepare(read, Path(name))
            said = f"{name} is grey, which is used as red, green and blue" in capsys.readouterr().err
            assert said == (name == "grey.png")
            expected = np.stack([array] * 3, -1) if array.ndim == 2 else array[..., :3]
            np.testing.assert_array_equal(read.image, expected)
    with_opacity = images.as_volume(colour[..., :2], (), 2, 3, "pixel")  # as Pillow gives an LA picture
    np.testing.assert_array_equal(with_opacity.image, np.stack([colour[..., 0]] * 3, -1))


def test_masks_beside_the_images_are_left_out(pictures, tmp_path, capsys):
    """Those of the user, and what this program wrote there earlier; a name of its own is an image's."""
    grey = PIL.Image.open(pictures.parent / "raw" / "images" / "0.png")
    for name in ("a", "a_mask", "a-seg", "mask", "b_label"):  # there is no image b
        grey.save(tmp_path / f"{name}.png")
    png(tmp_path / "nnU-Net" / "a_0000.png", grey)
    png(tmp_path / "nnU-Net" / "a_0000_gt.png", grey)
    for folder, counts, expected in (
        (tmp_path, ("2 masks", "8 masks"), ["a-mask.png", "b_label-mask.png", "mask-mask.png"]),
        (tmp_path / "nnU-Net", ("1 mask", "3 masks"), ["a-mask.png"]),
    ):
        for left_out in counts:  # later also a mask and an overlay of each
            p.main([str(pictures), str(folder), "-o", str(folder)])
            assert f"NB: left out {left_out} beside the images" in capsys.readouterr().err
            assert sorted(path.name for path in folder.glob("*-mask.png")) == expected


def test_a_mask_may_have_the_numbers_of_the_label_files(tmp_path, monkeypatch, save_run, capsys):
    """What was 7 and 200 in the labels, and lies at the bright half, is 200 in a mask that asks for it."""
    monkeypatch.setattr(e, "prediction_program", lambda *_: bright)
    image = np.zeros((16, 16), np.uint8)
    image[:, 8:] = 255
    for i in range(3):
        png(tmp_path / "raw" / "images" / f"{i}.png", image)
        png(tmp_path / "raw" / "labels" / f"{i}.png", np.where(image, 200, 7).astype(np.uint8))
    build(tmp_path, "halves", "--classes", "dark,bright")
    run = save_run(tmp_path / "run", "folder:halves", tmp_path, patch_shape=(8, 8))
    png(picture := tmp_path / "x.png", image)
    for words, numbers in (([], [0, 1]), (["--own-numbers"], [7, 200])):
        p.main([str(run), str(picture), "-o", str(tmp_path / "out"), *words])
        with PIL.Image.open(tmp_path / "out" / "x-mask.png") as mask:
            assert np.unique(np.asarray(mask)).tolist() == numbers and np.asarray(mask)[0, -1] == numbers[1]
        assert json.loads((tmp_path / "out" / "x.json").read_text())["numbers"] == [7, 200]
    header, arrays = read_signed(run / "best")
    red = images.COLOUR + 0xFF0000
    for known, why in (([], "it does not know them"), ([0, red], "the label files had 0, #ff0000")):
        write_signed(run / "best", header | {"numbers": known}, arrays)  # none as of older data sets
        said = one_line(capsys, p.main, run, picture, "-o", tmp_path / "out", "--own-numbers")
        assert f"no mask with --own-numbers ({why}); leave the option out" in said


def test_images_of_all_sizes_need_one_compilation(pictures, tmp_path):
    rng, shapes = np.random.default_rng(0), [(8, 8), (5, 9), (20, 30), (31, 7)]
    for i, shape in enumerate(shapes):
        png(tmp_path / f"{i}.png", rng.integers(0, 256, shape).astype(np.uint8))
    model = e.load(pictures)
    e._program.cache_clear()
    p.main([str(pictures), str(tmp_path), "-o", str(tmp_path / "out")])
    program = e.prediction_program(model.network, (8, 8), "ddpm", "x_0")
    assert program._cache_size() == 1
    for i, shape in enumerate(shapes):
        with PIL.Image.open(tmp_path / "out" / f"{i}-mask.png") as mask:
            assert mask.size == shape[::-1]


def test_patches_are_blended_as_in_validation(volumes, tmp_path):
    """Unless asked for otherwise; and it matters for an image of several patches."""
    image = np.random.default_rng(0).normal(size=(20, 24, 16)).astype(np.float32)
    model, words = e.load(volumes), {"spacing": (2.0, 2.0, 2.0)}
    mean, gaussian = (model(image, **words, blend=blend) for blend in ("mean", "gaussian"))
    np.testing.assert_array_equal(model(image, **words), mean)
    config = dataclasses.replace(model.facts.config, blend="gaussian")
    other = model._replace(facts=dataclasses.replace(model.facts, config=config))
    np.testing.assert_array_equal(other(image, **words), gaussian)
    assert np.abs(mean - gaussian).max() > 1e-3


def test_scores_on_the_images_own_grid(volumes, tmp_path, capsys):
    """The same as those of the mask that predict.py writes and the label's file, by any other program."""
    e.main(["test", str(volumes)])
    assert "run, own grid" in capsys.readouterr().out
    raw, out = volumes.parent / "raw", tmp_path / "out"
    p.main([str(volumes), str(raw / "images" / "2.nii.gz"), "-o", str(out)])
    mask, truth = (nibabel.load(file) for file in (out / "2-mask.nii.gz", raw / "labels" / "2.nii.gz"))
    expected = e.score_masks(mask.dataobj, truth.dataobj, truth.header.get_zooms())[1]
    (path,) = (volumes / "scores" / "own_grid").glob("*.csv")
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert float(row["dice"]) == pytest.approx(expected["dice"], abs=1e-6)
    assert float(row["hausdorff_95"]) == pytest.approx(expected["hausdorff_95"], abs=1e-4)
    prepared = (volumes / "scores" / path.name).read_text()
    assert prepared != path.read_text()


def test_the_readme_from_python(pictures, tmp_path, monkeypatch):
    """As it is written there, with an image and its truth."""
    text = (HERE / "README.md").read_text().partition("## Your own data and masks")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    raw = pictures.parent / "raw"
    image, truth = (np.asarray(PIL.Image.open(raw / kind / "2.png")) for kind in ("images", "labels"))
    names = {"image": image, "truth": truth // 255}
    (tmp_path / "runs" / "folder-mine-rec_xT").mkdir(parents=True)
    shutil.copy(pictures / "best", tmp_path / "runs" / "folder-mine-rec_xT" / "best")
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert names["steps"].shape == (5, *image.shape, 2)
    assert set(names["scores"][1]) == {"dice", "hausdorff_95", "outcome"}
    first, second = repr(names["model"]).splitlines()
    assert "diff, 0 steps on folder:dots (folder raw), validation Dice -" in first and "8 x 8" in second


THERE, PRECIOUS = ("png/2-mask.png", "tif/2-mask.TIF", "json/2.json"), b'{"patient": "A"}'


@pytest.fixture(scope="module")
def bad(tmp_path_factory, volumes, pictures, two_channels, save_run):
    """What the words of the table below stand for."""
    tmp, image = tmp_path_factory.mktemp("bad"), pictures.parent / "raw" / "images" / "2.png"
    for folder in ("empty", "cut", "images", "png", "tif", "json"):
        (tmp / folder).mkdir()
    for name in ("images/2.png", "png/2.png", "tif/2.TIF", "json/2.png"):
        PIL.Image.open(image).save(tmp / name)
    for name in THERE:
        (tmp / name).write_bytes(PRECIOUS)
    (tmp / "cut" / "best").write_bytes((pictures / "best").read_bytes()[:-7])
    (tmp / "file").touch()
    volume(tmp / "four.nii.gz", *grid("RAS", (2.0, 2.0, 2.0)), channels=4)
    volume(tmp / "slice.nii", (20, 18, 1), np.diag([2.0, 2.0, 2.0, 1.0]))
    save_run(tmp / "made-up", "phantom_us", tmp, patch_shape=(16, 16), phantom_shape=(16, 16))
    case = two_channels.parent / "raw" / "case_1" / "case_1"
    return {"tmp": tmp, "image": image, "pictures": pictures, "volumes": volumes,
            "channels": two_channels, "case": case}  # fmt: skip


@pytest.mark.parametrize(
    "words, says",
    [("{tmp}/empty {image}", "train first"), ("{tmp}/cut {image}", "the file is damaged"),
     ("{volumes} {tmp}/four.nii.gz", "4 channels"),
     ("{volumes} {image}", "takes NIfTI files: give the one that this picture is a slice of"),
     ("{volumes} {tmp}/slice.nii", "2D, but {volumes}/best takes volumes; give the whole one"),
     ("{pictures} {tmp}/nothing.png", "no such file"), ("{pictures} {tmp}/empty", "no images"),
     ("{pictures} {image} {tmp}/images/2.png", "rename one"), ("{tmp}/made-up {image}", "made-up"),
     ("{pictures} {image} -o {tmp}/file", "{tmp}/file"),
     ("{channels} {case}_t1.nii.gz,{case}_flair.nii.gz", "give the files in the order flair, t1"),
     ("{channels} {tmp}", "no images of the channels flair, t1 in it"),
     ("{pictures} {tmp}/png/2.png -o {tmp}/png", "2-mask.png: would be"),
     ("{pictures} {tmp}/tif/2.TIF -o {tmp}/tif", "2-mask.TIF: would be"),
     ("{pictures} {tmp}/json/2.png -o {tmp}/json", "2.json: would be")],
)  # fmt: skip
def test_bad_input_is_one_line(bad, tmp_path, words, says, capsys):
    words = [word.format(**bad) for word in words.split()]
    output = [] if "-o" in words else ["-o", tmp_path / "out"]
    assert says.format(**bad) in one_line(capsys, p.main, *words, *output)
    assert not [p for p in (tmp_path / "out").glob("*") if "2" not in p.name]  # nothing of the bad image
    for name in THERE:
        assert (bad["tmp"] / name).read_bytes() == PRECIOUS


def test_predictions_are_replaced_by_later_ones(pictures, tmp_path):
    """Those of all steps, then of the last one, then of all again; another image's file is left alone."""
    image = str(pictures.parent / "raw" / "images" / "2.png")
    (tmp_path / "3.json").write_text("not of this image")
    for more in (["--all-steps"], [], ["--all-steps"]):
        (tmp_path / "2-mask.png").unlink(missing_ok=True)
        p.main([str(pictures), image, "-o", str(tmp_path), *more])
        assert (tmp_path / "2-mask.png").exists()
    assert (tmp_path / "3.json").read_text() == "not of this image"


def test_every_seed_has_its_own_scores(pictures, capsys):
    """And pictures as they are have one grid."""
    words = ["test", str(pictures), "--split", "test", "--sampler", "ddim", "--sampling-steps", "2"]
    e.main([*words, "--seed", "3", "--seeds", "2"])
    names = {path.name for path in (pictures / "scores").iterdir()}
    assert names == {f"test-best-ddim-2-seed{n}.{kind}" for n in (3, 4) for kind in ("csv", "json")}
    table = capsys.readouterr().out
    assert "ddim seed 3" in table and "ddim seed 4" in table and "own grid" not in table
