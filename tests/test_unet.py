"""The network: sizes, dtypes, what it depends on, and its convolutions against XLA's own."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from scipy.ndimage import correlate, map_coordinates
from scipy.special import softmax

import support.machine.cpu_convolution as c
import unet as u
from support.machine import attention

SMALL = {"image_channels": 1, "classes": 3, "channels": (4, 8), "heads": 2, "head_dim": 4}


def make(shape, **settings):
    """A network whose parameters are all random, so that no scale is 1 and no shift 0. They are drawn in
    NumPy, as the inputs are, since JAX would compile a program for every shape."""
    settings = SMALL | {"patch_shape": shape, "strides": ((2,) * len(shape),)} | settings
    rng = np.random.default_rng(5)

    def draw(like):
        center, spread = (0, np.sqrt(2 / np.prod(like.shape[:-1]))) if len(like.shape) > 1 else (1, 0.3)
        return jax.device_put(rng.normal(center, spread, like.shape).astype(like.dtype))

    return jax.tree.map(draw, eqx.filter_eval_shape(u.UNet, **settings, key=jax.random.key(0)))


@eqx.filter_jit
def call(model, *args):
    return model(*args)


def inputs(shape, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    return [jax.device_put(rng.normal(size=(*shape, n)).astype(np.float32)) for n in (1, classes)]


@pytest.mark.parametrize(
    "shape, extra",
    [((1, 1), {}), ((3, 10, 5), {"strides": ((2, 2, 1),)}), ((1, 1, 1), {"transformer": False})],
)
def test_any_size_2d_and_3d(shape, extra):
    """Also smaller and larger than the patch of the training."""
    model = make((8,) * len(shape), **extra)
    image, x_t = inputs(shape)
    logits = call(model, image, jnp.array(3), x_t)
    assert logits.shape == (*shape, 3) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


def test_the_output_depends_on_t_unless_switched_off():
    """Where the time is added before the norm, as in the authors' network, this difference is zero."""
    image, x_t = inputs((8, 8))
    model, off = make((8, 8)), make((8, 8), time_dim=0)
    at = [np.array(call(model, image, jnp.array(t), x_t)) for t in (1, 2, 1001)]
    assert np.abs(at[0] - at[2]).max() > 1e-2 and np.abs(at[0] - at[1]).max() > 1e-4
    first, last = (np.array(call(off, image, jnp.array(t), x_t)) for t in (1, 1001))
    assert (first == last).all()


def test_every_parameter_gets_a_gradient():
    model = make((8, 8), self_condition=True)
    image, x_t = inputs((8, 8))
    loss = lambda m: jnp.sum(m(image, jnp.array(500), x_t, x_t) ** 2)  # noqa: E731
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(model)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    assert [jax.tree_util.keystr(path) for path, leaf in leaves if not np.abs(leaf).max() > 0] == []


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8)])
def test_all_convolutions_and_products_run_in_bfloat16(shape):
    """Read from the program that is compiled: no float32 operand reaches a convolution, and of the
    matrix products only those of the time embedding."""
    model = make(shape, dtype="bfloat16")
    image, x_t = inputs(shape)
    text = jax.jit(lambda *args: model(*args)).lower(image, jnp.array(1), x_t).as_text()
    operands = re.findall(r"stablehlo\.convolution.*?: \((.*?)\) -> ", text)
    assert len(operands) >= 21 and all("bf16" in o and "f32" not in o for o in operands)
    products = re.findall(r"stablehlo\.dot_general.*?: \((.*?)\) -> ", text)
    assert len(products) > 5
    assert all("f32" not in o for o in products if not o.startswith("tensor<256xf32>"))
    for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)):
        assert leaf.dtype == jnp.float32
    if len(shape) == 2:
        exact, half = (np.array(call(m, image, jnp.array(1), x_t)) for m in (make(shape), model))
        assert half.dtype == np.float32
        assert np.abs(half - exact).mean() < 0.05 * np.abs(exact).mean()


def test_rematerialisation_changes_nothing_but_memory():
    """The network has two levels of five blocks, and three blocks between them; that of the gradients has one
    level."""
    image, x_t = inputs((8, 8))
    loss = lambda m: jnp.sum(m(image, jnp.array(9), x_t) ** 2)  # noqa: E731

    def gradient(remat):
        model = make((8, 8), channels=(4,), strides=(), transformer=False, remat=remat)
        return jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(model))

    for remat, blocks in ((0, 0), (1, 5), (2, 10), (3, 13)):
        program = str(eqx.filter_make_jaxpr(loss)(make((8, 8), remat=remat))[0])
        assert len(re.findall(r"= (remat|checkpoint)", program)) == blocks
    for a, b in zip(gradient(0), gradient(2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * np.abs(a).max() + 1e-3)


@pytest.mark.slow
def test_a_large_network_on_a_cpu_stores_less_and_learns_the_same(monkeypatch):
    """Its gradients are those of a network that stores everything, and with `remat` it needs less again:
    XLA must not find out that it computes some things twice."""
    image, x_t = inputs((64, 64))
    large = {"channels": (32, 32), "convolutions": "cpu", "transformer": False}
    loss = lambda m: jnp.sum(jax.vmap(m)(image[None], jnp.array([9]), x_t[None]) ** 2)  # noqa: E731

    def compiled(**settings):
        model = make((64, 64), **large, **settings)
        weights, rest = eqx.partition(model, eqx.is_inexact_array)
        gradient = jax.jit(
            jax.grad(lambda weights: loss(eqx.combine(weights, rest))),
            compiler_options=model.compiler_options((64, 64)),
        )
        program = gradient.lower(weights).compile()
        return jax.tree.leaves(program(weights)), program.memory_analysis().temp_size_in_bytes

    costly, less = compiled()
    _, least = compiled(remat=3)
    monkeypatch.setattr(c, "saves_memory", lambda *_: False)
    everything, more = compiled()
    assert less < 0.7 * more and least < 0.9 * less
    for a, b in zip(costly, everything, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
    "way, size",
    [(c._convolve_by_slices, (2, 5, 6, 7)), (c._convolve_in_bands, (3, 17, 9)),
     (c._convolve_in_bands, (2, 40, 8)), (c._convolve_in_bands, (1, 1, 1))],
)  # fmt: skip
def test_convolutions_in_parts_equal_the_native_one(way, size):
    """Value and both gradients, of a batch, in one program and rematerialised."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*size, 3)), rng.normal(size=(*(3,) * (len(size) - 1), 3, 4))

    @jax.jit
    def both(x, kernel):
        found = []
        for convolve in (way, c.convolve):
            value, pull = jax.vjp(jax.vmap(jax.checkpoint(convolve), (0, None)), x, kernel)
            found.append((value, *pull(jnp.cos(value))))
        return found

    for ours, native in zip(*both(x.astype(np.float32), kernel.astype(np.float32)), strict=True):
        np.testing.assert_allclose(ours, native, rtol=1e-4, atol=1e-4)


# --- Figure 2, written a second time, in NumPy ---


def gelu(x):
    """Its approximation by tanh (Hendrycks & Gimpel 2016), as the authors use it."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def convolved(x, kernel):
    """Beyond the image there is 0."""
    parts = [
        sum(correlate(x[..., i], kernel[..., i, o], mode="constant") for i in range(x.shape[-1]))
        for o in range(kernel.shape[-1])
    ]
    return np.stack(parts, -1)


def normed(x, norm, axes):
    y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    return y * np.array(norm.scale) + np.array(norm.shift)


def instance_normed(x, norm):
    return normed(x, norm, (0, 1))


def linear(x, layer):
    return x @ np.array(layer.kernel) + np.array(layer.bias)


def embedded(t, T, dim):
    angle = [10_000 * t / T / 10_000 ** (i / (dim // 2)) for i in range(dim // 2)]
    return np.array([*np.sin(angle), *np.cos(angle)])


def res_block(x, block, embedding):
    y = instance_normed(convolved(x, np.array(block.conv_1.kernel)), block.norm_1)
    y = y + linear(gelu(embedding), block.time)
    y = instance_normed(convolved(gelu(y), np.array(block.conv_2.kernel)), block.norm_2)
    return gelu(x + y)


def transformed(x, layer):
    """A query at a time, and a head at a time."""
    grid, channels = x.shape[:2], x.shape[-1]
    # Between the places of the table its values change linearly; both grids fill the same field of view.
    scale = [new / old for new, old in zip(grid, layer.position.shape, strict=False)]
    where = [(np.arange(n) + 0.5) / s - 0.5 for n, s in zip(grid, scale, strict=True)]
    where = np.meshgrid(*where, indexing="ij")
    table = np.array(layer.position, np.float64)
    position = [map_coordinates(table[..., i], where, order=1, mode="nearest") for i in range(channels)]
    x = (x + np.stack(position, -1)).reshape(-1, channels)
    query, key, value = np.split(linear(normed(x, layer.norm_1, -1), layer.query_key_value), 3, axis=-1)
    heads, out = np.split(np.arange(query.shape[-1]), layer.heads), np.zeros_like(query)
    for head in heads:
        for i in range(len(x)):
            weight = softmax(key[:, head] @ query[i, head] / np.sqrt(len(head)))
            out[i, head] = weight @ value[:, head]
    x = x + linear(out, layer.out)
    x = x + linear(gelu(linear(normed(x, layer.norm_2, -1), layer.mlp_1)), layer.mlp_2)
    return x.reshape(*grid, channels)


def figure_2(model, image, t, x_t, x_0_hat):
    """A network of two levels and stride (2, 1), of Figure 2, step by step and in float64."""
    x = np.concatenate([image, x_t, x_0_hat], -1)
    height, width, _ = x.shape
    x = np.concatenate([x, x[-1:]], 0) if height % 2 else x
    embedding = embedded(t, 1001, 8)
    (top_1, top_2), (low_1, low_2) = model.down
    stem = gelu(instance_normed(convolved(x, np.array(model.stem.kernel)), model.stem_norm))
    a = res_block(stem, top_1, embedding)
    b = res_block(a, top_2, embedding)
    down, norm = model.down_sample[0]
    kernel = np.array(down.kernel)
    halved = b[0::2] @ kernel[0, 0] + b[1::2] @ kernel[1, 0]
    c = instance_normed(halved, norm)
    d = res_block(c, low_1, embedding)
    e = res_block(d, low_2, embedding)
    y = transformed(res_block(e, model.bottom_1, embedding), model.transformer)
    y = res_block(y, model.bottom_2, embedding)
    for skip, block in zip((e, d, c), model.up[1], strict=True):
        y = res_block(y + skip, block, embedding)
    up, norm = model.up_sample[0]
    doubled = np.empty((2 * len(y), width, 4))
    for i in range(2):
        doubled[i::2] = y @ np.array(up.kernel)[:, i, 0]
    y = instance_normed(doubled, norm)
    for skip, block in zip((b, a, stem), model.up[0], strict=True):
        y = res_block(y + skip, block, embedding)
    return linear(y, model.head)[:height]


# (7, 5) is padded, and position is interpolated; without a prediction the network is given zeros.
@pytest.mark.parametrize("shape, known", [((8, 6), False), ((7, 5), True)])
def test_the_network_is_figure_2(shape, known):
    settings = {"strides": ((2, 1),), "channels": (4, 6), "head_dim": 3, "time_dim": 8}
    model = make((8, 6), self_condition=True, **settings)
    image, x_t = inputs(shape)
    x_0_hat = inputs(shape, seed=1)[1]
    ours = call(model, image, jnp.array(251), x_t, x_0_hat if known else None)
    arrays = (np.array(a, np.float64) for a in (x_t, known * x_0_hat))
    expected = figure_2(model, np.array(image, np.float64), 251, *arrays)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_first_weights_keep_the_scale_of_what_passes():
    """He et al. (2015) before a GELU, LeCun before a sum: the variances 2 and 1 over the number of inputs."""
    size = 200

    @jax.jit
    def passed(key, x):
        down, up = u.Down((2, 2), size, size, key=key), u.Up((2, 2), size, size, key=key)
        convolution = u.Conv(2, size, size, convolutions="native", key=key)
        transformer = u.TransformerLayer((32, 32), 64, 2, 4, key=key)
        linear = u.Linear(size, size, key=key)
        return transformer.position, linear(x), down(x), up(x), convolution(x)[1:3, 1:3]

    found = passed(jax.random.key(0), np.random.default_rng(1).normal(size=(4, 4, size)).astype(np.float32))
    np.testing.assert_allclose([np.std(y) for y in found], [0.02, 1, *[np.sqrt(2)] * 3], rtol=0.05)


def test_the_variance_in_one_pass_is_good_where_the_mean_is_far_from_0():
    """At a mean of 200 standard deviations, where bfloat16 itself has two values per deviation."""
    x = (200 + np.random.default_rng(0).normal(size=(64, 64, 2))).astype(jnp.bfloat16)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean((0, 1))) / exact.std((0, 1))
    found = np.array(u.Norm(2)(jnp.array(x)), np.float64)
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("stride", [(2, 2), (2, 2, 1), (3, 1, 2)])
def test_strided_convolutions_equal_xlas(stride):
    dims = len(stride)
    spatial = "DHW"[-dims:]
    how = {"padding": "VALID", "dimension_numbers": (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")}

    @jax.jit
    def ours_and_native(key):
        x = jax.random.normal(key, (*(2 * s for s in stride), 3))
        down, up = u.Down(stride, 3, 5, key=key), u.Up(stride, 3, 5, key=key)
        down_sampled = lax.conv_general_dilated(x[None], down.kernel, stride, **how)
        # XLA's transposed convolution correlates.
        kernel = jnp.flip(jnp.moveaxis(up.kernel, 0, -2), range(dims))
        up_sampled = lax.conv_transpose(x[None], kernel, stride, **how)
        return (down(x), up(x)), (down_sampled[0], up_sampled[0])

    for ours, native in zip(*ours_and_native(jax.random.key(0)), strict=True):
        np.testing.assert_allclose(ours, native, rtol=1e-5, atol=1e-5)


def test_time_embedding_tells_all_times_apart():
    embed = np.array(jax.jit(jax.vmap(lambda t: u.time_embedding(t, 1001)))(jnp.arange(1, 1002)))
    assert embed.dtype == np.float32
    assert np.linalg.norm(embed[1:] - embed[:-1], axis=1).min() > 0.1


PAPER = {  # millions without diffusion, with, with self-conditioning, computed from the authors' layers
    "muscle_us": (1, 2, (12.587, 13.336, 13.336)),
    "amos_ct": (1, 16, (33.383, 34.145, 34.159)),
    "prostate_mr": (1, 9, (33.383, 34.139, 34.147)),
    "brats_mr": (4, 2, (33.385, 34.135, 34.137)),
}


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts(name):
    """Those of the authors' code of the paper's time, but for the two vectors of its last LayerNorm."""
    import train

    channels, classes, expected = PAPER[name]
    for strategy, millions in zip(("no_diff", "rec_xT", "sc_xt"), expected, strict=True):
        strides = ["--strides", "2x2x2,2x2x2,2x2x2"] if name == "prostate_mr" else []  # as theirs were then
        config, _ = train.parse_config(["--dataset", name, "--strategy", strategy, *strides])
        model = eqx.filter_eval_shape(train.make_network, config, channels, classes, jax.random.key(0))
        count = sum(x.size for x in jax.tree.leaves(model) if isinstance(x, jax.ShapeDtypeStruct))
        assert round((count + 2 * 256) / 1e6, 3) == millions


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_attention_in_parts_is_jaxs(dtype, tolerance):
    """Heads in rows, with a remainder (1100 is no multiple of 512), and whole heads. Some logits are large,
    which float32 must survive."""
    inputs = 3 * np.random.default_rng(0).normal(size=(3, 1100, 2, 4))
    inputs[0, 0] *= 50
    inputs = [jnp.asarray(one, dtype) for one in inputs]

    def value_and_gradient(attend):
        def total(*inputs):
            return jnp.sum(jnp.sin(attend(*inputs).astype(jnp.float32)))

        return jax.jit(lambda *inputs: (attend(*inputs), *jax.grad(total, (0, 1, 2))(*inputs)))(*inputs)

    expected = value_and_gradient(jax.nn.dot_product_attention)
    for rows in (512, 2000):
        found = value_and_gradient(partial(attention.attend, most=1100 * rows))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_gradients_of_many_rows_are_summed_in_float32():
    """In bfloat16 the sum over 275 parts would be off by two percent."""
    inputs = jax.random.normal(jax.random.key(0), (3, 1100, 1, 16), jnp.bfloat16)

    def gradients(rows):
        def total(*inputs):
            return jnp.sum(attention.attend(*inputs, 1100 * rows).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(total, (1, 2)))(*inputs)

    for found, whole in zip(gradients(4), gradients(2000), strict=True):
        found, whole = (np.asarray(x, np.float32) for x in (found, whole))
        assert np.linalg.norm(found - whole) < 5e-3 * np.linalg.norm(whole)
