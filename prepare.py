"""How does a raw download, or a folder of one's own images, become a checked HDF5 file?
Section 5.2 of Fu et al. (2023).

    python prepare.py download hippocampus_mr                       # into raw/hippocampus_mr
    python prepare.py build hippocampus_mr --raw raw/hippocampus_mr # into data/hippocampus_mr.h5
    python prepare.py build folder:mine --raw my_folder             # as it came from its archive
    python prepare.py show folder:mine                              # a table and a picture

What is particular to a data set is in recipes/, and data.py describes the file. A build that was interrupted
continues where it stopped when the same command is run again.
"""

import argparse
import dataclasses
import hashlib
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from data import SPLITS, Dataset, Sample, open_dataset
from recipes import RECIPES, folder, recipe_of
from support.disk.command_line import Parser, add_options, check_counts
from support.disk.dataset_file import DatasetWriter, check_sample
from support.raw.download import fetch, unpack
from support.disk.files import InputError, program, replace_file
from support.raw.images import IGNORED, counted, cut, fullest_slice, has_foreground, times
from support.raw.phantoms import PHANTOMS
from support.results.pictures import Panel, montage, png
from support.results.scores import as_text
from support.raw.recipe import Case, Plan, read_case
from support.raw.splits import LEAST
from support.raw.workers import each_case

# --- prepare.py build ---------------------------------------------------------------------------


def build(args: argparse.Namespace) -> None:
    """`prepare.py build`. Raises InputError."""
    kind, _, name = args.name.partition(":")
    fields = [field.name for field in dataclasses.fields(folder.FolderOptions)]
    typed = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    options = folder.FolderOptions(**typed)
    if not args.raw.is_dir():
        raise InputError(f"{args.raw}: no such folder; give the unpacked download as --raw")
    if kind == "folder":
        name = name or args.raw.resolve().name
        if name in RECIPES or name in PHANTOMS or not re.fullmatch(r"[\w.-]+", name):
            fix = "choose another NAME, of letters, digits, dots, _ and -, that no built-in data set has"
            raise InputError(f"folder:{name}: {fix}")
        name = f"{name}-fold{options.fold}" if options.folds else name
        plan = folder.plan(args.raw, options, args.workers)
    else:
        for option in typed:
            raise InputError(f"--{option.replace('_', '-')} is for folder:NAME; {kind} has its own")
        name, plan = kind, RECIPES[kind].plan(args.raw)
    if twice := [uid for uid, n in Counter(case.uid for case in plan.cases).items() if n > 1]:
        raise InputError(f"{args.raw}: {twice[0]} occurs twice; give every case a name of its own")

    known = [case.fault for case in plan.cases if case.fault]
    if known and not args.skip_bad:
        raise InputError(known[0])
    path = args.data_dir / f"{name}.h5"
    with DatasetWriter(
        path, name=name, class_names=plan.class_names, source=plan.source, preprocessing=plan.preprocessing,
        unit=plan.unit, settings=plan.settings, origin=str(args.raw.resolve()),
        channel_names=plan.channel_names, numbers=[*plan.numbers], **plan.reading._asdict(),
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
        print(f"NB: the whole data set has {', '.join(map(str, plan.counts))}.", file=sys.stderr)
    if not all(counts):
        print("NB: training needs all three splits; add cases, or change --split.", file=sys.stderr)
    elif counts[1] < LEAST:
        few = counted(counts[1], "validation case")
        print(f"NB: {few} will choose the best model; give more with --split.", file=sys.stderr)
    full = f"folder:{name}" if kind == "folder" else name
    print(f"next: python prepare.py show {full}; python train.py --dataset {full}")


def fill(writer: DatasetWriter, plan: Plan, args: argparse.Namespace) -> list[str]:
    """Writes the cases that are not there yet, and returns what is wrong with those that cannot be written.
    Raises InputError at the first of them, unless --skip-bad."""
    bad: list[str] = []
    origins = {(case.split, case.uid): origin(case, plan) for case in plan.cases}
    for key, made_from in list(writer.done.items()):
        made_from, _, empty = made_from.partition(" ")
        if origins.get(key) != made_from or (empty and not args.allow_empty):
            writer.remove(*key)
    todo = [case for case in plan.cases if (case.split, case.uid) not in writer.done]
    if writer.done:
        print(f"continuing: {len(writer.done)} of {len(plan.cases)} cases are there", file=sys.stderr)
    prepare = recipe_of(args.name, plan.spacing).prepare
    make = partial(make_sample, plan=plan, prepare=prepare, allow_empty=args.allow_empty)
    lost: dict[str, list[str]] = {}  # the cases in which each class is no more
    for case, result in each_case(make, todo, args.workers, writer.path.stem):
        if not isinstance(result, InputError):
            sample, gone = result
            made_from = origins[case.split, case.uid] + ("" if has_foreground(sample.label) else " empty")
            writer.add(case.split, **sample._asdict(), origin=made_from)
            for c in gone:
                lost.setdefault(plan.class_names[c], []).append(case.uid)
        elif args.skip_bad:
            bad.append(str(result))
        else:
            raise result
    for name, uids in lost.items():
        cases = f"{len(uids)} of {counted(len(todo), 'case')}, such as {uids[0]}"
        print(f"NB: {name} is lost in resampling in {cases}; a finer --spacing keeps it.", file=sys.stderr)
    return bad


def origin(case: Case, plan: Plan) -> str:
    """What a sample is made from, as a digest: its files, by name, size and time of change, and how they are
    read. A build that continues makes a sample again where this has changed."""
    paths = [path.resolve() for path in case.images + case.labels]
    facts = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    how = [*plan.numbers], plan.channels, [*plan.ignore], plan.spacing, plan.reading, case.classes
    return hashlib.sha256(repr((paths, facts, how)).encode()).hexdigest()


def make_sample(case: Case, plan: Plan, prepare: Callable, allow_empty: bool) -> tuple[Sample, list[int]]:
    """A case, read and prepared, and the classes that its label had before it was prepared, and has no more.
    Raises InputError if it cannot be trained on."""
    path = case.images[0]
    raw = read_case(case, plan)
    volume = prepare(raw, path)
    if not allow_empty and not has_foreground(volume.label):
        why, fix = "no foreground in it", "take the pair out, or use --allow-empty"
        if has_foreground(raw.label):
            change = f"from spacing {times(raw.spacing())} to {times(volume.spacing())}"
            why = f"its foreground is lost in resampling {change}"
            fix = "give a finer --spacing, or use --allow-empty"
        raise InputError(f"{case.labels[0]}: {why}; {fix}")
    sample = Sample(volume.image, volume.label, volume.spacing(), case.uid, volume.affine)
    check_sample(str(path), sample._asdict(), len(plan.class_names), plan.channels)
    if not plan.spacing:  # not a folder; and a recipe may unite classes
        return sample, []
    moved = raw.label.shape != volume.label.shape or not np.array_equal(raw.affine, volume.affine)
    if moved and case.split != "train":
        sample = sample._replace(own_label=raw.label, own_affine=raw.affine)
    return sample, np.setdiff1d(raw.label, [*np.unique(volume.label), 0, IGNORED]).tolist()


# --- prepare.py show ----------------------------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    """`prepare.py show`: prints two tables and draws `<data_dir>/<name>.png`, reading a sample at a time.
    Raises InputError."""
    if args.name in PHANTOMS:
        raise InputError(f"{args.name}: it is made up in training, and has no file; give another name")
    dataset = open_dataset(args.name, args.data_dir, ())
    rows, voxels, pictures = zip(*(survey_split(dataset, split) for split in SPLITS), strict=True)
    splits = [["split", "cases", "smallest", "median", "largest", "median spacing"]]
    classes, every = [["class", "share of voxels", "median voxels", "cases without it"]], np.vstack(voxels)
    for title, counts, *per_split in zip(dataset.class_names, every.T, *(v.T for v in voxels), strict=True):
        share = f"{100 * counts.sum() / every.sum():.3f} %"
        without = ", ".join(str((found == 0).sum()) for found in per_split)
        classes.append([title, share, f"{np.median(counts):.0f}", without])
    print(f"{dataset.name}: {dataset.source}; {counted(dataset.image_channels, 'channel')}, {dataset.unit}")
    print(f"\n{as_text([*splits, *rows])}\n\n{as_text(classes)}")
    path = args.data_dir / f"{dataset.name}.png"
    replace_file(path, png(montage([*chain(*pictures)], dataset.class_names), dpi=120))
    print(f"\npicture: {path}")


def survey_split(
    dataset: Dataset, split: str
) -> tuple[list[str], Int[np.ndarray, "cases classes"], list[Panel]]:
    """A split's row of the table, its voxels per class, and pictures of four of its cases."""
    count, classes = len(dataset.uids[split]), len(dataset.class_names)
    voxels, pictures = np.zeros((count, classes), int), []
    if not count:
        return [split, "0", *4 * [""]], voxels, pictures
    shapes, spacings = [], []
    pictured = set(np.linspace(0, count - 1, 4).astype(int))
    for i in tqdm(range(count), desc=split, disable=None, leave=False):
        sample = dataset.load(split, i)
        shapes.append(sample.label.shape)
        spacings.append(sample.spacing)
        voxels[i] = np.bincount(sample.label.ravel(), minlength=classes)[:classes]
        if i in pictured:
            z = fullest_slice(sample.label)
            image, label = cut(sample.image[..., 0], z), cut(sample.label, z)
            pictures.append(Panel(image, label, sample.spacing, f"{split}: {sample.uid}"[:32]))
    sizes = [times(f(shapes, axis=0)) for f in (np.min, np.median, np.max)]
    return [split, str(count), *sizes, times(np.median(spacings, axis=0))], voxels, pictures


# --- The program --------------------------------------------------------------------------------


def get(args: argparse.Namespace) -> None:
    """`prepare.py download`: gets and unpacks a data set; what is there already is not asked for again.
    Raises InputError."""
    what, target = RECIPES[args.name].download, args.raw_dir / args.name
    if isinstance(what, str):
        raise InputError(f"{args.name}: {what}")
    print(f"{args.name}: licence {what.licence}\nplease cite: {what.citation}")
    for file, (url, md5) in what.files.items():
        path = target / file
        if not path.exists():
            fetch(url, path, md5)
            if not md5:
                print(f"NB: {path}: no checksum is known; at most its size was checked", file=sys.stderr)
        if path.suffix in (".zip", ".tar") and not (target / path.stem).exists():
            unpack(path, target / path.stem)
    print(f"next: python prepare.py build {args.name} --raw {shlex.quote(str(target))}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    commands, names = parser.add_subparsers(required=True), ", ".join(RECIPES)
    data_dir = {"type": Path, "default": Path("data"), "help": "Where the HDF5 file is. Default: data."}
    command = commands.add_parser("build", help="Make the HDF5 file from a raw folder.")
    command.set_defaults(run_command=build)
    command.add_argument("name", help=f"One of {names}, or folder:NAME for your own images.")
    command.add_argument("--raw", type=Path, required=True, help="The unpacked download, or your own folder.")
    command.add_argument("--data-dir", **data_dir)
    text = "How many cases are made at once, each in memory. Default: 0, which is one per core, at most 8."
    command.add_argument("--workers", type=int, default=0, help=text)
    command.add_argument("--skip-bad", action="store_true", help="List bad cases in a file, and continue.")
    command.add_argument("--allow-empty", action="store_true", help="Accept labels without foreground.")
    own = command.add_argument_group("for a folder of your own")
    add_options(own, folder.FolderOptions)
    command = commands.add_parser("show", help="Print a table, and draw a picture, of a prepared data set.")
    command.set_defaults(run_command=show)
    command.add_argument("name", help=f"One of {names}, or folder:NAME.")
    command.add_argument("--data-dir", **data_dir)
    command = commands.add_parser("download", help="Get and unpack an open data set.")
    command.set_defaults(run_command=get)
    command.add_argument("name", choices=list(RECIPES), help="The data set to get.")
    command.add_argument("--raw-dir", type=Path, default=Path("raw"), help="Where it goes. Default: raw.")
    args = parser.parse_args(argv)
    check_counts(parser, args, workers=0)
    if args.run_command is build and args.name.partition(":")[0] != "folder" and args.name not in RECIPES:
        parser.error(f"{args.name} is not one of {names}, folder:NAME")
    with program():
        args.run_command(args)


if __name__ == "__main__":
    main()
