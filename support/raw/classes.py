"""Which numbers in the labels of a folder, or which of its files, are which classes?

A label's numbers become classes 0, 1, ... in rising order, and the lowest is background, which is 0 unless
`--classes` names others; with `--classes`, numbers that are classes already stay. What is likely to be a
mistake is asked.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from support.disk.files import InputError
from support.raw.images import COLOUR, IGNORED, counted, show_value
from support.raw.pairing import class_of, listed
from support.raw.recipe import Case


def classes_by_file(cases: Sequence[Case], given: str, raw: Path) -> tuple[list[Case], dict[int, str]]:
    """The cases with a class for every label, by the name of its file, and the classes' names: those of
    --classes, without the labels of others, or all in the order of the alphabet. Raises InputError if the
    names are of no use, or not the given ones."""
    named = {case.uid: [class_of(label, case.uid) for label in case.labels] for case in cases}
    count = Counter(chain(*named.values()))
    del count["background"]
    some = ", ".join(sorted(count)[:5])
    if (len(cases) > 2 and max(count.values(), default=0) == 1) or len(count) >= IGNORED:
        why = f"--class-per-file: {len(count)} labels have names of their own, such as {some}"
        raise InputError(f"{raw}: {why}; use --unite if they show one class")
    class_names = split_names(given) if given else ["background", *sorted(count)]
    if unknown := [name for name in class_names[1:] if name not in count]:
        raise InputError(f"--classes {given}: no label is named {unknown[0]}, but {some}")
    number, result = {name: i for i, name in enumerate(class_names) if i}, []
    for case in cases:
        pairs = zip(named[case.uid], case.labels, strict=True)
        chosen = sorted((number[name], label) for name, label in pairs if name in number)
        classes, labels = zip(*chosen, strict=True) if chosen else ((), case.labels)
        fault = case.fault
        if not fault and len(set(classes)) < max(len(classes), 1):
            what = "two labels of one class" if classes else f"no label of the classes {', '.join(number)}"
            fault = f"{raw}: {listed(case.labels, raw)}: {what}; correct the names, or use --skip-bad"
        result.append(case._replace(labels=labels, classes=classes, fault=fault))
    return result, dict(enumerate(class_names))


def names_in_json(cases: Sequence[Case], raw: Path) -> dict[int, str]:
    """The names of numbers in the `dataset.json` of nnU-Net, or of the Decathlon, that lies above the labels;
    none if there is no such file, or it unites numbers to regions."""
    label = next((label for case in cases for label in case.labels), raw)
    for folder in (folder for folder in label.parents if folder.is_relative_to(raw)):
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            said = json.loads((folder / "dataset.json").read_bytes())["labels"].items()
            names = dict((value, key) if isinstance(value, int) else (int(key), value) for key, value in said)
            if 0 in names and 1 < len(set(names.values())) == len(said) <= IGNORED:
                print(f"names of the classes: {folder / 'dataset.json'}", file=sys.stderr)
                return {number: str(names[number]) for number in sorted(names)}
    return {}


def split_names(text: str) -> list[str]:
    """The classes' names of `--classes`. Raises InputError if they cannot be such."""
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > IGNORED:
        raise InputError(f"--classes {text}: 2 to {IGNORED} different names are needed, background first")
    return names


def classes_of(count: Counter[int], labels: int, raw: Path, names: str) -> dict[int, str]:
    """The names, found or given, of the label numbers that are classes 0, 1, ... `count` says how many of the
    labels have each number. One is no class if it is likely to be a mistake or to mean "unknown": if fewer
    than a tenth of the labels have it, or only one of three or more, or if it is 255 beside 0, 1, 2, ...
    without a gap. Names make classes of all numbers, or of those that are usual, whichever are as many.
    Raises InputError, with the option that answers it, if it is a question what the numbers mean."""
    found = sorted(count)
    if set(found) <= {0}:
        raise InputError(f"{raw}: all {labels} labels are background alone; give some with foreground")
    often = [v for v in found if v and 10 * count[v] >= labels and (count[v] > 1 or labels < 3)]
    usual = [v for v in found if v in (often or found) or v == 0]
    if len(usual) > 2 and usual == [*range(len(usual) - 1), 255]:
        usual.pop()
    if names:
        return with_names(found, usual, names, in_masks(count))
    middle = 127 if found[-1] >= COLOUR else (found[0] + found[-1]) // 2
    questions = [
        (has_smooth_edges(found), "smooth edges have such; if they show one class, use "
         f"--threshold {middle}; else save masks with hard edges, or name all numbers with --classes"),
        (len(found) > 32, "if they count objects, use --threshold 0, or name them with --classes"),
        (len(found) > 2 and not often, f"every number above 0 is in few of the {labels} masks; "
         "if all mean one thing, use --threshold 0; if not, name all with --classes"),
        (0 not in count, "no mask holds 0, the background; "
         "name the numbers, lowest first, as in --classes background,vessel"),
    ]  # fmt: skip
    for asked, what in questions:
        if asked:
            raise InputError(f"{raw}: {len(found)} different label values ({in_masks(count)}): {what}")
    return {v: f"class {show_value(v)}" if i else "background" for i, v in enumerate(usual)}


def with_names(found: Sequence[int], usual: Sequence[int], names: str, shown: str) -> dict[int, str]:
    """The names of --classes for the numbers that are `found` in labels, or for the usual ones among them.
    Raises InputError, which says what is `shown`, if neither are as many."""
    class_names = split_names(names)
    for numbers in (found, usual):
        if len(numbers) == len(class_names):
            return dict(zip(numbers, class_names, strict=True))
    if not set(usual) <= set(range(len(class_names))):
        what = f"{len(class_names)} names, but the masks hold {counted(len(found), 'number')}: {shown}"
        raise InputError(f"--classes {names}: {what}; name all, or leave some out with --ignore")
    return dict(enumerate(class_names))  # they are classes already, though some are not there


def has_smooth_edges(found: Sequence[int]) -> bool:
    """Whether numbers of labels, which rise, are rather the values of smooth edges: many, up to white or in
    colours, or some near both ends, as a JPEG or a change of size makes them."""
    if len(found) < 5:
        return False
    low, high = found[0], found[-1]
    if len(found) > 32:
        return high in (255, 65535) or high >= COLOUR
    near = [sum(8 * abs(value - end) < high - low for value in found) for end in (low, high)]
    at_ends = 127 < high - low < 256 and near[1] > 1 and sum(near) == len(found)
    counting = found[:-1] == [*range(len(found) - 1)]
    return not counting and ({0, 255} <= {*found} or at_ends)


def in_masks(count: Counter[int]) -> str:
    """How many masks have each number, as text: 0 in 10, 130 in 1."""
    shown = [f"{show_value(v)} in {count[v]}" for v in sorted(count)]
    return ", ".join(shown if len(shown) < 8 else [*shown[:6], f"and {len(shown) - 6} more"])


def ignored(text: str) -> list[int]:
    """The numbers of `--ignore`, as `read_label` gives them. Raises InputError if there are others."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if not re.fullmatch(r"[0-9]{1,7}|#[0-9a-fA-F]{6}", word)]:
        raise InputError(f"--ignore {wrong[0]}: neither a whole number nor a colour like #ff00ff")
    numbers = []
    for word in words:
        grey = word[1:3] == word[3:5] == word[5:]  # which `read_label` gives as one number
        base, text = (0, word[1:3]) if grey else (COLOUR, word[1:])
        numbers.append(base + int(text, 16) if word[0] == "#" else int(word))
    if 0 in numbers:
        raise InputError("--ignore 0: 0 is background, and cannot be ignored")
    return numbers
