"""A build that ended early goes on, and its file is that of an undisturbed one."""

import fcntl
import resource
import shutil

import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest
from made import CLASSES, build, cases_in, contents, empty, error, nan, nifti, pictures, png, python, volumes

import prepare

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_mended_build_goes_on(tmp_path, capsys, monkeypatch):
    raw = volumes(tmp_path / "raw")
    build("folder:f", raw, tmp_path).close()
    whole = contents(tmp_path / "f.h5")
    good = (raw / "labels" / "v3.nii.gz").read_bytes()
    empty(raw)
    assert "v3" in error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    assert contents(tmp_path / "f.h5") == whole  # the old file is still there
    (raw / "labels" / "v3.nii.gz").write_bytes(good)
    make, calls = prepare.make_sample, []
    monkeypatch.setattr(prepare, "make_sample", lambda case, **k: calls.append(case.uid) or make(case, **k))
    build("folder:f", raw, tmp_path).close()
    assert calls == ["v3", "v4", "v5"] and contents(tmp_path / "f.h5") == whole
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_start_over(tmp_path, capsys):
    raw = volumes(tmp_path / "raw")
    empty(raw)
    error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    with build("folder:f", raw, tmp_path, "--skip-bad", "--spacing", "2,2,2") as file:
        assert {case["label"].shape for case in cases_in(file).values()} == {(6, 7, 5)}


def test_what_was_found_good_is_kept_where_empty_labels_are_meant(tmp_path, capsys, monkeypatch):
    """And only there: without --allow-empty, the same build ends at the empty label again."""
    raw = volumes(tmp_path / "raw")
    empty(raw)
    for kind in ("images", "labels"):
        values = np.asarray(nibabel.load(raw / kind / "v5.nii.gz").dataobj)
        nifti(raw / kind / "v5.nii.gz", values, np.diag([1e6, 1e6, 1e6, 1]))
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path]
    assert "no foreground" in error(capsys, *command)
    make, calls = prepare.make_sample, []
    monkeypatch.setattr(prepare, "make_sample", lambda case, **k: calls.append(case.uid) or make(case, **k))
    assert "is too far" in error(capsys, *command, "--allow-empty")
    assert calls == ["v3", "v4", "v5"]
    assert "no foreground" in error(capsys, *command)


def test_what_has_changed_is_made_again(tmp_path, capsys):
    """A build that continues has no sample of a file that is another one now, or was read in another way."""
    raw = pictures(tmp_path / "raw")
    shutil.copytree(raw / "labels", raw / "reader2")
    for path in (raw / "reader2").iterdir():
        png(path, CLASSES[::-1])
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path, "--classes", "a,b,c"]
    command += ["--images", "images/{}.png"]
    for labels in ("labels/{}.png", "reader2/{}.png"):
        png(raw / labels.format("case5"), 0 * CLASSES)
        error(capsys, *command, "--labels", labels)
        with h5py.File(tmp_path / "f.h5.partial") as file:
            assert len(file["train"]) >= 3
    png(raw / "reader2" / "case5.png", CLASSES)
    picture = np.asarray(PIL.Image.open(raw / "images" / "case0.png"))
    png(raw / "images" / "case0.png", picture[::-1])
    prepare.main([*map(str, command), "--workers", "1", "--labels", "reader2/{}.png"])
    found = contents(tmp_path / "f.h5")
    (tmp_path / "f.h5").unlink()
    prepare.main([*map(str, command), "--workers", "1", "--labels", "reader2/{}.png"])
    assert found == contents(tmp_path / "f.h5")


KILLED = """
import os, sys
import prepare
from support.disk import dataset_file
add, count = dataset_file.DatasetWriter.add, []
def stop(self, split, **sample):
    add(self, split, **sample)
    count.append(1)
    if len(count) == 3:
        os.kill(os.getpid(), 9)
dataset_file.DatasetWriter.add = stop
prepare.main(sys.argv[1:])
"""


def test_a_killed_build_goes_on(tmp_path, capsys):
    raw = volumes(tmp_path / "raw")
    command = ["build", "folder:f", "--raw", str(raw), "--data-dir", str(tmp_path), "--workers", "1"]
    assert python("-c", KILLED, *command).returncode == -9 and not (tmp_path / "f.h5").exists()
    prepare.main(command)
    assert "3 of 6 cases are there" in capsys.readouterr().err
    after = contents(tmp_path / "f.h5")
    build("folder:f", raw, tmp_path).close()
    assert after == contents(tmp_path / "f.h5") and len(after) == 6


def test_a_full_disk(tmp_path, capsys):
    """A limit on file sizes stands in for the disk's: the system refuses the room for a large sample."""
    raw = volumes(tmp_path / "raw")
    image = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)
    nifti(raw / "images" / "v3.nii.gz", image)
    nifti(raw / "labels" / "v3.nii.gz", (image > 1).astype(np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        line = error(capsys, "build", "folder:f", "--raw", raw, "--data-dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "f.h5.partial: cannot be written" in line and "free some space" in line
    assert [path.name for path in tmp_path.glob("f.*")] == ["f.h5.partial"]
    build("folder:f", raw, tmp_path).close()
    assert "3 of 6 cases are there" in capsys.readouterr().err and len(contents(tmp_path / "f.h5")) == 6


def test_two_builds_do_not_meet(tmp_path, capsys):
    raw = volumes(tmp_path / "raw")
    empty(raw)
    command = ["build", "folder:f", "--raw", raw, "--data-dir", tmp_path]
    error(capsys, *command)
    before = (tmp_path / "f.h5.partial").read_bytes()
    with open(tmp_path / "f.h5.partial", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as HDF5 does while it writes
        assert "another build" in error(capsys, *command)
        assert (tmp_path / "f.h5.partial").read_bytes() == before


def test_several_threads_write_the_same(tmp_path):
    raw = volumes(tmp_path / "raw", count=8)
    nan(raw)
    build("folder:f", raw, tmp_path, "--skip-bad").close()
    alone = contents(tmp_path / "f.h5")
    build("folder:f", raw, tmp_path, "--skip-bad", "--workers", 2).close()
    assert alone == contents(tmp_path / "f.h5") and len(alone) == 7
