"""f_theta: the U-Net of Figure 2 and Section 5.3 of Fu et al. (2023), in 2D and 3D.

The modules take ONE example with channels last, which is clearly faster on a CPU; the caller maps
over the batch with `jax.vmap`. One place decides the precision: `UNet.__call__` casts its input to
`dtype`, and convolutions and matrix products keep the type of their input. Parameters, norms, the
sums of softmax and the time embedding stay float32, and logits are returned as float32 (rounded to
bfloat16 by the last layer).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from support.machine import cpu_convolution
from support.machine.attention import attend
from support.machine.cpu_convolution import CONVOLUTIONS

Features = Float[Array, "*spatial channels"]


# --- Convolutions and products -------------------------------------------------------------------


class Conv(eqx.Module):
    """A 3 x 3 (x 3) convolution without bias, stride 1, zero padding, computed in one of the ways of
    support/machine/cpu_convolution.py."""

    kernel: Float[Array, "*taps c_in c_out"]
    convolutions: str = eqx.field(static=True)

    def __init__(self, dims: int, c_in: int, c_out: int, *, convolutions: str, key: PRNGKeyArray):
        self.kernel = _he_normal(key, (*(3,) * dims, c_in, c_out), fan_in=3**dims * c_in)
        self.convolutions = convolutions

    def __call__(self, x: Float[Array, "*spatial c_in"]) -> Float[Array, "*spatial c_out"]:
        return checkpoint_name(CONVOLUTIONS[self.convolutions](x, self.kernel.astype(x.dtype)), "convolved")


class Down(eqx.Module):
    """A convolution whose kernel is as large as its stride: every voxel is used once, so it is a
    matrix product over blocks of voxels."""

    kernel: Float[Array, "*stride c_in c_out"]

    def __init__(self, stride: Sequence[int], c_in: int, c_out: int, *, key: PRNGKeyArray):
        fan_in = math.prod(stride) * c_in
        self.kernel = _he_normal(key, (*stride, c_in, c_out), fan_in=fan_in)

    def __call__(self, x: Float[Array, "*spatial c_in"]) -> Float[Array, "*smaller c_out"]:
        *stride, c_in, c_out = self.kernel.shape
        dims = len(stride)
        blocks = [n for size, s in zip(x.shape[:-1], stride, strict=True) for n in (size // s, s)]
        x = x.reshape(*blocks, c_in)
        x = x.transpose(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2), 2 * dims)
        x = x.reshape(*x.shape[:dims], -1)
        return x @ self.kernel.reshape(-1, c_out).astype(x.dtype)


class Up(eqx.Module):
    """The transpose of `Down`: every voxel becomes a block of voxels."""

    kernel: Float[Array, "c_in *stride c_out"]

    def __init__(self, stride: Sequence[int], c_in: int, c_out: int, *, key: PRNGKeyArray):
        self.kernel = _he_normal(key, (c_in, *stride, c_out), fan_in=c_in)

    def __call__(self, x: Float[Array, "*spatial c_in"]) -> Float[Array, "*larger c_out"]:
        c_in, *stride, c_out = self.kernel.shape
        dims = len(stride)
        size = [n * s for n, s in zip(x.shape[:-1], stride, strict=True)]
        x = x @ self.kernel.reshape(c_in, -1).astype(x.dtype)
        x = x.reshape(*x.shape[:-1], *stride, c_out)
        x = x.transpose(*(axis for n in range(dims) for axis in (n, dims + n)), 2 * dims)
        return x.reshape(*size, c_out)


class Linear(eqx.Module):
    """A matrix product and a bias over the last axis; on a feature map, this is a 1 x 1 (x 1) convolution."""

    kernel: Float[Array, "c_in c_out"]
    bias: Float[Array, "c_out"]

    def __init__(self, c_in: int, c_out: int, *, key: PRNGKeyArray):
        self.kernel = jax.random.normal(key, (c_in, c_out)) / math.sqrt(c_in)
        self.bias = jnp.zeros(c_out)

    def __call__(self, x: Float[Array, "... c_in"]) -> Float[Array, "... c_out"]:
        return x @ self.kernel.astype(x.dtype) + self.bias.astype(x.dtype)


def _he_normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Array:
    return jax.random.normal(key, shape) * math.sqrt(2 / fan_in)


# --- Norms and time -----------------------------------------------------------------------------


class Norm(eqx.Module):
    """Normalisation to zero mean and unit variance in float32, then a scale and a shift per channel;
    `more_shift` is added to the shift. Over the voxels of an example it is an InstanceNorm, over the channels
    a LayerNorm; features in another layout bring their own `mean`."""

    scale: Float[Array, "channels"]
    shift: Float[Array, "channels"]
    over_channels: bool = eqx.field(static=True)

    def __init__(self, channels: int, *, over_channels: bool = False):
        self.scale, self.shift = jnp.ones(channels), jnp.zeros(channels)
        self.over_channels = over_channels

    def __call__(
        self, x: Features, more_shift: Float[Array, "channels"] | int = 0, mean: Callable | None = None
    ) -> Features:
        if mean is None:
            axes = -1 if self.over_channels else tuple(range(x.ndim - 1))
            mean = partial(jnp.mean, axis=axes, keepdims=True)
        y = x.astype(jnp.float32)
        if x.dtype == jnp.bfloat16:  # in one pass: the rounding of E[y^2] - E[y]^2 is far below that of x
            variance = jnp.maximum(mean(jnp.square(y)) - jnp.square(mean(y)), 0)
            y = y - mean(y)
        else:
            y = y - checkpoint_name(mean(y), "statistics")
            variance = checkpoint_name(mean(jnp.square(y)), "statistics")
        return (y * (self.scale * jax.lax.rsqrt(variance + 1e-5)) + (self.shift + more_shift)).astype(x.dtype)


def time_embedding(t: Int[Array, ""], T: int, dim: int = 256) -> Float[Array, "dim"]:
    """Sinusoids of t / T * 10000 at wavelengths from 2 pi to about 20000 pi (§5.3). They are
    computed in float32, since bfloat16 would merge the 1,001 times into about 500."""
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(dim // 2) / (dim // 2))
    angle = t.astype(jnp.float32) / T * 10_000 * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])


# --- Blocks -------------------------------------------------------------------------------------


class ResBlock(eqx.Module):
    """conv, norm, (+ time,) GELU, conv, norm, + input, GELU.

    NB: the time is added AFTER the norm, to its shift. If it were added before, as in the authors' code,
    the norm would subtract it again, and the network would never see t.
    """

    conv_1: Conv
    norm_1: Norm
    time: Linear | None
    conv_2: Conv
    norm_2: Norm

    def __init__(self, dims: int, channels: int, time_dim: int, *, convolutions: str, key: PRNGKeyArray):
        key_1, key_2, key_time = jax.random.split(key, 3)
        self.conv_1 = Conv(dims, channels, channels, convolutions=convolutions, key=key_1)
        self.norm_1 = Norm(channels)
        self.time = Linear(time_dim, channels, key=key_time) if time_dim else None
        self.conv_2 = Conv(dims, channels, channels, convolutions=convolutions, key=key_2)
        self.norm_2 = Norm(channels)

    def __call__(self, x: Features, embedding: Float[Array, "time_dim"] | None) -> Features:
        time = 0 if self.time is None else self.time(jax.nn.gelu(embedding))
        y = jax.nn.gelu(self.norm_1(self.conv_1(x), time))
        y = self.norm_2(self.conv_2(y))
        return jax.nn.gelu(x + y)


class TransformerLayer(eqx.Module):
    """Self-attention and a perceptron on the voxels of the lowest grid, each after a LayerNorm and
    added to its input. Position vectors are learned on the grid of the training patch and
    interpolated linearly to any other grid."""

    position: Float[Array, "*grid channels"]
    norm_1: Norm
    query_key_value: Linear
    out: Linear
    norm_2: Norm
    mlp_1: Linear
    mlp_2: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, grid: Sequence[int], channels: int, heads: int, head_dim: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        self.position = 0.02 * jax.random.normal(keys[0], (*grid, channels))
        self.norm_1 = Norm(channels, over_channels=True)
        self.query_key_value = Linear(channels, 3 * heads * head_dim, key=keys[1])
        self.out = Linear(heads * head_dim, channels, key=keys[2])
        self.norm_2 = Norm(channels, over_channels=True)
        self.mlp_1 = Linear(channels, 4 * channels, key=keys[3])
        self.mlp_2 = Linear(4 * channels, channels, key=keys[4])
        self.heads = heads

    def __call__(self, x: Features) -> Features:
        shape = x.shape
        position = jax.image.resize(self.position, shape, "linear", antialias=False)
        x = (x + position.astype(x.dtype)).reshape(-1, shape[-1])
        qkv = self.query_key_value(self.norm_1(x))
        query, key, value = jnp.moveaxis(qkv.reshape(len(x), 3, self.heads, -1), 1, 0)
        x = x + self.out(attend(query, key, value).reshape(len(x), -1))
        x = x + self.mlp_2(jax.nn.gelu(self.mlp_1(self.norm_2(x))))
        return x.reshape(shape)


# --- The network --------------------------------------------------------------------------------

# The results that are costly to compute. For a large network on a CPU, the backward pass finds these alone,
# and computes the norms and activations in between again.
COSTLY = jax.checkpoint_policies.save_only_these_names("convolved", "statistics", "attended")


class UNet(eqx.Module):
    """f_theta(I, t, x_t): from the image, and with diffusion the noisy mask, to logits (or noise).

    `channels` has one entry per level, `strides` one per down-sampling in between. Each level has
    two residual blocks on the way down and three on the way up; to the input of each of these, a
    feature map of the way down is ADDED (concatenating takes more memory). With `time_dim` 0 the
    network is not told t. With `remat` (gradient checkpointing) only the inputs of the blocks of the
    first `remat` levels are stored, and the rest is recomputed in the backward pass; the bottleneck
    counts as one more level.

    Your own network can replace this one: add it to NETWORKS below. It is made from the same
    keywords and key, and is called in the same way. Other files use only its `classes`, whether it
    takes a noisy mask and an earlier prediction (`noisy_mask`, `self_condition`), and its
    `compiler_options`.
    """

    stem: Conv
    stem_norm: Norm
    down: list[list[ResBlock]]
    down_sample: list[tuple[Down, Norm]]
    bottom_1: ResBlock
    transformer: TransformerLayer | None
    bottom_2: ResBlock
    up_sample: list[tuple[Up, Norm]]
    up: list[list[ResBlock]]
    head: Linear
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    T: int = eqx.field(static=True)
    time_dim: int = eqx.field(static=True)
    noisy_mask: bool = eqx.field(static=True)
    self_condition: bool = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    remat: int = eqx.field(static=True)

    def __init__(
        self, *, image_channels: int, classes: int, patch_shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 128, 256), strides: Sequence[Sequence[int]] = ((2, 2),) * 3,
        T: int = 1001, noisy_mask: bool = True, self_condition: bool = False, time_dim: int = 256,
        transformer: bool = True, heads: int = 8, head_dim: int = 64, dtype: str = "float32",
        convolutions: str = "native", remat: int = 0, key: PRNGKeyArray,
    ):  # fmt: skip
        """Raises ValueError if `strides` does not fit `channels` or `patch_shape`."""
        dims = len(patch_shape)
        if len(strides) != len(channels) - 1 or any(len(stride) != dims for stride in strides):
            raise ValueError(
                f"{len(channels)} levels in {dims}D need {len(channels) - 1} strides of {dims} "
                f"numbers, got {strides}"
            )
        keys = iter(jax.random.split(key, 8 * (len(channels) + 1)))
        c_in = image_channels + classes * (noisy_mask + self_condition)
        time_dim = time_dim if noisy_mask else 0

        def block(c: int) -> ResBlock:
            return ResBlock(dims, c, time_dim, convolutions=convolutions, key=next(keys))

        self.stem = Conv(dims, c_in, channels[0], convolutions=convolutions, key=next(keys))
        self.stem_norm = Norm(channels[0])
        self.down = [[block(c), block(c)] for c in channels]
        levels = list(zip(strides, channels[:-1], channels[1:], strict=True))
        self.down_sample = [(Down(s, a, b, key=next(keys)), Norm(b)) for s, a, b in levels]
        self.bottom_1, self.bottom_2 = block(channels[-1]), block(channels[-1])
        self.channels, self.strides = tuple(channels), tuple(tuple(stride) for stride in strides)
        grid = [math.ceil(n / s) for n, s in zip(patch_shape, self.total_stride(dims), strict=True)]
        self.transformer = None
        if transformer:
            self.transformer = TransformerLayer(grid, channels[-1], heads, head_dim, key=next(keys))
        self.up = [[block(c), block(c), block(c)] for c in channels]
        self.up_sample = [(Up(s, b, a, key=next(keys)), Norm(a)) for s, a, b in levels]
        self.head = Linear(channels[0], classes, key=next(keys))
        self.classes, self.T, self.time_dim = classes, T, time_dim
        self.noisy_mask, self.self_condition = noisy_mask, self_condition
        self.dtype, self.remat = dtype, remat

    def __call__(
        self, image: Features, t: Int[Array, ""] | None = None,
        x_t: Float[Array, "*spatial classes"] | None = None,
        x_0_hat: Float[Array, "*spatial classes"] | None = None,
    ) -> Float[Array, "*spatial classes"]:  # fmt: skip
        """Logits in float32. Without `x_0_hat`, a self-conditioned network sees zeros instead. An image whose
        size is no multiple of the strides is padded with its edge values, and the logits are cropped."""
        inputs = [image]  # muscle_us: [480, 512, 1], beside it x_t [480, 512, 2]
        if self.noisy_mask:
            inputs.append(x_t)
        if self.self_condition:
            inputs.append(jnp.zeros_like(x_t) if x_0_hat is None else x_0_hat)
        x = jnp.concatenate(inputs, axis=-1).astype(self.dtype)  # the precision is decided here

        spatial = x.shape[:-1]
        pad = [(0, -n % s) for n, s in zip(spatial, self.total_stride(len(spatial)), strict=True)]
        x = jnp.pad(x, [*pad, (0, 0)], mode="edge")
        embedding = time_embedding(t, self.T, self.time_dim) if self.time_dim else None
        return self.logits(x, embedding)[tuple(slice(n) for n in spatial)]

    def logits(
        self, x: Float[Array, "*spatial c_in"], embedding: Float[Array, "time_dim"] | None
    ) -> Float[Array, "*spatial classes"]:
        """The U itself, for inputs whose size is a multiple of the strides."""

        sparing = cpu_convolution.saves_memory(self.stem.convolutions, x.shape[:-1], self.channels[0])

        def run(level: int, block: eqx.Module, *args: Array | None) -> Array:
            if level < self.remat:
                return eqx.filter_checkpoint(block)(*args)
            return eqx.filter_checkpoint(block, policy=COSTLY)(*args) if sparing else block(*args)

        x = jax.nn.gelu(self.stem_norm(self.stem(x)))  # muscle_us: [480, 512, 3] -> [480, 512, 32]
        skips = [x]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = run(level, block, x, embedding)
                skips.append(x)
            if level < len(self.down_sample):
                down_sample, norm = self.down_sample[level]
                x = norm(down_sample(x))
                skips.append(x)

        x = run(len(self.down), self.bottom_1, x, embedding)  # [60, 64, 256]
        if self.transformer is not None:
            x = run(len(self.down), self.transformer, x)
        x = run(len(self.down), self.bottom_2, x, embedding)

        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                x = run(level, block, x + skips.pop(), embedding)
            if level > 0:
                up_sample, norm = self.up_sample[level - 1]
                x = norm(up_sample(x))

        return self.head(x).astype(jnp.float32)  # [480, 512, 2]

    def total_stride(self, dims: int) -> list[int]:
        """The stride from the image to the lowest level, per axis."""
        return [math.prod(axis) for axis in zip((1,) * dims, *self.strides, strict=True)]

    def compiler_options(self, patch_shape: Sequence[int]) -> dict[str, str]:
        """Options of `jax.jit` for a program in which this network works on patches of this shape."""
        return cpu_convolution.compiler_options(self.stem.convolutions, patch_shape, self.channels[0])


# Networks by name, as `train.py --network` and a model file call them.
NETWORKS: dict[str, Callable[..., eqx.Module]] = {"UNet": UNet}


def count_parameters(model: eqx.Module) -> int:
    """The number of learned parameters (Table 7)."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
