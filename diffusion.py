"""Gaussian diffusion on segmentation masks: Section 3.1 and Appendices A and B of Fu et al. (2023).

What is q, what is p, what is one step of DDPM or DDIM, and what is a re-spaced schedule?
No network, no data set and no configuration lives here. Throughout, `t` is the paper's time, an
integer in 1..T (0 is the clean mask); a mask `x_0` holds -1 and 1 (Section 3.2), with the classes
last, and a predicted `x_0_hat` lies in [-1, 1]. Noise is an argument `eps`, so everything except
`gaussian`, `sample` and `sample_t` is plain arithmetic. Randomness takes one key per example
(JAX's random state: the same key, the same numbers), so that an example's noise does not depend on
its batch or device.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Mask = Float[Array, "batch *spatial classes"]
Image = Float[Array, "batch *spatial channels"]
Time = Int[Array, "batch"]
Keys = Key[Array, "batch"]

TIMESTEPS = 1001  # T of the paper's schedule (§5.3)
UNIFORM = 0.001  # the share of uniform sampling in importance sampling of t


# --- Schedules: beta_t, alpha_bar_t, and the times that they belong to --------------------------


class Schedule(eqx.Module):
    """A variance schedule (an eqx.Module is a dataclass whose arrays JAX traces). Row t of every table
    belongs to time t, and row 0 is the clean mask (beta[0] = 0, alpha_bar[0] = 1), so that the paper's
    t - 1 is `t - 1` here.

    In a re-spaced schedule (App. A.5) the rows are k = 0..K, and `timestep[k]` is the original time
    t_k of that noise level, which is what the network is told (strategies.make_denoise).
    `one_minus_alpha_bar` is stored separately, because 1 - alpha_bar[1] = 1e-4, computed in float32,
    would keep only four digits.
    """

    beta: Float[Array, "T_plus_1"]
    alpha_bar: Float[Array, "T_plus_1"]
    one_minus_alpha_bar: Float[Array, "T_plus_1"]
    timestep: Int[Array, "T_plus_1"]

    @property
    def T(self) -> int:
        """Number of noise levels (K in a re-spaced schedule)."""
        return len(self.beta) - 1


Table = Float[np.ndarray, "T_plus_1"]


def _from_log(log_alpha_bar: Table, timestep: Int[np.ndarray, "T_plus_1"]) -> Schedule:
    """The schedule with the float64 table log(alpha_bar), stored as float32; |expm1(x)| is 1 - e^x."""
    return Schedule(
        beta=jnp.asarray(np.abs(np.expm1(np.diff(log_alpha_bar, prepend=0.0))), jnp.float32),
        alpha_bar=jnp.asarray(np.exp(log_alpha_bar), jnp.float32),
        one_minus_alpha_bar=jnp.asarray(np.abs(np.expm1(log_alpha_bar)), jnp.float32),
        timestep=jnp.asarray(timestep, jnp.int32),
    )


def _from_beta(beta: Float[np.ndarray, "T"]) -> Schedule:
    """The schedule of beta_1..beta_T."""
    return _from_log(np.cumsum(np.log1p(-np.concatenate([[0.0], beta]))), np.arange(len(beta) + 1))


def _log_alpha_bar(schedule: Schedule) -> Table:
    """In float64, from the betas; where these are large, and may be 1 in float32, from alpha_bar itself."""
    beta, alpha_bar = (np.asarray(table, np.float64) for table in (schedule.beta, schedule.alpha_bar))
    large = np.log(alpha_bar / np.roll(alpha_bar, 1))  # row 0 is never used: beta[0] = 0
    return np.cumsum(np.where(beta < 0.5, np.log1p(-np.minimum(beta, 0.5)), large))


def linear_schedule(T: int = TIMESTEPS, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """The schedule whose beta_t rises linearly from `beta_1` to `beta_T` (§5.3). Raises ValueError
    unless T >= 1 and 0 < beta_1 <= beta_T < 1.

    NB: §4 prints alpha_1 = 0.999, but beta_1 = 1e-4 gives 0.9999, as the sqrt(alpha_bar_1) = 0.99995
    printed there confirms.
    """
    if T < 1 or not 0 < beta_1 <= beta_T < 1:
        raise ValueError(f"need T >= 1 and 0 < beta_1 <= beta_T < 1, got {T}, {beta_1}, {beta_T}")
    return _from_beta(np.linspace(beta_1, beta_T, T))


def cosine_schedule(T: int = TIMESTEPS, s: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """The schedule alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2), with beta_t
    clipped to `beta_max` (Nichol & Dhariwal 2021, Eq. 17). Raises ValueError unless T >= 1."""
    if T < 1:
        raise ValueError(f"need T >= 1, got {T}")
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return _from_beta(np.minimum(1 - f[1:] / f[:-1], beta_max))


def respace(schedule: Schedule, K: int) -> Schedule:
    """K of the T noise levels, spaced evenly from t = 1 to T, with beta_k = 1 - alpha_bar[t_k] /
    alpha_bar[t_{k-1}] (App. A.5). K = 5 of T = 1001 keeps t_k = 1, 251, 501, 751, 1001.

    NB: K = 1 keeps T, where sampling starts. Raises ValueError unless 1 <= K <= T.
    """
    if not 1 <= K <= schedule.T:
        raise ValueError(f"need 1 <= K <= T = {schedule.T}, got K = {K}")
    kept = np.rint(np.linspace(1, schedule.T, K)) if K > 1 else [schedule.T]
    t = np.array([0, *kept], int)
    return _from_log(_log_alpha_bar(schedule)[t], np.asarray(schedule.timestep)[t])


def scale_signal(schedule: Schedule, b: float) -> Schedule:
    """The schedule of a mask that is b times as strong against the same noise: alpha_bar' = b^2 alpha_bar /
    (1 - (1 - b^2) alpha_bar), whose signal-to-noise ratio is b^2 times as high at every t (Chen 2023,
    arXiv 2301.10972). Averaging s voxels along each of d axes divides noise by s^(d/2), so that a mask
    gives away at b = s^(d/2) what one of s times the size does at b = 1. Not in the paper, where b = 1.
    Raises ValueError unless b > 0."""
    if not b > 0:
        raise ValueError(f"need b > 0, got {b}")
    log_alpha_bar = _log_alpha_bar(schedule)
    log_alpha_bar -= np.log1p((1 - b**-2) * np.expm1(log_alpha_bar))  # both parts divided by b^2
    return _from_log(log_alpha_bar, np.asarray(schedule.timestep))


SCHEDULES: dict[str, Callable[..., Schedule]] = {"linear": linear_schedule, "cosine": cosine_schedule}


def make_schedule(name: str, timesteps: int, signal: float = 1.0) -> Schedule:
    """The noise levels of training: all of the paper's 1001, or fewer (Table 10), with its masks or with
    masks that are `signal` times as strong."""
    return respace(scale_signal(SCHEDULES[name](), signal), timesteps)


def _at(table: Float[Array, "T_plus_1"], t: Time, x: Array) -> Array:
    """Row t of a table for each example, shaped to multiply `x`."""
    return table[t].reshape(t.shape + (1,) * (x.ndim - 1))


# --- Randomness ---------------------------------------------------------------------------------


def key_for(use: str, seed: int) -> Key[Array, ""]:
    """The key of one of a seed's three independent random streams: "weights", "training" or "sampling"."""
    return jax.random.split(jax.random.key(seed), 3)[["weights", "training", "sampling"].index(use)]


def gaussian(keys: Keys, x: Mask) -> Mask:
    """eps ~ N(0, I) with the shape of `x`, where each example has its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)


# --- The noising process q ----------------------------------------------------------------------


def q_sample(schedule: Schedule, x_0: Mask, t: Time, eps: Mask) -> Mask:
    """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), Eq. (2a), reparameterised.

    This function computes (3a), (4a), (4c), (5a), (5c), (7a) and (8a).
    NB: (5a) prints the variance 1 - alpha_bar_t beside the mean sqrt(alpha_bar_{t+1}) x_0; it should
    be 1 - alpha_bar_{t+1}.
    """
    mean = jnp.sqrt(_at(schedule.alpha_bar, t, x_0)) * x_0
    return mean + jnp.sqrt(_at(schedule.one_minus_alpha_bar, t, x_0)) * eps


def q_posterior(schedule: Schedule, x_0: Mask, x_t: Mask, t: Time) -> tuple[Mask, Float[Array, "batch ..."]]:
    """Mean mu_tilde and variance beta_tilde of q(x_{t-1} | x_t, x_0), Eq. (6). At t = 1 they are x_0
    and 0."""
    beta, alpha_bar_prev = _at(schedule.beta, t, x_t), _at(schedule.alpha_bar, t - 1, x_t)
    variance = _at(schedule.one_minus_alpha_bar, t, x_t)
    variance_prev = _at(schedule.one_minus_alpha_bar, t - 1, x_t)
    mu_tilde = (
        jnp.sqrt(alpha_bar_prev) * beta / variance * x_0 + variance_prev / variance * jnp.sqrt(1 - beta) * x_t
    )  # (6)
    return mu_tilde, variance_prev / variance * beta


def eps_from_x_0(schedule: Schedule, x_0: Mask, x_t: Mask, t: Time) -> Mask:
    """The noise that turns x_0 into x_t (App. A.3.1): the eps-parameterisation of a predicted x_0."""
    signal = jnp.sqrt(_at(schedule.alpha_bar, t, x_t)) * x_0
    return (x_t - signal) / jnp.sqrt(_at(schedule.one_minus_alpha_bar, t, x_t))


def x_0_from_eps(schedule: Schedule, eps: Mask, x_t: Mask, t: Time) -> Mask:
    """The mask that noise `eps` turned into x_t: the inverse of `eps_from_x_0`. Near t = T it divides
    by sqrt(alpha_bar_T) = 0.006, so a mask from a predicted eps must be clipped to [-1, 1]."""
    noise = jnp.sqrt(_at(schedule.one_minus_alpha_bar, t, x_t)) * eps
    return (x_t - noise) / jnp.sqrt(_at(schedule.alpha_bar, t, x_t))


# --- The denoising process p: one step, and all of them -----------------------------------------


def ddpm_step(schedule: Schedule, x_0_hat: Mask, x_t: Mask, t: Time, eps: Mask) -> Mask:
    """x_{t-1} ~ p(x_{t-1} | x_t) = N(mu_theta, beta_tilde I), where mu_theta is Eq. (6) with x_0_hat
    for x_0 (§3.1, Inference). At t = 1 the variance is 0 and the result is x_0_hat."""
    mu_theta, beta_tilde = q_posterior(schedule, x_0_hat, x_t, t)
    return mu_theta + jnp.sqrt(beta_tilde) * eps


def ddim_step(schedule: Schedule, x_0_hat: Mask, x_t: Mask, t: Time, eps: Mask, eta: float = 0.0) -> Mask:
    """x_{t-1} ~ N(sqrt(alpha_bar_{t-1}) x_0_hat + sqrt(1 - alpha_bar_{t-1} - sigma^2) eps_hat,
    sigma^2 I), App. B, with sigma^2 = eta^2 beta_tilde: eta = 0 is DDIM, which ignores `eps`, and
    eta = 1 is DDPM.

    NB: App. B prints sigma_t under the root; only sigma_t^2 keeps the marginal q(x_t | x_0).
    """
    _, beta_tilde = q_posterior(schedule, x_0_hat, x_t, t)
    sigma_squared = eta**2 * beta_tilde
    variance_prev = _at(schedule.one_minus_alpha_bar, t - 1, x_t)
    eps_hat = eps_from_x_0(schedule, x_0_hat, x_t, t)
    direction = jnp.sqrt(jnp.maximum(variance_prev - sigma_squared, 0)) * eps_hat
    mean = jnp.sqrt(_at(schedule.alpha_bar, t - 1, x_t)) * x_0_hat + direction
    return mean + jnp.sqrt(sigma_squared) * eps


SAMPLERS: dict[str, Callable[..., Mask]] = {"ddpm": ddpm_step, "ddim": ddim_step}


def sample(
    schedule: Schedule, predict_x_0: Callable[..., Mask], image: Image, keys: Keys, *, classes: int,
    sampler: Callable[..., Mask] = ddpm_step, self_condition: bool = False,
) -> Float[Array, "K batch *spatial classes"]:  # fmt: skip
    """Denoise x_T ~ N(0, I) over k = K..1 and return the x_0_hat of EVERY step, first to last (§3.1,
    Inference; Figures 3 and 10 need them all).

    `predict_x_0(image, k, x_t, x_0_hat_or_None) -> x_0_hat` belongs to the same schedule: it tells
    the network the original time t_k of row k (strategies.make_denoise). With `self_condition`, it
    is also given the x_0_hat of the previous step, or zeros in the first.
    """
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    x_T = gaussian(fold_in(keys, 0), jnp.zeros((*image.shape[:-1], classes)))

    def body(carry: tuple[Mask, Mask | None], k: Array) -> tuple[tuple[Mask, Mask | None], Mask]:
        x_t, x_0_hat = carry
        rows = jnp.full(image.shape[0], k)
        x_0_hat = predict_x_0(image, rows, x_t, x_0_hat)
        eps = gaussian(fold_in(keys, k), x_t)
        x_t = sampler(schedule, x_0_hat, x_t, rows, eps)
        return (x_t, x_0_hat if self_condition else None), x_0_hat

    first = (x_T, jnp.zeros_like(x_T) if self_condition else None)
    return jax.lax.scan(body, first, jnp.arange(schedule.T, 0, -1))[1]  # a compiled loop; [1]: its outputs


# --- Importance sampling of t -------------------------------------------------------------------


class TimeSampler(eqx.Module):
    """A distribution over t in 1..t_max. It is uniform until every t has a full history; then p_t is
    proportional to the mean of the last losses at t (§3.1, Training; Nichol & Dhariwal 2021, §3.3).

    A share UNIFORM of the probability is always spread evenly, so that no t is ever forgotten.
    """

    history: Float[Array, "t_max_plus_1 length"]  # the last losses at t, a ring buffer
    count: Int[Array, "t_max_plus_1"]  # how many losses t has had
    importance: bool = eqx.field(static=True)

    @property
    def t_max(self) -> int:
        return len(self.count) - 1


def make_time_sampler(t_max: int, *, importance: bool, length: int = 10) -> TimeSampler:
    """A sampler that has seen no loss yet. `t_max` is T, or T - 1 where the paper asks for t < T."""
    zeros = jnp.zeros((t_max + 1, length), jnp.float32)
    return TimeSampler(zeros, jnp.zeros(t_max + 1, jnp.int32), importance)


def probabilities(sampler: TimeSampler) -> Float[Array, "t_max_plus_1"]:
    """p_t for t = 0..t_max, which sum to 1; p_0 is 0."""
    even = jnp.full(sampler.t_max + 1, 1 / sampler.t_max).at[0].set(0)
    if not sampler.importance:
        return even
    loss = jnp.mean(sampler.history, axis=1).at[0].set(0)
    total = jnp.sum(loss)
    full = jnp.all(sampler.count[1:] >= sampler.history.shape[1]) & (total > 0)
    by_loss = (1 - UNIFORM) * loss / jnp.where(full, total, 1) + UNIFORM * even
    return jnp.where(full, by_loss, even)


def sample_t(sampler: TimeSampler, key: Key[Array, ""], batch: int) -> tuple[Time, Float[Array, "batch"]]:
    """Times for a batch and their weights 1 / (t_max p_t), with which the mean of weight * loss is
    an unbiased estimate of the plain mean over t."""
    p = probabilities(sampler)
    t = jax.random.choice(key, sampler.t_max + 1, (batch,), p=p)
    return t, 1 / (sampler.t_max * p[t])


def record_losses(sampler: TimeSampler, t: Time, loss: Float[Array, "batch"]) -> TimeSampler:
    """Record the unweighted losses of the (global) batch. If a t occurs more than once, all its
    losses are recorded, in the order of the batch. Losses that are not finite are left out."""
    if not sampler.importance:
        return sampler
    length = sampler.history.shape[1]
    finite = jnp.isfinite(loss)
    same = (t[:, None] == t[None, :]) & finite[None, :]
    rank = jnp.sum(jnp.tril(same, k=-1), axis=1)  # how many of the same t come before it
    kept = finite & (rank >= jnp.sum(same, axis=1) - length)  # the last ones, if a ring is too short
    row = jnp.where(kept, t, sampler.t_max + 1)  # a row beyond the table is dropped
    history = sampler.history.at[row, (sampler.count[t] + rank) % length].set(loss, mode="drop")
    count = sampler.count.at[t].add(finite.astype(jnp.int32))
    return TimeSampler(history, count, sampler.importance)


# --- Appendix A: the variational bound, in nats per example, for t = 2..T. Not called in training ----


def _square(x: Mask) -> Float[Array, "batch"]:
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def vlb_x_0(schedule: Schedule, x_0: Mask, x_0_hat: Mask, t: Time) -> Float[Array, "batch"]:
    """L_{t-1} = 1/2 (SNR(t-1) - SNR(t)) ||x_0_hat - x_0||^2 (App. A.3.2), the KL divergence from
    p(x_{t-1} | x_t) to the posterior (6). To avoid cancellation, the difference is computed as
    alpha_bar_{t-1} beta_t / ((1 - alpha_bar_{t-1}) (1 - alpha_bar_t))."""
    difference = schedule.alpha_bar[t - 1] * schedule.beta[t]
    difference /= schedule.one_minus_alpha_bar[t - 1] * schedule.one_minus_alpha_bar[t]
    return 0.5 * difference * _square(x_0_hat - x_0)


def vlb_eps(schedule: Schedule, eps: Mask, eps_hat: Mask, t: Time) -> Float[Array, "batch"]:
    """L_{t-1} = 1/2 (SNR(t-1) / SNR(t) - 1) ||eps - eps_hat||^2 (App. A.3.1), equal to `vlb_x_0` of
    the same prediction.

    NB: the second form that A.3.1 prints lacks the 1/2 that its first form has.
    """
    beta = schedule.beta[t]
    return 0.5 * beta / ((1 - beta) * schedule.one_minus_alpha_bar[t - 1]) * _square(eps - eps_hat)


def vlb_prior(schedule: Schedule, x_0: Mask) -> Float[Array, "batch"]:
    """L_T = KL(q(x_T | x_0) || N(0, I)) (App. A.2): what x_T still reveals about x_0."""
    alpha_bar = schedule.alpha_bar[-1]
    kl = alpha_bar * (jnp.square(x_0) - 1) - jnp.log1p(-alpha_bar)
    return 0.5 * jnp.sum(kl, axis=tuple(range(1, x_0.ndim)))
