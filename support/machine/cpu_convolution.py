"""How is a convolution computed? In XLA's own way, or in parts on a CPU, of which XLA's own
convolutions (as of JAX 0.10.2) leave much unused. On other devices the parts would only cost memory.

`CONVOLUTIONS` names the ways. Their results are the same, except for the order of sums.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from support.machine.devices import kind_of_device


def convolve(
    x: Float[Array, "*spatial c_in"], kernel: Float[Array, "*taps c_in c_out"]
) -> Float[Array, "*spatial c_out"]:
    """A convolution with stride 1 and zero padding, which keeps the size."""
    spatial = "DHW"[-(x.ndim - 1) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    ones = (1,) * (x.ndim - 1)
    return jax.lax.conv_general_dilated(x[None], kernel, ones, "SAME", dimension_numbers=numbers)[0]


def convolve_on_cpu(
    x: Float[Array, "*spatial c_in"], kernel: Float[Array, "*taps c_in c_out"]
) -> Float[Array, "*spatial c_out"]:
    """The same convolution, by slices in 3D, and in bands in 2D if the image is large."""
    if x.ndim == 4:
        return _convolve_by_slices(x, kernel)
    if is_large(x.shape[:-1], *kernel.shape[-2:]):
        return _convolve_in_bands(x, kernel)
    return convolve(x, kernel)


# On a TPU it is the features that are laid out in another way (tpu_layout.py).
CONVOLUTIONS = {"native": convolve, "cpu": convolve_on_cpu, "tpu": convolve}


def way_here(trained: str = "") -> str:
    """The way that suits this machine. A network that was trained in the way of another kind of machine would
    be several times as slow here; one that was trained in a way that suits all keeps it."""
    here = kind_of_device()
    if trained and trained in ("native", here):
        return trained
    return here if here in CONVOLUTIONS else "native"


def is_large(shape: Sequence[int], c_in: int, c_out: int) -> bool:
    """Whether a convolution of an image (or of slices) of this size is worth the methods for large images on
    a CPU, which it is from 75 MFLOP on. Smaller networks keep the program of the published results."""
    return math.prod(shape[-2:]) * c_in * c_out >= 2**22


def saves_memory(convolutions: str, shape: Sequence[int], channels: int) -> bool:
    """Whether a network stores only what is costly to compute for the backward pass. On a CPU, training then
    needs less than half the memory and is about as fast; on other devices the program stays as it is."""
    return convolutions == "cpu" and is_large(shape, channels, channels)


# Of a small network, most of the wait is LLVM's: at its first level it takes up to a quarter less time, and
# the program is as fast and gives the same bits (docs/speed.md).
SMALL = {"xla_backend_optimization_level": "1"}
# XLA leaves 2D convolutions on a CPU to YNNPACK, which reaches half the rate of two cores for large images
# (unless their rows are very wide), while Eigen reaches nearly all of it. Sums stay with YNNPACK. And XLA
# removes the barriers of `jax.checkpoint` there before it looks for what is computed twice, so that all would
# be stored after all; with the second option they stay.
LARGE = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


def compiler_options(convolutions: str, shape: Sequence[int], channels: int) -> dict[str, str]:
    """Options of `jax.jit` for a program whose network has `channels` channels at its first level."""
    if convolutions != "cpu" or jax.default_backend() != "cpu":
        return {}  # on other devices these options are not known
    return LARGE if saves_memory(convolutions, shape, channels) else SMALL


def _convolve_by_slices(
    x: Float[Array, "d h w c_in"], kernel: Float[Array, "3 3 3 c_in c_out"]
) -> Float[Array, "d h w c_out"]:
    """A 3 x 3 x 3 convolution as a sum of three 2D convolutions over slices, one per tap in depth.

    XLA has a fast 2D convolution for the CPU and a slow 3D one: forward and backward together,
    this takes a quarter to a half of the time.
    """
    depth = x.shape[0]
    padded = jnp.pad(x, ((1, 1), (0, 0), (0, 0), (0, 0)))
    slices = jax.vmap(convolve, (0, None))
    return sum(slices(padded[tap : tap + depth], kernel[tap]) for tap in range(3))


@jax.custom_vjp
def _convolve_batch(
    x: Float[Array, "n h w c_in"], kernel: Float[Array, "3 3 c_in c_out"]
) -> Float[Array, "n h w c_out"]:
    """A 2D convolution of a batch, whose kernel gradient is a sum over bands of eight rows or more. XLA
    computes that gradient as one convolution whose window is the whole image, the slowest of the three."""
    return jax.vmap(convolve, (0, None))(x, kernel)


def _batch_backward(
    saved: tuple[Array, Array], dy: Float[Array, "n h w c_out"]
) -> tuple[Float[Array, "n h w c_in"], Float[Array, "3 3 c_in c_out"]]:
    x, kernel = saved
    dx = _convolve_batch(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    height = x.shape[1]
    bands = max(1, min(32, height // 8))
    edges = [height * band // bands for band in range(bands + 1)]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def of_band(start: int, stop: int) -> Float[Array, "3 3 c_in c_out"]:
        def band(kernel: Array) -> Array:
            rows, numbers = padded[:, start : stop + 2], ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(rows, kernel, (1, 1), "VALID", dimension_numbers=numbers)

        return jax.vjp(band, kernel)[1](dy[:, start:stop])[0]

    return dx, sum(map(of_band, edges[:-1], edges[1:]))


_convolve_batch.defvjp(lambda x, kernel: (_convolve_batch(x, kernel), (x, kernel)), _batch_backward)


@jax.custom_batching.custom_vmap
def _convolve_in_bands(
    x: Float[Array, "h w c_in"], kernel: Float[Array, "3 3 c_in c_out"]
) -> Float[Array, "h w c_out"]:
    """`_convolve_batch` of one example. Under `jax.vmap` it is that of the batch; an ordinary
    function's gradient would become a grouped convolution with one group per example, which XLA's CPU
    backend runs slowly. Without `jax.vmap` it has no gradient (JAX has none for a `custom_vmap`)."""
    return _convolve_batch(x[None], kernel)[0]


@_convolve_in_bands.def_vmap
def _(size: int, batched: list[bool], x: Array, kernel: Array) -> tuple[Array, bool]:
    if batched[1]:
        return jax.vmap(convolve, [0 if b else None for b in batched])(x, kernel), True
    return _convolve_batch(x, kernel), True
