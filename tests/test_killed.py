"""A training that is killed goes on bit for bit on the machine at hand, with all of XLA's optimisations, and
one that is compiled anew is the same training. tests/test_faults.py kills at every write."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.disk.files import read_signed
from support.disk.run_folder import newest_state, read_log, read_state

WORDS = ["--dataset", "phantom_us", "--strategy", "rec_xT", "--steps", "30", "--validate-every", "10"]


def start(run, **variables):
    command = [sys.executable, "train.py", "--run-dir", run, "--log-every", "1", *WORDS]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=os.environ | variables)


def left_behind(run):
    """The log, the last state's arrays and the weights."""
    return (run / "log.jsonl").read_bytes(), read_state(run / "last")[1], read_signed(run / "final")[1]


@pytest.mark.slow  # three trainings of the usual network
def test_a_killed_training_ends_as_one_that_was_not_killed(tmp_path):
    whole, killed, anew = (tmp_path / name for name in ("whole", "killed", "anew"))
    assert start(whole).wait() == 0
    for moment in (13, 24):  # after the checkpoints of steps 10 and 20
        process = start(killed)
        while max((line["step"] for line in read_log(killed / "log.jsonl", 30)), default=0) < moment:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert newest_state(killed)[0]["step"] == moment // 10 * 10
    assert start(killed).wait() == 0
    assert start(anew, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache")).wait() == 0
    assert left_behind(killed) == left_behind(anew) == left_behind(whole)
