"""Five ways of training a diffusion model to segment, and one without diffusion: Figure 1, Sections
3.2 and 4 and Appendix C of Fu et al. (2023), one line of code per lettered equation.

Every strategy has one signature and takes no options:

    strategy(denoise: Denoise, teacher: Denoise, schedule: Schedule,
             image: Image, x_0: Mask, t: Time, keys: Keys) -> Denoised

`denoise(image, t, x_t, x_0_hat)` is f_theta, the network that is trained; `teacher` makes the
first of two predictions. The paper uses the network itself for both, and optionally "a model with
exponential moving averaged weights" (§4) as the teacher. `keys` holds one key per example.
The loss (2c) = (3c) = (4e) = (5e) = (7e) = (8f) is applied once, by the caller.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from diffusion import (
    Image, Keys, Mask, Schedule, Time, eps_from_x_0, gaussian, q_posterior, q_sample, x_0_from_eps,
)  # fmt: skip
from support.machine.tpu_layout import in_layout


class Denoised(NamedTuple):
    """The result of one pass of the network: its raw output (logits, or eps_hat), the mask that
    follows from it, in [-1, 1], and the noisy mask that was its input (None without diffusion)."""

    output: Mask
    x_0_hat: Mask
    x_t: Mask | None


Denoise = Callable[[Image, Time | None, Mask | None, Mask | None], Denoised]


def one_hot(label: Int[Array, "batch *spatial"], classes: int) -> Mask:
    """x_0: a label map as 1 in the channel of its class and -1 in the others (§3.2). A voxel whose label is
    no class (support.raw.images.IGNORED) has -1 in all of them, so that the loss can leave it out."""
    return 2 * jax.nn.one_hot(label, classes, dtype=jnp.float32) - 1


def batched(network: Callable[..., Array]) -> Callable[..., Array]:
    """A network for one example, turned into one for a batch, in the layout that suits the device."""
    network = in_layout(network)
    return lambda image, t, x_t, x_0_hat: jax.vmap(network)(image, t, x_t, x_0_hat)


def make_denoise(network: Callable[..., Mask], schedule: Schedule, prediction: str) -> Denoise:
    """f_theta of (2b), as the strategies and the samplers use it. `t` is a row of `schedule`, and the
    network is always told the original time `schedule.timestep[t]`: in K = 5 sampling steps it is
    told 1001, 751, 501, 251 and 1, in this order.

    `network(image, t, x_t, x_0_hat)` returns float32 logits, whose softmax is scaled to [-1, 1]
    (`prediction` "x_0", the paper's), or the noise (`prediction` "eps", App. A.4), from which the
    mask is computed and clipped to [-1, 1].
    """

    def denoise(image: Image, t: Time | None, x_t: Mask | None, x_0_hat: Mask | None) -> Denoised:
        output = network(image, None if t is None else schedule.timestep[t], x_t, x_0_hat)
        if prediction == "eps":
            return Denoised(output, jnp.clip(x_0_from_eps(schedule, output, x_t, t), -1, 1), x_t)
        return Denoised(output, 2 * jax.nn.softmax(output, axis=-1) - 1, x_t)

    return denoise


# --- The six strategies -------------------------------------------------------------------------


def image_alone(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """No diffusion: the same network sees the image alone, and t is not used (§5.1.2)."""
    return denoise(image, None, None, None)


def standard_diffusion(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Eq. (3): denoise a noisy version of the true mask."""
    x_t = q_sample(schedule, x_0, t, gaussian(keys, x_0))  # (3a)
    return denoise(image, t, x_t, None)  # (3b)


def recycle_x_T(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Eq. (4), the paper's proposal: denoise a noisy version of the network's own prediction. x_T holds a
    trace of x_0, but (4b) has no gradient, so that no use of it is learned. (4c) draws new noise,
    independent of that of (4a). Needs t < T."""
    T = jnp.full_like(t, schedule.T)
    keys_T, keys_t = split_keys(keys)
    x_T = q_sample(schedule, x_0, T, gaussian(keys_T, x_0))  # (4a)
    x_0_hat = stop_gradient(teacher(image, T, x_T, None).x_0_hat)  # (4b)
    x_t = q_sample(schedule, x_0_hat, t, gaussian(keys_t, x_0))  # (4c)
    return denoise(image, t, x_t, None)  # (4d)


def recycle_x_t_plus_1(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Eq. (5), Fu et al. (2023, preliminary): the first prediction is made from the true mask, one
    step noisier (at t + 1). Needs t < T."""
    keys_t_plus_1, keys_t = split_keys(keys)
    x_t_plus_1 = q_sample(schedule, x_0, t + 1, gaussian(keys_t_plus_1, x_0))  # (5a)
    x_0_hat = stop_gradient(teacher(image, t + 1, x_t_plus_1, None).x_0_hat)  # (5b)
    x_t = q_sample(schedule, x_0_hat, t, gaussian(keys_t, x_0))  # (5c)
    return denoise(image, t, x_t, None)  # (5d)


def self_condition_x_t(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Eq. (7), Chen et al. (2022): the first prediction is a further input of the second pass."""
    keys_t, keys_dropout = split_keys(keys)
    x_t = q_sample(schedule, x_0, t, gaussian(keys_t, x_0))  # (7a)
    x_0_hat = stop_gradient(teacher(image, t, x_t, jnp.zeros_like(x_t)).x_0_hat)  # (7b)
    x_0_hat = dropout(keys_dropout, x_0_hat)  # (7c)
    return denoise(image, t, x_t, x_0_hat)  # (7d)


def self_condition_x_t_plus_1(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Eq. (8), Watson et al. (2023): as (7), but the first prediction is made at t + 1. Needs t < T.

    NB: mu_tilde in (8d) is computed from the true x_0 and x_{t+1}, not from a prediction.
    """
    keys_t_plus_1, keys_dropout, keys_t = split_keys(keys, 3)
    x_t_plus_1 = q_sample(schedule, x_0, t + 1, gaussian(keys_t_plus_1, x_0))  # (8a)
    x_0_hat = stop_gradient(teacher(image, t + 1, x_t_plus_1, jnp.zeros_like(x_0)).x_0_hat)  # (8b)
    x_0_hat = dropout(keys_dropout, x_0_hat)  # (8c)
    mu_tilde, beta_tilde = q_posterior(schedule, x_0, x_t_plus_1, t + 1)
    x_t = mu_tilde + jnp.sqrt(beta_tilde) * gaussian(keys_t, x_0)  # (8d)
    return denoise(image, t, x_t, x_0_hat)  # (8e)


def split_keys(keys: Keys, n: int = 2) -> list[Keys]:
    """n independent keys for every example."""
    split = jax.vmap(lambda key: jax.random.split(key, n))(keys)
    return [split[:, i] for i in range(n)]


def dropout(keys: Keys, x_0_hat: Mask) -> Mask:
    """Zero the whole x_0_hat of an example with probability 50 %, (7c) and (8c)."""
    keep = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(keep.reshape(-1, *(1,) * (x_0_hat.ndim - 1)), x_0_hat, 0)


class Strategy(NamedTuple):
    """How a strategy is trained and what its network takes in."""

    training_pass: Callable[..., Denoised]  # one of the functions above
    title: str  # the paper's name for it, with mathematics between dollar signs
    noisy_mask: bool = True  # x_t and t are inputs
    self_condition: bool = False  # x_0_hat is an input
    below_T: bool = False  # t < T, because the first pass is at T or t + 1


# A new strategy is a function like those above and a line here; every program then knows its name.
STRATEGIES = {
    "no_diff": Strategy(image_alone, "No diff.", noisy_mask=False),
    "diff": Strategy(standard_diffusion, "Diff."),
    "sc_xt": Strategy(self_condition_x_t, "Diff. sc. $x_t$", self_condition=True),
    "sc_xt1": Strategy(self_condition_x_t_plus_1, "Diff. sc. $x_{t+1}$", self_condition=True, below_T=True),
    "rec_xt1": Strategy(recycle_x_t_plus_1, "Diff. rec. $x_{t+1}$", below_T=True),
    "rec_xT": Strategy(recycle_x_T, "Diff. rec. $x_T$", below_T=True),
}


# --- The loss L(x_0, x_0_hat) -------------------------------------------------------------------


def known(x_0: Mask) -> Float[Array, "batch *spatial"]:
    """1 for a voxel that has a class, 0 for one that is ignored."""
    return (jnp.max(x_0, axis=-1) + 1) / 2


def mean_of_known(voxels: Float[Array, "batch *spatial"], x_0: Mask) -> Float[Array, "batch"]:
    """The mean of each example over its voxels that have a class; 0 if none has."""
    counted = known(x_0)
    axes = tuple(range(1, voxels.ndim))
    # The mean over all voxels, times a factor that is exactly 1 if none is ignored.
    factor = voxels[0].size / jnp.maximum(jnp.sum(counted, axis=axes), 1)
    return jnp.mean(voxels * counted, axis=axes) * factor


def cross_entropy(logits: Mask, x_0: Mask) -> Float[Array, "batch"]:
    """Mean over the voxels of -log softmax(logits) at the true class."""
    return mean_of_known(-jnp.sum((x_0 + 1) / 2 * jax.nn.log_softmax(logits, axis=-1), axis=-1), x_0)


def soft_dice(
    probability: Mask, x_0: Mask
) -> tuple[Float[Array, "batch foreground"], Bool[Array, "batch foreground"]]:
    """Soft Dice, 2 sum(p g) / sum(p + g), of each foreground class, and whether the truth contains
    it. Absent classes have 0 in the first result and False in the second."""
    p, g = probability[..., 1:] * known(x_0)[..., None], (x_0[..., 1:] + 1) / 2
    axes = tuple(range(1, p.ndim - 1))
    present = jnp.sum(g, axis=axes) > 0
    union = jnp.where(present, jnp.sum(p + g, axis=axes), 1)
    return jnp.where(present, 2 * jnp.sum(p * g, axis=axes) / union, 0), present


def segmentation_loss(logits: Mask, x_0: Mask) -> Float[Array, "batch"]:
    """L of (2c), (3c), (4e), (5e), (7e), (8f): 20 x cross entropy + 1 x foreground Dice loss (§5.3).

    The Dice loss is the mean of 1 - Dice over the foreground classes in the truth; without any
    foreground, the loss is 20 x cross entropy alone.
    """
    dice, present = soft_dice(jax.nn.softmax(logits, axis=-1), x_0)
    dice_loss = jnp.sum(jnp.where(present, 1 - dice, 0), axis=1)
    dice_loss /= jnp.maximum(jnp.sum(present, axis=1), 1)
    return 20 * cross_entropy(logits, x_0) + dice_loss


def noise_loss(schedule: Schedule, eps_hat: Mask, x_0: Mask, x_t: Mask, t: Time) -> Float[Array, "batch"]:
    """Mean of ||eps - eps_hat||^2 (App. A.4), where eps is the noise between x_t and the TRUE x_0.

    For `standard_diffusion` this is the noise that was drawn. Where x_t was made from a prediction, eps
    also contains the error of that prediction times sqrt(alpha_bar[t] / (1 - alpha_bar[t])), because the
    network must find the truth. This factor is 100 at t = 1, so that a few small t dominate the loss.
    """
    error = jnp.square(eps_hat - eps_from_x_0(schedule, x_0, x_t, t))
    return mean_of_known(jnp.mean(error, axis=-1), x_0)
