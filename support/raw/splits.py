"""Which cases of a folder train, which choose the best model, and which test?

With shares, the hash of a case's name, or of what `--group` finds in it, such as a patient, is its place in
[0, 1), which the shares divide, so that adding cases moves no others. Small sets are the exception: there,
the nearest cases fill every split up to LEAST.
"""

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from support.disk.dataset_file import SPLITS
from support.disk.files import InputError, one_line

LEAST = 3  # cases of a split, if there are enough: one would choose the best model by chance

# From the names of cases to the split of each; those that have none are left out.
Splitter = Callable[[Sequence[str]], dict[str, str]]


def splitter(split: str, group: str, folds: int = 0, fold: int = 0) -> Splitter:
    """A function from the names of all cases to their splits. `split` is three shares, or a file with a line
    "name split" per case; a name in which `group` finds nothing has no split.

    With `folds`, the names in the order of their places are cut into so many parts, whose lengths differ by
    one at most. Number `fold` (1, 2, ...) is the test split, so that every case is tested in one fold, and
    the shares divide the rest into training and validation, as exactly as whole names allow. Raises
    InputError if an option cannot be understood, or there are fewer names than folds."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        for option, given in (("--folds", folds), ("--group", group)):
            if given:
                fix = "three shares, not a list of names; leave one of them out"
                raise InputError(f"--split {split}: {option} needs {fix}") from None
        listed = read_list(split)
        return lambda names: {name: listed[name] for name in names if name in listed}
    if len(shares) != 3 or min(shares) < 0 or not np.isclose(sum(shares), 1) or (folds and shares[2] == 1):
        raise InputError(f"--split {split}: three shares that add up to 1 are needed, or a text file")
    try:
        pattern = re.compile(group or "(?s:.*)")
    except re.error as error:
        raise InputError(f"--group {group}: not a regular expression ({error}); correct it") from error

    def by_hash(names: Sequence[str]) -> dict[str, str]:
        if not group:
            hint = "If several cases are of one patient, use --group so that they share a split."
            print(hint, file=sys.stderr)
        matches = {name: match for name in names if (match := pattern.search(name))}
        keys = {name: match[min(pattern.groups, 1)] or "" for name, match in matches.items()}
        hashes = {key: hashlib.sha256(key.encode()).digest()[:8] for key in keys.values()}
        places = {key: int.from_bytes(digest) / 2**64 for key, digest in hashes.items()}
        part = in_fold(places, shares, folds, fold) if folds else parts(places, shares)
        return {name: SPLITS[part[key]] for name, key in keys.items()}

    return by_hash


def in_fold(places: dict[str, float], shares: Sequence[float], folds: int, fold: int) -> dict[str, int]:
    """The part of every key in one of several folds. Raises InputError if there are fewer keys."""
    if len(places) < folds:
        raise InputError(f"--folds {folds}: only {len(places)} cases or groups; use fewer folds")
    order = sorted(places, key=places.get)
    tested = {key for i, key in enumerate(order) if i * folds // len(order) == fold - 1}
    # The rest, in an order of its own, evenly spread over [0, 1).
    rest = sorted(places.keys() - tested, key=lambda key: (places[key] * folds % 1, key))
    spread = {key: (i + 0.5) / len(rest) for i, key in enumerate(rest)}
    return dict.fromkeys(places, 2) | parts(spread, [share / sum(shares[:2]) for share in shares[:2]])


def parts(places: dict[str, float], shares: Sequence[float]) -> dict[str, int]:
    """The part of every key, by its place in [0, 1), which the shares divide. A part whose share is above 0
    has LEAST keys or more; of fewer than 4 LEAST keys, a quarter, and one at least. The keys that are nearest
    to it move there, from parts that have more."""
    ends = np.cumsum(shares)
    part = {
        key: min(int(np.searchsorted(ends, place, side="right")), len(shares) - 1)
        for key, place in places.items()
    }
    wanted = [i for i, share in enumerate(shares) if share > 0]
    least = max(min(LEAST, len(places) // 4), 1)
    for small in wanted if len(places) >= len(wanted) else ():
        begin, end = ends[small] - shares[small], ends[small]
        while (count := Counter(part.values()))[small] < least:
            movable = (key for key in sorted(part) if count[part[key]] > least)
            part[min(movable, key=lambda key: max(begin - places[key], places[key] - end))] = small
    return part


def read_list(file: str) -> dict[str, str]:
    """The splits that a text file lists, by name. Raises InputError if it is not such a file."""
    try:
        lines = unicodedata.normalize("NFC", Path(file).read_text(encoding="utf-8-sig")).splitlines()
    except (OSError, ValueError) as error:
        why = f"neither three shares nor a text file ({one_line(error)})"
        raise InputError(f"--split {file}: {why}; give one of them") from error
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, which = line.replace("\t", " ").strip().rpartition(" ")
        if line.strip() and (which not in SPLITS or listed.setdefault(name.strip(), which) != which):
            must = f"must be a name, a space and one of {', '.join(SPLITS)}, and no name has two splits"
            raise InputError(f"{file}: line {number} {must}; correct it")
    return listed
