"""Every strategy with a network that writes down what it is given; the losses; the paper's labels."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

import diffusion as d
import strategies as s

SCHEDULE = d.linear_schedule()
# Five levels, so far apart that a wrong one shows, with alpha_bar at t_k = 0, 1, 251, 501, 751, 1001.
FIVE = d.respace(SCHEDULE, 5)
ALPHA_BAR = np.array([1, 0.9999, 0.521750136, 0.0779923232, 0.00331891358, 0.0000399520241])
B = 256
RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 3, (B, 5, 4))
X_0 = s.one_hot(jnp.asarray(LABEL), 3)
QUARTER = np.full(X_0.shape, 0.25, np.float32)
IMAGE = jnp.asarray(RNG.normal(size=(B, 5, 4, 1)), jnp.float32)
T_SOME = jnp.asarray(RNG.integers(1, 5, B), jnp.int32)
KEYS = jax.random.split(jax.random.key(3), B)

# JAX would compile a program for each of their operations.
segmentation_loss, cross_entropy, soft_dice = map(
    jax.jit, (s.segmentation_loss, s.cross_entropy, s.soft_dice)
)


@partial(jax.jit, static_argnames="name")
def passes(name, x_0, answer):
    """The inputs of the trained network and those of its teacher, whose predicted mask is `answer`."""
    own, first = [], []

    def denoiser(calls, answer):
        return lambda image, *given: calls.append(given) or s.Denoised(answer, answer, given[1])

    given = denoiser(own, answer), denoiser(first, jnp.copy(answer)), FIVE, IMAGE, x_0, T_SOME, KEYS
    assert s.STRATEGIES[name].training_pass(*given).output is answer  # the trained network's pass comes last
    return own, first


def run(name, x_0=X_0, answer=QUARTER):
    return jax.tree.map(np.asarray, passes(name, x_0, answer))


def noise_in(x_t, mask, t):
    """The noise that is in x_t, if it is a noised `mask` at level t of FIVE: asserts at every level that x_t
    holds sqrt(alpha_bar_t) of the mask, and beside it a variance of 1 - alpha_bar_t, to 5 standard errors."""
    x_t, mask, t = np.asarray(x_t, float), np.asarray(mask, float), np.asarray(t)
    noise = np.empty_like(x_t)
    for level in np.unique(t):
        x, m, signal, variance = x_t[t == level], mask[t == level], ALPHA_BAR[level], 1 - ALPHA_BAR[level]
        share = (x * m).sum() / (m * m).sum()
        assert share == pytest.approx(np.sqrt(signal), abs=5 * np.sqrt(variance / (m * m).sum()) + 1e-5)
        noise[t == level] = (x - np.sqrt(signal) * m) / np.sqrt(variance)
        assert noise[t == level].var() == pytest.approx(1, abs=5 * np.sqrt(2 / x.size))
    return noise


def correlation(a, b):
    return abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def test_every_lettered_line_is_in_the_code():
    source = Path(s.__file__).read_text() + Path(d.__file__).read_text()
    labels = "2a 2b 2c 3a 3b 3c 4a 4b 4c 4d 4e 5a 5b 5c 5d 5e 6 7a 7b 7c 7d 7e 8a 8b 8c 8d 8e 8f"
    assert [label for label in labels.split() if f"({label})" not in source] == []
    steps = "3a 3b 4a 4b 4c 4d 5a 5b 5c 5d 7a 7b 7c 7d 8a 8b 8c 8d 8e"
    once = {label: len(re.findall(rf"# \({label}\)", source)) for label in steps.split()}
    assert set(once.values()) == {1}, once  # one statement each


def test_no_diff_sees_the_image_alone():
    calls, first = run("no_diff")
    assert calls == [(None, None, None)] and not first


def test_diff_denoises_the_truth():
    [(t, x_t, x_0_hat)], first = run("diff")
    assert (t == T_SOME).all() and x_0_hat is None and not first
    noise_in(x_t, X_0, t)


@pytest.mark.parametrize("name, first_time", [("rec_xT", 5), ("rec_xt1", np.asarray(T_SOME) + 1)])
def test_recycling_denoises_the_prediction(name, first_time):
    """(4a), (5a): the first pass is given the truth at the time that it is told; (4c), (5c): the second is
    given the prediction, with noise of its own."""
    prediction = np.random.default_rng(7).uniform(-1, 1, X_0.shape).astype(np.float32)
    [(t, x_t, x_0_hat)], [(t_first, x_first, x_0_hat_first)] = run(name, answer=prediction)
    assert (t_first == first_time).all() and (t == T_SOME).all()
    assert x_0_hat is None and x_0_hat_first is None
    noises = noise_in(x_first, X_0, t_first), noise_in(x_t, prediction, t)
    assert correlation(*noises) < 5 / np.sqrt(X_0.size)  # two draws, not one


@pytest.mark.parametrize("name, leaks", [("rec_xT", False), ("rec_xt1", False), ("diff", True),
                                         ("sc_xt", True), ("sc_xt1", True)])  # fmt: skip
def test_whether_the_last_pass_depends_on_the_truth(name, leaks):
    """With a constant network, the x_t that is denoised changes with x_0, or it does not (§4)."""
    [(_, x_t, _)], _ = run(name)
    [(_, other, _)], _ = run(name, -X_0)
    assert bool((x_t != other).any()) == leaks


def test_self_conditioning_at_t():
    [(t, x_t, _)], [(t_first, x_first, zeros)] = run("sc_xt")
    assert (t == T_SOME).all() and (t_first == T_SOME).all() and (zeros == 0).all()
    assert (x_t == x_first).all()
    noise_in(x_t, X_0, t)


def test_self_conditioning_at_t_plus_1():
    """(8d): over the noise of (8a) too, x_t has the marginal q(x_t | x_0); given x_{t+1}, it is normal with
    the mean and variance that follow from x_{t+1} = sqrt(1 - beta) x_t + sqrt(beta) eps."""
    [(t, x_t, _)], [(t_first, x_first, zeros)] = run("sc_xt1")
    assert (t == T_SOME).all() and (t_first == T_SOME + 1).all() and (zeros == 0).all()
    noises = [noise_in(x_first, X_0, t_first), noise_in(x_t, X_0, t)]
    now, next_ = (ALPHA_BAR[time][:, None, None, None] for time in (t, t_first))
    covariance = np.sqrt(next_ / now) * (1 - now)
    x_0 = np.asarray(X_0)
    mean = np.sqrt(now) * x_0 + covariance / (1 - next_) * (x_first - np.sqrt(next_) * x_0)
    variance = (1 - now) - covariance**2 / (1 - next_)
    own = (x_t - mean) / np.sqrt(variance)
    for level in range(1, 5):
        found = own[t == level]
        assert found.mean() == pytest.approx(0, abs=5 / np.sqrt(found.size))
        assert found.var() == pytest.approx(1, abs=5 * np.sqrt(2 / found.size))
    assert correlation(own, noises[0]) < 5 / np.sqrt(X_0.size)  # (8d) has noise of its own


@pytest.mark.parametrize("name", ["sc_xt", "sc_xt1"])
def test_dropout_is_per_example_and_half(name):
    [(_, _, x_0_hat)], _ = run(name)
    flat = np.asarray(x_0_hat).reshape(B, -1)
    assert set(np.unique(flat)) == {0, 0.25} and (flat.min(1) == flat.max(1)).all()
    assert abs((flat[:, 0] == 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(B)


@pytest.mark.parametrize("name", ["sc_xt", "sc_xt1"])
def test_what_is_dropped_does_not_depend_on_the_noise(name):
    """It would depend on the noise if both were drawn from one key."""
    [(t, x_t, x_0_hat)], [(t_first, x_first, _)] = run(name)
    dropped = np.asarray(x_0_hat).reshape(B, -1)[:, 0] == 0
    for x, time in ((x_t, t), (x_first, t_first)):
        for place in noise_in(x, X_0, time).reshape(B, -1).T[::7]:
            assert correlation(dropped, place) < 5 / np.sqrt(B)


def assert_no_gradient_passes(training_pass):
    """The gradient equals that with a first pass of frozen weights; and it would not without the stop."""

    def network(w):
        def denoise(image, t, x_t, x_0_hat):
            output = w * x_t + image + (0 if x_0_hat is None else w * x_0_hat)
            return s.Denoised(output, jnp.tanh(output), x_t)

        return denoise

    def loss(w, frozen):
        out = training_pass(network(w), network(frozen), FIVE, IMAGE, X_0, T_SOME, KEYS)
        return jnp.mean(out.output**2)

    @jax.jit
    def gradients(w):
        return jax.grad(lambda w: loss(w, w))(w), *jax.grad(loss, (0, 1))(w, w)

    shared, frozen, first_alone = map(float, gradients(0.7))
    assert shared == pytest.approx(frozen, rel=1e-6) and frozen != 0 and first_alone == 0


@pytest.mark.parametrize("name", ["rec_xT", "rec_xt1", "sc_xt", "sc_xt1"])
def test_no_gradient_passes_through_the_first_prediction(name):
    assert_no_gradient_passes(s.STRATEGIES[name].training_pass)


# --- Losses ---


def test_one_hot_and_its_way_back():
    assert X_0.shape == (B, 5, 4, 3) and set(np.unique(X_0)) == {-1, 1}
    assert (X_0.argmax(-1) == LABEL).all() and (X_0.sum(-1) == -1).all()


def test_cross_entropy_is_scipys():
    logits = np.random.default_rng(0).normal(size=X_0.shape)
    picked = np.take_along_axis(log_softmax(logits, -1), LABEL[..., None], -1)
    ours = cross_entropy(logits, X_0)
    np.testing.assert_allclose(ours, -picked.mean((1, 2, 3)), rtol=1e-5)


def test_loss_of_perfect_and_of_known_logits():
    assert segmentation_loss(50 * X_0, X_0).max() < 1e-3
    # Uniform over 3 classes: cross entropy log 3; Dice 2 (n/3) / (N/3 + n) of a class of n of N voxels.
    loss = segmentation_loss(np.zeros(X_0.shape, np.float32), X_0)
    n = np.stack([(c == LABEL).sum((1, 2)) for c in (1, 2)])
    dice = 2 * n / 3 / (20 / 3 + n)
    has = n > 0
    expected = 20 * np.log(3) + (has * (1 - dice)).sum(0) / has.sum(0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_absent_classes_are_left_out_and_an_empty_patch_is_finite():
    logits = np.random.default_rng(5).normal(size=(2, 6, 6, 3)).astype(np.float32)
    label = np.zeros((2, 6, 6), int)
    label[0, 2:4] = 1
    x_0 = s.one_hot(jnp.asarray(label), 3)
    loss, by_voxel = segmentation_loss(logits, x_0), 20 * cross_entropy(logits, x_0)
    p, g = softmax(logits[0], -1)[..., 1], label[0]
    assert 1 - float(loss[0] - by_voxel[0]) == pytest.approx(2 * (p * g).sum() / (p + g).sum(), abs=1e-5)
    assert float(loss[1]) == pytest.approx(float(by_voxel[1]), rel=1e-6)
    gradient = jax.jit(jax.grad(lambda logits: s.segmentation_loss(logits, x_0).sum()))(logits)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("prediction", ["x_0", "eps"])
def test_ignored_voxels_are_as_if_they_were_not_there(prediction):
    """The loss is that of the other voxels alone, and no gradient reaches the ignored ones."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (2, 8, 10)).astype(np.int32)
    label[:, :, 6:] = 255
    x_0 = np.asarray(s.one_hot(jnp.asarray(label), 3))
    output, x_t = rng.normal(size=(2, *x_0.shape)).astype(np.float32)
    t = jnp.array([3, 700])

    @jax.jit
    def value_and_gradient(output, x_0, x_t):
        def loss(output):
            if prediction == "eps":
                return s.noise_loss(SCHEDULE, output, x_0, x_t, t)
            return s.segmentation_loss(output, x_0)

        return loss(output), jax.grad(lambda output: loss(output).sum())(output)

    found, gradient = map(np.asarray, value_and_gradient(output, x_0, x_t))
    alone, _ = value_and_gradient(output[:, :, :6], x_0[:, :, :6], x_t[:, :, :6])
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert (gradient[:, :, 6:] == 0).all() and (gradient[:, :, :6] != 0).any()
    probability = softmax(output, -1)
    dice, _ = soft_dice(probability, x_0)
    expected, _ = soft_dice(probability[:, :, :6], x_0[:, :, :6])
    np.testing.assert_allclose(dice, expected, rtol=1e-5)
    nothing = np.full_like(x_0, -1)
    assert np.isfinite(value_and_gradient(output, nothing, x_t)[0]).all()


def test_noise_loss_of_plain_diffusion_is_about_the_drawn_noise():
    @jax.jit
    def losses():
        eps = d.gaussian(KEYS, X_0)
        x_t = d.q_sample(SCHEDULE, X_0, T_SOME, eps)
        return [s.noise_loss(SCHEDULE, eps + off, X_0, x_t, T_SOME) for off in (0, 2)]

    # eps comes back out of x_t with float32's error, which 1 / sqrt(1 - alpha_bar_1) = 100 enlarges.
    exact, off_by_2 = losses()
    np.testing.assert_allclose(exact, 0, atol=1e-8)
    np.testing.assert_allclose(off_by_2, 4, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["x_0", "eps"])
def test_denoise_gives_the_mask_of_its_output(prediction):
    @jax.jit
    def masks():
        x_t = d.q_sample(SCHEDULE, X_0, T_SOME, d.gaussian(KEYS, X_0))
        perfect = 50 * X_0 if prediction == "x_0" else d.eps_from_x_0(SCHEDULE, X_0, x_t, T_SOME)

        def mask(output):
            return s.make_denoise(lambda *_: output, SCHEDULE, prediction)(IMAGE, T_SOME, x_t, None).x_0_hat

        return mask(perfect), mask(perfect + 3)

    found, off = masks()
    np.testing.assert_allclose(found, X_0, atol=2e-3)
    assert off.min() >= -1 and off.max() <= 1


@pytest.mark.parametrize("prediction", ["x_0", "eps"])
def test_sampling_tells_the_network_its_original_times(prediction):
    """Also a perfect predictor of the noise ends at x_0 at every step: every table is read at the row
    of the re-spaced schedule, and only the network is told t_k."""
    told, x_0 = [], X_0[:2]

    def network(image, t, x_t, x_0_hat):
        jax.debug.callback(lambda t: told.append(t.tolist()), t)
        k = jnp.argmax(FIVE.timestep[None] == t[:, None], axis=1)
        return 50 * x_0 if prediction == "x_0" else d.eps_from_x_0(FIVE, x_0, x_t, k)

    denoise = s.make_denoise(network, FIVE, prediction)
    predict = lambda *given: denoise(*given).x_0_hat  # noqa: E731
    steps = jax.jit(lambda: d.sample(FIVE, predict, IMAGE[:2], KEYS[:2], classes=3))()
    jax.effects_barrier()
    assert told == [[t] * 2 for t in (1001, 751, 501, 251, 1)]
    np.testing.assert_allclose(steps, np.broadcast_to(x_0, steps.shape), atol=1e-3)
