"""Other machines and odd places to start from: what a program does there is what it does here."""

import os
import shlex
import subprocess

import jax
import pytest
from made import HERE, python
from test_faults import SETTINGS

from support.disk import run_folder
from support.disk.files import InputError
from support.machine import devices

SMALL = [*SETTINGS, "--steps", "2"]


def test_a_disk_without_locks_is_said(monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with run_folder.locked(tmp_path):
        assert "cannot be locked (No locks available); start only one run here" in capsys.readouterr().err


def test_only_changed_code_is_noted(tmp_path, monkeypatch):
    """Neither masks and notes in the checkout, nor scores that are tracked, make it another program."""

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    code, scores = tmp_path / "support" / "devices.py", tmp_path / "scores.csv"
    code.parent.mkdir()
    for path in (code, scores):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(devices, "__file__", str(code))
    scores.write_text("2")
    (tmp_path / "mask.png").write_text("3")
    assert len(devices.provenance()["commit"]) == 40
    code.write_text("2")
    assert devices.provenance()["commit"].endswith(" (changed)")


def test_a_user_without_a_home_keeps_no_programs(monkeypatch):
    """As in a container whose user has no entry: neither a traceback, nor a warning at every program."""
    before = jax.config.jax_compilation_cache_dir

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(devices.Path, "home", nowhere)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        devices.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    journal = run_folder.Journal(tmp_path, {}, {}, [])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(InputError, match=r"log.jsonl: cannot be written \(disk full\); make room"):
        journal.write(1, {"loss": 0.5})


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    done = python("train.py", "--run-dir", tmp_path / "run", *SMALL, JAX_PLATFORMS="nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_PLATFORMS=nothing: JAX finds none")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow  # two trainings and a test
def test_an_odd_place_and_odd_variables_change_nothing(tmp_path):
    """Another folder, another data.py there and on the path, blanks and umlauts, and variables that were set
    for other programs: the same log and weights, and the command that is proposed next works."""
    odd = tmp_path / "mit Läufen"
    odd.mkdir()
    (odd / "data.py").write_text("raise ImportError")
    variables = {"PYTHONPATH": str(odd), "LC_ALL": "C", "JAX_ENABLE_X64": "1", "MPLBACKEND": "TkAgg"}
    assert python("train.py", "--run-dir", tmp_path / "run", *SMALL).returncode == 0
    done = python("-O", HERE / "train.py", "--run-dir", "ein Lauf ä", *SMALL, cwd=odd, **variables)
    assert done.returncode == 0, done.stderr
    runs = (tmp_path / "run", odd / "ein Lauf ä")
    assert len({(run / "log.jsonl").read_text() for run in runs}) == 1
    assert len({run_folder.read_state(run / "last")[1] for run in runs}) == 1
    _, program, *words = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    done = python(HERE / program, *words, cwd=odd, **variables)
    assert done.returncode == 0 and "ein Lauf ä ddpm" in done.stdout
