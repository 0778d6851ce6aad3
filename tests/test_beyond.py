"""experiments/beyond.py: each method beside a closed form or a second way to compute it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import beyond as b
import diffusion as d
import strategies as s
import train
from settings import check
from support.disk.files import InputError

B, CLASSES = 64, 3
LABEL = jax.random.randint(jax.random.key(0), (B, 6, 5), 0, CLASSES)
X_0 = s.one_hot(LABEL, CLASSES)
IMAGE = jax.random.normal(jax.random.key(1), (B, 6, 5, 1))
KEYS = jax.random.split(jax.random.key(2), B)
T_ALL = jax.random.randint(jax.random.key(3), (B,), 1, 1001)
LINEAR = d.linear_schedule()


def answer(image, t, x_t, x_0_hat):
    """A prediction from which x_t can be found again."""
    return s.Denoised(x_t, jnp.tanh(x_t / 4) * (1 + t.reshape(-1, 1, 1, 1) / 2002), x_t)


class Spy:
    """`answer`, which notes what it is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, *given):
        self.calls.append(given[1:3])
        return answer(*given)


def passes(method, t=T_ALL, schedule=LINEAR):
    """The times and noisy masks that the teacher and the trained network are given."""
    spy, teacher = Spy(), Spy()
    b.METHODS[method].training_pass(spy, teacher, schedule, IMAGE, X_0, t, KEYS)
    ((time, x_t),) = spy.calls
    return teacher.calls, time, x_t


# --- The methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 50])
def test_flow_matching_is_euler_along_the_rectified_flow(steps):
    """In the flow's own variables, z = (1 - s) x_0 + s eps, from s = 0.999 to 0, in float64."""
    few = d.respace(b.flow_schedule(), steps)
    found = d.sample(
        few, lambda image, k, x, _: answer(image, few.timestep[k], x, None).x_0_hat, IMAGE, KEYS,
        classes=CLASSES, sampler=d.ddim_step,
    )  # fmt: skip
    x_T = np.asarray(d.gaussian(jax.vmap(jax.random.fold_in, (0, None))(KEYS, 0), X_0), np.float64)
    times = [*np.rint(np.linspace(1, 1001, steps)).astype(int)[::-1], 0]
    z = x_T * np.hypot(1 - 0.999, 0.999)
    for t, t_next, x_0_hat in zip(times, times[1:], found, strict=False):
        now, later = 0.999 * t / 1001, 0.999 * t_next / 1001
        expected = np.tanh(z / np.hypot(1 - now, now) / 4) * (1 + t / 2002)
        np.testing.assert_allclose(x_0_hat, expected, atol=5e-5)
        z += (later - now) * (z - expected) / now  # the velocity is eps_hat - x_0_hat
    np.testing.assert_allclose(found[-1], z, atol=5e-5)  # at s = 0 it is the last prediction


def test_fixed_T_is_one_pass_of_pure_noise_at_T():
    teacher, time, x_T = passes("fixed_T")
    assert not teacher and set(np.asarray(time)) == {1001}
    changed = b.fixed_T(answer, answer, LINEAR, IMAGE, -X_0, T_ALL[::-1], KEYS)
    np.testing.assert_array_equal(changed.x_t, x_T)  # neither the mask nor t is in it
    assert np.mean(x_T) == pytest.approx(0, abs=0.05) and np.std(x_T) == pytest.approx(1, abs=0.05)
    # It is what sampling begins with, so that its loss is that of the first step.
    loss = s.segmentation_loss(changed.output, X_0)
    alone = answer(IMAGE, jnp.full(B, 1001), d.gaussian(KEYS, X_0), None)
    np.testing.assert_array_equal(loss, s.segmentation_loss(alone.output, X_0))


@pytest.mark.parametrize("schedule", [LINEAR, d.respace(LINEAR, 21)], ids=["T = 1001", "T = 21"])
def test_on_policy_sees_the_samplers_own_steps(schedule):
    t = jnp.arange(B) * schedule.T // B + 1
    _, time, x_t = passes("on_policy", t, schedule)
    few = d.respace(schedule, 5)
    told = {int(row): k for k, row in enumerate(np.rint(np.linspace(1, schedule.T, 5)).astype(int), 1)}
    steps = [told[int(row)] for row in time]  # each is one of the sampler's five times
    assert steps == sorted(steps) and np.bincount(steps)[1:] == pytest.approx([B / 5] * 5, abs=4)

    def predict(image, k, x, _):
        rows = jnp.asarray([0, *told])[k]
        return answer(image, rows, x, None).x_0_hat

    x_0_hat = d.sample(few, predict, IMAGE, KEYS, classes=CLASSES)
    for i, k in enumerate(steps):
        expected = np.asarray(x_0_hat[5 - k, i], np.float64) / (1 + int(time[i]) / 2002)
        np.testing.assert_allclose(np.tanh(x_t[i] / 4), expected, atol=1e-5)


def test_on_policy_with_the_truth_sees_the_noised_truth():
    """Where every prediction is right, the steps of DDPM keep the marginals (2a)."""
    _, teacher = Spy(), lambda image, t, x_t, _: s.Denoised(X_0, X_0, x_t)
    t = jnp.full(B, 500)  # step 3 of 5, at t = 501
    x_t = np.asarray(b.on_policy(answer, teacher, LINEAR, IMAGE, X_0, t, KEYS).x_t)
    eps = (x_t - np.sqrt(0.0779923232) * X_0) / np.sqrt(1 - 0.0779923232)
    assert np.mean(eps) == pytest.approx(0, abs=5 / np.sqrt(eps.size))
    assert np.var(eps) == pytest.approx(1, abs=5 * np.sqrt(2 / eps.size))
    assert np.mean(eps * X_0) == pytest.approx(0, abs=5 / np.sqrt(eps.size))


@pytest.mark.parametrize("method", ["on_policy", "self_aligned"])
def test_no_gradient_goes_through_the_first_passes(method):
    """The gradient is that of a single pass of the x_t that was given."""

    def network(w):
        def denoise(image, t, x_t, x_0_hat):
            output = w * answer(image, t, x_t, x_0_hat).x_0_hat
            return s.Denoised(output, output, x_t)

        return denoise

    def loss(w, through):
        found = b.METHODS[method].training_pass(network(w), network(w), LINEAR, IMAGE, X_0, T_ALL, KEYS)
        time = passes(method)[1]
        alone = network(w)(IMAGE, time, jax.lax.stop_gradient(found.x_t), None)
        return jnp.mean(s.segmentation_loss((found if through else alone).output, X_0))

    slope, alone = (float(jax.grad(loss)(0.7, through)) for through in (True, False))
    assert slope == pytest.approx(alone, rel=1e-6) and slope != 0


def test_self_alignment_keeps_classes_and_noise():
    ((first, x_T),), time, x_t = passes("self_aligned")
    assert set(np.asarray(first)) == {1001} and np.array_equal(time, T_ALL)
    alpha_bar = np.asarray(LINEAR.alpha_bar, np.float64)[T_ALL].reshape(-1, 1, 1, 1)
    mask = (x_t - np.sqrt(1 - alpha_bar) * x_T) / np.sqrt(alpha_bar)
    clear = alpha_bar.ravel() > 0.01  # where float32 leaves enough of it
    chosen = np.argmax(answer(IMAGE, first, x_T, None).x_0_hat, axis=-1)
    np.testing.assert_allclose(mask[clear], np.where(np.eye(3)[chosen], 1, -1)[clear], atol=1e-3)


def test_perturbed_input_is_one_pass_with_a_hundredth_more_variance():
    teacher, time, x_t = passes("perturbed")
    assert not teacher and np.array_equal(time, T_ALL)
    alpha_bar = np.asarray(LINEAR.alpha_bar, np.float64)[T_ALL].reshape(-1, 1, 1, 1)
    eps = (x_t - np.sqrt(alpha_bar) * X_0) / np.sqrt(1 - alpha_bar)
    plain = np.asarray(s.standard_diffusion(answer, answer, LINEAR, IMAGE, X_0, T_ALL, KEYS).x_t)
    same = (plain - np.sqrt(alpha_bar) * X_0) / np.sqrt(1 - alpha_bar)
    assert np.var(eps) / np.var(same) == pytest.approx(1.01, rel=1e-3)


def test_the_methods_are_known_while_they_are_wanted_and_no_longer():
    with b.known():
        config = train.parse_config(["--strategy", "on_policy", "--schedule", "flow"])[0]
        check(config)
        assert d.make_schedule(config.schedule, 5).T == 5
    with pytest.raises(InputError, match="--strategy on_policy is not one of no_diff, diff"):
        check(config)
