"""experiments/beyond.py: each method beside a closed form or a second way to compute it, what a noisy mask
gives away, the trainings and the pages."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_results import keep, rows_of
from test_strategies import assert_no_gradient_passes

import beyond as b
import diffusion as d
import evaluate
import finding as f
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


@pytest.mark.parametrize("method", ["on_policy", "self_aligned"])
def test_no_gradient_goes_through_the_first_passes(method):
    assert_no_gradient_passes(b.METHODS[method].training_pass)


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


# --- What a noisy mask gives away ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", *b.MATCHED])
def test_what_x_t_gives_away_is_counted(name):
    """One per cent of the voxels is wrong at the last of those times, which with the matched b is the same as
    with the linear schedule. The plan has three digits of b."""
    matched = float(b.MATCHED.get(name, "1").rpartition(" ")[2])
    with b.known():
        plain, scaled = (d.make_schedule(name, 1001, signal) for signal in (1.0, matched))
    whole, same = b.gives_away(plain), b.matching_b(plain, LINEAR)
    assert f"| {name} | {100 * whole:.1f} % | {same:.3f} |" in b.PAGE.read_text()
    assert matched == pytest.approx(same, abs=5e-4)
    x_0 = s.one_hot(jax.random.randint(jax.random.key(5), (B, 4096), 0, 2), 2)
    for schedule, share in ((plain, whole), (scaled, b.gives_away(LINEAR))):
        x_t = d.q_sample(schedule, x_0, jnp.full(B, round(share * 1001)), d.gaussian(KEYS, x_0))
        wrong = np.mean(np.argmax(x_t, -1) != np.argmax(x_0, -1))
        assert wrong == pytest.approx(0.01, abs=0.001)


def test_the_mean_of_many_voxels_gives_more_away():
    """What the page says of 100 of them, and at the last of those times one in a hundred means is wrong."""
    cosine, flow = d.cosine_schedule(), b.flow_schedule()
    share = b.gives_away(cosine, 100)
    assert share > b.gives_away(flow, 100) > b.gives_away(flow) > b.gives_away(cosine)
    assert f"b = {b.matching_b(cosine, LINEAR, 100):.3f}" in b.PAGE.read_text()
    x_0 = s.one_hot(jnp.ones((B, 4096, 100), int), 2)
    x_t = d.q_sample(cosine, x_0, jnp.full(B, round(share * 1001)), d.gaussian(KEYS, x_0))
    wrong = np.mean(np.argmax(jnp.mean(x_t, axis=2), -1) != 1)
    assert wrong == pytest.approx(0.01, abs=0.001)


# --- The plan, the trainings and the pages ------------------------------------------------------

SMALL = ["--dataset", "phantom_us", "--network", "Mixed", "--steps", "2", "--validation-cases", "1"]


def test_every_planned_run_has_a_folder_and_settings_of_its_own(tmp_path):
    runs = [f.Run(*pair, 1) for pair in b.TRAININGS]
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    with b.known():
        configs = {
            train.parse_config(
                ["--dataset", "phantom_us", *b.options_of(run, "phantom_us", tmp_path), "--strategy", run[0]]
            )[0]
            for run in runs
        }
    assert len(configs) == len(runs)
    late = b.options_of(f.Run("rec_xT", b.TENTH, 2), "folder:nerve_64", tmp_path)
    assert late[:4] == ["--init-from", str(tmp_path / "diff-b1-seed2"), "--steps", "100"]


def test_a_method_is_trained_and_scored_like_the_others(tmp_path):
    """At first a network of `diff`, and what starts from it; also the method that has one step."""
    methods = {"diff": f.PLAIN, "self_aligned": b.TENTH, "fixed_T": b.ONE_STEP}
    for strategy, variant in methods.items():
        run = f.Run(strategy, variant, 1)
        folder = run.folder(tmp_path)
        b.train_and_score(folder, run, [*b.options_of(run, "phantom_us", tmp_path), *SMALL])
        found = json.loads((folder / "finding.json").read_text())
        assert found["facts"]["steps"] == 2 and found["facts"]["seconds"] > 0
        steps = {len(row) - 5 for row in found["rows"] if row[3] == "ddim"}
        assert steps == {1 if strategy == "fixed_T" else 5}
    with b.known():
        late = evaluate.load(f.Run("self_aligned", b.TENTH, 1).folder(tmp_path))
    assert "diff, step 2" in late.facts.provenance["init_from"]["of"]


@pytest.fixture
def studied(tmp_path):
    """Scores as predicted, but for `perturbed`, which is too good, in a folder with the two pages."""
    gains = {"diff": (-1, 0), "rec_xT": (0.5, 1)}
    others = {"on_policy": (0.5, 1), "self_aligned": (0.5, 1), "perturbed": (3, 4)}
    more = {f.PLAIN: gains | others, b.TENTH: gains | {"self_aligned": (0.5, 1)}}
    for schedule, matched in b.MATCHED.items():
        more |= {schedule: {"diff": (-3, -6), "rec_xT": (0.5, 1)}, matched: gains}
    rows = rows_of(gains, more=more)
    for seed in (1, 2, 3):
        alone = f.Run("fixed_T", b.ONE_STEP, seed)
        plain = rows[f.Run("no_diff", f.PLAIN, seed)]
        rows[alone] = [[*map(str, alone), "ddpm", *row[4:], "0.99"] for row in plain]
    facts = {"steps": 4, "devices": "1 x cpu", "commit": "abc"}
    runs = {f"on_policy-b1-seed{seed}": facts | {"seconds": 0.3 + seed} for seed in (1, 2)}
    keep(tmp_path / "beyond-phantom_us.csv", rows, runs)
    for name, page in (("beyond", b.PAGE), ("effects", b.EFFECTS)):
        (tmp_path / f"{name}.md").write_text(page.read_text())
    return [tmp_path / "beyond.md", tmp_path / "effects.md"]


def test_the_pages_say_what_the_scores_are_and_which_predictions_hold(studied):
    made = b.pages(*studied)
    page, effects = (made[path].decode() for path in studied)
    plain, alone = (re.search(rf"^\| {name} \| 1, 1 \| (.+?) \|", page, re.M) for name in
                    ("`no_diff`", "`fixed_T`, one step"))  # fmt: skip
    assert plain[1] == alone[1] != "-"  # the same scores, and no gain
    assert re.search(r"`on_policy` .*, \+0\.5\d \(.*\) \| 1\.30 \|$", page, re.M)
    fates = re.findall(r"^\| (\d) \| .*: (as predicted|against it|open) \|$", effects, re.M)
    against = {number for number, fate in fates if fate == "against it"}
    assert against == {"7"} and sum(fate == "as predicted" for _, fate in fates) == len(fates) - 2 == 21


def test_the_projects_pages_hold_what_the_scores_give():
    for path, content in b.pages(b.PAGE, b.EFFECTS).items():
        assert content.decode() == path.read_text()
