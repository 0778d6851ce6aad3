"""How do 32 channels fill a TPU, whose registers and multipliers are 128 wide? Four neighbouring columns of
an image stand side by side in its last axis, [H, W, 32] -> [H, W / 4, 4 x 32]. This is `--convolutions tpu`.

A U-Net for such features is a U-Net again, with larger kernels: `fold` makes it from the usual one, of
which it computes the same sums. The kernels are made anew in every step, so that training, checkpoints and
model files have the usual weights alone.
"""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

LANES = 128
# XLA makes a batch of one volume larger by cutting it into overlapping parts, which it copies from
# convolution to convolution. Without that, a step of amos_ct takes 5.3 GiB where it took 15.6.
COMPILER_OPTIONS = {
    "xla_tpu_run_space_to_batch": "false",
    "xla_tpu_run_space_to_batch_on_new_platforms": "false",  # v5e
}


def columns_of(
    shape: Sequence[int], channels: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[int, list[int]]:
    """The axis that is folded, and how many of its columns stand side by side at each level of a U-Net:
    enough to fill the lanes, if the sizes divide, and one at the lowest level, where the Transformer is.
    `shape` is a multiple of the strides. The axis is the one that folds most, and the last of several."""
    found = []
    for axis in range(len(shape)):
        size, sizes = shape[axis], [shape[axis]]
        for stride in strides:
            size //= stride[axis]
            sizes.append(size)
        columns = [1]
        for level in reversed(range(len(strides))):
            below = strides[level][axis] * columns[0]  # as many give the columns of the level below
            columns.insert(0, math.gcd(below, sizes[level], max(1, LANES // channels[level])))
        found.append((math.prod(columns), axis, columns))
    return max(found)[1:]


def fold_columns(
    x: Float[Array, "*size"], axis: int, columns: int, channels: int = -1
) -> Float[Array, "*folded"]:
    """Groups of columns along an axis, side by side in the axis of the channels, which comes after it."""
    channels %= x.ndim
    x = x.reshape(*x.shape[:axis], -1, columns, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis + 1, channels)
    return x.reshape(*x.shape[:channels], -1, *x.shape[channels + 2 :])


def unfold_columns(x: Float[Array, "*folded"], axis: int, columns: int) -> Float[Array, "*size"]:
    """The inverse of `fold_columns`."""
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], columns, -1), -2, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def tile(x: Float[Array, "... channels"], columns: int) -> Float[Array, "... lanes"]:
    """What is per channel, for each of the columns that stand side by side."""
    return jnp.concatenate([x] * columns, axis=-1)


def mean_of_voxels(y: Float[Array, "*spatial lanes"], channels: int) -> Float[Array, "..."]:
    """The mean of each channel over all voxels, whose columns may stand side by side."""
    mean = jnp.mean(y, axis=tuple(range(y.ndim - 1)), keepdims=True)
    columns = y.shape[-1] // channels
    return mean if columns == 1 else tile(mean.reshape(columns, channels).mean(0), columns)


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


def fold_conv(kernel: Float[Array, "*taps c_in c_out"], axis: int, columns: int) -> Array:
    """A kernel of three taps as one of three blocks of columns, of which the first and last are the
    neighbours: output column i sees the input columns i - 1 to i + 1 of the middle one."""
    offsets = [columns + i - 1 for i in range(columns)]
    kernel = _to_outputs(_shifted(kernel, axis, offsets, 3 * columns))
    return fold_columns(kernel, axis, columns, channels=-2)


def fold_down(kernel: Float[Array, "*stride c_in c_out"], axis: int, before: int, after: int) -> Array:
    """A strided kernel: output column i sees its own `stride` input columns."""
    stride = kernel.shape[axis]
    offsets = [stride * i for i in range(after)]
    kernel = _to_outputs(_shifted(kernel, axis, offsets, stride * after))
    return fold_columns(kernel, axis, before, channels=-2)


def fold_up(kernel: Float[Array, "c_in *stride c_out"], axis: int, before: int, after: int) -> Array:
    """The kernel of the transpose: input column j is seen by its own `stride` output columns."""
    stride = kernel.shape[axis + 1]
    offsets = [stride * j for j in range(before)]
    kernel = _shifted(kernel, axis + 1, offsets, stride * before)
    kernel = kernel.reshape(-1, *kernel.shape[2:])
    return fold_columns(kernel, axis + 1, after)


def _numbers(x: Array) -> tuple[str, str, str]:
    spatial = "DHW"[-(x.ndim - 1) :]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


class StridedConv(eqx.Module):
    """`unet.Down` as a convolution of XLA: blocks of voxels would be copied on a TPU."""

    kernel: Float[Array, "*stride c_in c_out"]

    def __call__(self, x: Float[Array, "*spatial c_in"]) -> Float[Array, "*smaller c_out"]:
        kernel, stride, numbers = self.kernel.astype(x.dtype), self.kernel.shape[:-2], _numbers(x)
        return jax.lax.conv_general_dilated(x[None], kernel, stride, "VALID", dimension_numbers=numbers)[0]


class TransposedConv(eqx.Module):
    """`unet.Up` as a convolution of XLA."""

    kernel: Float[Array, "c_in *stride c_out"]

    def __call__(self, x: Float[Array, "*spatial c_in"]) -> Float[Array, "*larger c_out"]:
        stride = self.kernel.shape[1:-1]
        kernel = jnp.flip(jnp.moveaxis(self.kernel, 0, -2), range(len(stride))).astype(x.dtype)
        return jax.lax.conv_transpose(x[None], kernel, stride, "VALID", dimension_numbers=_numbers(x))[0]


# --- The network --------------------------------------------------------------------------------


def fold(network: eqx.Module, axis: int, columns: Sequence[int]) -> eqx.Module:
    """A `unet.UNet` for features whose columns along an axis stand side by side, `columns` per level."""

    def at_level(level: int, part: PyTree) -> PyTree:
        """Blocks of a level, whose kernels are those of convolutions and of time."""

        def changed(path: tuple, leaf: Array) -> Array:
            names = [getattr(key, "name", "") for key in path]
            if names[-1] == "kernel" and "time" not in names:
                return fold_conv(leaf, axis, columns[level])
            return tile(leaf, columns[level]) if "time" in names else leaf

        return jax.tree_util.tree_map_with_path(changed, part)

    def head(linear: eqx.Module) -> eqx.Module:
        kernel = jnp.kron(jnp.eye(columns[0]), linear.kernel)
        return eqx.tree_at(lambda m: (m.kernel, m.bias), linear, (kernel, tile(linear.bias, columns[0])))

    def resampled(
        pairs: list, make: type, change: Callable, before: Sequence[int], after: Sequence[int]
    ) -> list:
        return [
            (make(change(layer.kernel, axis, a, b)), norm)
            for (layer, norm), a, b in zip(pairs, before, after, strict=True)
        ]

    def parts(network: eqx.Module) -> tuple:
        return (network.stem, network.head, network.down, network.up, network.down_sample, network.up_sample)

    return eqx.tree_at(parts, network, (
        at_level(0, network.stem),
        head(network.head),
        [at_level(level, blocks) for level, blocks in enumerate(network.down)],
        [at_level(level, blocks) for level, blocks in enumerate(network.up)],
        resampled(network.down_sample, StridedConv, fold_down, columns[:-1], columns[1:]),
        resampled(network.up_sample, TransposedConv, fold_up, columns[1:], columns[:-1]),
    ))  # fmt: skip


def logits_of_columns(
    network: eqx.Module, x: Float[Array, "*spatial c_in"], embedding: Float[Array, "time_dim"] | None
) -> Float[Array, "*spatial classes"]:
    """The logits of a `unet.UNet`, computed with columns side by side."""
    axis, columns = columns_of(x.shape[:-1], network.channels, network.strides)
    logits = fold(network, axis, columns).logits(fold_columns(x, axis, columns[0]), embedding)
    return unfold_columns(logits, axis, columns[0])


def compiler_options(convolutions: str) -> dict[str, str]:
    """Options of `jax.jit` for a program with this way of computing convolutions."""
    on_tpu = convolutions == "tpu" and jax.default_backend() == "tpu"  # else the option is not known
    return COMPILER_OPTIONS if on_tpu else {}
