"""Properties of the schedules, of q and p, of the samplers and of importance sampling."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion as d

SCHEDULE = d.linear_schedule()
FIVE = d.respace(SCHEDULE, 5)
schedules = st.builds(
    lambda T, a, b: d.linear_schedule(T, min(a, b), max(a, b)),
    st.integers(2, 60), st.floats(1e-5, 0.3), st.floats(1e-5, 0.3),
) | st.builds(d.cosine_schedule, st.integers(2, 60))  # fmt: skip

# JAX compiles each operation for every new shape, so those below are compiled together or are NumPy's.
in_numpy = partial(jax.tree.map, np.asarray)
record_losses, probabilities = jax.jit(d.record_losses), jax.jit(d.probabilities)
sample_t = jax.jit(d.sample_t, static_argnums=2)


def keys(n: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), n)


def masks(n: int, seed: int = 0, shape=(4, 3, 2)):
    """n random masks of -1 and 1."""
    return 2.0 * jax.random.bernoulli(jax.random.key(seed), 0.3, (n, *shape)) - 1


# --- Schedules ---


def test_published_numbers():
    root = np.sqrt(np.asarray(SCHEDULE.alpha_bar, np.float64))
    np.testing.assert_allclose(root[[1, 1001]], [0.99995, 0.00632076], rtol=2e-6)
    np.testing.assert_allclose(np.sqrt(d.linear_schedule(1000).alpha_bar[-1]), 0.00635282, rtol=2e-6)
    assert FIVE.timestep.tolist() == [0, 1, 251, 501, 751, 1001]
    alpha_bar = [0.9999, 0.521750136, 0.0779923232, 0.00331891358, 0.0000399520241]
    beta = [0.0001, 0.478197683, 0.850517867, 0.957445638, 0.987962319]
    beta_tilde = [0, 0.0000999890893, 0.441167752, 0.885711829, 0.984722699]
    np.testing.assert_allclose(FIVE.alpha_bar[1:], alpha_bar, rtol=2e-7)
    np.testing.assert_allclose(FIVE.beta[1:], beta, rtol=2e-7)
    ones = jnp.ones((5, 1, 1))
    _, ours = d.q_posterior(FIVE, ones, ones, jnp.arange(1, 6))
    np.testing.assert_allclose(ours.ravel(), beta_tilde, rtol=3e-7)


@given(schedules)
@settings(max_examples=30, deadline=None)
def test_schedule_properties(schedule):
    schedule = in_numpy(schedule)
    beta, alpha_bar = schedule.beta, schedule.alpha_bar
    assert beta[0] == 0 and alpha_bar[0] == 1 and schedule.timestep[0] == 0
    assert (beta[1:] > 0).all() and (beta[1:] < 1).all()
    assert (np.diff(alpha_bar) < 0).all()
    np.testing.assert_allclose(alpha_bar + schedule.one_minus_alpha_bar, 1, atol=1e-6)


@given(st.integers(1, 50), st.integers(2, 200))
@settings(max_examples=12, deadline=None)
def test_respacing_keeps_the_noise_levels(K, T):
    schedule, K = d.linear_schedule(T), min(K, T)
    kept, same, schedule = in_numpy((d.respace(schedule, K), d.respace(schedule, T), schedule))
    assert kept.T == K and kept.timestep[-1] == T and (K == 1 or kept.timestep[1] == 1)
    assert (np.diff(kept.timestep) > 0).all()
    np.testing.assert_allclose(kept.alpha_bar, schedule.alpha_bar[kept.timestep], rtol=1e-6)
    np.testing.assert_allclose(np.cumprod(1 - np.asarray(kept.beta, np.float64)), kept.alpha_bar, rtol=1e-5)
    np.testing.assert_allclose(same.beta, schedule.beta, rtol=1e-6)
    assert same.timestep.tolist() == schedule.timestep.tolist()


@pytest.mark.parametrize("name", d.SCHEDULES)
def test_few_noise_levels_can_be_respaced_again(name):
    """Those of a cosine end at alpha_bar = 2e-9, and so with a beta that is 1 in float32."""
    few = d.make_schedule(name, 5)
    for kept, same in zip(jax.tree.leaves(few), jax.tree.leaves(d.respace(few, 5)), strict=True):
        np.testing.assert_allclose(same, kept, rtol=1e-6)


def test_cosine_is_that_of_nichol_and_dhariwal():
    T = 100
    t = np.arange(T + 1)
    f = np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2
    ours = d.cosine_schedule(T)
    np.testing.assert_allclose(ours.alpha_bar[:-1], (f / f[0])[:-1], rtol=1e-5)
    assert ours.beta[-1] == pytest.approx(0.999)  # clipped: f(T) is 0


@given(st.integers(2, 60), st.floats(1e-4, 0.05), st.floats(0.05, 30), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_a_stronger_signal_is_b_squared_times_the_ratio(T, beta, b, K):
    """At every t, also after re-spacing, which may come first or last."""
    schedule = d.linear_schedule(T, beta / 10, beta)

    def ratio(s):  # of signal to noise, from t = 1
        return np.asarray(s.alpha_bar, np.float64)[1:] / np.asarray(s.one_minus_alpha_bar, np.float64)[1:]

    stronger, K = d.scale_signal(schedule, b), min(K, schedule.T)
    np.testing.assert_allclose(ratio(stronger), b**2 * ratio(schedule), rtol=2e-3)
    first, last = d.scale_signal(d.respace(schedule, K), b), d.respace(stronger, K)
    np.testing.assert_allclose(first.beta, last.beta, rtol=2e-3)
    np.testing.assert_allclose(ratio(first), ratio(last), rtol=2e-3)
    assert first.timestep.tolist() == last.timestep.tolist()


@pytest.mark.parametrize("name", d.SCHEDULES)
def test_the_papers_signal_changes_nothing(name):
    plain = d.respace(d.SCHEDULES[name](), 1001)
    for ours, theirs in zip(
        jax.tree.leaves(d.make_schedule(name, 1001)), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError):
        d.scale_signal(plain, 0.0)


@pytest.mark.parametrize("bad", [{"T": 0}, {"beta_1": 0.0}, {"beta_1": 0.1}, {"beta_T": 1.0}])
def test_schedule_refuses(bad):
    with pytest.raises(ValueError):
        d.linear_schedule(**bad)
    with pytest.raises(ValueError):
        d.respace(SCHEDULE, 0)


# --- q ---


def test_q_sample_has_the_marginal():
    x_0 = jnp.tile(jnp.array([-1.0, 1.0]), (40_000, 1, 1))
    for t in (1, 300, 1001):
        x_t = d.q_sample(SCHEDULE, x_0, jnp.full(40_000, t), d.gaussian(keys(40_000), x_0))
        alpha_bar = float(SCHEDULE.alpha_bar[t])
        np.testing.assert_allclose(x_t.mean(0)[0], np.sqrt(alpha_bar) * x_0[0, 0], atol=0.02)
        np.testing.assert_allclose(x_t.std(0)[0], np.sqrt(1 - alpha_bar), rtol=0.02)


def test_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): on a grid."""
    x_0, x_t = 1.0, -0.4
    grid = np.linspace(-8, 8, 400_001)
    for t in (2, 100, 1001):
        beta, before = float(SCHEDULE.beta[t]), float(SCHEDULE.alpha_bar[t - 1])
        log_p = -((x_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
        log_p += -((grid - np.sqrt(before) * x_0) ** 2) / (2 * (1 - before))
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = (p * grid).sum()
        mu, variance = d.q_posterior(
            SCHEDULE, jnp.full((1, 1, 1), x_0), jnp.full((1, 1, 1), x_t), jnp.array([t])
        )
        assert float(mu[0, 0, 0]) == pytest.approx(mean, abs=2e-4)
        assert float(variance[0, 0, 0]) == pytest.approx((p * (grid - mean) ** 2).sum(), rel=2e-3)


def test_parameterisations_are_inverse():
    x_0, t = masks(6), jnp.array([1, 2, 250, 500, 900, 1001])
    eps = d.gaussian(keys(6), x_0)
    x_t = d.q_sample(SCHEDULE, x_0, t, eps)
    np.testing.assert_allclose(d.eps_from_x_0(SCHEDULE, x_0, x_t, t), eps, atol=2e-5)
    np.testing.assert_allclose(d.x_0_from_eps(SCHEDULE, eps, x_t, t), x_0, atol=2e-4)


def test_variational_terms_agree_with_each_other_and_with_the_kl_of_two_gaussians():
    t = jnp.array([2, 3, 100, 500, 1001])
    x_0, x_0_hat = masks(5), masks(5, 1) * 0.7
    x_t = d.q_sample(SCHEDULE, x_0, t, d.gaussian(keys(5), x_0))
    by_x_0 = d.vlb_x_0(SCHEDULE, x_0, x_0_hat, t)
    eps, eps_hat = (d.eps_from_x_0(SCHEDULE, x, x_t, t) for x in (x_0, x_0_hat))
    np.testing.assert_allclose(d.vlb_eps(SCHEDULE, eps, eps_hat, t), by_x_0, rtol=1e-4)
    mu, variance = d.q_posterior(SCHEDULE, x_0, x_t, t)
    mu_theta, _ = d.q_posterior(SCHEDULE, x_0_hat, x_t, t)
    kl = np.sum(np.asarray((mu - mu_theta) ** 2 / (2 * variance)), axis=(1, 2, 3))
    np.testing.assert_allclose(by_x_0, kl, rtol=2e-2)  # mu - mu_theta cancels where t is small
    snr = np.asarray(SCHEDULE.alpha_bar, np.float64) / SCHEDULE.one_minus_alpha_bar
    square = np.sum(np.asarray(x_0 - x_0_hat) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(by_x_0, 0.5 * (snr[t - 1] - snr[t]) * square, rtol=1e-3)


def test_prior_term():
    """Against KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2, summed."""
    x_0 = 0.5 * masks(2)
    alpha_bar = float(SCHEDULE.alpha_bar[-1])
    v, m = 1 - alpha_bar, np.sqrt(alpha_bar) * np.asarray(x_0, np.float64)
    kl = 0.5 * np.sum(m**2 + v - 1 - np.log(v), axis=(1, 2, 3))
    np.testing.assert_allclose(d.vlb_prior(SCHEDULE, x_0), kl, rtol=1e-4)


# --- p ---


@pytest.mark.parametrize("step", [d.ddpm_step, d.ddim_step])
def test_a_step_with_the_truth_keeps_the_marginal(step):
    """Chaining q(x_t | x_0) with a step gives q(x_{t-1} | x_0), at every noise level."""
    n = 40_000
    x_0 = jnp.ones((n, 1, 1))
    for k in range(1, 6):
        rows = jnp.full(n, k)
        x_t = d.q_sample(FIVE, x_0, rows, d.gaussian(keys(n, k), x_0))
        before = step(FIVE, x_0, x_t, rows, d.gaussian(keys(n, k + 9), x_0))
        assert float(before.mean()) == pytest.approx(float(jnp.sqrt(FIVE.alpha_bar[k - 1])), abs=0.02)
        assert float(before.var()) == pytest.approx(float(FIVE.one_minus_alpha_bar[k - 1]), abs=0.02)


def test_ddim_with_the_posterior_variance_is_ddpm():
    x_0_hat, k = masks(5), jnp.arange(1, 6)
    x_t, eps = d.gaussian(keys(5), x_0_hat), d.gaussian(keys(5, 1), x_0_hat)
    ddpm = d.ddpm_step(FIVE, x_0_hat, x_t, k, eps)
    np.testing.assert_allclose(d.ddim_step(FIVE, x_0_hat, x_t, k, eps, eta=1.0), ddpm, atol=2e-5)
    deterministic = d.ddim_step(FIVE, x_0_hat, x_t, k, eps)
    assert (deterministic == d.ddim_step(FIVE, x_0_hat, x_t, k, 7 * eps)).all()
    np.testing.assert_allclose(ddpm[0], x_0_hat[0], atol=1e-6)  # no noise at the last step


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("step", [d.ddpm_step, d.ddim_step])
def test_sample_visits_every_row_and_carries_the_prediction(step, self_condition):
    """An oracle that also writes down what it is given, by returning it."""
    image = jnp.zeros((2, 3, 3, 1))

    def spy(image, t, x_t, x_0_hat):
        carried = -1.0 if x_0_hat is None else x_0_hat[0, 0, 0, 0]
        return jnp.zeros((2, 3, 3, 2)).at[...].set(t[0].astype(float)).at[..., 1].set(carried)

    steps = d.sample(FIVE, spy, image, keys(2), classes=2, sampler=step, self_condition=self_condition)
    assert steps.shape == (5, 2, 3, 3, 2)
    assert steps[:, 0, 0, 0, 0].tolist() == [5, 4, 3, 2, 1]
    carried = [0, 5, 4, 3, 2] if self_condition else [-1] * 5
    assert steps[:, 0, 0, 0, 1].tolist() == carried


# --- Importance sampling ---


def test_times_are_uniform_until_every_t_is_full_and_then_follow_the_loss():
    sampler = d.make_time_sampler(4, importance=True, length=2)
    sampler = record_losses(sampler, jnp.array([1, 2, 3, 1, 2, 3, 4]), jnp.arange(7.0) + 1)
    np.testing.assert_allclose(probabilities(sampler), [0, 0.25, 0.25, 0.25, 0.25])
    sampler = record_losses(sampler, jnp.array([4]), jnp.array([5.0]))
    means = np.array([2.5, 3.5, 4.5, 6.0])
    expected = 0.999 * means / means.sum() + 0.001 / 4
    np.testing.assert_allclose(probabilities(sampler), [0, *expected], rtol=1e-6)


@pytest.mark.parametrize("importance", [True, False])
def test_weights_are_unbiased(importance):
    """The times follow p, and the mean of weight * f(t) is the plain mean of f."""
    sampler = d.make_time_sampler(7, importance=importance, length=3)
    rng, times = np.random.default_rng(0), np.tile(np.arange(1, 8), 3)
    sampler = record_losses(sampler, times, rng.uniform(0.1, 5, len(times)).astype(np.float32))
    t, weight = sample_t(sampler, jax.random.key(3), 200_000)
    frequency = np.bincount(np.asarray(t), minlength=8) / 200_000
    np.testing.assert_allclose(frequency, probabilities(sampler), atol=0.005)
    f = rng.normal(size=8)
    assert float((weight * f[t]).mean()) == pytest.approx(f[1:].mean(), abs=0.01)
    assert np.allclose(weight, 1) != importance


losses = st.floats(0, 9, width=32) | st.sampled_from([float("nan"), float("inf")])


@given(st.lists(st.lists(st.tuples(st.integers(1, 3), losses), min_size=6, max_size=6), min_size=1))
@settings(max_examples=40, deadline=None)
def test_every_repeated_t_is_recorded(batches):
    """Against a list per t that keeps the last three finite losses."""
    sampler = d.make_time_sampler(3, importance=True, length=3)
    lists: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for batch in batches:
        t, loss = zip(*batch, strict=True)
        sampler = record_losses(sampler, np.array(t), np.array(loss, np.float32))
        for i, value in batch:
            lists[i] += [value] * math.isfinite(value)
    counts, histories = np.asarray(sampler.count), np.asarray(sampler.history)
    for i, values in lists.items():
        assert counts[i] == len(values)
        if len(values) >= 3:
            assert sorted(histories[i].tolist()) == pytest.approx(sorted(values[-3:]))


# --- Noise in sampling ---


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_eta_scales_the_standard_deviation(eta):
    """sigma = eta sqrt(beta_tilde) (App. B): DDPM's share of the noise, times eta and not its square root."""
    t = jnp.arange(2, 6)
    x_0_hat, x_t = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    step = partial(d.ddim_step, FIVE, x_0_hat, x_t, t)
    some, ddpm = (step(jnp.ones_like(x_t), e) - step(jnp.zeros_like(x_t), e) for e in (eta, 1.0))
    np.testing.assert_allclose(some, eta * ddpm, rtol=1e-3)


def test_every_sampling_step_has_noise_of_its_own():
    """Where the network always predicts 0, the noise of a step is what (6) leaves of its x_t: no two steps
    have the same, none has that of x_T, and no two examples share any."""
    seen = []

    def predict_x_0(image, k, x_t, x_0_hat):
        jax.debug.callback(lambda k, x: seen.append((int(k[0]), np.asarray(x))), k, x_t)
        return jnp.zeros_like(x_t)

    keys = jax.random.split(jax.random.key(0), 2)
    d.sample(FIVE, predict_x_0, jnp.zeros((2, 40, 40, 1)), keys, classes=2)
    jax.effects_barrier()
    noises = [seen[0][1]]
    for (k, x_t), (_, after) in pairwise(seen):
        mean, variance = d.q_posterior(FIVE, jnp.zeros_like(x_t), jnp.asarray(x_t), jnp.full(2, k))
        noises.append((after - mean) / np.sqrt(variance))
    flat = [noise[i].ravel() for noise in noises for i in range(2)]
    apart = np.corrcoef(flat) - np.eye(len(flat))
    assert len(flat) == 10 and np.abs(apart).max() < 5 / np.sqrt(flat[0].size)
    assert all(np.std(f) == pytest.approx(1, abs=5 / np.sqrt(2 * f.size)) for f in flat)
