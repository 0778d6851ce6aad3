"""How is everything drawn? Images with outlines of classes, curves, and the figures of a report.

Every function takes arrays and words, or scores, and gives a figure, of which `png` makes a file's content.
Nothing is scored or predicted here.
"""

import io
from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from support.raw.images import IGNORED
from support.results.scores import DICE, HD95, RunScores, deviation, improved

Image = Float[np.ndarray, "*spatial"]
Label = Integer[np.ndarray, "*spatial"]
# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow is faint on white and grey.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]
GREEN, BLUE, VERMILION = COLOURS[2:5]
MARKERS = "osD^vP*Xd<>"
# For pictures whose pixels are classes: black background, then all seven colours over and over.
_FILLED = [*COLOURS[:3], "#F0E442", *COLOURS[3:]] * 37
PALETTE = ([0] * 3 + [int(c[i : i + 2], 16) for c in _FILLED for i in (1, 3, 5)])[:768]


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


# --- Images -------------------------------------------------------------------------------------


def fullest_slice(label: Label) -> int | None:
    """The place along a volume's last axis that has the most foreground; None for a picture."""
    return int((label > 0).sum(axis=(0, 1)).argmax()) if label.ndim == 3 else None


def slice_at(values: Shaped[np.ndarray, "*spatial"], z: int | None) -> Shaped[np.ndarray, "height width"]:
    """The z-th axial slice of a volume with the patient's front up; a picture as it is."""
    return values if z is None else np.rot90(values[..., z])


def outline(c: int) -> list[dict]:
    """The two lines of class c: one in its colour, on a wider one that sets it off from any grey. After six
    classes the colours are dashed, after twelve they are dashed on white."""
    wide, line = (("black", "solid"), ("black", "dashed"), ("white", "dashed"))[(c - 1) // len(COLOURS) % 3]
    line = {"linestyles": ["solid" if line == "solid" else (0, (2, 1.5))]}
    colour = COLOURS[(c - 1) % len(COLOURS)]
    return [{"colors": wide, "linewidths": 2.1}, {"colors": colour, "linewidths": 1.2, **line}]


def show_slice(axes, image: Image, label: Label, z: int | None = None) -> None:
    """An image in grey, with the outline of every class of `label`; of a volume the z-th slice."""
    image, label = slice_at(image, z), slice_at(label, z)
    low, high = np.percentile(image, [1, 99])
    axes.imshow(image, cmap="gray", interpolation="nearest", vmin=low, vmax=max(high, low + 1e-6))
    for c in range(1, int(label.max(initial=0, where=label != IGNORED)) + 1):
        if (label == c).any():
            for line in outline(c):
                axes.contour(label == c, levels=[0.5], **line)
    axes.set_xticks([])
    axes.set_yticks([])


def class_legend(figure: Figure, names: Sequence[str], size: int, columns: int = 4) -> None:
    """Names the colours of the foreground classes under a figure."""
    lines = [tuple(LineCollection([], **line) for line in outline(c)) for c in range(1, len(names))]
    where = {"loc": "outside lower center", "ncols": columns, "handlelength": 3, "edgecolor": "none"}
    figure.legend(lines, names[1:], fontsize=size, facecolor="0.7", **where)


def cases_over_steps(cases: Sequence[tuple], title: str) -> Figure:
    """A row per case (image, label, predicted classes at each sampling step, their Dice scores): the image,
    the truth, and every prediction; of a volume, the slice that has the most foreground."""
    K = len(cases[0][2])
    figure = Figure(figsize=(1.7 * (K + 2), 1.9 * len(cases) + 0.5), layout="constrained")
    grid = figure.subplots(len(cases), K + 2, squeeze=False)
    for row, (image, label, predictions, dices) in zip(grid, cases, strict=True):
        z = fullest_slice(label)
        for axes, panel in zip(row, [np.zeros_like(label), label, *predictions], strict=True):
            show_slice(axes, image, panel, z)
        for axes, value in zip(row[2:], dices, strict=True):
            axes.set_xlabel(f"Dice {100 * value:.1f}", fontsize=8)
    steps = [f"step {k}" for k in range(1, K + 1)] if K > 1 else ["prediction"]
    for axes, head in zip(grid[0], ["image", "truth", *steps], strict=True):
        axes.set_title(head, fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure


def montage(shown: Sequence[tuple], class_names: Sequence[str]) -> Figure:
    """Cases (title, image, label), four in a row, with their labels' outlines."""
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(8.8, 2.4 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, (title, image, label) in zip(grid, shown, strict=False):
        show_slice(axes, image, label, fullest_slice(label))
        axes.set_title(title[:32], fontsize=7)
    class_legend(figure, class_names, 7)
    return figure


def overlay(image: Image, mask: Label, variance: Image | None, names: Sequence[str], title: str) -> Figure:
    """A prepared image with the outlines of the predicted classes, of a volume the slice that has most of
    them; beside it the variance over seeds, where there is one."""
    columns = 1 + (variance is not None)
    figure = Figure(figsize=(4.6 * columns, 4.8), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    z = fullest_slice(mask) if mask.any() or mask.ndim == 2 else mask.shape[2] // 2
    show_slice(grid[0], image, mask, z)
    if variance is not None:
        shown = grid[1].imshow(slice_at(variance, z), cmap="viridis", vmin=0)
        figure.colorbar(shown, ax=grid[1], label="variance over seeds", shrink=0.8)
        grid[1].set(xticks=[], yticks=[])
    class_legend(figure, names, 8)
    figure.suptitle(title, fontsize=8)
    return figure


def training_curve(lines: Sequence[dict], title: str) -> Figure:
    """Training loss, and validation Dice at every sampling step, over the training steps of a log."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [line for line in lines if "loss" in line]
    losses = np.array([line["loss"] for line in trained], float)  # null becomes NaN, a gap
    left.plot([line["step"] for line in trained], losses, color=BLUE)
    left.set(xlabel="training step", ylabel="loss (20 CE + Dice, or MSE of noise)", yscale="log")
    checked = [line for line in lines if line.get("validation_dice")]
    steps = [line["step"] for line in checked]
    # Not strict: a log may hold validations with different numbers of sampling steps.
    for k, dices in enumerate(zip(*(line["validation_dice"] for line in checked), strict=False)):
        percent = [100 * d for d in dices]
        right.plot(steps, percent, label=f"sampling step {k + 1}", markersize=3, **style(k))
    right.set(xlabel="training step", ylabel="validation Dice (%)")
    right.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


# --- Figures of a report ------------------------------------------------------------------------


def style(index: int) -> dict:
    """Colour and marker of the index-th line: told apart without colour, too."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def curves(family: Sequence[RunScores]) -> Figure:
    """Figures 3 and 10: mean Dice and distance at every sampling step. Without diffusion there is one step,
    which is drawn as a line from side to side."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    grid = figure.subplots(1, 2)
    ticks = range(1, max(scores.dice.shape[2] for scores in family) + 1)
    labels = "Dice (%)", f"HD95 ({family[0].unit})"
    for axes, measure, label in zip(grid, (DICE, HD95), labels, strict=True):
        for index, scores in enumerate(family):
            mean = np.nanmean(scores.cases(measure), axis=0)
            if len(mean) == 1:
                axes.axhline(mean[0], color="black", linestyle="--", linewidth=1, label=scores.name)
            else:
                axes.plot(range(1, len(mean) + 1), mean, label=scores.name, markersize=5, **style(index))
        axes.set(xlabel="sampling step", ylabel=label, xticks=ticks)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def boxes(family: Sequence[RunScores]) -> Figure:
    """Figures 8 and 9: a box per method of the last step's score minus the first's, per case, and in how many
    percent of the cases it is better (a higher Dice, a smaller distance)."""
    names = [scores.name for scores in family]
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(family)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    units = "percentage points", family[0].unit
    for axes, measure, unit in zip(grid, (DICE, HD95), units, strict=True):
        steps = [scores.cases(measure) for scores in family]
        differences = [step[:, -1] - step[:, 0] for step in steps]
        drawn = axes.boxplot(
            [d[np.isfinite(d)] for d in differences], orientation="horizontal", tick_labels=names,
            patch_artist=True, medianprops={"color": "black"}, flierprops={"markersize": 3}, widths=0.6,
        )  # fmt: skip
        for i, (box, difference) in enumerate(zip(drawn["boxes"], differences, strict=True)):
            box.set_facecolor(style(i)["color"])
            share = f"{improved(measure.better * difference):.0f} % better"
            axes.annotate(share, (1.01, i + 1), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"{measure.name}, last step - first ({unit})")
    grid[0].invert_yaxis()
    return figure


def example(
    image: Image, label: Label, rows: Sequence[tuple], without: Sequence[tuple], names: Sequence[str]
) -> Figure:
    """Figure 4: image, truth and the prediction without diffusion (if there is one), then a row per strategy.
    `rows` and `without` hold a name and predictions, each of which is its classes and its caption. `names`
    are those of the classes."""
    z = fullest_slice(label)
    height, width = slice_at(label, z).shape
    steps = [
        (name, [(classes, f"step {k}", caption) for k, (classes, caption) in enumerate(predictions, 1)])
        for name, predictions in rows
    ]
    top = [(np.zeros_like(label), "image", ""), (label, "truth", "")]
    top += [(classes, name, caption) for name, [*_, (classes, caption)] in without]
    columns, lines = max(3, *(len(panels) for _, panels in steps)), [("", top), *steps]
    wide, high = np.clip(2 * width / height, 1.2, 2), np.clip(2 * height / width, 1, 2) + 0.55
    below = 0.2 * -(-(len(names) - 1) // columns) if len(names) > 2 else 0  # for the legend
    figure = Figure(figsize=(wide * columns + 0.4, high * len(lines) + 0.4 + below), layout="constrained")
    grid = figure.subplots(len(lines), columns)
    for row, (name, panels) in zip(grid, lines, strict=True):
        for axes in row:
            axes.axis("off")
        for axes, (classes, head, caption) in zip(row, panels, strict=False):
            axes.axis("on")
            show_slice(axes, image, classes, z)
            axes.set_title(head, fontsize=8)
            axes.set_xlabel(caption, fontsize=8)
        row[0].set_ylabel(name, fontsize=9)
    if len(names) > 2:
        class_legend(figure, names, 8, columns)
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
    `surface` is what `faces` gives, or in 2D the places alone; `errors` holds a distance per place, NaN where
    the class is missed, which has a colour of its own."""
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
            show_slice(axes, image, np.zeros(image.shape, int))
            colours = error_colours(error / limits["vmax"])
            axes.scatter(surface[0][:, 1], surface[0][:, 0], c=colours, s=14)
        axes.set_title(title, fontsize=9)
    colours = ScalarMappable(Normalize(**limits), "viridis")
    figure.colorbar(colours, ax=list(grid), label=f"distance to the prediction ({unit})", shrink=0.7)
    if any(np.isnan(error).any() for error in errors):
        missed = Line2D(
            [], [], marker="s", linestyle="", color=VERMILION, label="missed: the class is not predicted"
        )
        figure.legend(handles=[missed], loc="outside lower center", fontsize=8, frameon=False)
    return figure


def error_colours(errors: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n 4"]:
    """Errors from 0 to 1 in viridis, and NaN in a colour that is not in it."""
    return colormaps["viridis"].with_extremes(bad=VERMILION)(np.ma.masked_invalid(np.clip(errors, 0, 1)))


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
