"""Your own folder, as it came from its archive.

In support/raw/, pairing.py finds images and labels in it, classes.py says what is which class, and splits.py
who trains. The files are pictures or NIfTI, of any sizes. A first pass finds what cannot be read, and
numbers, sizes and spacing; a second prepares everything. Volumes are resampled to the median spacing and
pictures stay as they are, unless `--spacing` says otherwise.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from data import normalise
from support.disk.command_line import as_typed, check_settings
from support.disk.files import InputError
from support.raw.images import Reading, Volume, counted, flat, is_nifti, resample, show_value, times
from support.raw.classes import classes_by_file, classes_of, ignored, names_in_json
from support.raw.pairing import channels_of, find_pairs
from support.raw.recipe import Case, Plan, Recipe, read_pair
from support.raw.splits import splitter
from support.raw.workers import each_case


# fmt: off
@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """The options of `prepare.py build` that only a folder of one's own has."""

    images: Annotated[str, "How the images are named, {} being what image and label share: "
                           '"images/{}_training.tif". If empty, found from the names.'] = ""
    labels: Annotated[str, 'How the labels are named: "1st_manual/{}_manual1.gif".'] = ""
    unite: Annotated[bool, "If an image has several labels, unite them."] = False
    class_per_file: Annotated[bool, "If an image has several labels, each is a class, by its file's name; "
                                    "--classes chooses among them, and later ones lie above."] = False
    classes: Annotated[str, "Names, background first: background,nerve,vessel."] = ""
    threshold: Annotated[float, "Above it, values of labels are class 1: 127 for smooth edges, 0 for objects "
                                "that are counted. Below 0, there is none.", -1] = -1.0
    ignore: Annotated[str, "Numbers in labels (255, or a colour #ff00ff) whose voxels are left out of loss "
                           "and scores."] = ""
    geometry: Annotated[Literal["", "sform", "pixdim"], "Which spacing holds, if a NIfTI header states "
                                                        "two; the model remembers it."] = ""
    split: Annotated[str, "Three shares, or a text file with a line for every case: name split."
                     ] = "0.7,0.1,0.2"
    folds: Annotated[int, "Cross-validation: the number of parts, such as 5.", 0] = 0
    fold: Annotated[int, "Which of them is the test split: 1, 2, ...", 0] = 0
    group: Annotated[str, "A regular expression; what it finds stays in one split."] = ""
    spacing: Annotated[tuple[float, ...], "What to resample to: 2,2 (pixels) or 1,1,3 (mm).", 1e-9] = ()
# fmt: on

RARE = 0.01  # a share of foreground voxels below which few patches would have any


class Facts(NamedTuple):
    """What the plan of a folder needs to know of a case."""

    kind: tuple[str, int, int]  # unit, dimensions, channels
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    values: dict[int, float]  # the label's numbers, and which share of its voxels each has
    replaced: set[tuple[int, int]]  # classes of which the second lies above the first somewhere


def plan(raw: Path, options: FolderOptions, workers: int) -> Plan:
    """The plan of a folder. Raises InputError."""
    check_options(options)
    split = splitter(options.split, options.group, options.folds, options.fold)
    several = options.unite or options.class_per_file
    cases, named = find_pairs(raw, options.images, options.labels, several), {}
    words = channels_of(cases)
    if options.class_per_file:
        cases, named = classes_by_file(cases, options.classes, raw)
    elif not options.classes and options.threshold < 0:
        named = names_in_json(cases, raw)
    reading, ignore = Reading(options.geometry, options.threshold), ignored(options.ignore)
    ignore += [number for number, name in named.items() if name == "ignore"]
    facts, faults = {}, {}
    look = partial(survey, reading=reading, ignore=ignore)
    for case, result in each_case(look, cases, workers, "files"):
        (faults if isinstance(result, InputError) else facts)[case] = result
    if not facts:
        # That a file has no partner is seldom the reason: other cases have both, and fail for another one.
        raise InputError(str(faults[next(case for case in cases if case.images and case.labels)]))
    count = Counter(chain(*(fact.values for fact in facts.values())))
    named = {number: name for number, name in named.items() if number not in ignore}
    named = named or classes_of(count, len(facts), raw, options.classes)
    numbers = [*named]
    say_classes([*facts.values()], named, count)
    kind = unit, dims, channels = usual_kind([*facts.values()])
    for case, fact in facts.items():
        if fault := mismatch(case, fact, numbers, count, kind):
            faults[case] = fault
    good = [fact for case, fact in facts.items() if case not in faults]
    if not good:
        raise InputError(faults[next(iter(facts))])
    splits = split([case.uid for case in facts if case not in faults])
    if options.spacing and len(options.spacing) != dims:
        raise InputError(f"--spacing: {dims} numbers are needed, {len(options.spacing)} given")
    middle = np.median([fact.spacing for fact in good], axis=0)
    spacing = options.spacing or tuple(float(f"{s:.4g}") for s in middle)
    sizes = [np.array(fact.shape) * fact.spacing / spacing for fact in good]
    settings = propose(np.median(sizes, axis=0).tolist(), spacing)
    if np.mean([sum(fact.values.get(v, 0) for v in numbers[1:]) for fact in good]) < RARE:
        settings["foreground"] = 0.33
    proposed = (f"--{key.replace('_', '-')} {as_typed(value)}" for key, value in settings.items())
    print(f"spacing {times(spacing)} {unit}; proposed: {'; '.join(proposed)}", file=sys.stderr)
    fold = f", fold {options.fold} of {options.folds}" if options.folds else ""
    how = "a label file per class" if options.class_per_file else f"label values {numbers}"
    how += f" above {options.threshold:g}" if options.threshold >= 0 else ""
    channel_names = words if len(words) == channels else ()
    lost = f"--group {options.group} does not match this name; widen it"
    lost = lost if options.group else f"{options.split} has no line for this name; add one"
    for i, case in enumerate(cases):
        fault = faults.get(case, "" if case.uid in splits else f"{case.uid}: {lost}")
        cases[i] = case._replace(split=splits.get(case.uid, "train"), fault=str(fault))
    return Plan(
        cases, numbers, [*named.values()],
        f"folder {raw.resolve().name}{fold}", f"{times(spacing)} {unit}; zero mean, unit variance; {how}"
        + (f"; channels {', '.join(words)}" if words else "")
        + (f"; {options.ignore} is ignored" if ignore else ""), unit, ignore=ignore,
        channels=channels, settings=settings, channel_names=channel_names, spacing=spacing, reading=reading,
    )  # fmt: skip


def say_classes(facts: Sequence[Facts], named: dict[int, str], count: Counter[int]) -> None:
    """Prints which number is which class, which classes no label has, and which overlap."""
    said = ", ".join(f"{show_value(number)} is {name}" for number, name in named.items())
    print(f"labels: {said}", file=sys.stderr)
    missing = [name for number, name in named.items() if not count[number]]
    if missing:
        print(f"NB: no label has the class {', '.join(missing)}.", file=sys.stderr)
    for (below, above), n in sorted(Counter(chain(*(fact.replaced for fact in facts))).items()):
        where = f"overlap in {n} of {counted(len(facts), 'case')}, and {named[above]} lies above"
        print(f"NB: {named[below]} and {named[above]} {where}; change it with --classes.", file=sys.stderr)


def usual_kind(facts: Sequence[Facts]) -> tuple[str, int, int]:
    """The unit, the number of dimensions and that of channels which most cases have."""
    kinds = Counter(fact.kind for fact in facts)
    unit, dims, channels = max(kinds, key=kinds.get)
    if {("pixel", 2, 1), ("pixel", 2, 3)} <= kinds.keys():
        channels = 1
        print("There are grey and coloured pictures: all are read as grey.", file=sys.stderr)
    return unit, dims, channels


def check_options(options: FolderOptions) -> None:
    """Raises InputError, one line, if an option is wrong by itself or beside others."""
    check_settings(options)
    several, smooth = options.class_per_file, options.threshold >= 0
    if options.unite and several:
        raise InputError("--unite makes one class of an image's labels, --class-per-file several; type one")
    if options.ignore and (several or smooth):
        raise InputError("--ignore has no meaning beside --class-per-file or --threshold; leave it out")
    if smooth and options.classes.count(",") > 1 and not several:
        raise InputError(f"--threshold makes two classes, but --classes {options.classes} names more")
    if (options.folds or options.fold) and not 1 <= options.fold <= options.folds > 1:
        raise InputError("--folds must be 2 or more, with a --fold from 1 to that number")


def survey(case: Case, reading: Reading, ignore: Sequence[int]) -> Facts:
    """What the plan needs to know of a case. Raises InputError if its files cannot be used."""
    volume, replaced = read_pair(case, reading)
    found, voxels = np.unique(volume.label, return_counts=True)
    shares = {int(v): n / volume.label.size for v, n in zip(found, voxels, strict=True) if v not in ignore}
    kind = "mm" if is_nifti(case.images[0]) else "pixel", volume.label.ndim, volume.image.shape[-1]
    return Facts(kind, volume.label.shape, volume.spacing(), shares, replaced)


def mismatch(
    case: Case, fact: Facts, known: Sequence[int], count: Counter[int], most: tuple[str, int, int]
) -> str:
    """Why a case does not fit the classes, whose numbers are `known`, or the kind of `most` cases; "" if it
    fits. `count` says how many labels have each number, of all cases."""
    if wrong := sorted(set(fact.values) - set(known)):
        shown = ", ".join(map(show_value, wrong[:5]))
        found = counted(max(count[v] for v in wrong), "label")
        classes = ", ".join(map(show_value, known))
        fix = f"repair it, or name all {len(count)} numbers with --classes, or use --ignore or --skip-bad"
        return f"{case.labels[0]}: label {shown}, found in {found}, is none of the classes {classes}; {fix}"
    if fact.kind == most or (fact.kind[:2] == most[:2] and most == ("pixel", 2, 1)):
        return ""
    this, others = (f"{dims}D in {unit}s, {counted(n, 'channel')}" for unit, dims, n in (fact.kind, most))
    return f"{case.images[0]}: {this}, but most others are {others}; keep one kind per folder"


def propose(size: Sequence[float], spacing: Sequence[float]) -> dict[str, tuple | float]:
    """Settings of train.py for images of about this size. Strides leave an axis of much longer
    voxels alone until the others are as long. The patch is a multiple of the strides, has up to 2^16
    voxels (which a laptop can train on), and is shortened where it is longest."""
    length, strides = np.array(spacing, float), []
    for _ in range(2):
        stride = np.where((length < 2 * length.min()) & (np.array(size) >= 16), 2, 1)
        strides.append(tuple(stride.tolist()))
        length = length * stride
    unit = np.prod(strides, axis=0)
    patch = np.maximum(np.minimum(size, 2**16) // unit, 1).astype(int) * unit
    while patch.prod() > 2**16:
        patch[patch.argmax()] -= unit[patch.argmax()]
    translation = np.maximum(patch // 12, 1)
    settings = {"patch_shape": patch.tolist(), "strides": strides, "translation": translation.tolist()}
    return {name: tuple(value) for name, value in settings.items()}


def prepare(volume: Volume, path: Path, spacing: Sequence[float]) -> Volume:
    """A prepared volume of a folder. It is smoothed where it is made coarser (the paper's data sets
    are not, since §5.2 mentions only resampling)."""
    volume = resample(flat(volume), spacing, path, smooth=True)
    return volume._replace(image=normalise(volume.image))


def recipe(spacing: Sequence[float]) -> Recipe:
    """The recipe of a folder that was built with this spacing."""
    return Recipe(plan, partial(prepare, spacing=spacing))
