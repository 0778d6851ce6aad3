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
    (said, _) = results.answer(studies, claim)
    places = re.findall(r"(\w+) \(((?:not )?told t)(?: and ((?:not )?told t))?\)", said)
    named = [(name, told) for name, *all_told in places for told in all_told if told]
    assert sorted(named) == sorted((study.name, told) for study in studies for told in finding.TOLD)


def test_bold_type_is_for_what_is_beyond_doubt():
    effect = finding.Effect(1.0, 0.5, 1.5, 0.001, 5)
    assert results.interval(effect, 0.04) == "**+1.00 (+0.50 to +1.50)**"
    assert results.interval(effect, 0.06) == "+1.00 (+0.50 to +1.50)"
    assert results.interval(None) == ""
