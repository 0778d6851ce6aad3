"""How do 32 channels fill a TPU, whose registers and multipliers are 128 wide? Blocks of 2 x 2 neighbouring
voxels stand side by side in the last axis, [H, W, 32] -> [H / 2, W / 2, 4 x 32], and pairs of voxels where
there are 64 channels. This is `--convolutions tpu`.

A U-Net for such features is a U-Net again, with larger kernels: `fold` makes it from the usual one, of which
it computes the same sums. The kernels are made anew in every step, so that training, checkpoints and model
files have the usual weights alone.

The taps of a convolution reach from a pair of voxels into three pairs: their own, and the one on each side.
If the pairs of the result begin one voxel earlier, two are enough. The first convolution of a residual block
therefore moves the pairs by one voxel, and the second one moves them back. In between there is one pair more,
and the first and the last of them have a voxel each that lies outside the image (`inside`).
"""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LANES = 128


def paired_axes(channels: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The axes along which pairs of voxels stand side by side, at each level of a U-Net: as many of the first
    two as the lanes have room for, and none at the lowest level, where the Transformer is. An axis has pairs
    where its stride is even, or where it has pairs one level below; an odd stride would divide a pair.
    Sizes that are a multiple of the strides are then even. The second axis comes first: with pairs along
    (0, 1) and, below, along (1,), a pair of slices becomes one slice, and no slices are taken apart."""
    levels: list[tuple[int, ...]] = [()]
    for stride, c in reversed(list(zip(strides, channels[:-1], strict=True))):
        most = int(math.log2(max(1, LANES // c)))
        axes = [axis for axis in (1, 0) if stride[axis] % 2 == 0 or axis in levels[0]]
        levels.insert(0, tuple(sorted(axes[:most])))
    return levels


def fold_axis(
    x: Float[Array, "*size"], axis: int, columns: int, channels: int = -1
) -> Float[Array, "*folded"]:
    """Groups of columns along an axis, side by side in the axis of the channels, which comes after it."""
    channels %= x.ndim
    x = x.reshape(*x.shape[:axis], -1, columns, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis + 1, channels)
    return x.reshape(*x.shape[:channels], -1, *x.shape[channels + 2 :])


def fold_pairs(x: Float[Array, "*spatial channels"], axes: Sequence[int]) -> Float[Array, "*pairs lanes"]:
    """Pairs of voxels along each of these axes, side by side in the channels; those of the last axis are
    furthest apart."""
    for axis in axes:
        x = fold_axis(x, axis, 2)
    return x


def unfold_pairs(x: Float[Array, "*pairs lanes"], axes: Sequence[int]) -> Float[Array, "*spatial channels"]:
    """The inverse of `fold_pairs`."""
    for axis in reversed(axes):
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], 2, -1), -2, axis + 1)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return x


def inside(shape: Sequence[int], axes: Sequence[int]) -> Bool[Array, "*pairs lanes"]:
    """Which voxels lie in the image, of features whose pairs along these axes begin one voxel before it."""
    *spatial, lanes = shape
    found = jnp.ones((*spatial, lanes), bool)
    for number, axis in enumerate(axes):
        pair = jax.lax.broadcasted_iota(int, shape, axis)
        second = jax.lax.broadcasted_iota(int, shape, len(spatial)) * 2 ** (len(axes) - number) // lanes % 2
        found &= (pair + second > 0) & (pair + second < spatial[axis])
    return found


def tile(x: Float[Array, "... channels"], columns: int) -> Float[Array, "... lanes"]:
    """What is per channel, for each of the voxels that stand side by side."""
    return jnp.concatenate([x] * columns, axis=-1)


# --- Kernels ------------------------------------------------------------------------------------


def _shifted(kernel: Array, axis: int, offsets: Sequence[int], length: int) -> Array:
    """The taps along an axis, moved to each of the offsets of a longer axis and stacked along a new one."""
    pads = [(0, 0)] * kernel.ndim
    copies = []
    for offset in offsets:
        pads[axis] = (offset, length - offset - kernel.shape[axis])
        copies.append(jnp.pad(kernel, pads))
    return jnp.stack(copies)


def _to_outputs(kernel: Float[Array, "columns *taps c_in c_out"]) -> Float[Array, "*taps c_in lanes"]:
    kernel = jnp.moveaxis(kernel, 0, -2)
    return kernel.reshape(*kernel.shape[:-2], -1)


def fold_conv(kernel: Float[Array, "*taps c_in c_out"], axes: Sequence[int]) -> Array:
    """A kernel of three taps as one of two pairs, four voxels, along each of these axes: the first voxel of
    a pair that comes out sees voxels 0 to 2 of the four, and the second one sees voxels 1 to 3."""
    for axis in axes:
        kernel = _to_outputs(_shifted(kernel, axis, [0, 1], 4))
        kernel = fold_axis(kernel, axis, 2, channels=-2)
    return kernel


def _columns(dims: int, before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(axis, 1 + (axis in before), 1 + (axis in after)) for axis in range(dims)]


def fold_down(
    kernel: Float[Array, "*stride c_in c_out"], before: Sequence[int], after: Sequence[int]
) -> Array:
    """A strided kernel from pairs along the axes `before` to pairs along the axes `after`: output column i
    sees its own `stride` input columns."""
    for axis, columns, new_columns in _columns(kernel.ndim - 2, before, after):
        stride = kernel.shape[axis]
        offsets = [stride * i for i in range(new_columns)]
        kernel = _to_outputs(_shifted(kernel, axis, offsets, stride * new_columns))
        kernel = fold_axis(kernel, axis, columns, channels=-2)
    return kernel


def fold_up(kernel: Float[Array, "c_in *stride c_out"], before: Sequence[int], after: Sequence[int]) -> Array:
    """The kernel of the transpose: input column j is seen by its own `stride` output columns."""
    for axis, columns, new_columns in _columns(kernel.ndim - 2, before, after):
        stride = kernel.shape[axis + 1]
        offsets = [stride * j for j in range(columns)]
        kernel = _shifted(kernel, axis + 1, offsets, stride * columns)
        kernel = fold_axis(kernel.reshape(-1, *kernel.shape[2:]), axis + 1, new_columns)
    return kernel


# --- Layers -------------------------------------------------------------------------------------


def _convolve(
    slices: Float[Array, "d h w c_in"], kernel: Float[Array, "k_h k_w c_in c_out"], **how: Sequence
) -> Float[Array, "d new_h new_w c_out"]:
    """A 2D convolution of each slice."""
    kernel, numbers = kernel.astype(slices.dtype), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(slices, kernel, dimension_numbers=numbers, **how)


# The layers below work on the slices of a volume, with one 2D kernel for each tap in depth; an image is a
# single slice. XLA lays the members of a batch along the rows of a register, of which a single volume would
# fill one. In bfloat16, the sum over the taps in depth is rounded after each of them.


def _slices(x: Array, kernel: Array) -> tuple[Array, Array]:
    return (x[None], kernel[None]) if x.ndim == 3 else (x, kernel)


def _volume(slices: Array, like: Array) -> Array:
    return slices.reshape(slices.shape[-like.ndim :])


class PairConv(eqx.Module):
    """`unet.Conv` for pairs. The pairs of its result begin one voxel earlier than those of its input; but
    where those begin one voxel before the image, along the axes `moved`, they begin with the image."""

    kernel: Float[Array, "*taps c_in c_out"]
    moved: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*pairs c_in"]) -> Float[Array, "*new_pairs c_out"]:
        if self.moved:
            x = jnp.where(inside(x.shape, self.moved), x, 0)
        pads = [(0, 0) if axis in self.moved else (1, 1) for axis in range(x.ndim - 1)]

        def convolved(slices: Array, kernels: Array) -> Array:
            if x.ndim == 4:
                slices = jnp.pad(slices, [pads[0], (0, 0), (0, 0), (0, 0)])
            count = len(slices) - len(kernels) + 1
            parts = [
                _convolve(slices[tap : tap + count], kernel, window_strides=(1, 1), padding=pads[-2:])
                for tap, kernel in enumerate(kernels)
            ]
            return sum(parts)

        if x.ndim == 4:  # so that the backward pass cuts the slices anew, instead of keeping them per tap
            convolved = jax.checkpoint(convolved)
        return _volume(convolved(*_slices(x, self.kernel)), like=x)


class PairNorm(eqx.Module):
    """`unet.Norm` over voxels, for pairs that begin one voxel before the image along the axes `moved`: what
    lies outside it does not count, and voxels that stand side by side share the statistics of a channel."""

    norm: eqx.Module  # with a scale and a shift for each of these voxels
    columns: int = eqx.field(static=True)
    moved: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*pairs lanes"], more_shift: Array | int = 0) -> Array:
        per_channel = jnp.full(x.shape[-1] // self.columns, more_shift, jnp.float32)
        return self.norm(x, tile(per_channel, self.columns), self.mean)

    def mean(self, y: Float[Array, "*pairs lanes"]) -> Float[Array, "..."]:
        """The mean of each channel over all voxels of the image."""
        *pairs, _ = y.shape
        count = self.columns * math.prod(n - (axis in self.moved) for axis, n in enumerate(pairs))
        counted = jnp.where(inside(y.shape, self.moved), y, 0)
        total = jnp.sum(counted, axis=tuple(range(len(pairs))), keepdims=True)
        return tile(total.reshape(self.columns, -1).sum(0) / count, self.columns)


class PairStem(eqx.Module):
    """The first `unet.Conv`, from an image to features whose pairs begin with it."""

    conv: PairConv
    convolutions: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*spatial c_in"]) -> Float[Array, "*pairs c_out"]:
        pads = [(1, 1) if axis in self.conv.moved else (0, 0) for axis in range(x.ndim)]
        return self.conv(fold_pairs(jnp.pad(x, pads), self.conv.moved))


class PairHead(eqx.Module):
    """The last `unet.Linear`, from pairs to the logits of an image."""

    linear: eqx.Module
    axes: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*pairs lanes"]) -> Float[Array, "*spatial classes"]:
        return unfold_pairs(self.linear(x), self.axes)


class PairDown(eqx.Module):
    """`unet.Down`."""

    kernel: Float[Array, "*stride c_in c_out"]

    def __call__(self, x: Float[Array, "*pairs c_in"]) -> Float[Array, "*new_pairs c_out"]:
        slices, kernels = _slices(x, self.kernel)
        depth, *stride = kernels.shape[:3]
        parts = [
            _convolve(slices[tap::depth], kernel, window_strides=stride, padding="VALID")
            for tap, kernel in enumerate(kernels)
        ]
        return _volume(sum(parts), like=x)


class PairUp(eqx.Module):
    """`unet.Up`, the transpose of `unet.Down`."""

    kernel: Float[Array, "c_in *stride c_out"]

    def __call__(self, x: Float[Array, "*pairs c_in"]) -> Float[Array, "*new_pairs c_out"]:
        slices, kernels = _slices(x, jnp.moveaxis(self.kernel, 0, -2))
        stride = kernels.shape[1:3]
        how = {"window_strides": (1, 1), "padding": [(s - 1, s - 1) for s in stride], "lhs_dilation": stride}
        new = jnp.stack([_convolve(slices, jnp.flip(kernel, (0, 1)), **how) for kernel in kernels], axis=1)
        return _volume(new.reshape(-1, *new.shape[2:]), like=x)


# --- The network --------------------------------------------------------------------------------


def fold(network: eqx.Module, axes: Sequence[tuple[int, ...]]) -> eqx.Module:
    """A `unet.UNet` whose features have pairs side by side along some axes, `axes` per level."""

    def norm(norm: eqx.Module, axes: tuple[int, ...], moved: tuple[int, ...] = ()) -> eqx.Module:
        columns = 2 ** len(axes)
        per_voxel = tile(norm.scale, columns), tile(norm.shift, columns)
        norm = eqx.tree_at(lambda n: (n.scale, n.shift), norm, per_voxel)
        return PairNorm(norm, columns, moved) if axes else norm

    def block(block: eqx.Module, axes: tuple[int, ...] = ()) -> eqx.Module:
        return eqx.tree_at(lambda b: (b.conv_1, b.norm_1, b.conv_2, b.norm_2), block, (
            PairConv(fold_conv(block.conv_1.kernel, axes), moved=()),
            norm(block.norm_1, axes, moved=axes),
            PairConv(fold_conv(block.conv_2.kernel, axes), moved=axes),
            norm(block.norm_2, axes),
        ))  # fmt: skip

    def at_levels(levels: list[list[eqx.Module]]) -> list[list[eqx.Module]]:
        return [[block(one, along) for one in blocks] for blocks, along in zip(levels, axes, strict=True)]

    def stem(conv: eqx.Module, axes: tuple[int, ...]) -> PairStem:
        return PairStem(PairConv(fold_conv(conv.kernel, axes), moved=axes), conv.convolutions)

    def head(linear: eqx.Module, axes: tuple[int, ...]) -> PairHead:
        kernel = jnp.kron(jnp.eye(2 ** len(axes)), linear.kernel)
        bias = tile(linear.bias, 2 ** len(axes))
        return PairHead(eqx.tree_at(lambda m: (m.kernel, m.bias), linear, (kernel, bias)), axes)

    def parts(u: eqx.Module) -> tuple:
        return u.stem, u.stem_norm, u.head, u.down, u.up, u.bottom_1, u.bottom_2, u.down_sample, u.up_sample

    levels = list(zip(network.down_sample, network.up_sample, axes[:-1], axes[1:], strict=True))
    return eqx.tree_at(parts, network, (
        stem(network.stem, axes[0]),
        norm(network.stem_norm, axes[0]),
        head(network.head, axes[0]),
        at_levels(network.down),
        at_levels(network.up),
        block(network.bottom_1),
        block(network.bottom_2),
        [(PairDown(fold_down(down.kernel, a, b)), norm(after, b)) for (down, after), _, a, b in levels],
        [(PairUp(fold_up(up.kernel, b, a)), norm(after, a)) for _, (up, after), a, b in levels],
    ))  # fmt: skip


def in_layout(network: Callable[..., Array]) -> Callable[..., Array]:
    """The same network, computed with pairs of voxels side by side if it is a `unet.UNet` that is meant for a
    TPU; any other one as it is."""
    if getattr(getattr(network, "stem", None), "convolutions", "") != "tpu":
        return network
    return fold(network, paired_axes(network.channels, network.strides))
