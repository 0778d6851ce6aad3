"""How is everything drawn? Images with outlines of classes, curves, and the figures of a report.

Every function takes arrays and words, or scores, and gives a figure, of which `png` makes a file's content.
Nothing is scored or predicted here.
"""

import io
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.mathtext import MathTextParser
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from support.raw.images import IGNORED
from support.results.scores import DICE, HD95, RunScores, deviation, improved

Image = Float[np.ndarray, "*spatial"]
Label = Integer[np.ndarray, "*spatial"]
# The colours of classes: Okabe and Ito's, which colour-blind readers can tell apart; their yellow is faint on
# white and grey.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]
GREEN, BLUE, VERMILION = COLOURS[2:5]
MATHEMATICS = MathTextParser("path")
# For pictures whose pixels are classes: black background, then all seven colours over and over.
_FILLED = [*COLOURS[:3], "#F0E442", *COLOURS[3:]] * 37
PALETTE = ([0] * 3 + [int(c[i : i + 2], 16) for c in _FILLED for i in (1, 3, 5)])[:768]
# Every strategy has one colour and one marker in all figures: Paul Tol's, "bright".
STRATEGY_STYLES = {
    "no_diff": ("black", "."), "diff": ("#4477AA", "o"), "sc_xt": ("#66CCEE", "s"),
    "sc_xt1": ("#228833", "D"), "rec_xt1": ("#CCBB44", "^"), "rec_xT": ("#EE6677", "v"),
}  # fmt: skip
OTHER_STYLE = ("#AA3377", "P")  # of strategies that a reader adds
FEW = 10  # with fewer cases, a figure shows each of them


class Panel(NamedTuple):
    """A picture, or one slice [x, y, 1] of a volume, with the outlines of a label's classes. `spacing` is
    that of the image."""

    image: Image
    label: Label
    spacing: Sequence[float]
    head: str = ""
    caption: str = ""


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG. Dollar signs that enclose no mathematics, as in the name of a file, stay as they
    are."""
    for text in figure.findobj(Text):
        try:
            MATHEMATICS.parse(text.get_text())
        except ValueError:
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


# --- Images -------------------------------------------------------------------------------------


def upright(values: Shaped[np.ndarray, "*spatial"]) -> Shaped[np.ndarray, "height width"]:
    """A slice of a volume with the patient's front up and right side on the right; a picture as it is."""
    return np.rot90(values[..., 0]) if values.ndim == 3 else values


def outline(c: int) -> list[dict]:
    """The two lines of class c: one in its colour, on a wider one that sets it off from any grey. After six
    classes the colours are dashed, after twelve they are dashed on white."""
    wide, line = (("black", "solid"), ("black", "dashed"), ("white", "dashed"))[(c - 1) // len(COLOURS) % 3]
    line = {"linestyles": ["solid" if line == "solid" else (0, (2, 1.5))]}
    colour = COLOURS[(c - 1) % len(COLOURS)]
    return [{"colors": wide, "linewidths": 1.5}, {"colors": colour, "linewidths": 0.8, **line}]


def show_slice(axes, image: Image, label: Label, spacing: Sequence[float] = (1.0, 1.0)) -> None:
    """An image in grey, with the outline of every class of `label`; a slice of a volume also has the letters
    of the patient's left and right, front (A) and back (P)."""
    aspect = spacing[1] / spacing[0] if image.ndim == 3 else spacing[0] / spacing[1]
    shown, label = upright(image), upright(label)
    low, high = np.percentile(shown, [1, 99])
    grey = {"cmap": "gray", "interpolation": "nearest", "vmin": low, "vmax": max(high, low + 1e-6)}
    axes.imshow(shown, aspect=aspect, **grey)
    for c in range(1, int(label.max(initial=0, where=label != IGNORED)) + 1):
        if min(label.shape) > 1 and (label == c).any():
            for line in outline(c):
                axes.contour(label == c, levels=[0.5], **line)
    if image.ndim == 3:
        for letter, x, y in (("L", 0.03, 0.5), ("R", 0.97, 0.5), ("A", 0.5, 0.96), ("P", 0.5, 0.04)):
            edge = [withStroke(linewidth=1.2, foreground="black")]
            how = {"ha": "center", "va": "center", "fontsize": 6, "color": "white", "path_effects": edge}
            axes.text(x, y, letter, transform=axes.transAxes, **how)
    axes.set(xticks=[], yticks=[])


def class_legend(figure: Figure, names: Sequence[str], columns: int = 4) -> None:
    """Names the colours of the foreground classes under a figure."""
    lines = [tuple(LineCollection([], **line) for line in outline(c)) for c in range(1, len(names))]
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 3, "edgecolor": "none"}
    figure.legend(lines, names[1:], fontsize=8, facecolor="0.7", **place)


def panels(
    rows: Sequence[Sequence[Panel]], names: Sequence[str], *, beside: Sequence[str] = (), title: str = ""
) -> Figure:
    """Rows of panels, with words beside the rows, and a legend of the classes, whose names are `names`."""
    columns, first = max(map(len, rows)), rows[0][0]
    height, width = upright(first.image).shape
    high = np.clip(2 * height / width, 1, 2) + 0.4
    wide = np.clip(2 * width / height, 1.2, 2)
    below = 0.2 * -(-(len(names) - 1) // columns)  # for the legend
    figure = Figure(figsize=(wide * columns + 0.4, high * len(rows) + 0.4 + below), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line[len(row) :]:
            axes.axis("off")
        for axes, panel in zip(line, row, strict=False):
            show_slice(axes, panel.image, panel.label, panel.spacing)
            axes.set_title(panel.head, fontsize=8)
            axes.set_xlabel(panel.caption, fontsize=8)
    for line, words in zip(grid, beside, strict=False):
        line[0].set_ylabel(words, fontsize=8)
    class_legend(figure, names, columns)
    figure.suptitle(title, fontsize=9)
    return figure


def over_steps(
    image: Image, label: Label, spacing: Sequence[float], predictions: Integer[np.ndarray, "K *spatial"],
    captions: Sequence[str],
) -> list[Panel]:  # fmt: skip
    """A row of panels: a case's image, its truth, and its prediction at every sampling step."""
    K = len(predictions)
    heads = [f"step {k}" for k in range(1, K + 1)] if K > 1 else ["prediction"]
    shown = zip(predictions, heads, captions, strict=True)
    first = (np.zeros_like(label), "image", ""), (label, "truth", "")
    return [Panel(image, classes, spacing, head, words) for classes, head, words in (*first, *shown)]


def montage(shown: Sequence[Panel], class_names: Sequence[str]) -> Figure:
    """Cases with their labels' outlines, four in a row."""
    return panels([shown[i : i + 4] for i in range(0, len(shown), 4)], class_names)


def overlay(panel: Panel, variance: Image | None = None, *, names: Sequence[str], title: str) -> Figure:
    """An image with the outlines of the predicted classes; beside it the variance over seeds, if there is
    one."""
    columns = 1 + (variance is not None)
    figure = Figure(figsize=(4.6 * columns, 4.8), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    show_slice(grid[0], panel.image, panel.label, panel.spacing)
    if variance is not None:
        shown = grid[1].imshow(upright(variance), aspect=grid[0].get_aspect(), cmap="viridis", vmin=0)
        figure.colorbar(shown, ax=grid[1], label="variance over seeds", shrink=0.8)
        grid[1].set(xticks=[], yticks=[])
    class_legend(figure, names)
    figure.suptitle(title, fontsize=8)
    return figure


def training_curve(lines: Sequence[dict], title: str, loss: str) -> Figure:
    """Training loss (in words, `loss`), and validation Dice at every sampling step, over the training steps
    of a log."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [line for line in lines if "loss" in line]
    losses = np.array([line["loss"] for line in trained], float)  # null becomes NaN, a gap
    few = {"marker": "o", "markersize": 4} if len(trained) < 20 else {}
    left.plot([line["step"] for line in trained], losses, color=BLUE, **few)
    if np.nanmax(losses, initial=0) > 10 * np.nanmin(losses, initial=np.inf) > 0:
        left.set_yscale("log")
    left.set_ylabel(f"loss: {loss}")
    checked = [line for line in lines if line.get("validation_dice")]
    steps = [line["step"] for line in checked]
    # Not strict: a log may hold validations with different numbers of sampling steps.
    columns = list(zip(*(line["validation_dice"] for line in checked), strict=False))
    for k, dices in enumerate(columns):
        # Sampling steps have an order, and so have their colours.
        how = {"color": colormaps["viridis"](0.9 * (1 - k / len(columns))), "marker": "o", "markersize": 4}
        right.plot(steps, [100 * d for d in dices], label=f"sampling step {k + 1}", **how)
    right.set_ylabel("validation Dice (%)")
    if columns:
        right.legend(fontsize=7)
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=9)
    return figure


# --- Figures of a report ------------------------------------------------------------------------


def style(strategy: str) -> dict:
    """Colour and marker of a strategy, told apart without colour, too."""
    return dict(zip(("color", "marker"), STRATEGY_STYLES.get(strategy, OTHER_STYLE), strict=True))


def beside(count: int, width: float) -> Float[np.ndarray, "count"]:
    """Places around 0 for what would lie on top of each other; always the same ones."""
    return width * (np.arange(count) - (count - 1) / 2) / max(count, 2)


def curves(family: Sequence[RunScores]) -> Figure:
    """Figures 3 and 10: mean Dice and distance at every sampling step, with the mean's standard error over
    the cases; of fewer than ten cases, each. Without diffusion there is one step, which is drawn as a line
    from side to side."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    grid = figure.subplots(1, 2)
    ticks = range(1, max(scores.dice.shape[2] for scores in family) + 1)
    labels = "Dice (%)", f"HD95 ({family[0].unit})"
    seen = [scores.config["strategy"] for scores in family]
    for axes, measure, label in zip(grid, (DICE, HD95), labels, strict=True):
        for index, (scores, aside) in enumerate(zip(family, beside(len(family), 0.3), strict=True)):
            cases = scores.cases(measure)
            mean, count = np.nanmean(cases, axis=0), np.isfinite(cases).sum(axis=0)
            # Variants of one strategy share its colour.
            line = ("-", "--", "-.", ":")[seen[:index].count(seen[index]) % 4]
            if len(mean) == 1:
                axes.axhline(mean[0], color="black", linestyle="--", linewidth=1, label=scores.name)
                continue
            steps, how = np.arange(1, len(mean) + 1) + aside, style(seen[index])
            axes.plot(steps, mean, label=scores.name, markersize=5, linestyle=line, **how)
            if len(cases) < FEW:
                axes.plot(steps, cases.T, ".", color=how["color"], markersize=4, alpha=0.5)
            else:
                error = deviation(cases) / np.sqrt(count)
                axes.errorbar(steps, mean, error, fmt="none", color=how["color"], elinewidth=1, capsize=2)
        axes.set(xlabel="sampling step", ylabel=label, xticks=ticks)
    what = "points: cases" if len(family[0].uids) < FEW else "bars: standard error over the cases"
    grid[0].set_title(what, fontsize=8, loc="left")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def boxes(family: Sequence[RunScores]) -> Figure:
    """Figures 8 and 9: per method the last step's score minus the first's of each case, as a box, or of fewer
    than ten cases as points, and in how many percent of the cases it is better."""
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(family)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    units = "percentage points", family[0].unit
    for axes, measure, unit in zip(grid, (DICE, HD95), units, strict=True):
        for place, scores in enumerate(family, 1):
            steps = scores.cases(measure)
            difference = (steps[:, -1] - steps[:, 0])[np.isfinite(steps).all(axis=1)]
            how = style(scores.config["strategy"])
            if len(difference) < FEW:
                axes.plot(difference, place + beside(len(difference), 0.5), **how, linestyle="", markersize=5)
            else:
                axes.boxplot(
                    [difference], positions=[place], orientation="horizontal", patch_artist=True, widths=0.6,
                    boxprops={"facecolor": how["color"]}, medianprops={"color": "black"},
                    flierprops={"markersize": 3},
                )  # fmt: skip
            share = f"{improved(measure.better * difference):.0f} % better"
            axes.annotate(share, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
        side = "right" if measure.better > 0 else "left"
        axes.set_xlabel(f"{measure.name}, last step - first ({unit}); better to the {side}")
    grid[0].set_yticks(range(1, len(family) + 1), [scores.name for scores in family])
    grid[0].set_ylim(len(family) + 0.5, 0.5)
    return figure


def bland_altman(first: RunScores, others: Sequence[RunScores]) -> Figure:
    """Figure 5: how the last step's scores of the others differ from those of the first, per case, over the
    mean of both, with the mean difference (line) and 1.96 standard deviations around it (dashed)."""
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    grid, unit = figure.subplots(2, len(others)), first.unit
    for row, measure, units in zip(grid, (DICE, HD95), (("%", "points"), (unit, unit)), strict=True):
        for axes, other in zip(row, others, strict=True):
            a, b = other.last(measure), first.last(measure)
            difference, share = a - b, improved(measure.better * (a - b))
            mean, reach = np.nanmean(difference), 1.96 * deviation(difference)
            axes.plot((a + b) / 2, difference, "o", color=BLUE, markersize=4, alpha=0.7)
            axes.axhline(mean, color=GREEN)
            for end in (mean - reach, mean + reach):
                axes.axhline(end, color=VERMILION, linestyle="--")
            lines = f"mean {mean:.2f} (line), ± 1.96 SD {mean - reach:.2f} to {mean + reach:.2f} (dashed)"
            axes.set_title(f"{other.name} - {first.name}: {share:.0f} % better\n{lines}", fontsize=9)
            axes.set_xlabel(f"{measure.name}, mean of both ({units[0]})")
            axes.set_ylabel(f"{measure.name}, difference ({units[1]})")
    return figure


def faces(mask: Bool[np.ndarray, "x y z"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The squares between a mask's voxels and its outside: which voxel, the 4 corners (in voxels, a voxel
    reaching from its index to the next), and the normal."""
    padded, voxels, corners, normals = np.pad(mask, 1), [], [], []
    for axis, side in product(range(3), (0, 1)):
        outside = ~np.roll(padded, 1 - 2 * side, axis)[1:-1, 1:-1, 1:-1]
        found = np.argwhere(mask & outside)
        square = np.zeros((4, 3))
        square[:, axis] = side
        square[:, [i for i in range(3) if i != axis]] = [(0, 0), (0, 1), (1, 1), (1, 0)]
        voxels.append(found)
        corners.append(found[:, None] + square)
        normals.append(np.tile(np.eye(3)[axis] * (2 * side - 1), (len(found), 1)))
    return np.concatenate(voxels), np.concatenate(corners), np.concatenate(normals)


def surface_errors(
    image: Image, surface: Sequence[np.ndarray], errors: Sequence[Float[np.ndarray, "n"]],
    titles: Sequence[str], spacing: Sequence[float], unit: str,
) -> Figure:  # fmt: skip
    """Figures 6 and 11: the true surface, coloured by how far the predicted one is, a panel per prediction.
    What is predicted far from the truth does not show.
    `surface` is what `faces` gives, or in 2D the places alone; `errors` holds a distance per place, infinite
    if the class is missed, which has a colour of its own."""
    volume = image.ndim == 3
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    grid = figure.subplots(1, len(titles), subplot_kw={"projection": "3d"} if volume else {})
    # The few farthest places would leave one colour to all others.
    top = [np.percentile(error[np.isfinite(error)], 99) for error in errors if np.isfinite(error).any()]
    limits = {"vmin": 0, "vmax": float(max([*top, min(spacing)]))}
    for axes, title, error in zip(grid, titles, errors, strict=True):
        if volume:
            draw_surface(axes, surface[1] * np.array(spacing), surface[2], error / limits["vmax"])
        else:
            show_slice(axes, image, np.zeros(image.shape, int), spacing)
            colours = error_colours(error / limits["vmax"])
            axes.scatter(surface[0][:, 1], surface[0][:, 0], c=colours, s=14)
        axes.set_title(title, fontsize=9)
    colours = ScalarMappable(Normalize(**limits), "viridis")
    figure.colorbar(colours, ax=list(grid), label=f"from the truth to the prediction ({unit})", shrink=0.7)
    if any(np.isinf(error).any() for error in errors):
        missed = Line2D(
            [], [], marker="s", linestyle="", color=VERMILION, label="missed: the class is not predicted"
        )
        figure.legend(handles=[missed], loc="outside lower center", fontsize=8, frameon=False)
    return figure


def error_colours(errors: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n 4"]:
    """Errors from 0 to 1 in viridis, and infinite ones in a colour that is not in it."""
    return colormaps["viridis"].with_extremes(bad=VERMILION)(np.ma.masked_invalid(errors))


def draw_surface(axes, corners: np.ndarray, normals: np.ndarray, errors: np.ndarray) -> None:
    """Squares in 3D, in the colour of their error, darker where they turn away from the light."""
    colour = error_colours(errors)
    light = np.array([-0.5, -0.6, 0.62])
    colour[:, :3] *= (0.85 + 0.15 * normals @ light)[:, None]
    axes.add_collection3d(Poly3DCollection(corners, facecolors=colour, edgecolors="none"))
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    # Looked at from the side, slightly from above and from one end.
    axes.view_init(elev=30, azim=-70 if high[0] - low[0] > high[1] - low[1] else -30)
    axes.set_box_aspect(high - low, zoom=1.1)
    axes.set_axis_off()


def information(
    beta: np.ndarray, alpha_bar: np.ndarray, times: np.ndarray, told: np.ndarray, limit: Sequence[float]
) -> Figure:
    """Figure 7: beta_t and sqrt(alpha_bar_t) for t = 1, 2, ...; at `times` [time, 2] cross entropy and Dice
    of x_t, with the limit of noise alone (dashed)."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    grid = figure.subplots(2, 2).ravel()
    steps = range(1, len(beta) + 1)
    grid[0].plot(steps, beta, color=BLUE)
    grid[1].plot(steps, np.sqrt(alpha_bar), color=BLUE)
    for axes, values, end in zip(grid[2:], told.T, limit, strict=True):
        axes.plot(times, values, color=BLUE, label="$x_t$ and $x_0$")
        axes.axhline(end, color=VERMILION, linestyle="--", label="noise alone and $x_0$")
        axes.legend(fontsize=8)
    what = (r"$\beta_t$", r"$\sqrt{\bar\alpha_t}$", "cross entropy (nats per voxel)", "Dice (%)")
    for axes, label in zip(grid, what, strict=True):
        axes.set(xlabel="timestep t", ylabel=label, xticks=range(1, len(beta) + 1, 200))
    return figure
