"""experiments/finding.py: intervals for new trainings and new cases, and the verdicts of the plan."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import finding as f


def drawn(rng, seeds, cases, mean=0.0, of_seeds=1.0, of_cases=1.0, of_rest=1.0):
    parts = rng.normal(size=(seeds, 1)) * of_seeds, rng.normal(size=(1, cases)) * of_cases
    return mean + sum(parts) + rng.normal(size=(seeds, cases)) * of_rest


@pytest.mark.parametrize("seeds, of_seeds, of_cases", [(5, 1.0, 5.0), (5, 1.0, 0.5), (3, 0.3, 3.0)])
def test_intervals_hold_the_mean_in_95_percent_of_experiments(seeds, of_seeds, of_cases):
    """A t-test over cases, of the mean of the seeds, holds it in far fewer."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        values = drawn(rng, seeds, 40, 7.0, of_seeds, of_cases)
        effect = f.random_effects(values)
        held += effect.low < 7 < effect.high
        naive += ttest_1samp(values.mean(axis=0), 7).pvalue > 0.05
    assert 930 <= held <= 995
    assert naive < held


def test_without_a_share_of_the_cases_it_is_the_t_test_over_seeds():
    rng = np.random.default_rng(1)
    values = drawn(rng, 5, 40, 0.3, 1.0, 0.0)
    values -= values.mean(axis=0) - values.mean()  # no case differs from another
    test = ttest_1samp(values.mean(axis=1), 0)
    effect = f.random_effects(values)
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose(effect[:4], [values.mean(), low, high, test.pvalue], rtol=1e-9)


def test_seeds_that_agree_give_the_t_test_over_cases():
    values = np.tile(np.random.default_rng(2).normal(0.2, 1, 40), (5, 1))
    values += np.linspace(-1e-9, 1e-9, 5)[:, None]
    test = ttest_1samp(values[0], 0)
    assert f.random_effects(values).mean == pytest.approx(values[0].mean())
    assert f.random_effects(values).p == pytest.approx(test.pvalue, rel=0.1)  # its t has more freedom


def results(gains, plain=50.0, seeds=(2, 3, 4), ddim=None, not_told=None):
    """Scores of runs that gain so many points over the steps and end at 50 + what `gains` says; with DDIM,
    and not told t, as other tables say, if given."""
    rng, rows = np.random.default_rng(3), {}
    for seed in seeds:
        base = plain + rng.normal(0, 5, 30)
        rows[f.Run("no_diff", "told t", seed)] = [
            ["no_diff", "told t", str(seed), "", str(i), f"{value / 100:.6f}"] for i, value in enumerate(base)
        ]
        for told in f.TOLD:
            for strategy in gains:
                run = f.Run(strategy, told, seed)
                for sampler in ("ddpm", "ddim"):
                    mine = (told == "not told t" and not_told) or (sampler == "ddim" and ddim) or gains
                    gain, end = mine[strategy]
                    for i, value in enumerate(base):
                        last = value + end + rng.normal(0, 0.3)
                        steps = [last - gain + rng.normal(0, 0.1), last, last + 1]
                        row = [*map(str, run), sampler, str(i), *(f"{step / 100:.6f}" for step in steps)]
                        rows.setdefault(run, []).append(row)
    return f.Results(rows)


PAPERS = {"diff": (-2, -3), "sc_xt": (-2, -3), "sc_xt1": (-1, -3), "rec_xt1": (-1, -2), "rec_xT": (1, 0)}


def verdicts(found, told="told t", seeds=3):
    effects = f.effects(found)
    return [f.verdict(claim, told, effects, f.corrected(effects, seeds), seeds) for claim in f.CLAIMS]


def test_the_papers_picture_is_reproduced():
    assert verdicts(results(PAPERS)) == ["reproduced"] * 5


@pytest.mark.parametrize(
    "change, claim, says",
    [
        ({"diff": (2, -3)}, 0, "not reproduced"),  # another one gains, too
        ({"rec_xT": (-1, 0)}, 0, "not reproduced"),
        ({"rec_xT": (0, 0)}, 0, "undecided"),
        ({"sc_xt": (-2, 3)}, 1, "not reproduced"),
        ({"rec_xT": (1, -9)}, 2, "not reproduced"),
        ({"rec_xT": (1, -9)}, 3, "not reproduced"),  # the ensemble is then 8 below the plain U-Net
        ({"rec_xT": (-1, 0)}, 4, "not reproduced"),
    ],
)
def test_what_is_against_a_claim(change, claim, says):
    assert verdicts(results(PAPERS | change))[claim] == says


def test_what_was_not_trained_is_said():
    few = {name: PAPERS[name] for name in ("diff", "rec_xT")}
    assert verdicts(results(few)) == ["not all run", "not all run", "reproduced", "reproduced", "reproduced"]
    few["diff"] = 2, 3
    assert verdicts(results(few))[:2] == ["not reproduced", "not reproduced"]  # whatever the others do


def test_claim_5_is_of_ddim_and_the_others_are_of_ddpm():
    falls = PAPERS | {"rec_xT": (-1, 0)}
    assert verdicts(results(PAPERS, ddim=falls)) == ["reproduced"] * 4 + ["not reproduced"]


def test_what_is_not_told_t_has_answers_of_its_own():
    falls = PAPERS | {"rec_xT": (-1, -9)}
    found = results(PAPERS, not_told=falls)
    assert verdicts(found) == ["reproduced"] * 5
    assert verdicts(found, "not told t") == ["not reproduced"] * 5
    gain = f.effects(found)["t", "not told t", "gain of rec_xT, not told t minus told t"]
    assert gain.low < -2 < gain.high < 0


def test_fewer_seeds_than_planned_decide_nothing():
    assert verdicts(results(PAPERS), seeds=4) == ["not all run"] * 5


@pytest.mark.parametrize("change", ["steps", "cases"])
def test_trainings_that_cannot_be_compared_are_refused(tmp_path, change):
    path, folders = tmp_path / "docs" / "set.csv", {}
    for seed, run in enumerate([f.Run("no_diff", "told t", 2), f.Run("no_diff", "told t", 3)]):
        folders[run] = run.folder(tmp_path)
        folders[run].mkdir()
        steps, case = 20 + seed * (change == "steps"), f"case{seed * (change == 'cases')}"
        facts = {"steps": steps, "devices": "1 x cpu", "commit": "0" * 40}
        found = {"source": "made up", "facts": facts, "rows": [[*run, "", case, "0.500000"]]}
        (folders[run] / "finding.json").write_text(json.dumps(found))
    with pytest.raises(f.InputError, match="different steps or test cases"):
        f.collect(path, folders)
    assert not path.exists()
    f.collect(path, dict(list(folders.items())[:1]))
    assert list(f.read_rows(path)) == list(folders)[:1]


def test_nothing_is_written_for_a_data_set_without_trainings(tmp_path):
    with pytest.raises(f.InputError, match="no training is finished"):
        f.write_report("typo", tmp_path / "typo.csv", {})
    assert not list(tmp_path.iterdir())


def test_an_effect_is_the_mean_of_differences():
    found = results(PAPERS)
    last = {
        name: np.array([list(found.dice(f.Run(name, "told t", seed), "ddpm").values()) for seed in (2, 3, 4)])
        for name in ("diff", "rec_xT", "no_diff")
    }
    effects = f.effects(found)
    difference = (last["rec_xT"][..., 1] - last["diff"][..., 1]).mean()
    assert effects["2", "told t", "rec_xT minus diff"].mean == pytest.approx(difference)
    both = (last["rec_xT"][..., 2] - last["no_diff"][..., 0]).mean()
    assert effects["4", "told t", "mean of both minus no_diff"].mean == pytest.approx(both)
    gain = (last["rec_xT"][..., 1] - last["rec_xT"][..., 0]).mean()
    assert effects["1", "told t", "rec_xT, last step minus first"].mean == pytest.approx(gain)
