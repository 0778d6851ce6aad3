"""experiments/nnunet.py, as far as it goes without nnU-Net: what is asked for, timed, kept and compared."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import nnunet as n


@pytest.mark.parametrize(
    "words", ["", "unet:5", "no_diff", "no_diff:0", "no_diff:-1", "diff:1,", "nnU-Net:100"]
)
def test_methods_that_are_none_are_refused_in_one_line(words):
    with pytest.raises(n.InputError, match="--methods") as caught:
        n.methods(words)
    assert "\n" not in str(caught.value)


def test_minutes_of_a_part_are_scaled_to_the_whole_and_kept(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(n.time, "process_time", lambda: next(clock))
    assert n.minutes_of(tmp_path, lambda: 0.25) == pytest.approx(4)

    def again():
        raise AssertionError("a finished training is not done twice")

    assert n.minutes_of(tmp_path, again) == pytest.approx(4)


def test_a_training_that_was_finished_elsewhere_has_no_minutes(tmp_path):
    assert np.isnan(n.minutes_of(tmp_path, lambda: 0.0))


def left(folder, method, dice):
    folder.mkdir(parents=True)
    rows = [[*method, "1.5", f"case{i}", f"{d:.6f}", "2.0", f"{d:.6f}"] for i, d in enumerate(dice)]
    facts = {"source": "made up", "classes": ["part"], "unit": "mm", "devices": "1 x cpu", "commit": "0" * 40}
    (folder / "scores.json").write_text(json.dumps({"facts": facts, "rows": rows}))


def test_finished_trainings_are_collected_once_and_compared_with_nnunet(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "docs.csv"
    folders = {method: method.folder(tmp_path) for method in n.methods("no_diff:10,nnU-Net:250,diff:10")}
    dice = {method: rng.uniform(0.5, 0.9, 8).round(6) for method in list(folders)[:2]}
    for method, values in dice.items():
        left(folders[method], method, values)
    rows, facts = n.collect(path, folders)
    assert [method.name for method in rows] == ["nnU-Net", "no_diff"]  # diff is not finished
    left(
        folders[next(iter(dice))] / "moved", n.Method("no_diff", 10), [0.0]
    )  # what is kept is not read again
    assert n.collect(path, folders) == (rows, facts) == n.read(path)
    ours, theirs = dice.values()
    line = next(line for line in n.report_of("set", rows, facts).splitlines() if line.startswith("| no_diff"))
    *_, difference, p = (cell.strip() for cell in line.strip("|").split("|"))
    assert float(difference) == pytest.approx(100 * (ours - theirs).mean(), abs=0.006)
    assert p == n.show_p(ttest_rel(ours, theirs).pvalue)


def test_what_nnunet_is_not_prepared_for_is_refused_before_training():
    flat = n.open_dataset("phantom_us", Path("data"), (32, 32))
    with pytest.raises(n.InputError, match="is no volume"):
        next(n.cases(flat, "train"))
    volumes = n.open_dataset("phantom_ct", Path("data"), (16, 16, 16))
    assert next(n.cases(volumes, "test")).label.ndim == 3
