"""experiments/killed.py: it says so where a resumed training is another one, and kills one on the way."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import killed as k


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """Two finished runs with the same log and the same weights."""
    runs, networks = [tmp_path / "one", tmp_path / "two"], {}
    for run in runs:
        run.mkdir()
        (run / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        networks[run / "final"] = {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}
    monkeypatch.setattr(k.evaluate, "load", lambda path: SimpleNamespace(network=networks[path]))
    return runs, networks


def test_runs_that_are_the_same(two_runs):
    runs, _ = two_runs
    assert k.compared(*runs) == "log same, weights same"


def test_one_weight_that_differs_in_its_last_bit(two_runs):
    runs, networks = two_runs
    networks[runs[1] / "final"]["kernel"][1, 2] = np.nextafter(1, 2)
    assert k.compared(*runs) == "log same, weights differ"


def test_a_log_that_differs(two_runs):
    runs, _ = two_runs
    (runs[1] / "log.jsonl").write_text('{"step": 1, "loss": 0.25}\n')
    assert k.compared(*runs) == "log differs, weights same"


def test_it_kills_after_half_of_the_steps_and_not_before(tmp_path, monkeypatch):
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    text = f"""
import time
for step in range(1, 100):
    with open({str(log)!r}, "a") as file:
        file.write('{{"step": %d}}\\n' % step)
    time.sleep(0.05)
"""
    started = []

    def start(folder, options):
        started.append(subprocess.Popen([sys.executable, "-c", text]))
        return started[-1]

    monkeypatch.setattr(k, "start", start)
    assert 11 <= k.kill_half_way(log.parent, [], 20) < 99
    assert started[0].returncode != 0


def test_a_training_that_fails_is_one_line(tmp_path):
    with pytest.raises(k.InputError, match=r"the training failed, see .*run\.txt"):
        k.finish(tmp_path / "run", ["--steps", "0"])
    assert "--steps" in (tmp_path / "run.txt").read_text()


@pytest.mark.parametrize("saved", [None, 20], ids=["before the first checkpoint", "after the end"])
def test_a_kill_that_shows_nothing_is_refused(tmp_path, monkeypatch, saved):
    """Otherwise a run that began again would be called resumed."""
    monkeypatch.setattr(k, "finish", lambda *_: None)
    monkeypatch.setattr(k, "kill_half_way", lambda *_: 11)
    monkeypatch.setattr(k, "read_state", lambda _: ({"step": 20}, b""))
    monkeypatch.setattr(k, "newest_state", lambda _: saved and ({"step": saved}, b""))
    with pytest.raises(k.InputError, match="shows nothing about resuming; give more --steps"):
        k.train_thrice(tmp_path / "run", [], "")


@pytest.mark.slow  # three trainings: they compile for a minute
def test_every_training_goes_on_bit_for_bit_here(tmp_path):
    words = [sys.executable, k.HERE / "experiments" / "killed.py", "--runs-dir", tmp_path, "--strategies",
             "rec_xT", "--steps", "30", "--validate-every", "10"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("log same, weights same") == 2
