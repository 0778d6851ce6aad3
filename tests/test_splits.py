"""Which cases of a folder train, validate and test?"""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from made import error, pictures, split_of

import data
import prepare
from support.raw import splits

pytestmark = pytest.mark.usefixtures("elsewhere")


@given(st.lists(st.floats(0.05, 1), min_size=3, max_size=3))
@examples(max_examples=20, deadline=None)
def test_shares_are_kept(parts):
    shares = np.array(parts) / sum(parts)
    split = splits.splitter(",".join(map(str, shares)), "")
    found = [*split([f"name {i}" for i in range(2000)]).values()]
    assert np.allclose([found.count(s) / 2000 for s in data.SPLITS], shares, atol=0.06)


def test_a_patient_stays_on_one_side(capsys):
    splits.splitter("0.5,0.2,0.3", "")(["p1_1", "p1_2", "p2_1"])
    assert "If several cases are of one patient, use --group" in capsys.readouterr().err
    split = splits.splitter("0.5,0.2,0.3", r"^(p\d+)_")
    found = split([f"p{p}_{visit}" for p in range(30) for visit in range(20)])
    places = {p: {found[f"p{p}_{visit}"] for visit in range(20)} for p in range(30)}
    assert all(len(where) == 1 for where in places.values())
    assert set.union(*places.values()) == set(data.SPLITS)
    assert not split(["q1_2"]) and not capsys.readouterr().err


@given(st.sets(st.text(st.characters(codec="ascii"), min_size=1), min_size=3, max_size=40))
@examples(max_examples=300, deadline=None)
def test_small_sets_have_cases_of_each_part(names):
    found = Counter(splits.splitter("0.7,0.1,0.2", "")(sorted(names)).values())
    assert min(found[split] for split in data.SPLITS) >= max(min(3, len(names) // 4), 1)
    whole = splits.splitter("1,0,0", "")(sorted(names))
    assert set(whole.values()) == {"train"}  # where no share is asked for, none is taken


def test_adding_cases_to_a_large_set_moves_none():
    """Beyond some size no part is empty, and the places alone decide, which do not depend on others."""
    split, names = splits.splitter("0.7,0.1,0.2", ""), [f"case {i}" for i in range(3000)]
    before, after = split(names[:100]), split(names)
    assert Counter(before.values())["validation"] > 3
    assert before.items() <= after.items()


@given(st.integers(2, 6), st.integers(6, 60), st.integers(0, 10**6))
@examples(max_examples=60, deadline=None)
def test_every_case_is_tested_in_one_fold(folds, count, salt):
    names = [f"{salt} {i}" for i in range(count)]
    every = [splits.splitter("0.7,0.1,0.2", "", folds, fold)(names) for fold in range(1, folds + 1)]
    tested = [[name for name in names if found[name] == "test"] for found in every]
    assert sorted(chain(*tested)) == sorted(names)
    assert {len(cases) for cases in tested} <= {count // folds, -(-count // folds)}
    for found in every:
        rest = Counter(split for split in found.values() if split != "test")
        least = max(min(3, rest.total() // 4), 1)
        assert rest["train"] and abs(rest["validation"] - max(rest.total() / 8, least)) <= 0.5


def test_folds_keep_shares_and_patients():
    names = [f"p{p}_{visit}" for p in range(1000) for visit in range(2)]
    for fold in range(1, 6):
        found = splits.splitter("0.6,0.2,0.2", r"p\d+", 5, fold)(names)
        assert all(found[name] == found[f"{name[:-1]}0"] for name in names)
        counts = Counter(found.values())
        assert counts["test"] == 400 and counts["validation"] == 400


def test_a_fold_has_a_file_of_its_own(tmp_path, capsys):
    raw, tested = pictures(tmp_path / "raw", count=9), []
    for fold in (1, 2, 3):
        prepare.main(
            ["build", "folder:f", "--raw", str(raw), "--workers", "1", "--folds", "3", "--fold", str(fold)]
        )
        assert f"train.py --dataset folder:f-fold{fold}" in capsys.readouterr().out
        dataset = data.open_dataset(f"folder:f-fold{fold}", Path("data"), ())
        assert dataset.name == f"f-fold{fold}" and dataset.source == f"folder raw, fold {fold} of 3"
        assert all(dataset.uids.values())
        tested += dataset.uids["test"]
    assert sorted(tested) == [f"case{i}" for i in range(9)]
    command = ["build", "folder:f", "--raw", raw, "--folds"]
    assert "9 cases" in error(capsys, *command, 10, "--fold", 1)
    (tmp_path / "split.txt").write_text("case0 test")
    assert "three shares" in error(capsys, *command, 3, "--fold", 1, "--split", tmp_path / "split.txt")
    for wrong in (["--folds", "3"], ["--fold", "1"], ["--folds", "3", "--fold", "4"], ["--folds", "1"]):
        with pytest.raises(SystemExit):
            prepare.main(["build", "folder:f", "--raw", str(raw), *wrong])
        assert "--fold from 1" in capsys.readouterr().err


def test_three_cases_can_be_trained_on(tmp_path, capsys):
    """It does not matter that others are bad."""
    raw = pictures(tmp_path / "raw", count=4)
    (raw / "labels" / "case1.png").write_text("no picture")
    found = split_of(raw, tmp_path, "--skip-bad")
    assert len(found) == 3 and set(found.values()) == set(data.SPLITS)
    said = capsys.readouterr().err
    assert "needs all three" not in said and "NB: 1 validation case will choose the best model" in said


def test_a_split_from_a_file(tmp_path, capsys):
    raw = pictures(tmp_path / "raw", count=3)
    text = tmp_path / "split.txt"
    text.write_text("\ufeffcase0\ttest\ncase1 train\n\ncase2 validation\n", encoding="utf-8")  # of Windows
    assert split_of(raw, tmp_path, "--split", text) == {
        "case0": "test", "case1": "train", "case2": "validation"
    }  # fmt: skip
    text.write_text("case0 test\ncase1 train\ncase2 val\n")
    assert "line 3" in error(capsys, "build", "folder:f", "--raw", raw, "--split", text)
    text.write_text("case0 test\ncase1 train\n")
    line = error(capsys, "build", "folder:f", "--raw", raw, "--split", text)
    assert "case2: " in line and "has no line for this name" in line
    line = error(capsys, "build", "folder:f", "--raw", raw, "--split", text, "--group", "case")
    assert "--group needs three shares" in line
    line = error(capsys, "build", "folder:f", "--raw", raw, "--group", "case[01]")
    assert "case2: --group case[01] does not match this name" in line
