"""Columns side by side compute what the usual layout computes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support.tpu_layout as p
import unet as u

CASES = [  # patch, strides, channels, and by hand: the axis, and the columns at each level
    ((13, 21), ((2, 2), (2, 2)), (32, 64, 128), (1, [4, 2, 1])),  # padded to 16 x 24
    ((7, 9), ((2, 3),), (32, 32), (0, [2, 1])),  # 9 columns are no pairs
    (
        (8, 8, 8),
        ((2, 2, 1), (2, 2, 2)),
        (32, 64, 128),
        (1, [4, 2, 1]),
    ),  # the last axis would fold only by two
    ((6, 8, 13), ((2, 2, 2), (2, 2, 2)), (32, 64, 128), (2, [4, 2, 1])),
]


@pytest.mark.parametrize("shape, strides, channels, expected", CASES)
def test_columns_side_by_side_give_the_same_logits_and_gradient(shape, strides, channels, expected):
    settings = {"image_channels": 1, "classes": 3, "channels": channels, "strides": strides, "heads": 2,
                "head_dim": 4, "time_dim": 16, "patch_shape": shape, "key": jax.random.key(0)}  # fmt: skip
    stride = np.prod(strides, axis=0)
    padded = [-(-size // s) * s for size, s in zip(shape, stride.tolist(), strict=True)]
    assert p.columns_of(padded, channels, strides) == expected
    image = jax.random.normal(jax.random.key(1), (*shape, 1))
    x_t = jax.random.normal(jax.random.key(2), (*shape, 3))

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(network):
        logits = network(image, jnp.array(7), x_t)
        return jnp.sum(jnp.sin(logits)), logits

    (_, plain), plain_gradient = run(u.UNet(**settings, convolutions="native"))
    (_, folded), folded_gradient = run(u.UNet(**settings, convolutions="tpu"))
    np.testing.assert_allclose(folded, plain, rtol=0, atol=1e-5 * float(jnp.abs(plain).max()))
    both = zip(jax.tree.leaves(folded_gradient), jax.tree.leaves(plain_gradient), strict=True)
    for a, b in both:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()))


def test_a_folded_image_has_neighbours_side_by_side_and_comes_back():
    x = np.arange(2 * 6 * 5 * 3, dtype=np.float32).reshape(2, 6, 5, 3)
    folded = p.fold_columns(jnp.array(x), axis=1, columns=2)
    assert folded.shape == (2, 3, 5, 6)
    np.testing.assert_array_equal(folded[1, 2, 4], [*x[1, 4, 4], *x[1, 5, 4]])
    np.testing.assert_array_equal(p.unfold_columns(folded, axis=1, columns=2), x)


def test_the_features_of_the_papers_networks_fill_the_lanes():
    assert p.columns_of((480, 512), (32, 64, 128, 256), ((2, 2),) * 3) == (1, [4, 2, 1, 1])
    prostate = ((2, 2, 1), (2, 2, 2), (2, 2, 2))
    assert p.columns_of((256, 256, 32), (32, 64, 128, 256), prostate) == (1, [4, 2, 1, 1])


def test_the_variance_in_one_pass_is_good_where_the_mean_is_far_from_0():
    """At a mean of 200 standard deviations, where bfloat16 itself has two values per deviation."""
    x = (200 + np.random.default_rng(0).normal(size=(64, 64, 2))).astype(jnp.bfloat16)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean((0, 1))) / exact.std((0, 1))
    found = np.array(u.Norm(2)(jnp.array(x)), np.float64)
    np.testing.assert_allclose(found, expected, atol=0.02)
