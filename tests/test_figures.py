"""What a figure shows, read off the figure itself, beside NumPy's account of the same scores."""

import numpy as np
import pytest
from made import run_scores
from matplotlib.colors import to_hex

from strategies import STRATEGIES
from support.raw.images import fullest_slice
from support.results import pictures
from support.results.scores import HD95, table

RNG = np.random.default_rng(0)


def drawn(name="Diff.", cases=8, steps=3):
    dice, hausdorff = RNG.uniform(0.3, 0.9, (cases, steps, 2)), RNG.uniform(1, 30, (cases, steps, 2))
    return run_scores(dice, hausdorff, name=name)


def means(group):
    """Per measure, in percent and mm: the mean over the classes, [case, step]."""
    return 100 * group.dice[0].mean(-1), group.hausdorff[0].mean(-1)


def of(strategy, **size):
    """Scores of a strategy."""
    scores = drawn(strategy, **size)
    return scores._replace(config=scores.config | {"strategy": strategy})


@pytest.mark.parametrize("cases", [8, 12])
def test_curves_are_means_over_the_cases(cases):
    """With fewer than ten cases each of them is drawn, otherwise the standard error of the mean."""
    groups = of("diff", cases=cases), of("rec_xT", cases=cases), of("no_diff", cases=cases, steps=1)
    figure = pictures.curves(groups)
    for i, axes in enumerate(figure.axes[:2]):
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        for group in groups:
            values = means(group)[i]
            found = np.array(lines[group.name].get_ydata(), float)
            np.testing.assert_allclose(found, values.mean(0) * np.ones(2 if values.shape[1] == 1 else 3))
        np.testing.assert_allclose(lines["diff"].get_xdata(), [1, 2, 3], atol=0.2)
        values = means(groups[0])[i]
        if cases < 10:
            points = [line.get_ydata() for line in axes.lines if line.get_marker() == "."]
            np.testing.assert_allclose(points[:cases], values)
        else:
            ends = np.array(axes.collections[0].get_segments())[..., 1]
            error = values.std(0, ddof=1) / np.sqrt(cases)
            np.testing.assert_allclose(ends.T, [values.mean(0) - error, values.mean(0) + error])


@pytest.mark.parametrize("cases", [8, 12])
def test_boxes_are_of_the_last_step_minus_the_first(cases):
    """With fewer than ten cases they are points. The axis says which side is better."""
    groups = of("diff", cases=cases), of("rec_xT", cases=cases)
    figure = pictures.boxes(groups)
    for i, axes in enumerate(figure.axes[:2]):
        differences = [means(group)[i][:, -1] - means(group)[i][:, 0] for group in groups]
        better = [100 * np.mean(d > 0 if i == 0 else d < 0) for d in differences]
        assert [text.get_text() for text in axes.texts] == [f"{share:.0f} % better" for share in better]
        assert axes.get_xlabel().endswith(("better to the right", "better to the left")[i])
        shown = axes.lines[: len(groups)] if cases < 10 else axes.patches
        for one, difference in zip(shown, differences, strict=True):
            x = one.get_xdata() if cases < 10 else one.get_path().vertices[:, 0]
            ends = [0, 100] if cases < 10 else [25, 75]
            np.testing.assert_allclose([x.min(), x.max()], np.percentile(difference, ends))


def test_a_strategy_has_the_same_colour_in_every_figure():
    assert set(pictures.STRATEGY_STYLES) == set(STRATEGIES)
    looks = [*pictures.STRATEGY_STYLES.values(), pictures.OTHER_STYLE]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    alone, among = (pictures.curves(groups) for groups in ([of("rec_xT")], [of("diff"), of("rec_xT")]))
    colours = {
        line.get_color() for f in (alone, among) for line in f.axes[0].lines if line.get_label() == "rec_xT"
    }
    box = pictures.boxes([of("sc_xt", cases=12), of("rec_xT", cases=12)]).axes[0].patches[1]
    assert colours == {to_hex(box.get_facecolor()).upper()}
    variants = pictures.curves([drawn("one"), drawn("two")]).axes[0].lines
    assert len({line.get_linestyle() for line in variants if line.get_label() in ("one", "two")}) == 2


def test_bland_altman_is_the_difference_over_the_mean_within_196_deviations():
    first, other = drawn("No diff.", steps=1), drawn("Ensemble")
    figure = pictures.bland_altman(first, [drawn("Diff."), other])
    for i, axes in enumerate(figure.axes[1:4:2]):
        a, b = means(other)[i][:, -1], means(first)[i][:, -1]
        points, middle, low, high = axes.lines[:4]
        np.testing.assert_allclose(points.get_xdata(), (a + b) / 2)
        np.testing.assert_allclose(points.get_ydata(), a - b)
        assert middle.get_ydata()[0] == pytest.approx((a - b).mean())
        reach = 1.96 * np.std(a - b, ddof=1)
        found = sorted(line.get_ydata()[0] for line in (low, high))
        assert found == pytest.approx([(a - b).mean() - reach, (a - b).mean() + reach])
        assert f"mean {(a - b).mean():.2f} (line)" in axes.get_title() and axes.get_legend() is None
        share = 100 * np.mean(a > b if i == 0 else a < b)
        assert f"Ensemble - No diff.: {share:.0f} % better" in axes.get_title()


def test_the_table_ends_with_the_last_step():
    """Every step's mean Dice, then mean and deviation of both scores at the last; where a class is missed,
    the distance of the found ones, and the numbers."""
    group = drawn(cases=5)
    percent, far = means(group)
    head, row = table([("one", group)]).splitlines()
    numbers = [float(n) for n in row.replace("±", "").split()[1:]]
    last = [percent[:, -1].mean(), percent[:, -1].std(ddof=1), far[:, -1].mean(), far[:, -1].std(ddof=1)]
    assert numbers == pytest.approx([*percent.mean(0), *last], abs=0.006) and "missed" not in head
    group.outcome[0, 2, -1, 0], group.outcome[0, 3, -1, 1] = "missed", "invented"
    head, row = table([("one", group)]).splitlines()
    found = [far[i, -1] for i in (0, 1, 4)] + [group.hausdorff[0, 2, -1, 1], group.hausdorff[0, 3, -1, 0]]
    assert f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}" in row and "missed" in head
    assert row.split()[-6:] == ["1", "of", "9", "1", "of", "1"]


def test_what_one_seed_finds_counts_where_another_misses_it():
    one, two = drawn(cases=2, steps=1), drawn(cases=2, steps=1)
    two.outcome[0, 0, 0, :] = "missed"
    both = one._replace(**{name: np.concatenate([getattr(one, name), getattr(two, name)])
                           for name in ("dice", "hausdorff", "outcome")})  # fmt: skip
    far = both.found().last(HD95)
    assert far[0] == pytest.approx(one.hausdorff[0, 0, 0].mean())
    assert far[1] == pytest.approx((one.hausdorff[0, 1, 0].mean() + two.hausdorff[0, 1, 0].mean()) / 2)


def test_a_training_curve_is_the_log():
    lines = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": None}, {"step": 6, "loss": 1.0}]
    lines += [{"step": 4, "validation_dice": [0.1, 0.2]}, {"step": 6, "validation_dice": [0.4, 0.3]}]
    left, right = pictures.training_curve(lines, "title", "Dice").axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [3.0, np.nan, 1.0])
    assert list(left.lines[0].get_xdata()) == [2, 4, 6]
    assert [list(line.get_ydata()) for line in right.lines] == [[10, 40], [20, 30]]
    assert [line.get_label() for line in right.lines] == ["sampling step 1", "sampling step 2"]
    assert left.get_ylabel() == "loss: Dice" and {left.lines[0].get_marker(), left.get_yscale()} == {
        "o",
        "linear",
    }


def test_the_slice_that_is_shown_has_the_most_foreground():
    label = np.zeros((5, 4, 6), np.uint8)
    label[:, :, 1], label[0, 0, 2:], label[:, :, 4] = 2, 1, 255
    assert fullest_slice(label) == 1 and fullest_slice(label[..., 0]) is None


def test_a_volume_is_shown_with_the_patients_front_up_and_right_side_right():
    """The axes of volumes run to the right and to the front; the corner that is farthest along both is at the
    top right. A voxel that is twice as long along the second axis is twice as high."""
    volume = np.zeros((4, 3, 1))
    volume[-1, -1] = 1
    none = np.zeros((4, 3), int)
    of_volume = pictures.Panel(volume, none[..., None], (1.0, 2.0, 5.0))
    of_picture = pictures.Panel(volume[..., 0], none, (1.0, 1.0))
    first, second = pictures.panels([[of_volume, of_picture]], ["background", "a"]).axes
    assert first.images[0].get_array().argmax() == 3 and second.images[0].get_array().argmax() == 11
    places = {text.get_text(): text.get_position() for text in first.texts}
    assert places["L"][0] < 0.1 < 0.9 < places["R"][0] and places["P"][1] < 0.1 < 0.9 < places["A"][1]
    assert not second.texts and first.get_aspect() == 2
