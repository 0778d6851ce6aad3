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


def verdicts(found, b="b = 1"):
    return [r.verdict(found, claim, b) for claim in r.CLAIMS]


def test_the_papers_picture_is_reproduced():
    assert verdicts(study(PAPERS)) == ["reproduced"] * 5


@pytest.mark.parametrize(
    "change, claim, says",
    [
        ({"diff": (2, -3)}, 0, "not reproduced"),  # another one gains, too
        ({"rec_xT": (-1, 0)}, 0, "not reproduced"),
        ({"rec_xT": (0, 0)}, 0, "undecided"),
        ({"sc_xt": (-2, 3)}, 1, "not reproduced"),
        ({"rec_xT": (1, -9)}, 2, "not reproduced"),
        ({"rec_xT": (1, -9)}, 3, "not reproduced"),  # the ensemble is then 8 below the plain U-Net
        ({"rec_xT": (-1, 0)}, 4, "not reproduced"),
    ],
)
def test_what_is_against_a_claim(change, claim, says):
    assert verdicts(study(PAPERS | change))[claim] == says


def test_what_was_not_trained_is_said():
    few = {name: PAPERS[name] for name in ("diff", "rec_xT")}
    assert verdicts(study(few)) == ["not all run", "not all run", "reproduced", "reproduced", "reproduced"]
    few["diff"] = 2, 3
    assert verdicts(study(few))[:2] == ["not reproduced", "not reproduced"]  # whatever the others do


def test_claim_5_is_of_ddim_and_the_others_are_of_ddpm():
    falls = PAPERS | {"rec_xT": (-1, 0)}
    assert verdicts(study(PAPERS, ddim=falls)) == ["reproduced"] * 4 + ["not reproduced"]


def test_each_b_has_answers_of_its_own():
    found = study(PAPERS, large=PAPERS | {"rec_xT": (-1, -9)})
    assert verdicts(found) == ["reproduced"] * 5
    assert verdicts(found, "b = 16") == ["not reproduced"] * 5


@pytest.mark.parametrize("seeds, says", [((1,), "fewer than two seeds"), ((1, 2), ", 2 seeds")])
def test_fewer_seeds_than_planned_decide_nothing(seeds, says):
    found = study(PAPERS, seeds=seeds)
    assert verdicts(found) == ["not all run"] * 5
    assert {r.reading(found, question) for question in "ad"} == {"not all run"}
    assert all(r.cell(found, key).endswith(says) and found.p[key] == 1 for key in found.effects)


def test_bold_type_is_for_what_is_beyond_doubt():
    found, key = study(PAPERS | {"diff": (0, -3)}), ("1", "b = 1", "diff, last step minus first")
    assert r.cell(found, ("1", "b = 1", "rec_xT, last step minus first")).startswith("**+1.")
    assert found.effects[key].mean == pytest.approx(0, abs=0.2) and "**" not in r.cell(found, key)


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


@pytest.mark.parametrize(
    "large, says",
    [
        ({"diff": (-5, -6)}, "for it"),
        ({}, "against it"),
        ({"diff": (-5, -6), "rec_xT": (-5, -6)}, "against it"),  # both fall
        ({"diff": (-2, -2), "rec_xT": (5, 6)}, "undecided"),  # diff does not fall, but rec_xT rises
    ],
)
def test_what_speaks_for_the_explanation(large, says):
    assert r.reading(study(PAPERS, large=PAPERS | large), "a") == says


@pytest.mark.parametrize("end, says", [(-3, "for it"), (-4.5, "for it"), (-9, "against it")])
def test_size_is_compared_within_two_points(end, says):
    found = study(PAPERS, "phantom_us", more={"b = 2, 64 x 64": PAPERS | {"diff": (-2, end)}})
    assert r.reading(found, "b") == says
    assert r.reading(study(PAPERS), "b") == "-"  # a data set of one size


def test_what_x_T_gives_away():
    assert r.reading(study(PAPERS), "d") == "for it"
    assert r.reading(study(PAPERS | {"diff": (0, -3)}), "d") == "against it"


def test_lengths_are_compared_where_they_were_trained():
    lengths = {"500 steps": {"diff": (3, 0), "rec_xT": (0, 0)}, "1400 steps": {"diff": (0, -4)}}
    found = study(PAPERS, "hippocampus_2mm", more=lengths)
    assert found.effects["c", "500 steps", "diff, gain"].mean == pytest.approx(3, abs=0.1)
    key = "c", "the same time", "rec_xT after 1000 steps minus diff after 1400, last step"
    assert found.effects[key].mean == pytest.approx(4, abs=0.2)
    assert found.effects["c", "4000 steps", "diff, gain"] is None
    assert not [key for key in study(PAPERS).effects if key[0] == "c"]


# --- The page -----------------------------------------------------------------------------------

BLOCKS = {
    "page.md": ("claims", "scores"),
    "effects.md": ("trainings", "claims", "signals", "size", "lengths", "steps"),
}


@pytest.fixture
def both(tmp_path):
    """Pages with empty blocks, and two data sets: one with all that is trained at 2 mm and at 1 mm, and one
    with a single seed."""
    for name, blocks in BLOCKS.items():
        marks = (f"<!-- made by experiments/results.py: {block} -->\n<!-- end -->\n" for block in blocks)
        (tmp_path / name).write_text("# Page\n\n" + "\n".join(marks) + "\nThe end.\n")
    few = {name: PAPERS[name] for name in ("diff", "rec_xT")}
    one = {"steps": 1000, "devices": "1 x cpu", "commit": "0123456789" * 4 + " (changed)"}
    for name, rows in (
        ("hippocampus_2mm", rows_of(PAPERS, more={"b = 2.8": few})),
        ("hippocampus_1mm", {run: rows for run, rows in rows_of(few).items() if run.variant == "b = 1"}),
        ("nerve_64", rows_of(few, seeds=(2,))),
    ):
        keep(tmp_path / f"{name}.csv", rows, {"a": one})
    return tmp_path / "page.md", tmp_path / "effects.md"


def test_a_second_run_makes_the_same_pages(both):
    first = r.pages(*both)
    for path in both:
        path.write_bytes(first[path])
    assert r.pages(*both) == first
    page, effects = (first[path].decode() for path in both)
    assert page.startswith("# Page\n") and page.endswith("\nThe end.\n")
    assert "| [nerve_64](nerve_64.csv) | 9 of 45 | 2 | 1000 | 1 x cpu | 0123456789 (changed) |" in effects
    assert "| 3. it is on par with the plain U-Net | reproduced | reproduced | not all run | not all" in page
    assert (
        "| question (b) | hippocampus_2mm | nerve_64 |\n| --- | --- | --- |\n| the explanation | for"
        in effects
    )
    assert (
        "nerve_64 | b = 4" not in effects
        and "hippocampus_2mm | b = 1 | diff, step 3 minus step 2 |" in effects
    )


def test_scores_are_means_of_seeds_and_cases(both):
    page = r.pages(*both)[both[0]].decode()
    (line,) = (line for line in page.splitlines() if line.startswith("| `rec_xT`"))
    whole, single = line.split(" | ")[1], line.split(" | ")[3]
    rows = [row for row in csv.reader((both[0].parent / "hippocampus_2mm.csv").read_text().splitlines())
            if row[:2] == ["rec_xT", "b = 1"] and row[3] == "ddpm"]  # fmt: skip
    first, last = (100 * np.mean([float(row[column]) for row in rows]) for column in (5, 9))
    assert len(rows) == 36 and whole == f"{first:.1f} → {last:.1f}" and last - first > 0.8
    assert single.endswith("(1 of 3 seeds)") and "| `sc_xt` |" in page and page.count("| - |") > 2


@pytest.mark.parametrize("text", ["", "<!-- made by experiments/results.py: trainings -->\n<!-- ende -->\n"])
def test_a_page_without_its_marks_is_refused(both, text):
    both[1].write_text(text)
    with pytest.raises(r.InputError, match="marks of the block trainings must be there once"):
        r.pages(*both)


def test_the_projects_pages_hold_what_the_scores_give():
    made = r.pages(r.PAGE, r.EFFECTS)
    assert [made[path].decode() for path in (r.PAGE, r.EFFECTS)] == [
        path.read_text() for path in (r.PAGE, r.EFFECTS)
    ]
