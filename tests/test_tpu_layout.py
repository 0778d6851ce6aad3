"""Pairs of voxels side by side compute what the usual layout computes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import inputs, make

import support.machine.tpu_layout as p
import unet as u
from support.machine.devices import make_mesh, shardings

CASES = [  # patch, strides, channels, size of the time embedding, and by hand: the axes of the pairs
    ((13, 21), ((2, 2), (2, 2)), (32, 64, 128), 16, [(0, 1), (1,), ()]),  # padded to 16 x 24
    ((7, 9), ((2, 3),), (32, 32), 0, [(0,), ()]),  # a stride of 3 would divide a pair
    ((12, 16), ((3, 2), (2, 2)), (32, 32, 128), 16, [(0, 1), (0, 1), ()]),  # unless pairs become pairs
    ((6, 8, 7), ((2, 2, 1), (2, 2, 2)), (16, 48, 128), 16, [(0, 1), (1,), ()]),  # padded to 8 x 8 x 8
]


def both_layouts(shape, strides, channels, time_dim):
    """A network in the usual layout and in that of a TPU, and what both are given."""
    settings = {"strides": strides, "channels": channels, "time_dim": time_dim}
    image, x_t = inputs(shape)
    networks = [make(shape, **settings, convolutions=way) for way in ("native", "tpu")]
    return networks, (image, jnp.array(7), x_t)


@pytest.mark.parametrize("shape, strides, channels, time_dim, expected", CASES)
def test_pairs_side_by_side_give_the_same_logits(shape, strides, channels, time_dim, expected):
    assert p.paired_axes(channels, strides) == expected
    networks, given = both_layouts(shape, strides, channels, time_dim)
    plain, folded = (eqx.filter_jit(lambda network: p.in_layout(network)(*given))(n) for n in networks)
    np.testing.assert_allclose(folded, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_pairs_side_by_side_give_the_same_gradient():
    """In 3D: what differs between the other cases is linear, and its transpose is JAX's."""
    networks, given = both_layouts(*CASES[3][:4])
    gradient = eqx.filter_jit(eqx.filter_grad(lambda network: jnp.sum(jnp.sin(p.in_layout(network)(*given)))))
    plain, folded = (jax.tree.leaves(gradient(network)) for network in networks)
    for a, b in zip(folded, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_the_norm_of_moved_pairs_in_bfloat16_leaves_out_what_lies_outside():
    @jax.jit
    def found_and_expected(image):
        moved = p.fold_pairs(jnp.pad(image, [(1, 1), (1, 1), (0, 0)], constant_values=100), (0, 1))
        found = p.PairNorm(u.Norm(12), columns=4, moved=(0, 1))(moved)
        return p.unfold_pairs(found, (0, 1))[1:-1, 1:-1].astype(jnp.float32), u.Norm(3)(image)

    image = np.random.default_rng(0).normal(size=(6, 8, 3)).astype(jnp.bfloat16)
    found, expected = found_and_expected(image)
    np.testing.assert_allclose(found, expected.astype(np.float32), atol=0.02)


def test_the_features_of_the_papers_networks_fill_the_lanes():
    channels, expected = (32, 64, 128, 256), [(0, 1), (1,), (), ()]
    for strides in (((2, 2),) * 3, ((2, 2, 2),) * 3, ((2, 2, 1), (2, 2, 2), (2, 2, 2))):
        assert p.paired_axes(channels, strides) == expected


@pytest.mark.parametrize("axes", [(), (1,), (0, 1)])
def test_a_volume_is_not_gathered_where_it_is_split_over_devices(axes):
    mesh = make_mesh("data=2,space=4", jax.devices()[:8])
    per_voxel, _, _ = shardings(mesh)
    taps = jax.random.normal(jax.random.key(0), (3, 3, 3, 4, 4))
    first, second = (p.PairConv(p.fold_conv(taps, axes), moved) for moved in ((), axes))

    def convolved(x):
        return second(jax.nn.gelu(first(p.fold_pairs(x, axes))))

    x = jax.ShapeDtypeStruct((4, 8, 16, 8, 4), jnp.float32, sharding=per_voxel)
    text = jax.jit(jax.vmap(convolved), out_shardings=per_voxel).lower(x).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text
