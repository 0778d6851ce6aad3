"""How does a raw download, or a folder of one's own images, become a checked HDF5 file?
Section 5.2 of Fu et al. (2023).

    python prepare.py download hippocampus_mr                       # into raw/hippocampus_mr
    python prepare.py build hippocampus_mr --raw raw/hippocampus_mr # into data/hippocampus_mr.h5
    python prepare.py build folder:mine --raw my_folder             # images/ and labels/ in it
    python prepare.py show folder:mine                              # a table and a picture

What is particular to a data set is in recipes/, and data.py describes the file. A build that was interrupted
continues where it stopped when the same command is run again.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from data import SPLITS, Dataset, Sample, check_sample, open_dataset
from recipes import RECIPES, folder
from support.dataset_file import DatasetWriter
from support.download import download
from support.files import InputError, program, replace_file
from support.images import Volume, times
from support.phantoms import PHANTOMS
from support.pictures import montage, png
from support.recipe import Plan
from support.workers import each_case

# --- prepare.py build ---------------------------------------------------------------------------


def build(args: argparse.Namespace) -> None:
    """`prepare.py build`. Raises InputError."""
    kind, _, name = args.name.partition(":")
    if not args.raw.is_dir():
        raise InputError(f"{args.raw}: no such folder; give the unpacked download as --raw")
    if kind == "folder":
        name = name or args.raw.resolve().name
        if name in RECIPES or name in PHANTOMS or not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"folder:{name}: choose another NAME, of letters, digits, . _ - and not taken")
        plan = folder.plan(args.raw, args)
    else:
        name, plan = kind, RECIPES[kind].plan(args.raw)
    if twice := [uid for uid, n in Counter(case.uid for case in plan.cases).items() if n > 1]:
        raise InputError(f"{args.raw}: {twice[0]} occurs twice; a name must be of one case")

    path = args.data_dir / f"{name}.h5"
    with DatasetWriter(
        path, name=name, class_names=plan.class_names, source=plan.source, preprocessing=plan.preprocessing,
        unit=plan.unit, settings=plan.settings, origin=str(args.raw.resolve()),
    ) as writer:  # fmt: skip
        bad = fill(writer, plan, args)
        counts = tuple(sum(where == split for where, _ in writer.done) for split in SPLITS)
        if not writer.done:
            raise InputError(f"{args.raw}: no case can be used; the first: {(bad or ['none found'])[0]}")
    report = path.with_name(f"{name}-skipped.txt")
    report.unlink(missing_ok=True)
    if bad:
        replace_file(report, "".join(f"{line}\n" for line in bad).encode(errors="backslashreplace"))
        print(f"{len(bad)} of {len(plan.cases)} cases skipped: {report}", file=sys.stderr)
    print(f"{path}: " + ", ".join(f"{n} {split}" for n, split in zip(counts, SPLITS, strict=True)))
    if plan.counts and plan.counts != counts:
        print(f"NB: the whole data set has {', '.join(map(str, plan.counts))}", file=sys.stderr)
    if not all(counts):
        print("NB: training needs all three splits; add cases, or change --split", file=sys.stderr)
    full = f"folder:{name}" if kind == "folder" else name
    print(f"next: python prepare.py show {full}; python train.py --dataset {full}")


def fill(writer: DatasetWriter, plan: Plan, args: argparse.Namespace) -> list[str]:
    """Writes the cases that are not there yet, and says what is wrong with those that cannot be written.
    Raises InputError at the first of them, unless --skip-bad."""
    bad: list[str] = []
    for key in writer.done - {(case.split, case.uid) for case in plan.cases}:
        writer.remove(*key)
    todo = [case for case in plan.cases if (case.split, case.uid) not in writer.done]
    if writer.done:
        print(f"going on: {len(writer.done)} of {len(plan.cases)} cases are there", file=sys.stderr)
    for case, result in each_case(plan.read, todo, args.workers, writer.path.stem):
        if isinstance(result, Volume) and not args.allow_empty and not result.label.any():
            result = InputError(f"{case.label}: no foreground in it; take the pair out, or --allow-empty")
        if isinstance(result, Volume):
            sample = Sample(result.image, result.label, result.spacing(), case.uid, result.affine)
            check_sample(sample, str(case.images[0]), len(plan.class_names), result.image.shape[-1])
            writer.add(case.split, **sample._asdict())
        elif args.skip_bad:
            bad.append(str(result))
        else:
            raise result
    return bad


# --- prepare.py show ----------------------------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    """`prepare.py show`: a table and `<data_dir>/<name>.png`. Reads a sample at a time."""
    dataset = open_dataset(args.name, args.data_dir, ())
    print(f"{dataset.name}: {dataset.source}; {dataset.image_channels} channels, {dataset.unit}\n")
    print(
        f"{'split':12}{'cases':>6}  {'size: smallest':20}{'median':20}{'largest':20}"
        f"{'spacing, median':18}intensity percentiles 1, 50, 99"
    )
    voxels, shown = {}, []
    for split in SPLITS:
        row, voxels[split], pictures = survey_split(dataset, split)
        print(row)
        shown += pictures
    print(f"\n{'class':28}{'share of voxels':>16}{'voxels, median':>16}  cases without it, per split")
    every = np.vstack(list(voxels.values()))
    for c, title in enumerate(dataset.class_names):
        without = ", ".join(str(int((voxels[split][:, c] == 0).sum())) for split in SPLITS)
        share = 100 * every[:, c].sum() / every.sum()
        print(f"{title:28}{share:14.3f} %{np.median(every[:, c]):16.0f}  {without}")
    path = args.data_dir / f"{dataset.name}.png"
    replace_file(path, png(montage(shown, dataset.class_names), dpi=120))
    print(f"\npicture: {path}")


def survey_split(dataset: Dataset, split: str) -> tuple[str, Int[np.ndarray, "cases classes"], list[tuple]]:
    """A split's row of the table, its voxels per class, and four of its cases as `montage` takes them."""
    count, classes = len(dataset.uids[split]), len(dataset.class_names)
    voxels, shown = np.zeros((count, classes), int), []
    if not count:
        return f"{split:12}{0:6d}", voxels, shown
    shapes, spacings, percentiles = [], [], []
    pictured = set(np.linspace(0, count - 1, min(count, 4)).astype(int))
    for i in tqdm(range(count), desc=split, disable=None, leave=False):
        sample = dataset.load(split, i)
        shapes.append(sample.label.shape)
        spacings.append(sample.spacing)
        percentiles.append(np.percentile(sample.image, [1, 50, 99]))
        voxels[i] = np.bincount(sample.label.ravel(), minlength=classes)
        if i in pictured:
            shown.append((f"{split}: {sample.uid}", sample.image[..., 0], sample.label))
    sizes = (f"{times(f(shapes, axis=0)):20}" for f in (np.min, np.median, np.max))
    levels = ", ".join(f"{level:.2f}" for level in np.median(percentiles, axis=0))
    row = f"{split:12}{count:6d}  {''.join(sizes)}{times(np.median(spacings, axis=0)):18}{levels}"
    return row, voxels, shown


# --- The program --------------------------------------------------------------------------------


def get(args: argparse.Namespace) -> None:
    """`prepare.py download`. Raises InputError."""
    target = download(args.name, RECIPES[args.name].download, args.raw_dir)
    print(f"next: python prepare.py build {args.name} --raw {target}")


def spacing_option(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < v < np.inf for v in values):
        raise ValueError
    return values


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="raw folder to HDF5")
    command.add_argument("name", help=f"{', '.join(RECIPES)}, or folder:NAME for one's own")
    command.add_argument("--raw", type=Path, required=True, help="the unpacked download, or one's own folder")
    command.add_argument("--data-dir", type=Path, default=Path("data"))
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    command.add_argument("--skip-bad", action="store_true", help="list bad cases in a file, and go on")
    command.add_argument("--allow-empty", action="store_true", help="labels without foreground are right")
    own = command.add_argument_group("for a folder of one's own")
    own.add_argument("--classes", default="", help="names, background first: background,nerve,vessel")
    own.add_argument("--split", default="0.7,0.1,0.2", help="three shares, or a file of lines: name split")
    own.add_argument("--group", default="", help="regular expression; what it finds stays in one split")
    own.add_argument("--spacing", type=spacing_option, help="to resample to: 2,2 (pixels), 1,1,3 (mm)")
    command.set_defaults(run=build)
    command = commands.add_parser("show", help="a table and a picture of a prepared data set")
    command.add_argument("name")
    command.add_argument("--data-dir", type=Path, default=Path("data"))
    command.set_defaults(run=show)
    command = commands.add_parser("download", help="get and unpack an open data set")
    command.add_argument("name", choices=list(RECIPES))
    command.add_argument("--raw-dir", type=Path, default=Path("raw"))
    command.set_defaults(run=get)
    args = parser.parse_args(argv)
    if args.run is build:
        kind = args.name.partition(":")[0]
        if kind != "folder" and args.name not in RECIPES:
            parser.error(f"{args.name} is none of {', '.join(RECIPES)}, folder:NAME")
        own_options = [f"--{name}" for name in ("classes", "split", "group", "spacing")
                       if getattr(args, name) != own.get_default(name)]  # fmt: skip
        if kind != "folder" and own_options:
            parser.error(f"{own_options[0]} is for folder:NAME; {args.name} has its own")
        if args.workers < 1:
            parser.error("--workers must be at least 1")
    with program():
        args.run(args)


if __name__ == "__main__":
    main()
