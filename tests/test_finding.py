"""experiments/finding.py: intervals for new trainings and new cases, and what is kept of a training."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_1samp

import finding as f
import train


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


def test_a_second_run_over_finished_trainings_writes_the_same_bytes(tmp_path):
    path, folders = tmp_path / "docs" / "set.csv", {}
    for run in [f.Run("rec_xT", "b = 1/4", 2), f.Run("no_diff", "b = 1", 1), f.Run("rec_xT", "b = 16", 2)]:
        folders[run] = run.folder(tmp_path)
        folders[run].mkdir()
        found = {"source": "made up", "facts": {"steps": 20}, "rows": [[*run, "", "case0", "0.500000"]]}
        (folders[run] / "finding.json").write_text(json.dumps(found))
    f.collect(path, dict(list(folders.items())[:2]))
    assert sorted(f.read_rows(path)) == sorted(list(folders)[:2])
    f.collect(path, folders)
    first = path.read_bytes(), path.with_suffix(".json").read_bytes()
    for folder in folders.values():
        (folder / "finding.json").unlink()  # as on another machine
    f.collect(path, folders)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == first
    assert sorted(f.read_rows(path)) == sorted(folders)


def test_every_planned_run_has_a_folder_and_settings_of_its_own(tmp_path):
    for plan in f.PLAN.values():
        runs = [f.Run(name, variant, 1) for name, variant in plan]
        assert len({run.folder(tmp_path) for run in runs}) == len(runs) == len(set(runs))
    configs = {
        name: train.parse_config(["--dataset", "phantom_us", *words])[0] for name, words in f.VARIANTS.items()
    }
    assert len(set(configs.values())) == len(configs)
    assert [configs[name].signal for name in ("b = 1", "b = 1/4", "b = 4", "b = 16")] == [1, 0.25, 4, 16]
