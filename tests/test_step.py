"""What reaches the strategy in a training step, what the optimizer makes of it, and how a validation chooses
the model: each beside a calculation of its own."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Mixed
from made import (
    batch_number, left_behind, mesh, quick, state_of, stepper, tiny, train_until_killed,
)  # fmt: skip
from scipy.special import softmax

import data
import diffusion as d
import evaluate
import train
from strategies import STRATEGIES, one_hot, standard_diffusion
from support.disk import run_folder
from support.disk.files import InputError
from support.results.scores import CaseScores

STILL = {"rotation": 0.0, "scaling": 0.0, "translation": (0, 0)}


class Spy:
    """Stands for a strategy, does what `diff` does, and writes down what it is given."""

    def __init__(self, monkeypatch):
        self.seen = []
        strategy = STRATEGIES["diff"]._replace(training_pass=self.predict)
        monkeypatch.setitem(STRATEGIES, "diff", strategy)

    def predict(self, denoise, teacher, schedule, image, x_0, t, keys):
        def write_down(*values):
            self.seen.append([np.array(value) for value in values])

        self.schedule = schedule
        jax.debug.callback(write_down, image, x_0, t, jax.random.key_data(keys), schedule.timestep)
        return standard_diffusion(denoise, teacher, schedule, image, x_0, t, keys)


# --- What is random in a step -------------------------------------------------------------------


def recorded(monkeypatch, name, note):
    """Lets `note` see what the step gives to a function of train.py."""
    real = getattr(train, name)
    monkeypatch.setattr(train, name, lambda *args, **words: note(*args, **words) or real(*args, **words))


def test_what_the_strategy_is_given(monkeypatch):
    """Without augmentation a patch as large as the image is the image, and x_0 is its label in -1 and 1.
    Every time is drawn. None of the step's keys is used twice, or is made of another one by a split; the same
    step draws the same once more, and nothing random of it returns in another one."""
    spy, keys = Spy(monkeypatch), {"augment": [], "sample_t": []}
    for name, found in keys.items():

        def note(first, key, *_, found=found, **__):
            jax.debug.callback(lambda data: found.append(np.array(data)), jax.random.key_data(key))

        recorded(monkeypatch, name, note)
    config = quick(strategy="diff", train_timesteps=5, batch_size=64, **STILL)
    step = stepper(config)
    for number in (0, 0, 1):
        step(number)
    first, again, other = spy.seen
    image, x_0, t, noise, timestep = first
    batch = batch_number(config)
    np.testing.assert_allclose(image, batch.image, atol=1e-5)
    np.testing.assert_array_equal(x_0, np.stack([2.0 * (batch.label == c) - 1 for c in (0, 1)], -1))
    assert timestep.tolist() == [0, 1, 251, 501, 751, 1001] and set(t.tolist()) == set(range(1, 6))
    of_times = jax.random.split(jax.random.wrap_key_data(jnp.asarray(keys["sample_t"][0])), 64)
    every = [noise, keys["augment"][0], jax.random.key_data(of_times), keys["sample_t"][0][None]]
    assert len(np.unique(np.concatenate(every), axis=0)) == 3 * 64 + 1
    assert all((a == b).all() for a, b in zip(first, again, strict=True)) and not (t == other[2]).all()
    for one, same, another in (*keys.values(), (noise, again[3], other[3])):
        assert (one == same).all() and not (one == another).all(axis=-1).any()


@pytest.mark.parametrize("name, whole", [("linear", d.linear_schedule()), ("cosine", d.cosine_schedule())])
def test_schedule_and_limits_of_augmentation_are_those_of_the_settings(monkeypatch, name, whole):
    """And weights and training have a stream of the seed each; that of sampling is tested with the
    validation, which has not seen its noise in training."""
    spy, given, used = Spy(monkeypatch), {}, []
    recorded(monkeypatch, "augment", lambda *_, **words: given.update(words))
    recorded(monkeypatch, "key_for", lambda *given: used.append(given))
    limits = {"rotation": 0.4, "scaling": 0.3, "translation": (5, 4), "foreground": 0.2}
    config = quick(strategy="diff", schedule=name, train_timesteps=7, seed=3, **limits)
    state = train.make_state(config, 1, 2)
    step = train.make_train_step(config, state.network, mesh(config))
    step.lower(batch_number(config), state)  # which calls every function of the step once, and compiles none
    assert spy.schedule.T == 7 and given == limits and used == [("weights", 3), ("training", 3)]
    expected = whole.alpha_bar[spy.schedule.timestep[1:]]
    np.testing.assert_allclose(spy.schedule.alpha_bar[1:], expected, rtol=1e-4)


def test_the_streams_of_a_seed_are_independent():
    uses, seeds = ("weights", "training", "sampling"), (0, 1)
    draws = [jax.random.normal(d.key_for(use, seed), (2000,)) for use in uses for seed in seeds]
    apart = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(apart).max() < 5 / np.sqrt(2000)


# --- Importance sampling ------------------------------------------------------------------------


def test_a_weight_multiplies_an_examples_share_of_the_gradient(monkeypatch):
    """Three times the weight is three times the gradient; the losses that are recorded stay as they are."""
    t, sampler = jnp.arange(1, 9), d.make_time_sampler(11, importance=True)
    # The place of t = 0 in the history is nobody's, and tells the weight here.
    monkeypatch.setattr(train, "sample_t", lambda sampler, *_: (t, jnp.full(8, sampler.history[0, 0])))
    step, found = stepper(quick(strategy="diff", train_timesteps=11)), []
    for weight in (1.0, 3.0):
        history = sampler.history.at[0].set(weight)
        found.append(step(sampler=dataclasses.replace(sampler, history=history)))
    (one, state), (three, other) = found
    assert three["gradient_norm"] == pytest.approx(3 * one["gradient_norm"], rel=1e-4)
    assert three["weighted_loss"] == pytest.approx(3 * three["loss"], rel=1e-5)
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-5)
    np.testing.assert_allclose(*(after.time_sampler.history[1:] for after in (state, other)), rtol=1e-5)


def test_the_weights_are_those_of_the_times(monkeypatch):
    """With one example, the weighted loss over the loss is 1 / (t_max p_t) of the t that was drawn."""
    sampler = d.make_time_sampler(2, importance=True, length=1)
    sampler = d.record_losses(sampler, jnp.array([1, 2]), jnp.array([3.0, 1.0]))
    spy, config = Spy(monkeypatch), quick(strategy="diff", train_timesteps=2, sampling_steps=2, batch_size=1)
    share, drawn, step = d.probabilities(sampler), set(), stepper(config)
    for number in range(12):
        metrics, after = step(number, sampler)
        t = int(spy.seen[-1][2][0])
        drawn.add(t)
        assert metrics["weighted_loss"] / metrics["loss"] == pytest.approx(0.5 / float(share[t]), rel=1e-4)
        assert float(after.time_sampler.history[t, 0]) == pytest.approx(metrics["loss"], rel=1e-5)
    assert drawn == {1, 2}


def test_parts_of_a_batch_leave_each_loss_at_its_time():
    """The history of losses is that of the whole batch at once."""
    config = quick(strategy="diff", train_timesteps=5)
    (first, whole), (other, parts) = (stepper(dataclasses.replace(config, accumulate=n))() for n in (1, 4))
    assert other == pytest.approx(first, rel=1e-4)
    assert int(whole.time_sampler.count.sum()) == 8
    for name in ("count", "history"):
        ours, expected = (np.array(getattr(s.time_sampler, name)) for s in (parts, whole))
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "strategy, t_max",
    [("no_diff", 5), ("diff", 5), ("sc_xt", 5), ("sc_xt1", 4), ("rec_xt1", 4), ("rec_xT", 4)],
)
def test_times_are_drawn_up_to_T_or_below_it_and_without_diffusion_uniformly(strategy, t_max):
    settings = {"strategy": strategy, "train_timesteps": 5}
    sampler = train.make_state(quick(**settings), 1, 2).time_sampler
    assert (sampler.t_max, sampler.importance) == (t_max, strategy != "no_diff")
    assert not train.make_state(quick(**settings, time_sampling="uniform"), 1, 2).time_sampler.importance


# --- The loss that is logged, and the optimizer -------------------------------------------------


def loss_of(strategy, **settings):
    """`loss_fn` of a strategy, as one compiled program."""
    facts = {"config": quick(strategy=strategy, **settings), "schedule": d.linear_schedule()}

    @eqx.filter_jit
    def loss_fn(*given):
        return train.loss_fn(*given, teacher=None, **facts)

    return loss_fn


def test_the_logged_dice_is_a_mean_over_the_classes_that_are_there(monkeypatch):
    """Of examples with two foreground classes, one, and none, whose Dice is NaN."""
    label = np.zeros((3, 4, 4), int)
    label[0, 0], label[0, 1], label[1, 2] = 1, 2, 2
    x_0 = jnp.asarray(np.stack([2.0 * (label == c) - 1 for c in range(3)], -1))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 1)), jnp.float32)
    sizes = {"image_channels": 1, "classes": 3, "noisy_mask": False, "self_condition": False}
    network = Mixed(**sizes, key=jax.random.key(0))
    p = np.array(jax.nn.softmax(jax.vmap(network)(image)))
    keys, weight = jax.random.split(jax.random.key(0), 3), jnp.array([1.0, 2.0, 0.0])
    mean, (loss, dice) = loss_of("no_diff")(network, image, x_0, jnp.ones(3, int), weight, keys)
    each = [[2 * p[b][label[b] == c, c].sum() / (p[b, ..., c].sum() + (label[b] == c).sum()) for c in (1, 2)]
            for b in range(2)]  # fmt: skip
    np.testing.assert_allclose(dice[:2], [np.mean(each[0]), each[1][1]], rtol=1e-5)
    assert np.isnan(dice[2]) and float(mean) == pytest.approx(float(loss[0] + 2 * loss[1]) / 3, rel=1e-5)


def test_a_network_that_predicts_noise_is_trained_on_noise():
    """One that predicts none errs by the noise itself, whose square is 1 on average; the loss of its masks
    would be more than ten times as large."""
    sizes = {"image_channels": 1, "classes": 2, "noisy_mask": True, "self_condition": False}
    zero = jax.tree.map(jnp.zeros_like, Mixed(**sizes, key=jax.random.key(0)))
    label = jax.random.randint(jax.random.key(1), (4, 40, 40), 0, 2)
    given = jnp.zeros((4, 40, 40, 1)), one_hot(label, 2), jnp.full(4, 300), jnp.ones(4)
    loss_fn = loss_of("diff", prediction="eps")
    _, (loss, _) = loss_fn(zero, *given, jax.random.split(jax.random.key(2), 4))
    np.testing.assert_allclose(loss, 1, atol=5 * np.sqrt(2 / 3200))


def test_the_optimizer_is_adamw_after_clipping():
    """Loshchilov & Hutter (2019), Algorithm 2, in NumPy, over gradients under and over the norm."""
    config = quick(learning_rate=1e-2, learning_rate_start=1e-3, warmup_steps=2, decay_steps=50,
                  weight_decay=0.5, clip_norm=2.0)  # fmt: skip
    optimizer, learning_rate = train.make_optimizer(config)
    rng = np.random.default_rng(0)
    ours = {"a": jnp.ones(3), "b": jnp.full((2, 2), -2.0)}
    flat = np.array([1.0] * 3 + [-2.0] * 4)
    state, m, v = optimizer.init(ours), np.zeros(7), np.zeros(7)
    update = jax.jit(optimizer.update)
    for n, norm in enumerate((0.5, 30.0, 0.01, 4.0)):
        gradient = rng.normal(size=7)
        gradient *= norm / np.linalg.norm(gradient)
        tree = {"a": jnp.asarray(gradient[:3]), "b": jnp.asarray(gradient[3:].reshape(2, 2))}
        updates, state = update(tree, state, ours)
        ours = eqx.apply_updates(ours, updates)
        clipped = gradient * min(1, 2.0 / norm)
        m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
        adam = m / (1 - 0.9 ** (n + 1)) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        flat = flat - float(learning_rate(n)) * (adam + 0.5 * flat)
        np.testing.assert_allclose(np.concatenate([ours["a"], ours["b"].ravel()]), flat, rtol=1e-5)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    """The paper's preset: linear from 1e-5 to 8e-4 in 100 steps, a cosine to 5e-5 at step 10,000."""
    config, _ = train.parse_config(["--dataset", "amos_ct"])
    _, rate = train.make_optimizer(config)
    middle = 5e-5 + (8e-4 - 5e-5) * (1 + np.cos(np.pi / 4)) / 2
    expected = {0: 1e-5, 50: (1e-5 + 8e-4) / 2, 100: 8e-4, 100 + 9900 // 4: middle, 5050: (8e-4 + 5e-5) / 2,
                10_000: 5e-5, 12_000: 5e-5}  # fmt: skip
    assert [float(rate(step)) for step in expected] == pytest.approx(list(expected.values()), rel=1e-4)
    _, short = train.make_optimizer(quick(steps=40, decay_steps=0, warmup_steps=100, learning_rate_end=1e-5))
    assert [float(short(20)), float(short(40))] == pytest.approx([8e-4, 1e-5])  # half, the end


# --- Validation and the choice of the model -----------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Self-conditioned, so that what a sampling step is given matters, and with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = quick(steps=6, validate_every=3, validation_cases=3, strategy="sc_xt", ema_decay=0.5, seed=5,
                  evaluate_with="ema", run_dir=str(folder), learning_rate=3e-3, decay_steps=6)  # fmt: skip
    train.train(config)
    return config


def test_validation_is_sampling_on_the_first_validation_cases(run):
    """Case by case, with K = 5 rows of a re-spaced schedule, the sampling stream of the seed, the noise of
    the case's number and patch, and each step's prediction given to the next."""
    model, dataset = evaluate.load(run.run_dir + "/final"), data.open_dataset("phantom_us", Path(), (16, 16))
    five, dices = d.respace(d.linear_schedule(), 5), []
    call, step = eqx.filter_jit(lambda network, *given: network(*given)), eqx.filter_jit(d.ddpm_step)
    for number in range(3):
        case = dataset.load("validation", number)
        key = jax.random.fold_in(jax.random.fold_in(d.key_for("sampling", 5), number), 0)
        x_t = jax.random.normal(jax.random.fold_in(key, 0), (16, 16, 2))
        x_0_hat, found = jnp.zeros((16, 16, 2)), []
        for k, t in zip(range(5, 0, -1), (1001, 751, 501, 251, 1), strict=True):
            logits = call(model.network, jnp.asarray(case.image), jnp.array(t), x_t, x_0_hat)
            x_0_hat = 2 * jnp.asarray(softmax(logits, -1)) - 1
            eps = jax.random.normal(jax.random.fold_in(key, k), x_t.shape)
            x_t = step(five, x_0_hat[None], x_t[None], jnp.array([k]), eps[None])[0]
            a, b = np.argmax(logits, -1) == 1, case.label == 1
            found.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        dices.append(found)
    log = [json.loads(line) for line in (Path(run.run_dir) / "log.jsonl").read_text().splitlines()]
    [*_, logged] = [line["validation_dice"] for line in log if "validation_dice" in line]
    np.testing.assert_allclose(logged, np.mean(dices, axis=0), atol=0.02)  # a pixel may round elsewhere
    assert len(logged) == 5 and np.ptp(np.mean(dices, axis=0)) > 0.01


def test_the_averaged_weights_are_those_that_are_validated_and_kept(run):
    state, final = state_of(run), evaluate.load(run.run_dir + "/final").network
    same = [eqx.tree_equal(*map(jax.tree.leaves, (final, weights))) for weights in (state.ema, state.network)]
    assert same == [True, False]


def validations(monkeypatch, *dices):
    """Makes a run's validations have these scores, [step, class] of one case each, one after the other."""
    given, scored = iter(dices), []

    def predict(self, cases, *_, **how):
        case = next(iter(cases))
        scored.append(np.array(next(given), float))
        yield case, np.zeros((len(scored[-1]), *case.label.shape, 2))

    def score(found, case, *_, **how):
        dice = scored[-1]
        return CaseScores(case.uid, dice, np.ones_like(dice), np.full(dice.shape, "found"))

    monkeypatch.setattr(evaluate.Model, "predict", predict)
    monkeypatch.setattr(evaluate, "score", score)


@pytest.mark.parametrize(
    "dices, best",
    [
        ([[[0.9], [0.5]], [[0.2], [0.7]], [[0.8], [0.6]]], (4, 0.7)),  # by the last sampling step
        ([[[0.1], [0.7]], [[0.2], [0.7]], [[0.3], [0.7]]], (2, 0.7)),  # of several, the first
        ([[[0.0], [0.0]], [[0.0], [0.0]], [[0.0], [0.0]]], (2, 0.0)),  # even where nothing is found
        ([[[0.5, 0.9]], [[0.8, 0.8]], [[0.9, 0.5]]], (4, 0.8)),  # by the mean over the classes
        ([[[0.3], [np.nan]], [[0.3], [0.1]], [[0.3], [np.nan]]], (4, 0.1)),  # undefined is below every score
        ([[[np.nan]], [[np.nan]], [[np.nan]]], (6, -1.0)),  # with nothing to choose by, the newest
    ],
)
def test_best_is_the_highest_mean_dice_at_the_last_sampling_step(run, monkeypatch, tmp_path, dices, best):
    validations(monkeypatch, *dices)
    model = evaluate.load(run.run_dir)
    journal = run_folder.Journal(tmp_path, {}, {"dice": -1.0, "step": 0}, [])
    for step in (2, 4, 6):
        now = model._replace(facts=dataclasses.replace(model.facts, step=step))
        train.validate(now, model.dataset(), mesh(run), journal, last=step == 6)
    facts = evaluate.load(tmp_path / "best").facts
    assert (facts.step, facts.dice) == pytest.approx(best)
    assert (journal.best["step"], journal.best["dice"]) == best
    assert evaluate.load(tmp_path / "final").facts.step == 6


def test_a_model_samples_as_it_is_asked_to(run):
    """By default as in its validation, with DDPM; the first step is the same with every sampler."""
    model = evaluate.load(run.run_dir)
    case = model.dataset().load("test", 0)
    usual = model.predict_image(case)

    def asked(**how):
        return model.predict_image(case, model.sampling(**how))

    np.testing.assert_array_equal(asked(sampler="ddpm", K=5, seed=0), usual)
    ddim, other = asked(sampler="ddim"), asked(seed=1)
    np.testing.assert_allclose(ddim[0], usual[0], atol=1e-5)
    assert np.abs(ddim[1:] - usual[1:]).max() > 1e-3 and np.abs(other[0] - usual[0]).max() > 1e-3
    assert len(asked(K=2)) == 2
    for changed in ({"schedule": "cosine"}, {"train_timesteps": 100}, {"signal": 4.0}):
        config = dataclasses.replace(model.facts.config, **changed)
        trained = model._replace(facts=dataclasses.replace(model.facts, config=config))
        assert np.abs(trained.predict_image(case)[1:] - usual[1:]).max() > 1e-3


@pytest.mark.parametrize("asked, count", [(0, 30), (2, 2), (40, 30)])
def test_how_many_cases_are_validated(run, tmp_path, asked, count):
    model = evaluate.load(run.run_dir)
    config = dataclasses.replace(model.facts.config, validation_cases=asked)
    facts = dataclasses.replace(model.facts, config=config, step=7)
    journal = run_folder.Journal(tmp_path, {}, {"dice": -1.0, "step": 0}, [])
    scores = train.validate(model._replace(facts=facts), model.dataset(), mesh(run), journal, last=False)
    assert scores.uids == tuple(f"phantom_us_validation_{i:03d}" for i in range(count))
    picture = (tmp_path / "validation-000007.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and np.isnan(scores.hausdorff[0, 0, :-1]).all()


# --- Resuming with other settings ---------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of four steps, at the end of which the learning rate is that of the end."""
    config = quick(run_dir=str(tmp_path_factory.mktemp("runs") / "ended"))
    train.train(config)
    return config


def test_the_length_may_change_where_the_learning_rate_does_not_depend_on_it(run, ended, tmp_path):
    for other, says in (
        ({"steps": 6}, "has steps = 4, not 6; .* add --restart-at 4 "),
        ({"steps": 6, "decay_steps": 3}, "has decay_steps = 0, not 3"),
        ({"steps": 6, "restart_at": 1}, "has steps = 4, not 6; .* add --restart-at 4 "),
        ({"steps": 6, "restart_at": 4, "seed": 1}, "has seed = 0, not 1"),
        ({"steps": 2}, "has come to step 4; give --steps 4$"),
        ({"dtype": "bfloat16"}, "has dtype = float32, not bfloat16; .* give --dtype float32 to resume"),
    ):
        with pytest.raises(InputError, match=says) as stop:
            train.train(dataclasses.replace(ended, **other))
        assert "\n" not in str(stop.value)
    fixed = dataclasses.replace(run, run_dir=shutil.copytree(run.run_dir, str(tmp_path / "fixed")))
    train.train(dataclasses.replace(fixed, steps=8, remat=1, log_every=3))
    assert run_folder.read_state(tmp_path / "fixed" / "last")[0]["step"] == 8
    for other, says in (
        ({"seed": 1}, "has seed = 5, not 1"),
        ({"restart_at": 7}, "has restart_at = 0, not 7; give --restart-at 0 to resume, or 8 "),
    ):
        with pytest.raises(InputError, match=says):
            train.train(dataclasses.replace(fixed, steps=9, **other))


def test_a_run_that_has_ended_goes_on_with_a_new_warm_up_and_says_so(ended, tmp_path, capsys):
    """Four steps, and five more; once in one go, and once killed after the first of the five and again after
    three: the same states, models and logs. The learning rate is that of a run of five steps."""
    for name in ("one", "two"):
        shutil.copytree(ended.run_dir, tmp_path / name)
    longer = dataclasses.replace(ended, run_dir=str(tmp_path / "one"), steps=9, restart_at=4)
    capsys.readouterr()
    train.train(longer)
    assert "resuming from step 4, with a new warm-up of the learning rate" in capsys.readouterr().err
    killed = dataclasses.replace(longer, run_dir=str(tmp_path / "two"))
    for moment in (5, 7):
        train_until_killed(killed, moment)
    train.train(killed)
    files, log = left_behind(tmp_path / "one")
    assert (files, log) == left_behind(tmp_path / "two") and len(files) == 3
    lines = [json.loads(line) for line in log.splitlines()]
    assert lines.count({"step": 4, "restart_at": 4}) == 1
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    rate = train.make_optimizer(dataclasses.replace(ended, steps=5))[1]
    assert rates[4:] == pytest.approx([float(rate(step)) for step in range(5)])
    assert rates[4] < rates[6] > rates[8] and rates[0] == rates[4]
    facts = evaluate.load(tmp_path / "two" / "final").facts
    assert facts.provenance["restarts"] == [4] and (facts.config.restart_at, facts.step) == (4, 9)
    with pytest.raises(InputError, match="has restart_at = 4, not 0; give --restart-at 4 to resume, or 9 "):
        train.train(dataclasses.replace(longer, restart_at=0))


@pytest.mark.parametrize("fresh", [False, True])
def test_there_is_nothing_to_restart_where_no_state_is(run, tmp_path, fresh):
    folder = tmp_path / "none"
    if fresh:
        shutil.copytree(run.run_dir, folder)
    config = dataclasses.replace(run, run_dir=str(folder), steps=9, restart_at=6)
    with pytest.raises(InputError, match="none: no state to go on from; leave out --restart-at 6"):
        train.train(config, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["none"] * fresh


def test_a_run_starts_from_the_weights_of_another_one(run, tmp_path, capsys):
    """A first step whose learning rate is 0 leaves them as they are. They are needed at the beginning alone,
    and what they were is said in every model that comes of them."""
    source = Path(shutil.copytree(run.run_dir, tmp_path / "source"))
    begun = evaluate.load(source)
    config = quick(steps=1, init_from=str(source), run_dir=str(tmp_path / "run"), learning_rate_start=0.0,
                   strategy="sc_xt", seed=9, decay_steps=9, ema_decay=0.5)  # fmt: skip
    train.train(config)
    assert "starting from the weights of" in capsys.readouterr().err
    one = evaluate.load(tmp_path / "run" / "final")
    assert eqx.tree_equal(one.network, begun.network)
    assert eqx.tree_equal(state_of(config).ema, begun.network)
    digest = hashlib.sha256((source / "best").read_bytes()).hexdigest()
    shutil.rmtree(source)
    train.train(dataclasses.replace(config, steps=2))
    two = evaluate.load(tmp_path / "run" / "final")
    assert not eqx.tree_equal(two.network, begun.network)
    for facts in (one.facts, two.facts):
        record = facts.provenance["init_from"]
        assert (record["sha256"], record["new"]) == (digest, []) and "sc_xt, step" in record["of"]
    with pytest.raises(InputError, match="has init_from"):
        train.train(dataclasses.replace(config, steps=3, init_from=""))


def test_other_classes_start_with_another_head():
    """And another stem, which takes in a mask of these classes."""
    two, three = (
        jax.tree.map(
            lambda like, n=n: jax.device_put(np.full(like.shape, n, np.float32)),
            eqx.filter_eval_shape(train.make_network, tiny(), 1, n, jax.random.key(0)),
        )
        for n in (2, 3)
    )
    mixed, kept = train.with_weights_of(three, two)
    assert kept == [".stem.kernel", ".head.kernel", ".head.bias"]
    assert eqx.tree_equal(mixed.down, two.down) and eqx.tree_equal(mixed.up, two.up)
    assert eqx.tree_equal(mixed.head, three.head) and eqx.tree_equal(mixed.stem, three.stem)


def test_another_network_is_no_beginning(run, tmp_path):
    other = tiny(init_from=run.run_dir, run_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="arrays have another shape or place") as stop:
        train.train(other)
    assert "\n" not in str(stop.value) and not (tmp_path / "run" / "last").exists()
    with pytest.raises(InputError, match="no such file"):
        train.train(quick(init_from=str(tmp_path / "nothing"), run_dir=str(tmp_path / "run")))


def test_lines_are_logged_and_states_saved_when_asked_and_best_holds_the_weights_of_its_step(
    tmp_path, monkeypatch
):
    saved, real = [], run_folder.Journal.save

    def save(self, state, step):
        saved.append(step)
        real(self, state, step)

    monkeypatch.setattr(run_folder.Journal, "save", save)
    validations(monkeypatch, [[0.5]], [[0.7]], [[0.6]])
    how = {"validate_every": 5, "log_every": 4, "save_every": "3", "decay_steps": 20}
    config = quick(steps=11, run_dir=str(tmp_path / "run"), **how)
    train.train(config)
    header, _ = run_folder.read_state(tmp_path / "run" / "last")
    assert header["best"] == {"dice": 0.7, "step": 10}
    best = jax.tree.leaves(evaluate.load(tmp_path / "run").network)
    for name, same in (("previous", True), ("last", False)):  # of step 10, and of step 11
        assert eqx.tree_equal(best, jax.tree.leaves(state_of(config, name).network)) == same
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 5, 8, 10, 11]
    assert [line["step"] for line in lines if "validation_dice" in line] == [5, 10, 11]
    assert saved == [0, 3, 5, 6, 9, 10, 11]
