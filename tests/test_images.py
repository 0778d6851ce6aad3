"""Do images, labels and masks stay where they are when they are resampled?"""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from nibabel.affines import apply_affine

from support.raw import images


def ball(shape, centre, radius):
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) <= radius**2


def middle(weight, affine):
    """The centre of mass in the world, in mm or pixels."""
    places = np.moveaxis(np.indices((*weight.shape, 1)[:3]), 0, -1)
    return np.average(apply_affine(affine, places).reshape(-1, 3), axis=0, weights=weight.ravel())


PLANE = product([(64, 80), (65, 81), (67, 78)], [0.5, 1.1, 1.25, 4 / 3, 1.5, 2, 2.02, 2.5, 3, 4, 5.05, 8])
SPACE = product([(24, 29, 26)], [1.25, 1.5, 2, 3])


@pytest.mark.parametrize("size, factor", [*PLANE, *SPACE])
def test_image_label_and_mask_stay_together(size, factor):
    """On average over places: a border between voxels is rounded, but not always to the same side."""
    far = []
    affine = np.diag([0.5, 2, 3, 1])  # mm per voxel
    spacing = (factor * np.diag(affine)[: len(size)]).tolist()
    reach = factor * np.ceil(12 / factor)  # whole new voxels, over which centres are spread evenly
    for i in range(150 if factor > 4 else 60):
        place = i * np.array([0.8192, 0.6710, 0.5497])[: len(size)] % 1 - 0.5
        truth = ball(size, np.array(size) / 2 + reach * place, min(size) / 4)
        whole = images.Volume(truth[..., None].astype(np.float32), truth.astype(np.uint8), affine)
        new = images.resample(whole, spacing, Path("ball"), smooth=True)
        classes = np.eye(2, dtype=np.float32)[new.label]  # a network that is sure of the label
        mask = images.most_probable(classes, new.affine, images.Grid((*size, 1)[:3], affine))
        there = middle(truth, affine)
        found = (middle(new.image, new.affine), middle(new.label, new.affine), middle(mask, affine))
        far.append([(place - there)[: len(size)] / np.diag(affine)[: len(size)] for place in found])
    assert np.abs(np.mean(far, axis=0)).max() < 0.1  # voxels of the file


@pytest.mark.parametrize("size, factor", [((40, 40), 2), ((41, 42), 3), ((40, 40), 1.5), ((40, 42), 4)])
def test_straight_borders_are_not_moved(size, factor):
    """Every border of a square, wherever it lies, is as often rounded to one side as to the other."""
    larger = []
    for a, b in product(range(12), repeat=2):
        label = np.zeros(size, np.uint8)
        label[5 + a : 20 + b, 5 + b : 20 + a] = 1
        volume = images.Volume(np.zeros((*size, 1), np.float32), label, np.eye(4))
        new = images.resample(volume, (float(factor),) * 2, Path("square"), smooth=True)
        back = images.most_probable(np.eye(2)[new.label], new.affine, images.Grid((*size, 1), np.eye(4)))
        larger.append([middle(new.label, new.affine)[:2] - middle(label, np.eye(4))[:2],
                       middle(back, np.eye(4))[:2] - middle(label, np.eye(4))[:2]])  # fmt: skip
    assert np.abs(np.mean(larger, axis=0)).max() < 0.1


def test_resampling_keeps_volumes_of_classes_and_ignored_voxels():
    label = np.zeros((60, 60), np.uint8)
    label[10:31, 12:40], label[31:50, 12:40], label[:, 50:] = 1, 3, images.IGNORED
    new = images.resample(
        images.Volume(np.zeros((60, 60, 1), np.float32), label, np.eye(4)), (2.0, 2.0), Path("x")
    )
    assert set(np.unique(new.label)) == {0, 1, 3, images.IGNORED} and new.label.dtype == np.uint8
    for value in (1, 3, images.IGNORED):
        assert np.isclose(4 * (new.label == value).sum(), (label == value).sum(), rtol=0.06)


def test_an_object_as_large_as_a_new_voxel_stays():
    for a, b in product(range(20, 24), repeat=2):
        label = np.zeros((48, 48), np.uint8)
        label[a : a + 2, b : b + 2] = 1
        new = images.resample(
            images.Volume(np.zeros((48, 48, 1), np.float32), label, np.eye(4)), (2.0, 2.0), Path("x")
        )
        assert new.label.sum() == 1


@pytest.mark.parametrize("size, factor", [(64, 1.5), (66, 2.5), (64, 2.0), (80, 4 / 3)])
def test_rounding_of_the_factor_does_not_matter(size, factor):
    """As in 0.3 / 0.2, which is a little less than 1.5."""
    size, new = np.array([size]), np.array([round(size / factor)])
    first = [images.first_voxel(size, new, np.array([factor + d])) for d in (-1e-12, 0, 1e-12)]
    assert np.ptp(first) < 1e-6
    rest = (first[0] + factor * np.arange(new[0])) % 1
    assert np.abs(rest - 0.5).min() > 0.1  # none half-way
