"""Real processes that are stopped, killed and moved to other devices: what they leave is what an
undisturbed run leaves."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made import left_behind

from support.disk import run_folder
from support.disk.dataset_file import DatasetWriter

HERE = Path(__file__).parent.parent
SETTINGS = [
    "--phantom-shape", "16,16", "--patch-shape", "16,16", "--channels", "4,8", "--strides", "2x2",
    "--translation", "1,1", "--no-transformer", "--validation-cases", "2", "--log-every", "1",
    "--time-dim", "4", "--decay-steps", "400", "--ema-decay", "0.9", "--time-sampling", "importance",
    "--train-timesteps", "5",
]  # fmt: skip

# train.py, but it kills itself at the n-th of the calls that write: before the call, or in the middle of
# a write. n and the run's words are arguments.
DIES = """
import builtins, os, signal, sys
left = int(sys.argv.pop(1))
def counted(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
sys.path.insert(0, sys.argv.pop(1))
import train
from support.disk import files, run_folder
real_open = open
class HalfWriting:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content):
        global left
        left -= 1
        if left == 0:
            self.file.write(content[: len(content) // 2]); self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(content)
def half_open(path, mode="r"):
    file = real_open(path, mode)
    return HalfWriting(file) if mode in ("wb", "a") else file
files.open = run_folder.open = half_open
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts train.py in a process of its own; compiled programs are kept for the next one."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def process(run, *words, dies_at=None, devices=1, small=SETTINGS, **variables):
        begin = ["train.py"] if dies_at is None else ["-c", DIES, str(dies_at), str(HERE)]
        environment = os.environ | cache | {"JAX_NUM_CPU_DEVICES": str(devices)} | variables
        command = [sys.executable, *begin, *small, "--run-dir", str(run), *words]
        return subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True)

    return process


def finish(process):
    """Exit status and what was said."""
    said = process.communicate(timeout=500)[1]
    return process.returncode, said


def wait_for_steps(run, process, count):
    """Until the log of a running process has so many lines more than at the call."""
    log = run / "log.jsonl"
    lines = lambda: len(log.read_text().splitlines()) if log.exists() else 0  # noqa: E731
    before = lines()
    while lines() < before + count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


WORDS = ["--steps", "60", "--validate-every", "20", "--save-every", "2"]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that was left alone."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert finish(start(run, *WORDS))[0] == 0
    return run


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """The same run, stopped by SIGTERM after a few steps."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    stop(start, run, signal.SIGTERM, 0)
    return run


def stop(start, run, number, status):
    """Sends a signal to a run that goes on; it ends with a status and a line, and has saved."""
    process = start(run, *WORDS)
    wait_for_steps(run, process, 5)
    process.send_signal(number)
    code, said = finish(process)
    step = run_folder.read_state(run / "last")[0]["step"]
    assert code == status and f"stopped and saved at step {step};" in said and 0 < step < 60


def test_signals_save_and_the_run_goes_on_bit_for_bit(start, whole, stopped, tmp_path):
    """SIGTERM, then a terminal that is closed, then Ctrl-C, then the rest."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    stop(start, run, signal.SIGHUP, 0)
    stop(start, run, signal.SIGINT, 130)
    assert finish(start(run, *WORDS))[0] == 0
    assert left_behind(run) == left_behind(whole)


def test_a_run_does_not_need_a_reader_of_standard_error(start, whole, tmp_path):
    """As behind `2>&1 | head`: the run ends as it would have."""
    run = tmp_path / "run"
    process = start(run, *WORDS)
    wait_for_steps(run, process, 2)
    process.stderr.close()
    assert process.wait(500) == 0
    assert left_behind(run) == left_behind(whole)


@pytest.mark.slow
def test_another_number_of_devices_goes_on_within_rounding(start, whole, stopped, tmp_path):
    """Of the loss, by as much as in test_train at first; AdamW lets it grow to a few percent."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    step = run_folder.read_state(run / "last")[0]["step"]
    code, said = finish(start(run, *WORDS, devices=2))
    assert code == 0 and f"resuming from step {step}" in said and "within rounding" in said
    lines = [(path / "log.jsonl").read_text().splitlines() for path in (whole, run)]
    losses = np.array([[json.loads(line).get("loss", 1.0) for line in log] for log in lines])
    np.testing.assert_array_equal(losses[0, :step], losses[1, :step])
    np.testing.assert_allclose(losses[0, step : step + 2], losses[1, step : step + 2], rtol=2e-3)
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.1)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_train_as_one_does(start, tmp_path):
    """Two processes of one device each, and one process of two: the same checkpoints and log, byte for
    byte. The second writes nothing: both would be in one folder."""
    words = ["--steps", "6", "--validate-every", "3", "--save-every", "2"]
    assert finish(start(tmp_path / "one", *words, devices=2))[0] == 0
    address = f"localhost:{free_port()}"
    hosts = [start(tmp_path / "two", *words, "--hosts", f"{address},2,{n}") for n in (0, 1)]
    assert [finish(host)[0] for host in hosts] == [0, 0]
    assert left_behind(tmp_path / "two") == left_behind(tmp_path / "one")


@pytest.mark.slow
def test_hosts_end_with_one_line_where_a_run_is_refused(start, tmp_path):
    """By both, since its settings have changed, or since those of the two differ."""
    words = ["--steps", "2", "--validate-every", "2"]
    assert finish(start(tmp_path, *words, devices=2))[0] == 0
    before = left_behind(tmp_path)
    for changes, says in (
        (["--learning-rate 0.1"] * 2, "this run has learning_rate = 0.001, not 0.1"),
        (["--seed 0", "--seed 1 --log-every 2"], "the hosts have different settings"),
    ):
        address = f"localhost:{free_port()}"
        hosts = [
            start(tmp_path, *words, *change.split(), "--hosts", f"{address},2,{n}")
            for n, change in enumerate(changes)
        ]
        for code, said in map(finish, hosts):
            assert code == 2 and says in said
    assert left_behind(tmp_path) == before


@pytest.mark.slow
def test_hosts_with_other_images_do_not_train(start, tmp_path):
    """The same cases by name, but one host's copy of the file holds another label: both end with a line."""
    facts = {"class_names": ["background", "x"], "source": "test", "preprocessing": "", "unit": "mm"}
    sample = {"image": np.ones((16, 16, 1)), "spacing": (1.0, 1.0), "affine": np.eye(4)}
    address, hosts = f"localhost:{free_port()}", []
    for number in (0, 1):
        label = np.eye(16, dtype=np.uint8)
        label[0, 1] = number
        folder = tmp_path / f"host{number}"
        with DatasetWriter(folder / "t.h5", name="t", **facts) as writer:
            writer.add("train", uid="a", label=label, **sample)
            writer.add("validation", uid="b", label=label, **sample)
        words = ["--dataset", "folder:t", "--data-dir", str(folder), "--steps", "2"]
        hosts.append(start(tmp_path / "run", *words, "--hosts", f"{address},2,{number}"))
    for code, said in map(finish, hosts):
        assert code == 2 and "folder:t: the hosts have different cases; copy one file to all" in said


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_where_one_host_dies_the_others_end_and_go_on(start, whole, tmp_path, dies):
    run, address = tmp_path / "run", f"localhost:{free_port()}"
    hosts = [start(run, *WORDS, "--hosts", f"{address},2,{n}") for n in (0, 1)]
    wait_for_steps(run, hosts[0], 5)
    hosts[dies].kill()
    begin = time.monotonic()
    code, _ = finish(hosts[1 - dies])
    assert code and time.monotonic() - begin < 60  # with a page that JAX writes
    hosts[dies].communicate()
    assert finish(start(run, *WORDS, devices=2))[0] == 0
    assert (run / "log.jsonl").read_text().count("loss") == (whole / "log.jsonl").read_text().count("loss")


@pytest.mark.slow
def test_an_error_that_nothing_catches_ends_its_host_at_once():
    """JAX would let it wait at the end for the other host, which may be waiting for this one."""
    program = (
        "import sys, time; from support.machine.devices import join_hosts; join_hosts(sys.argv[1])\n"
        "time.sleep(300 * sys.argv[1].endswith('0')); raise RuntimeError('a mistake')"
    )
    hosts = f"localhost:{free_port()},2"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"{hosts},{n}"], cwd=HERE, text=True, stderr=subprocess.PIPE
        )
        for n in (0, 1)
    ]
    try:
        assert "RuntimeError: a mistake" in both[1].communicate(timeout=120)[1] and both[1].returncode == 1
    finally:
        for process in both:
            process.kill()
            process.communicate()


def kill_often(start, run, words, kills):
    """Runs that are killed, half of them at a random moment and half while they write, then one that is
    not. Returns how many of the kills were in a write."""
    rng, writing = random.Random(0), 0
    for kill in range(kills):
        if kill % 2:
            # A step writes a line of the log; every second step a checkpoint, in five calls.
            process = start(run, *words, dies_at=rng.randint(1, 60))
            writing += finish(process)[0] == -signal.SIGKILL
        else:
            process = start(run, *words)
            wait_for_steps(run, process, rng.randint(1, 5))
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            finish(process)
    code, said = finish(start(run, *words))
    assert code == 0, said
    assert not list(run.glob("*.partial")) and not (run / "new").exists()
    return writing


@pytest.mark.slow
def test_a_run_that_is_killed_a_hundred_times_loses_nothing(start, tmp_path):
    words = ["--steps", "1500", "--validate-every", "200", "--save-every", "2"]
    assert finish(start(tmp_path / "whole", *words))[0] == 0
    assert kill_often(start, tmp_path / "killed", words, kills=100) > 40
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


@pytest.mark.slow  # three trainings of the usual network
def test_the_usual_network_goes_on_bit_for_bit_with_all_optimisations_and_compiled_anew(start, tmp_path):
    words = ["--steps", "30", "--validate-every", "10", "--log-every", "1"]
    usual = {"small": [], "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    whole, killed, anew = (tmp_path / name for name in ("whole", "killed", "anew"))
    assert finish(start(whole, *words, **usual))[0] == 0
    for step in (10, 20):  # the last checkpoint when it is killed
        process = start(killed, *words, **usual)
        wait_for_steps(killed, process, 13)
        process.kill()
        finish(process)
        assert run_folder.newest_state(killed)[0]["step"] == step
    assert finish(start(killed, *words, **usual))[0] == 0
    usual["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
    assert finish(start(anew, *words, **usual))[0] == 0
    assert left_behind(killed) == left_behind(anew) == left_behind(whole)
