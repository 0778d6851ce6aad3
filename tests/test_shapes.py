"""Any size, any number of channels and classes: it trains, predicts and scores, or says why not."""

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made import mesh, tiny

import data
import evaluate
from settings import check
import train
from diffusion import make_schedule, respace
from strategies import STRATEGIES
from support.disk.files import InputError


SMALL = {"time_dim": 8, "batch_size": 1, "sampling_steps": 2, "train_timesteps": 10}


def case_of(size, channels, classes, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(*size, channels)).astype(np.float32)
    label = rng.integers(classes, size=size).astype(np.uint8)
    return data.Sample(image, label, (1.0,) * len(size), "a", np.eye(4))


@st.composite
def problems(draw):
    """Settings with a patch, and a case that may be smaller or larger than it along any axis."""
    dims = draw(st.sampled_from([2, 3]))
    shape = st.tuples(*[st.integers(1, 70)] * dims)
    levels, channels, classes = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9)))
    stride = st.tuples(*[st.integers(1, 3)] * dims)
    config = tiny(
        strategy=draw(st.sampled_from(list(STRATEGIES))), patch_shape=draw(shape), channels=(4,) * levels,
        strides=tuple(draw(stride) for _ in range(levels - 1)), translation=(2,) * dims,
        transformer=draw(st.booleans()) and levels == 3, **SMALL,
    )  # fmt: skip
    return config, classes, case_of(draw(shape), channels, classes, draw(st.integers(0, 99)))


def trains_predicts_and_scores(config, classes, case):
    try:
        check(config)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return False
    shape = case.label.shape
    batch = data.Batch(
        case.image[None], case.label[None], np.array([shape], np.int32), np.ones((1, len(shape)), np.float32)
    )
    state = train.make_state(config, case.image.shape[-1], classes)
    before = jax.tree.map(np.asarray, state)  # the step takes the state's memory
    step = train.make_train_step(config, state.network, mesh(config))
    state, metrics = step(batch, state)
    assert np.isfinite(float(metrics["loss"])) and int(metrics["skipped"]) == 0
    assert not eqx.tree_equal(jax.tree.map(np.asarray, state.network), before.network)
    schedule = respace(make_schedule(config.schedule, config.train_timesteps), config.sampling_steps)
    program = evaluate.prediction_program(state.network, config.patch_shape, "ddpm", "x_0")
    [(_, probability)] = evaluate.predict_cases(
        lambda image, keys: np.asarray(program(state.network, schedule, image, keys)), [case],
        jax.random.key(0), patch_shape=config.patch_shape, batch_size=2,
    )  # fmt: skip
    K = config.sampling_steps if STRATEGIES[config.strategy].noisy_mask else 1
    assert probability.shape == (K, *shape, classes)
    np.testing.assert_allclose(probability.sum(-1), 1, atol=1e-5)
    scores = evaluate.score(probability.argmax(-1), case, classes)
    assert np.nanmin(scores.dice, initial=0) >= 0 and np.nanmax(scores.dice, initial=0) <= 1
    return True


def test_an_odd_shape_in_bfloat16():
    """Smaller than the patch along one axis, larger along others, and one voxel thick."""
    shape = {"patch_shape": (7, 6, 2), "strides": ((2, 2, 2),), "translation": (1, 1, 1)}
    config = tiny(**shape, channels=(4, 4), dtype="bfloat16", **SMALL)
    assert trains_predicts_and_scores(config, 3, case_of((3, 1, 9), 2, 3, seed=0))


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_any_shape(problem):
    trains_predicts_and_scores(*problem)
