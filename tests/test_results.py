"""docs/finding/, docs/results.md and the README hold what the scores give, and nothing typed by hand."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import finding
import nnunet
import results

SETS = [path for path in sorted(results.FOLDER.glob("*.csv")) if not path.stem.startswith("nnunet-")]


def test_a_second_run_makes_the_same_pages():
    pages = {path: made.decode() for path, made in results.pages().items() if path.suffix == ".md"}
    assert pages == {path: path.read_text() for path in pages}


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_the_page_of_a_data_set_is_what_its_scores_give(path):
    found = finding.Results(finding.read_rows(path))
    page = path.with_suffix(".md").read_text()
    name = page.splitlines()[0].removeprefix("# The finding on ")
    assert finding.report_of(name, found, results.read(path).facts) == page


def test_the_page_beside_nnunet_is_what_its_scores_give():
    path = results.FOLDER / "nnunet-hippocampus_mr.csv"
    assert nnunet.report_of("hippocampus_mr", *nnunet.read(path)) == path.with_suffix(".md").read_text()


@pytest.mark.parametrize("claim", finding.CLAIMS)
def test_an_answer_names_every_data_set_and_embedding_once(claim):
    studies = list(map(results.read, SETS))
    said = " ".join(results.answer(studies, claim))
    places = re.findall(r"(\w+) \(((?:not )?told t)(?: and ((?:not )?told t))?\)", said)
    named = [(name, told) for name, *all_told in places for told in all_told if told]
    assert sorted(named) == sorted((study.name, told) for study in studies for told in finding.TOLD)


def test_bold_type_is_for_what_is_beyond_doubt_and_few_seeds_are_said():
    key, effect = ("1", "told t", "some effect"), finding.Effect(1.0, 0.5, 1.5, 0.001, 2)
    rows = {finding.Run("no_diff", "told t", seed): [] for seed in (2, 3)}
    study = results.Study("set", {}, finding.Results(rows), {key: effect}, {key: 0.04})
    assert study.cell(*key) == "**+1.00 (+0.50 to +1.50)**"
    assert study._replace(p={key: 0.06}).cell(*key) == "+1.00 (+0.50 to +1.50)"
    rows[finding.Run("no_diff", "told t", 4)] = []
    assert study._replace(p={key: 0.06}).cell(*key) == "+1.00 (+0.50 to +1.50), 2 seeds"
    assert study.cell("1", "told t", "another") == ""


@pytest.mark.parametrize("page", ["", "<!-- made by experiments/results.py: first -->\n<!-- ende -->\n"])
def test_a_page_without_its_marks_is_refused(tmp_path, page):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(results.InputError, match="marks of the blocks first"):
        results.filled(path, first=["a"])
    path.write_text("<!-- made by experiments/results.py: first -->\nold\n<!-- end -->\nmore\n")
    assert b"old" not in results.filled(path, first=["a"])
