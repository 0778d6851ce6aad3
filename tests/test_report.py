"""Tables against numpy and closed forms, figures' numbers against the scores, and what is missing."""

import csv
import dataclasses
import json
import re
import shutil
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import one_line, run_scores
from made import pictures as raw_pictures
from matplotlib.colors import to_rgb
from scipy.stats import ttest_rel, wilcoxon, zscore

import evaluate
import prepare
import report
import train
from data import Sample
from support.results import pictures, scores
from support.disk.files import read_signed, write_signed

RNG = np.random.default_rng(0)


def error(capsys, *words):
    """The one line with which a command ends."""
    return one_line(capsys, report.main, *words)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scored(folder, dices, sampler="ddpm", classes=("a", "b"), uids=None, facts=None, **config):
    """A run's folder with nothing but the scores of `run_scores`. `facts` replaces some of what they tell."""
    uids = uids or [f"case{i}" for i in range(len(dices))]
    config = dataclasses.asdict(train.Config(sampling_steps=3)) | config
    made = run_scores(dices, sampler=sampler, config=config, classes=classes, uids=tuple(uids))
    ran = {"split": "test", "checkpoint": "best", "sampling_steps": dices.shape[1], "seed": 0}
    scores.write_scores(folder / "scores", made._replace(**(facts or {})), ran)
    return folder


def compared(tmp_path, *folders, rows="method"):
    """The rows of Table 1 of these runs, by their method."""
    report.main(["compare", *map(str, folders), "-o", str(tmp_path / "out")])
    [path] = (tmp_path / "out").glob("*-table1.csv")
    return {row[rows]: row for row in table(path)}


def read(*folders):
    return [one for folder in folders for one in report.read_run(folder, report.Options())]


def dices(cases=12, steps=3, classes=2, shift=0.0):
    return np.round(np.clip(RNG.uniform(0.5, 0.9, (cases, steps, classes)) + shift, 0, 1), 6)


# --- Statistics ---------------------------------------------------------------------------------


def test_holm_gives_what_r_gives():
    """p.adjust(p, "holm") of R: the smallest times m, the next times m - 1, and so on, never falling."""
    assert scores.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert scores.holm([0.04, 0.041]) == pytest.approx([0.08, 0.08])
    assert scores.holm([0.9, 0.8, 0.6]) == [1, 1, 1]


def test_a_verdict_is_by_the_corrected_p():
    """Three comparisons, each of which would pass alone."""
    base, z = np.linspace(0.5, 0.9, 20), np.tile([-1.0, 1.0], 10)
    others = [base + shift + 0.02 * z for shift in (0.0101, 0.0102, 0.0103)]
    rows = scores.against([base, *others], 0)[1:]
    assert all(0.017 < float(row["t-test p"]) < 0.05 for row in rows)
    assert [row["at 0.05"] for row in rows] == ["no difference shown"] * 3


def test_the_tests_are_scipys():
    """With an outlier, of which ranks alone take no notice; what is not there counts for neither."""
    a, b = np.append(RNG.normal(2, size=20), 0), np.append(RNG.normal(size=20), 50)
    t_test, ranks = scores.paired(a, b)
    assert t_test == pytest.approx(ttest_rel(a, b).pvalue)
    assert ranks == pytest.approx(float(wilcoxon(a - b).pvalue)) and ranks < 0.01 < t_test
    assert scores.paired(a, a) == (1.0, 1.0)
    assert scores.paired(np.append(a, np.nan), np.append(b, 5.0)) == (t_test, ranks)


def test_verdicts():
    base = RNG.uniform(0.6, 0.8, 40)
    noise = RNG.normal(scale=0.01, size=40)
    rows = scores.against([base, base + 0.05 + noise, base - 0.05 + noise, base + noise - noise.mean()], 0)
    verdicts = [row["at 0.05"] for row in rows]
    assert verdicts == ["**reference**", "higher", "lower", "no difference shown"]
    assert [bool(row["Holm p"]) for row in rows] == [False, True, True, True]
    assert scores.against([base, base + 0.05 + noise], 0)[1]["Holm p"] == ""  # nothing to correct for


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9, unique=True), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_middle_case_has_as_many_below_as_above(values, missing):
    values = np.array([*values, *[np.nan] * missing])
    chosen = values[scores.middle(values)]
    below, above = (values < chosen).sum(), (values > chosen).sum()
    assert np.isfinite(chosen) and above - below in (0, 1)


# --- Scores and compare -------------------------------------------------------------------------


def test_table_1_is_numpys(tmp_path):
    low, high, plain = dices(), dices(shift=0.1), dices(steps=1)
    scored(tmp_path / "low", low, strategy="diff")
    scored(tmp_path / "high", high[::-1], strategy="rec_xT", uids=[f"case{i}" for i in range(12)][::-1])
    scored(tmp_path / "plain", plain, "none", strategy="no_diff")
    rows = compared(tmp_path, *(tmp_path / name for name in ("plain", "high", "low")))
    assert list(rows) == ["Diff.", "Diff. rec. x_T", "No diff."]
    for name, values in (("Diff.", low), ("Diff. rec. x_T", high), ("No diff.", plain)):
        cases = 100 * values[:, -1].mean(-1)
        assert rows[name]["Dice (%)"] == f"{cases.mean():.2f} ± {cases.std(ddof=1):.2f}"
    p = scores.paired(low[:, -1].mean(-1), high[:, -1].mean(-1))[0]
    assert rows["Diff."]["t-test p"] == scores.show_p(p) and rows["Diff."]["at 0.05"] == "lower"
    assert rows["Diff. rec. x_T"]["at 0.05"] == "**reference**" and "paper, Dice (%)" not in rows["Diff."]
    classes = table(tmp_path / "out" / "phantom_us-table8.csv")
    value = 100 * high[:, -1, 1]
    assert classes[1]["Diff. rec. x_T"] == f"{value.mean():.2f} ± {value.std(ddof=1):.2f}"
    text = (tmp_path / "out" / "report.md").read_text()
    shown = re.findall(r"\]\((\S+\.png)\)", text)
    assert {"phantom_us-figure3.png", "phantom_us-figure8.png"} == set(shown)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert text.count("(somewhere)") >= 5 and "Figure 4" in text  # as missing: there is no checkpoint


def test_the_papers_numbers_stand_by_its_data_sets_alone(tmp_path):
    for sampler in ("ddpm", "ddim"):
        run = scored(tmp_path / "run", dices(classes=1), sampler, classes=("a",), dataset="muscle_us")
    rows = compared(tmp_path, run, rows="sampler")
    assert {name: row["paper, Dice (%)"] for name, row in rows.items()} == {"ddpm": "88.23", "ddim": ""}


@pytest.mark.parametrize("field, values", [("transformer", (True, False)), ("steps", (100, 200))])
def test_settings_in_which_groups_differ_are_named(tmp_path, field, values):
    """A run of twice as many steps is no further seed of the shorter one."""
    for seed, value in enumerate((*values, values[1])):
        scored(tmp_path / str(seed), dices(), seed=seed, remat=seed, **{field: value})
    for path in (tmp_path / "0" / "scores").glob("*.json"):  # from before there was such a setting
        facts = json.loads(path.read_text())
        del facts["config"]["ema_decay"]
        path.write_text(json.dumps(facts))
    rows = compared(tmp_path, *(tmp_path / str(seed) for seed in range(3)))
    runs = {f"Diff. rec. x_T, {field} {value}": str(n) for value, n in zip(values, (1, 2), strict=True)}
    assert {name: row["training seeds"] for name, row in rows.items()} == runs


def test_a_single_network_is_that_of_the_papers_method(tmp_path):
    made, folders = report.Report(tmp_path / "out"), (tmp_path / "diff", tmp_path / "rec_xT")
    runs = {folder: read(scored(folder, dices(), strategy=folder.name)) for folder in folders}
    report.one_set(made, "phantom_us", runs, report.Options())
    [line] = [line for line in made.lacking if "Tables 3 and 4" in line]
    assert str(tmp_path / "rec_xT") in line


def damaged(change):
    """A change of a run's CSV file by its text."""

    def damage(folder):
        [path] = (folder / "scores").glob("*.csv")
        path.write_text(change(path.read_text()))

    return damage


@pytest.mark.parametrize(
    "cases, changes, damage, says",
    [
        (5, {}, None, "different cases (such as case"),
        (12, {"dataset": "phantom_ct"}, None, "different data sets or classes"),
        (12, {"strategy": "rec_xT"}, None, "same settings and training seed"),
        (12, {"strategy": "sixth"}, None, "does not have strategy sixth"),
        (12, {}, damaged(lambda text: text[:-40]), "damaged"),
        (12, {}, damaged(lambda text: re.sub(",[a-z]+\r?$", "", text, flags=re.M)), "older than this code"),
        (12, {}, lambda folder: shutil.rmtree(folder / "scores"), "python evaluate.py test"),
        (12, {}, shutil.rmtree, "no such run"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, cases, changes, damage, says):
    good = scored(tmp_path / "good", dices())
    other = scored(tmp_path / "other", dices(cases), **{"strategy": "diff", **changes})
    if damage:
        damage(other)
    assert says in error(capsys, "compare", good, other, "-o", tmp_path / "out")


def test_missed_classes_are_told_beside_the_distance(tmp_path):
    """Class b is missed in one case (at distance 100, as in `scored`), and is in neither in another one."""
    one, other = dices(), dices()
    other[2, :, 1], other[5, :, 1] = 0, np.nan
    one[5, :, 1] = np.nan
    scored(tmp_path / "diff", one, strategy="diff")
    scored(tmp_path / "rec_xT", other, strategy="rec_xT")
    rows = compared(tmp_path, tmp_path / "diff", tmp_path / "rec_xT")
    far = 10 * (1 - other[:, -1])
    near = np.nanmean(np.where(other[:, -1] == 0, np.nan, far), axis=1)
    far[2, 1] = 100
    assert rows["Diff. rec. x_T"]["HD95 (mm)"] == scores.mean_sd(np.nanmean(far, axis=1))
    assert rows["Diff. rec. x_T"]["HD95 of found classes (mm)"] == scores.mean_sd(near)
    assert (rows["Diff. rec. x_T"]["missed"], rows["Diff."]["missed"]) == ("1 of 23", "0 of 23")
    assert rows["Diff."]["invented"] == "0 of 1"
    assert rows["Diff."]["HD95 of found classes (mm)"] == rows["Diff."]["HD95 (mm)"]
    [_, b] = table(tmp_path / "out" / "phantom_us-table9-found.csv")
    assert b["Diff. rec. x_T"] == f"{scores.mean_sd(np.delete(far[:, 1], [2, 5]))} (1 missed)"
    assert b["Diff."] == scores.mean_sd(10 * (1 - one[:, -1, 1]))


def test_the_papers_method_is_tested_where_another_is_the_best(tmp_path):
    low, high, middle = dices(shift=-0.2), dices(shift=0.2), dices()
    for strategy, values in (("diff", low), ("rec_xT", middle), ("sc_xt", high)):
        scored(tmp_path / strategy, values, strategy=strategy)
    folders = [tmp_path / strategy for strategy in ("diff", "rec_xT", "sc_xt")]
    rows = compared(tmp_path, *folders)
    cases = {name: values[:, -1].mean(-1) for name, values in (("low", low), ("high", high), ("mid", middle))}
    tests = scores.holm([scores.paired(cases[name], cases["mid"])[0] for name in ("low", "high")])
    head = "against Diff. rec. x_T: Holm p"
    assert [rows[name][head] for name in ("Diff.", "Diff. sc. x_t")] == [*map(scores.show_p, tests)]
    verdict = "against Diff. rec. x_T: at 0.05"
    assert rows["Diff. rec. x_T"][verdict] == "**reference**" and rows["Diff."][verdict] == "lower"
    assert rows["Diff. sc. x_t"]["at 0.05"] == "**reference**"
    row = compared(tmp_path, *folders[:2])["Diff."]
    # With one test there is nothing to correct for, and rec_xT is the reference already.
    assert row["t-test p"] and "Holm p" not in row and head not in row


# --- Folds --------------------------------------------------------------------------------------


def fold(folder, values, k, of=3, cases=(), sampler="ddpm", **config):
    """Scores of one fold of folder:mine; its cases have the letter of the fold."""
    uids = [f"{'abcde'[k - 1]}{i}" for i in range(len(values))]
    facts = {"source": f"folder mine, fold {k} of {of}"}
    config |= {"dataset": f"folder:mine-fold{k}", "data_dir": f"data{k}"}
    return scored(folder, values, sampler, uids=cases or uids, facts=facts, **config)


def test_folds_are_one_row_of_all_cases_in_whatever_order_they_are_given(tmp_path):
    """Of two strategies, one with two training seeds, and folds of 5, 4 and 3 cases: what numpy and scipy
    make of the cases put together by hand, with the mean of the seeds; the tests are over all 12."""
    low, high, again = [[dices(n, shift=shift) for n in (5, 4, 3)] for shift in (0, 0.08, 0.08)]
    runs = ("diff", "diff", 0, low), ("one", "rec_xT", 0, high), ("two", "rec_xT", 1, again)
    for name, strategy, seed, values in runs:
        for k in (1, 2, 3):
            fold(tmp_path / f"{name}-{k}", values[k - 1], k, strategy=strategy, seed=seed)
    folders = sorted(map(str, tmp_path.iterdir()), reverse=True)
    report.main(["compare", *folders, "-o", str(tmp_path / "out")])
    rows = table(tmp_path / "out" / "mine-3-folds-table1.csv")
    first, *others = (np.concatenate(values)[:, -1].mean(-1) for *_, values in runs)
    second = np.mean(others, axis=0)
    for row, cases, seeds in zip(rows, (first, second), "12", strict=True):
        assert row["Dice (%)"] == f"{100 * cases.mean():.2f} ± {100 * cases.std(ddof=1):.2f}"
        assert len(cases) == 12 and row["training seeds"] == seeds
    between = 100 * np.std([cases.mean() for cases in others], ddof=1)
    assert [row["SD of their Dice"] for row in rows] == ["-", f"{between:.2f}"]
    assert rows[0]["t-test p"] == scores.show_p(ttest_rel(first, second).pvalue)
    assert rows[0]["Wilcoxon p"] == scores.show_p(wilcoxon(first, second).pvalue)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "folder:mine (folder mine, folds 1, 2, 3 of 3), 12 test cases" in text
    # Figure 4 is of a single network: that of the first fold.
    assert f"{tmp_path / 'diff-1' / 'best'}: no such file" in text


@pytest.mark.parametrize(
    "cases, k, changes, says",
    [
        (4, 1, {"seed": 1}, "one and {tmp}/other: scored on different cases (such as b0)"),
        (4, 2, {"strategy": "diff"}, "(such as a0); test both again, and give the same folds of each"),
        (2, 3, {"cases": ["c0", "b3"]}, "two and {tmp}/other: case b3 is in both;"),
        (4, 2, {}, "case b0 is in both; leave one of them out"),
        (4, 3, {"of": 4}, "folds of different sets"),
    ],
)
def test_folds_that_do_not_fit_together_are_one_line(tmp_path, capsys, cases, k, changes, says):
    runs = fold(tmp_path / "one", dices(4), 1), fold(tmp_path / "two", dices(4), 2)
    other = fold(tmp_path / "other", dices(cases), k, **changes)
    line = error(capsys, "compare", *runs, other, "-o", tmp_path / "out")
    assert says.format(tmp=tmp_path) in line
    whole = scored(tmp_path / "whole", dices(8), dataset="folder:mine")
    assert "different data sets" in error(capsys, "compare", *runs, whole, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "dataset, source, found",
    [
        ("folder:mine-fold2", "folder mine, fold 2 of 5", ("folder:mine", "folder mine", 2, 5)),
        ("folder:a-fold1-fold12", "folder a, b, fold 12 of 20", ("folder:a-fold1", "folder a, b", 12, 20)),
        ("folder:mine-fold2", "folder mine", None),  # a set of that name
        ("folder:mine-fold2", "folder mine, fold 3 of 5", None),
        ("folder:mine", "folder mine, fold 2 of 5", None),
    ],
)
def test_a_fold_is_known_by_name_and_source_together(dataset, source, found):
    assert scores.fold_of(dataset, source) == found


def test_variants_are_compared_within_a_strategy_and_over_all_folds(tmp_path):
    folders = {}
    for strategy, transformer, k in product(("diff", "rec_xT"), (True, False), (1, 2)):
        path, changes = tmp_path / f"{strategy}-{transformer}-{k}", {"transformer": transformer}
        folders[strategy, transformer, k] = fold(path, dices(3), k, strategy=strategy, **changes)
    made = report.Report(tmp_path / "tables")
    runs, options = read(*folders.values()), report.Options()
    assert report.variants(made, 5, "", "transformer", runs, options)
    assert not report.variants(made, 10, "", "train_timesteps", runs, options)
    rows = table(tmp_path / "tables" / "mine-3-folds-table5.csv")
    assert [row["at 0.05"] == "**reference**" for row in rows] == [True, False] * 2
    assert [row["method"] for row in rows] == ["Diff."] * 2 + ["Diff. rec. x_T"] * 2
    assert [row["transformer"] for row in rows] == ["True", "False"] * 2
    pair = read(folders["diff", True, 1], folders["diff", True, 2])
    cases = np.concatenate([one.last(scores.DICE) for one in pair])
    assert rows[0]["Dice (%)"] == scores.mean_sd(cases)


def group_of(values, name="Diff."):
    """Scores of Dice [case, class] in percent."""
    config = {"dataset": "amos_ct", "strategy": "diff"}
    return run_scores(np.asarray(values)[:, None] / 100, name=name, config=config)


def test_significance_per_class():
    """Two classes gain, one loses, one is the same, one is in a single case: p of each is scipy's."""
    base = RNG.normal(80, 3, (20, 5))
    noise = zscore(RNG.normal(size=base.shape), ddof=1)
    after = base + noise * [1, 1, 1, 0, 1] + [3, 0.54, -3, 0, 5]
    base[1:, 4] = np.nan
    rows = scores.class_tests(group_of(base), group_of(after, "Ensemble"))
    p = [ttest_rel(after[:, j], base[:, j]).pvalue for j in range(3)]
    assert p[1] < 0.05 < 3 * p[1]  # significant by itself alone
    head = "Ensemble against Diff.: "
    assert [row[f"{head}t-test p"] for row in rows] == [*map(scores.show_p, p), "1.000", "-"]
    assert rows[1][f"{head}Holm p"] == scores.show_p(scores.holm([*p, 1.0, 1.0])[1])


# --- With networks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_run):
    """Untrained runs on a made-up data set, scored on its validation cases."""
    root = tmp_path_factory.mktemp("report") / "runs"
    small = {"patch_shape": (16, 16), "phantom_shape": (16, 16), "sampling_steps": 2, "transformer": True}
    for i, strategy in enumerate(("no_diff", "rec_xT")):
        save_run(root / f"phantom_us-{strategy}", "phantom_us", root, strategy, seed=i, **small)
        words = ["test", str(root / f"phantom_us-{strategy}"), "--split", "validation"]
        evaluate.main([*words, "--sampler", "ddpm"])
    return root


VALIDATION = report.Options(split="validation")


def test_example_pictures_show_what_was_scored(runs):
    """The 4th case has the noise of the 4th case, and so its Dice."""
    model = evaluate.load(runs / "phantom_us-rec_xT")
    [found], dataset = report.read_run(model.path.parent, VALIDATION), model.dataset()
    [(case, probability)] = report.predict(model, VALIDATION, 3)
    cases = [dataset.load("validation", i) for i in range(4)]
    *_, (_, same) = model.predict(cases, model.sampling(sampler="ddpm", K=2, seed=0))
    [(_, other)] = model.predict(cases[3:], model.sampling(sampler="ddpm", K=2, seed=0))
    np.testing.assert_allclose(probability, same, atol=1e-5)
    assert np.abs(probability - other).max() > 1e-3 and case.uid == found.uids[3]
    [(_, seed_1)] = report.predict(model, VALIDATION._replace(seed=1), 3)
    assert np.abs(probability - seed_1).max() > 1e-3
    again = evaluate.score(probability.argmax(-1), case, 2)
    np.testing.assert_allclose(again.dice, found.dice[0, 3], atol=1e-6)


def test_the_ensemble_is_the_mean_of_probabilities(runs, monkeypatch):
    """The mean is that of the last steps. With two classes a product would give the same; here are three."""
    a, b = (evaluate.load(runs / f"phantom_us-{name}") for name in ("no_diff", "rec_xT"))
    made = {}

    def fake(model, cases, *_, **__):
        for i, case in enumerate(cases):
            made[model.path, i] = RNG.dirichlet([1, 1, 1], (2, *case.label.shape))
            yield case, made[model.path, i]

    monkeypatch.setattr(evaluate.Model, "predict", fake)
    monkeypatch.setattr(report, "clean", lambda dataset, classes: 10 * classes)
    for i, (_, three) in enumerate(report.predict_pair(a, b, VALIDATION)):
        p, q = made[a.path, i][-1], made[b.path, i][-1]
        for found, expected in zip(three, (p, q, p + q), strict=True):
            np.testing.assert_array_equal(found, 10 * expected.argmax(-1))
        assert (10 * (p * q).argmax(-1) != three[2]).any()


def test_the_ensembles_parts_score_as_they_did(runs, tmp_path):
    folders = [runs / "phantom_us-no_diff", runs / "phantom_us-rec_xT"]
    words = ["--split", "validation", "-o", str(tmp_path)]
    report.main(["ensemble", *map(str, folders), *words])
    rows = table(tmp_path / "phantom_us-table2.csv")
    for folder, row in zip(folders, rows, strict=False):
        [found] = report.read_run(folder, VALIDATION)
        assert row["Dice (%)"] == scores.mean_sd(found.last(scores.DICE))
    [path] = (tmp_path / "phantom_us-ensemble").glob("*.csv")
    assert len(table(path)) == 30 and (tmp_path / "phantom_us-figure5.png").exists()


def test_table_2_is_against_the_plain_unet(tmp_path):
    """Even where that is not the best; and the better cases are those of the other."""
    plain, other = np.full((8, 1, 2), 0.6), np.full((8, 3, 2), 0.5)
    other[:6, -1] = 0.7 + 0.01 * np.arange(6)[:, None]
    scored(tmp_path / "plain", plain, "none", strategy="no_diff")
    scored(tmp_path / "other", other, strategy="rec_xT")
    groups = read(tmp_path / "plain", tmp_path / "other")
    report.ensemble_table(report.Report(tmp_path / "out"), "", groups)
    first, second = table(tmp_path / "out" / "phantom_us-table2.csv")
    assert first["at 0.05"] == "**reference**" and first["better cases (%)"] == ""
    assert second["better cases (%)"] == "75.00" and second["at 0.05"] != "**reference**"


def test_table_4_is_over_all_pairs_of_seeds(runs, tmp_path, monkeypatch):
    """Of three seeds, whose predictions of four cases are given: Dice of one against another, and how far
    their scores against the truth are apart, in percent and points."""
    model, rng = evaluate.load(runs / "phantom_us-rec_xT"), np.random.default_rng(1)
    masks, cases = rng.integers(0, 2, (3, 4, 2, 16, 16)), [model.dataset().load("test", i) for i in range(4)]

    def predict(model, options):
        for case, steps in zip(cases, masks[options.seed - 5], strict=True):
            yield case, np.eye(2)[steps]

    monkeypatch.setattr(report, "predict", predict)
    report.inference_seeds(report.Report(tmp_path), model, report.Options(seed=5, seeds=3), "")
    rows = table(tmp_path / "phantom_us-rec_xT-table4.csv")

    def overlap(a, b):
        return 200 * (a & b).sum() / (a.sum() + b.sum())

    for k, row in enumerate(rows):
        against, apart = [], []
        for i, case in enumerate(cases):
            one, two, three = (masks[seed, i, k] for seed in range(3))
            against.append(np.mean([overlap(one, two), overlap(one, three), overlap(two, three)]))
            a, b, c = (overlap(mask, case.label) for mask in (one, two, three))
            apart.append(np.mean([abs(a - b), abs(a - c), abs(b - c)]))
        for head, values in (("Dice of each other (%)", against), ("difference in Dice (points)", apart)):
            assert row[head] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def test_scores_of_an_older_checkpoint_are_refused(runs, tmp_path, capsys):
    shutil.copytree(runs / "phantom_us-no_diff", tmp_path / "run")
    [path] = (tmp_path / "run" / "scores").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_steps": 500}))
    line = error(capsys, "compare", tmp_path / "run", "--split", "validation", "-o", tmp_path / "out")
    assert "scored at step 500, the model is of step 0" in line


def test_ensemble_wants_one_run_of_each_kind(runs, tmp_path, capsys):
    run = runs / "phantom_us-rec_xT"
    assert "no_diff" in error(capsys, "ensemble", run, run, "-o", tmp_path)
    assert "no diffusion" in error(capsys, "ablate", runs / "phantom_us-no_diff", "-o", tmp_path)


def test_without_test_cases_there_is_one_line(runs, tmp_path, capsys, monkeypatch):
    whole = evaluate.Model.dataset

    def emptied(model, data_dir=""):
        dataset = whole(model, data_dir)
        return dataset._replace(uids=dataset.uids | {"test": ()})

    monkeypatch.setattr(evaluate.Model, "dataset", emptied)
    pair = [runs / "phantom_us-no_diff", runs / "phantom_us-rec_xT"]
    assert "no test cases" in error(capsys, "ensemble", *pair, "-o", tmp_path)


def test_everything_there_is_and_what_is_missing_or_damaged(runs, tmp_path, capsys):
    """Whether the model or the scores of a run are damaged, all else is made, and the report ends well."""
    root = tmp_path / "runs"
    shutil.copytree(runs, root)
    for name in ("gone-strategy", "bad-scores"):
        shutil.copytree(root / "phantom_us-rec_xT", root / name)
    header, arrays = read_signed(root / "gone-strategy" / "best")
    header["config"]["strategy"] = "sixth"
    write_signed(root / "gone-strategy" / "best", header, arrays)
    damaged(lambda text: text[:-40])(root / "bad-scores")
    words = ["--split", "validation", "--steps", "2,3", "--seeds", "2", "-o", str(tmp_path / "out")]
    report.main(["all", str(root), *words])
    text, _, missing = (tmp_path / "out" / "report.md").read_text().partition("What is missing")
    for name in ("Table 1", "Table 2", "Table 3", "Table 4", *(f"Figure {n}" for n in (3, 4, 5, 6, 7, 8))):
        assert f"**{name}. " in text
    assert text.count("MADE UP") >= 10 and len(table(tmp_path / "out" / "phantom_us-table1.csv")) == 2
    folder = root / "phantom_us-rec_xT"
    assert (folder / "scores" / "validation-best-ddpm-3-seed0.csv").exists()
    untrained = re.findall(r"`python train.py --dataset phantom_us --strategy (\w+)`", missing)
    assert untrained == ["diff", "sc_xt", "sc_xt1", "rec_xt1"]
    for change, number in (("--no-transformer", 5), ("--train-timesteps 5", 10)):
        assert f"--strategy rec_xT {change} --run-dir {folder}-table{number}`" in missing
    for name, says in (
        ("gone-strategy", "strategy sixth is not one of"),
        ("bad-scores", "delete both and run evaluate.py test again"),
    ):
        [line] = [line for line in missing.splitlines() if name in line]
        assert says in line
    for name in ("phantom_us-rec_xT", "phantom_us-no_diff", "bad-scores"):
        shutil.rmtree(root / name)
    assert "no runs with scores that can be read" in error(capsys, "all", root, *words)


def test_folds_from_the_folder_to_the_report(tmp_path, save_run):
    """Three folds of nine pictures; that of two is trained (not at all, in truth) and scored."""
    raw, small = raw_pictures(tmp_path / "raw", 9), {"patch_shape": (8, 8), "sampling_steps": 2}
    for k in (1, 3):
        words = ["build", "folder:mine", "--raw", str(raw), "--data-dir", str(tmp_path), "--folds", "3"]
        prepare.main([*words, "--fold", str(k), "--workers", "1"])
        for strategy in ("no_diff", "rec_xT"):
            folder = tmp_path / "runs" / f"{strategy}-{k}"
            save_run(folder, f"folder:mine-fold{k}", tmp_path, strategy, **small)
            evaluate.main(["test", str(folder)])
    words = ["--steps", "2", "--seeds", "2", "-o", str(tmp_path / "out")]
    report.main(["all", str(tmp_path / "runs"), *words])
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.findall("^## folder.*$", text, re.M) == ["## folder:mine, 3 folds"]
    assert "Table 1. Training strategies. folder:mine (folder raw, folds 1, 3 of 3), 6 test cases" in text
    assert len(table(tmp_path / "out" / "mine-3-folds-table1.csv")) == 3
    for name in ("Table 2", "Table 3", "Table 4", "Figure 4", "Figure 5", "Figure 6", "Figure 7"):
        assert re.search(rf"\*\*{name}\..*folder:mine-fold1 \(folder raw, fold 1 of 3\)", text), name
    missing = text[text.index("What is missing") :]
    assert "`python train.py --dataset folder:mine-fold1 --strategy diff`" in missing


def test_predictions_of_different_seeds():
    """A prediction is no distance from itself."""
    case = Sample(np.zeros((6, 6, 1), np.float32), np.zeros((6, 6), int), (1.0, 2.0), "u", np.eye(4))
    same, far = report.agreement(*[RNG.integers(0, 2, (3, 6, 6))] * 2, case, 2)
    assert (same == 1).all() and (far == 0).all()


# --- Figures ------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_faces_are_the_surface(seed):
    """Their voxels are the scored surface's; every square looks away from the middle of its voxel; and a box
    has the area of a box."""
    mask = np.random.default_rng(seed).random((4, 5, 3)) < 0.5
    voxels, corners, normals = pictures.faces(mask)
    assert set(map(tuple, voxels)) == (set(map(tuple, evaluate.surface(mask))) if mask.any() else set())
    np.testing.assert_allclose(corners.mean(axis=1) - (voxels + 0.5), normals / 2)
    edges = corners[:, [1, 3]] - corners[:, [0]]
    np.testing.assert_array_equal(np.abs(np.cross(edges[:, 0], edges[:, 1])), np.abs(normals))
    assert len(pictures.faces(np.ones((4, 5, 3), bool))[0]) == 2 * (20 + 15 + 12)


def test_a_missed_class_does_not_set_the_scale_of_the_surface_errors(tmp_path, monkeypatch):
    """It has no distance, and a colour that is not on the scale, which a legend explains."""
    label = np.zeros((24, 24), int)
    label[3:9, 3:9], label[12:20, 12:20] = 1, 2
    near = np.roll(label, 1, axis=0)
    case = Sample(label[..., None].astype(np.float32), label, (1.0, 1.0), "u", np.eye(4))
    drawn = []
    monkeypatch.setattr(report.Report, "figure", lambda _, name, title, figure: drawn.append(figure))
    shown = {"a": near, "b": near * (near != 2)}
    report.surface_errors(report.Report(tmp_path), case, shown, group_of(dices(steps=1)[:, 0]), "")
    [figure] = drawn
    [legend] = figure.legends
    assert figure.axes[-1].get_ylim() == (0, 1) and "missed" in legend.get_texts()[0].get_text()
    colours = [dots.get_facecolor() for dots in figure.axes[1].collections]
    lost = (np.concatenate(colours)[:, :3] == to_rgb(pictures.VERMILION)).all(axis=1)
    assert lost.sum() == 28  # the edge of 8 x 8


def test_every_organ_has_an_outline_of_its_own_and_a_name():
    assert len({str(pictures.outline(c)) for c in range(1, 16)}) == 15
    label, names = RNG.integers(0, 4, (12, 12)), ["background", "liver", "spleen", "aorta"]
    row = pictures.over_steps(label.astype(float), label, (1.0, 1.0), np.stack([label] * 5), ["DS 1"] * 5)
    assert [panel.head for panel in row] == ["image", "truth", *(f"step {k}" for k in range(1, 6))]
    figure = pictures.panels([row], names, beside=["case1"])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names[1:]
    assert figure.axes[0].get_ylabel() == "case1" and figure.axes[2].get_xlabel() == "DS 1"


def test_information_has_its_limits(tmp_path, monkeypatch):
    """At t = 1 the mask is whole, and softmax leaves log(1 + e^-2) nats. Noise alone: the mean of
    log(1 + e^z) for z ~ N(0, 2)."""
    draw, drawn = pictures.information, []
    monkeypatch.setattr(pictures, "information", lambda *given: drawn.append(given) or draw(*given))
    report.main(["information", "--dataset", "phantom_us", "-o", str(tmp_path)])
    [(_, _, times, told, limit)] = drawn
    (entropy, dice), steps = told.T, times % 100 == 1
    assert times[0] == 1 and entropy[0] == pytest.approx(np.log1p(np.exp(-2)), abs=2e-3)
    places, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = (weights * np.log1p(np.exp(np.sqrt(2) * places))).sum() / weights.sum()
    assert limit[0] == pytest.approx(expected, abs=0.01)
    assert list(entropy[steps]) == sorted(entropy[steps]) and dice[0] == 100
    # At t = 1001 nearly nothing is left: Dice of guessing.
    assert times[-1] == 1001 and dice[-1] == pytest.approx(limit[1], abs=1.5)
    assert (tmp_path / "phantom_us-figure7.png").exists()


def test_folders_with_umlauts_are_named_in_an_ascii_locale(tmp_path):
    """There, Python gives the bytes of their names as surrogates."""
    made = report.Report(tmp_path)
    made.lines.append("größe".encode().decode("ascii", "surrogateescape"))
    made.close()
    assert "größe" in (tmp_path / "report.md").read_text(encoding="utf-8")
