"""experiments/results.py: the verdicts of the plan, and pages that hold what the scores give."""

import csv
import json
from itertools import chain

import numpy as np
import pytest

import finding as f
import results as r

PAPERS = {"diff": (-2, -3), "sc_xt": (-2, -3), "sc_xt1": (-1, -3), "rec_xt1": (-1, -2), "rec_xT": (1, 0)}


def rows_of(gains, seeds=(1, 2, 3), ddim=None, large=None, more=None):
    """Rows of runs that gain so many points over five steps and end at the plain U-Net's Dice and so many
    more; with DDIM, at b = 16 and with other variants as other tables say."""
    rng, rows = np.random.default_rng(3), {}
    variants = dict.fromkeys(r.SIGNALS, gains) | {"b = 16": large or gains} | (more or {})
    for seed in seeds:
        base = rng.normal(50, 5, 12)
        plain = f.Run("no_diff", "b = 1", seed)
        rows[plain] = [[*map(str, plain), "", str(i), f"{dice / 100:.6f}"] for i, dice in enumerate(base)]
        for variant, table in variants.items():
            for strategy in table:
                run = f.Run(strategy, variant, seed)
                rows[run] = []
                for sampler, ending in (("ddpm", table), ("ddim", ddim or table)):
                    gain, end = ending[strategy]
                    for i, dice in enumerate(base):
                        last = dice + end + rng.normal(0, 0.3)
                        steps = last - gain * np.array([1, 0.7, 0.5, 0.2, 0]) + rng.normal(0, 0.1, 5)
                        rows[run].append([*map(str, run), sampler, str(i), *shown(*steps, last + 1)])
                for source, dice in (("noise", 40), ("truth", 40 - gains["diff"][0] * 5)):
                    for i in range(12):
                        line = shown(dice + rng.normal(0, 0.1))
                        rows[run].append([*map(str, run), f"x_T from {source}", str(i), *line])
    return rows


def shown(*points):
    return [f"{value / 100:.6f}" for value in points]


def keep(path, rows, runs):
    """Writes rows and facts of runs as finding.py keeps them."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[*f.COLUMNS, "dice at each step"], *chain(*rows.values())])
    path.with_suffix(".json").write_text(json.dumps({"source": "made up", "runs": runs}))


def study(gains, name="nerve_64", **settings):
    return r.Study(name, rows_of(gains, **settings))


YES, NO, LATER = "reproduced", "not reproduced", "not all run"
FEW = {name: PAPERS[name] for name in ("diff", "rec_xT")}
WORSE = PAPERS | {"rec_xT": (-1, -9)}


@pytest.mark.parametrize(
    "gains, more, b, expected",
    [
        (PAPERS, {}, "b = 1", 5 * [YES]),
        (PAPERS | {"diff": (2, -3)}, {}, "b = 1", {0: NO}),  # another one gains, too
        (PAPERS | {"rec_xT": (-1, 0)}, {}, "b = 1", {0: NO, 4: NO}),
        (PAPERS | {"rec_xT": (0, 0)}, {}, "b = 1", {0: "undecided"}),
        (PAPERS | {"sc_xt": (-2, 3)}, {}, "b = 1", {1: NO}),
        (PAPERS | {"rec_xT": (1, -9)}, {}, "b = 1", {2: NO, 3: NO}),  # the ensemble falls, too
        # Of what was not trained some claims need nothing, and some are refuted whatever it does.
        (FEW, {}, "b = 1", [LATER, LATER, YES, YES, YES]),
        (FEW | {"diff": (2, 3)}, {}, "b = 1", {0: NO, 1: NO}),
        (PAPERS, {"seeds": (1, 2)}, "b = 1", 5 * [LATER]),
        # Claim 5 is of DDIM and the others are of DDPM, and each b has answers of its own.
        (PAPERS, {"ddim": PAPERS | {"rec_xT": (-1, 0)}}, "b = 1", [YES, YES, YES, YES, NO]),
        (PAPERS, {"large": WORSE}, "b = 1", 5 * [YES]),
        (PAPERS, {"large": WORSE}, "b = 16", 5 * [NO]),
    ],
)
def test_what_the_scores_say_of_the_papers_claims(gains, more, b, expected):
    """All five, or some of them by their places."""
    found = study(gains, **more)
    verdicts = dict(enumerate(r.verdict(found, claim, b) for claim in r.CLAIMS))
    assert verdicts == verdicts | (expected if isinstance(expected, dict) else dict(enumerate(expected)))


def sized(end):
    return {"more": {"b = 2, 64 x 64": PAPERS | {"diff": (-2, end)}}}


@pytest.mark.parametrize(
    "question, gains, more, says",
    [
        ("a", PAPERS, {"large": PAPERS | {"diff": (-5, -6)}}, "for it"),
        ("a", PAPERS, {}, "against it"),
        ("a", PAPERS, {"large": PAPERS | {"diff": (-5, -6), "rec_xT": (-5, -6)}}, "against it"),  # both fall
        ("a", PAPERS, {"large": PAPERS | {"diff": (-2, -2), "rec_xT": (5, 6)}}, "undecided"),  # one rises
        ("a", PAPERS, {"seeds": (1, 2)}, LATER),
        ("b", PAPERS, {"name": "phantom_us"} | sized(-3), "for it"),
        ("b", PAPERS, {"name": "phantom_us"} | sized(-4.5), "for it"),  # within two points
        ("b", PAPERS, {"name": "phantom_us"} | sized(-9), "against it"),
        ("b", PAPERS, {}, "-"),  # a data set of one size
        ("d", PAPERS, {}, "for it"),
        ("d", PAPERS | {"diff": (0, -3)}, {}, "against it"),
        ("d", PAPERS, {"seeds": (1,)}, LATER),
    ],
)
def test_what_the_scores_say_of_the_explanation(question, gains, more, says):
    assert r.reading(study(gains, **more), question) == says


def test_the_length_of_training_has_effects():
    lengths = {"500 steps": PAPERS, "4000 steps": PAPERS}
    lines = r.question([study(PAPERS, "hippocampus_2mm", more=lengths)], "c")
    assert [sum(f"| {name} |" in line for line in lines) for name in ("b = 1", *lengths)] == [2, 2, 2]


@pytest.mark.parametrize("seeds, says", [((1,), "fewer than two seeds"), ((1, 2), ", 2 seeds")])
def test_fewer_seeds_than_planned_are_said(seeds, says):
    found = study(PAPERS, seeds=seeds)
    assert all(r.cell(found, key).endswith(says) and found.p[key] == 1 for key in found.effects)


def test_an_effect_is_the_mean_of_differences():
    found = study(PAPERS, large=PAPERS | {"diff": (-7, -9)})
    last = {
        (name, b): np.mean([float(line[9]) * 100 for seed in (1, 2, 3)
                            for line in found.rows[f.Run(name, b, seed)] if line[3] == "ddpm"])
        for name in ("diff", "rec_xT") for b in ("b = 1", "b = 16")
    }  # fmt: skip
    grown = {name: last[name, "b = 16"] - last[name, "b = 1"] for name in ("diff", "rec_xT")}
    more = found.effects["a", "b = 16 minus b = 1", "diff minus rec_xT, last step"]
    assert more.mean == pytest.approx(grown["diff"] - grown["rec_xT"]) and more.mean < -5
    assert found.effects["2", "b = 1", "rec_xT minus diff"].mean == pytest.approx(
        last["rec_xT", "b = 1"] - last["diff", "b = 1"]
    )
    steps = [found.effects["d", "b = 16", f"diff, step {k + 1} minus step {k}"].mean for k in range(1, 5)]
    assert steps == pytest.approx([-2.1, -1.4, -2.1, -1.4], abs=0.1)
    assert found.effects["d", "b = 4", r.GIVEN_AWAY].mean == pytest.approx(10, abs=0.2)


def test_lengths_are_compared_where_they_were_trained():
    lengths = {"500 steps": {"diff": (3, 0), "rec_xT": (0, 0)}, "1400 steps": {"diff": (0, -4)}}
    found = study(PAPERS, "hippocampus_2mm", more=lengths)
    assert found.effects["c", "500 steps", "diff, gain"].mean == pytest.approx(3, abs=0.1)
    key = "c", "the same time", "rec_xT after 1000 steps minus diff after 1400, last step"
    assert found.effects[key].mean == pytest.approx(4, abs=0.2)
    assert found.effects["c", "4000 steps", "diff, gain"] is None
    assert not [key for key in study(PAPERS).effects if key[0] == "c"]


def test_each_question_has_its_effects_and_what_they_say():
    """Also of a set of one size, for which there is nothing to compare."""
    studies = [study(PAPERS, "phantom_us", **sized(-4.5)), study(PAPERS)]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in r.answers(studies)[2:-1]]
    rows = {name: shown for name, *shown in cells}
    assert [rows[f"({letter}) **the explanation**"] for letter in "abd"] == [
        ["against it", "against it"], ["for it", "-"], ["for it", "for it"],
    ]  # fmt: skip
    changed, nothing = rows["(b) the two sizes: rec_xT minus diff, last step"]
    assert float(changed.strip("*").split()[0]) == pytest.approx(1.5, abs=0.2) and nothing == "-"
    lead = [rows[f"(a) {b}: rec_xT minus diff"][1] for b in ("b = 1", "b = 16")]
    assert [float(one.strip("*").split()[0]) for one in lead] == pytest.approx([3, 3], abs=0.2)


def test_the_projects_pages_hold_what_the_scores_give():
    """With every cell, verdict and word, as a second run of the script would write them."""
    made = r.pages(*r.PAGES)
    for path in r.PAGES:
        assert made[path].decode() == path.read_text()
