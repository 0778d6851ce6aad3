"""How do time and memory of a training step grow with its size? One size at a time, on made-up arrays:

    python experiments/growth.py --dataset amos_ct --patch-shape 32,32,32 --channels 8,16,32,64 -o growth.png

takes every option of train.py, of a data set of the paper. Batch, patch volume, channels and classes are
doubled and halved around what is asked for. Prints for each the median time, the work (XLA's count before
optimisation) and the memory for intermediate values, with the exponents of power laws fitted to them (1: in
proportion to the size), and writes them as a plot.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench
import numpy as np
from matplotlib.figure import Figure

import train
from data import InputError, replace_file
from evaluate import keep_memory, provenance

FACTORS = (0.5, 1, 2, 4)
MEASURES = ("ms", "GFLOP", "MiB")


def sizes(config: train.Config) -> dict[str, list[tuple[float, train.Config, int]]]:
    """What is varied: number of it, configuration, classes."""
    _, _, classes = bench.case_shapes(config)
    base = config.patch_shape
    # The volume doubles by one axis after the other.
    shapes = [
        (base[0] // 2, *base[1:]),
        base,
        (*base[:-1], 2 * base[-1]),
        (2 * base[0], *base[1:-1], 2 * base[-1]),
    ]
    return {
        "batch": [(n, replace(config, batch_size=n), classes) for n in (1, 2, 4, 8)],
        "voxels of the patch": [(float(np.prod(s)), replace(config, patch_shape=s), classes) for s in shapes],
        "channels of the first level": [
            (c[0], replace(config, channels=c), classes)
            for c in (tuple(int(f * c) for c in config.channels) for f in FACTORS)
        ],
        "classes": [(n, config, n) for n in (2, 4, 8, 16)],
    }  # fmt: skip


def measured(config: train.Config, classes: int, repeats: int) -> tuple[float, float, float]:
    """MEASURES of one training step."""
    canvas, image_channels, _ = bench.PAPER[config.dataset]
    shape = tuple(map(max, canvas, config.patch_shape))
    with mock.patch.dict(bench.PAPER, {config.dataset: (shape, image_channels, classes)}):
        program = bench.training(config)
    times = [program.run() for _ in range(repeats)]
    return 1e3 * float(np.median(times)), program.flops / 1e9, program.temporaries / 2**20


def exponents(points: np.ndarray) -> Iterator[float]:
    """Slopes of straight lines through the logarithms: columns after the first against the first."""
    size, *columns = np.log(points).T
    for column in columns:
        yield np.polyfit(size, column, 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="of every step")
    parser.add_argument("-o", "--output", default="growth.png", help="the plot")
    args, more = parser.parse_known_args()
    keep_memory()
    config, _ = train.parse_config(more)
    if config.dataset not in bench.PAPER:
        raise InputError(f"--dataset {config.dataset}: give one of {', '.join(bench.PAPER)}")
    hardware = provenance()["devices"]
    title = f"{config.dataset}, {config.strategy}, patch {config.patch_shape}, batch {config.batch_size}, "
    print(f"{title}channels {config.channels}, {config.dtype}, {hardware}, medians of {args.repeats}")
    figure = Figure((10, 3.5), layout="constrained")
    panels = dict(zip(("ms", "MiB"), figure.subplots(1, 2), strict=True))
    for name, varied in sizes(config).items():
        print(f"\n{name:>28}{'ms':>10}{'GFLOP':>10}{'MiB':>10}")
        points = []
        for size, changed, classes in varied:
            points.append((size, *measured(changed, classes, args.repeats)))
            print(f"{size:28.0f}" + "".join(f"{value:10.1f}" for value in points[-1][1:]), flush=True)
        points = np.array(points)
        grown = dict(zip(MEASURES, exponents(points), strict=True))
        print(f"{'exponent':>28}" + "".join(f"{value:10.2f}" for value in grown.values()))
        for what, axes in panels.items():
            column = points[:, 1 + MEASURES.index(what)]
            label = f"{name}: {grown[what]:.2f}"
            axes.loglog(points[:, 0] / points[0, 0], column, "o-", label=label)
    for what, axes in panels.items():
        axes.set(xlabel="size, relative to the smallest", ylabel=f"{what} per step")
        axes.legend(title="exponent", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    replace_file(Path(args.output), buffer.getvalue())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
