"""What do methods of other papers do in this one's frame: the same network, loss, steps, seeds and scores?

Flow matching is a schedule here, because the network predicts x_0; the others are strategies. Each came in
through `SCHEDULES` or `STRATEGIES`, as a reader's own would. docs/beyond.md says what was read of each paper.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from diffusion import SCHEDULES, TIMESTEPS, Schedule, ddpm_step, gaussian, q_sample, respace
from strategies import STRATEGIES, Denoised, Strategy, one_hot

K = 5  # steps of sampling, as everywhere here
GAMMA = 0.1  # how far `perturbed_input` perturbs

# --- The methods --------------------------------------------------------------------------------


def flow_schedule(T: int = TIMESTEPS, s_T: float = 0.999) -> Schedule:
    """Flow matching on straight paths, z_s = (1 - s) x_0 + s eps (Liu et al. 2022, arXiv 2209.03003; Lipman
    et al. 2022, arXiv 2210.02747). x = z_s / sqrt((1 - s)^2 + s^2) has

        alpha_bar = (1 - s)^2 / ((1 - s)^2 + s^2),

    and Euler's steps along dz/ds = eps_hat - x_0_hat are those of DDIM. Row t is s = s_T t / T. At s = 1
    nothing of x_0 is left, and no step of DDPM or DDIM could begin there, so that s_T is a little less.
    """
    s = s_T * np.arange(T + 1) / T
    alpha_bar, rest = (1 - s) ** 2 / ((1 - s) ** 2 + s**2), s**2 / ((1 - s) ** 2 + s**2)
    beta = np.append(0, 1 - alpha_bar[1:] / alpha_bar[:-1])
    tables = (jnp.asarray(table, jnp.float32) for table in (beta, alpha_bar, rest))
    return Schedule(*tables, jnp.arange(T + 1))


def fixed_T(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """f(x_T, T) of pure noise, whatever t is: between no diffusion and (3). The noise holds nothing of the
    mask, and one step of sampling is all there is."""
    return denoise(image, jnp.full_like(t, schedule.T), gaussian(keys, x_0), None)


def on_policy(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """x_t as sampling makes it, by K - k steps of DDPM from noise (§3.1, Inference), at one of its K times
    t_k, which is drawn evenly by t. It is where (4) leads to: (4c) noises a prediction anew, but sampling
    goes on with the noise that it has."""
    few = respace(schedule, K)
    rows = jnp.searchsorted(schedule.timestep, few.timestep)  # those of `schedule`
    fold_in = jax.vmap(jax.random.fold_in, (0, None))

    def step(x, k):
        at = jnp.full_like(t, k)
        x_0_hat = teacher(image, rows[at], x, None).x_0_hat
        x = ddpm_step(few, x_0_hat, x, at, gaussian(fold_in(keys, k), x_0))
        return x, x

    x_T = gaussian(fold_in(keys, 0), x_0)
    path = jnp.append(x_T[None], jax.lax.scan(step, x_T, jnp.arange(K, 1, -1))[1], axis=0)
    k = 1 + (t - 1) * K // schedule.T
    x_t = stop_gradient(path[K - k, jnp.arange(len(t))])
    return denoise(image, rows[k], x_t, None)


def self_aligned(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Self-aligned denoising (Ji et al. 2023, arXiv 2303.17559, and its code): as (4), but of the prediction
    only the class of each voxel is kept, and the noise is the same again. Needs t < T."""
    eps = gaussian(keys, x_0)
    x_0_hat = teacher(image, jnp.full_like(t, schedule.T), eps, None).x_0_hat
    mask = one_hot(jnp.argmax(x_0_hat, axis=-1), x_0.shape[-1])  # has no gradient
    return denoise(image, t, q_sample(schedule, mask, t, eps), None)


def perturbed_input(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Input perturbation (Ning et al. 2023, arXiv 2301.11706): (3) with x_t = sqrt(alpha_bar_t) x_0 +
    sqrt(1 - alpha_bar_t) (eps + gamma xi), where xi is noise, too, and gamma = 0.1. A network that predicts
    eps must tell the two apart. One that predicts x_0 sees noise that is sqrt(1 + gamma^2) as strong."""
    eps = jnp.sqrt(1 + GAMMA**2) * gaussian(keys, x_0)
    return denoise(image, t, q_sample(schedule, x_0, t, eps), None)


METHODS = {
    "fixed_T": Strategy(fixed_T, "Diff. $t = T$"),
    "on_policy": Strategy(on_policy, "Diff. on policy"),
    "self_aligned": Strategy(self_aligned, "Diff. self-aligned", below_T=True),
    "perturbed": Strategy(perturbed_input, "Diff. perturbed"),
}


@contextmanager
def known() -> Iterator[None]:
    """While it lasts, every program knows the methods by their names."""
    with mock.patch.dict(STRATEGIES, METHODS), mock.patch.dict(SCHEDULES, flow=flow_schedule):
        yield
