"""Which image belongs to which label in a folder as it came from its archive?

The first of these rules that finds a pair is used, and folders may lie at any depth. Upper and lower case do
not matter in the lists of names below. docs/data.md draws folders of each kind.

1. Two folders beside each other, one of IMAGE_FOLDERS and one of LABEL_FOLDERS, with files of the same names.
   Endings are allowed: a label may have one of LABEL_ENDINGS, an image one of IMAGE_ENDINGS or CHANNELS. The
   words of the first two may also begin a name.

   Two such folders directly in the given one are used alone; otherwise all such folders below it are. There
   a folder of images may hold a single one, and may be the folder in which that of the labels lies. All in
   the folder of labels are its labels then, unless their names fit as above.

2. Images and labels in one folder, or in a folder per case. A label has one of LABEL_ENDINGS, perhaps with a
   number; its image has the same name without it, or with one of IMAGE_ENDINGS, or is several files that end
   in CHANNELS. What no label belongs to is left out. If no label ends so, these words may begin the names.

3. Two patterns that are typed, which replace the rules above. `{}` is what an image and its label have in
   common, and `*` any other text; if there is no `{}`, the only `*` has that meaning. A pattern is
   compared with the end of a path, from the name of a folder or a file on. Several patterns with commas
   between them are channels.

       --images "{}_pre.nii,{}_post.nii" --labels "{}_lesion.nii"

A case whose files have no name but such words has that of its folder. Where two answers are possible, such as
two folders of labels, the answer is an error, not a guess.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from support.disk.files import InputError
from support.raw.images import ENDINGS, check_kind, counted, plain, stem_of
from support.raw.recipe import Case

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "imagesTr")
LABEL_FOLDERS = (
    "labels", "label", "masks", "mask", "labelsTr", "manual", "manual1", "1st_manual", "2nd_manual", "gt",
    "ground_truth", "groundtruth", "annotations", "segmentations",
)  # fmt: skip
LABEL_ENDINGS = ("mask", "masks", "label", "labels", "seg", "segmentation", "gt", "manual", "annotation")
IMAGE_ENDINGS = ("image", "img", "imaging", "volume", "training", "test")
CHANNELS = (
    "t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "flair", "pd", "dwi", "adc", "ct", "pet",
    r"\d{4}",
)  # fmt: skip


def ending(words: Iterable[str], number: str = "") -> re.Pattern:
    """Matches the last word of a name, if it is one of these, with what separates it from the rest."""
    return re.compile(rf"(?:^|[-_. ])({'|'.join(words)}){number}$", re.IGNORECASE)


def beginning(words: Iterable[str]) -> re.Pattern:
    """Matches the first word of a name, if it is one of these and a number or a separator follows."""
    return re.compile(rf"^({'|'.join(words)})(?:[-_. ]+(?=.)|(?=\d))", re.IGNORECASE)


LABEL = (ending(LABEL_ENDINGS, r"[-_ ]?\d*"), beginning(LABEL_ENDINGS))
IMAGE = (ending((*IMAGE_ENDINGS, *CHANNELS)), beginning(IMAGE_ENDINGS))
EXAMPLE = '--images "images/{}_training.tif" --labels "1st_manual/{}_manual1.gif"'


class Group(NamedTuple):
    """Files that have a name in common ("" if it is that of their folder): images, each with its channel, and
    labels."""

    folder: Path
    name: str
    images: list[tuple[str, Path]]
    labels: list[Path]


def find_pairs(raw: Path, images: str = "", labels: str = "", several: bool = True) -> list[Case]:
    """The cases of a folder by the rules above, in the order of their names, which are also printed; `images`
    and `labels` are the patterns of rule 3, or empty. It is a fault of a case to have several labels unless
    `several` says that it may. Raises InputError if no case is found, or several answers are possible."""
    files = files_below(raw)
    readable = [path for path in files if path.name.lower().endswith(ENDINGS)]
    if bool(images) != bool(labels):
        raise InputError("--images and --labels belong together; type both")
    if images:
        groups = by_patterns(raw, readable, images, labels)
    else:
        groups = in_two_folders(raw, readable) or by_words(readable)
    if not groups:
        for path in files:
            check_kind(path)
        what = f"no {', '.join(ENDINGS)} files in it"
        if readable:
            some = ", ".join(str(path.relative_to(raw)) for path in (readable[0], readable[-1]))
            what = f"no pairs of images and labels among {counted(len(readable), 'file')}, such as {some}"
        fix = "put them in the folders images and labels, or end the labels' names in _mask, or type how they"
        raise InputError(f"{raw}: {what}; {fix} are named, such as {EXAMPLE}")
    cases = checked(raw, groups, several)
    say_pairs(cases, files, raw)
    return cases


def channels_of(cases: Sequence[Case]) -> tuple[str, ...]:
    """By which words the names of an image's files differ, if there are several."""
    return next((case.channels for case in cases if len(case.channels) > 1 and not case.fault), ())


def say_pairs(cases: Sequence[Case], files: Sequence[Path], raw: Path) -> None:
    """Prints how many cases there are, three of them, and which of the files are left out."""
    pairs = [case for case in cases if case.images and case.labels]
    words = ", ".join(channels_of(cases))
    words = f"; channels: {words}" if words else ""
    print(f"{counted(len(pairs), 'image')} with labels{words}", file=sys.stderr)
    for i in sorted({0, len(pairs) // 2, len(pairs) - 1}):
        both = f"{listed(pairs[i].images, raw)} with {listed(pairs[i].labels, raw)}"
        print(f"  {pairs[i].uid}: {both}", file=sys.stderr)
    used = {path for case in cases for path in case.images + case.labels}
    if others := [path for path in files if path not in used]:
        some = listed(others[:3], raw)
        print(f"{counted(len(others), 'other file')} left out, such as {some}", file=sys.stderr)


def listed(paths: Sequence[Path], raw: Path) -> str:
    """Files with their folders; of more than four, the first three and how many more."""
    shown = [str(path.relative_to(raw)) for path in paths]
    return ", ".join(shown if len(shown) < 5 else [*shown[:3], f"and {len(shown) - 3} more"])


# --- Names --------------------------------------------------------------------------------------


def files_below(raw: Path) -> list[Path]:
    """The files of a folder and those below, without hidden ones, in the order of their paths."""
    found, seen = [], set()
    for folder, below, names in os.walk(raw, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else [n for n in below if n[0] != "." and n != "__MACOSX"]
        found += [] if real in seen else [Path(folder, name) for name in names if name[0] != "."]
        seen.add(real)  # a link may lead back up
    return sorted(found)


def by_folder(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """The files of every folder, folders in the order of the files."""
    found: dict[Path, list[Path]] = {}
    for path in files:
        found.setdefault(path.parent, []).append(path)
    return found


def without(patterns: Sequence[re.Pattern], stem: str) -> list[tuple[str, str]]:
    """A name without a last or first word that one of these patterns matches, and the word, for each of them
    that does."""
    matches = [match for pattern in patterns if (match := pattern.search(stem))]
    return [(stem[: match.start()] + stem[match.end() :], match[1].lower()) for match in matches]


def class_of(label: Path, uid: str) -> str:
    """The class that a label shows by its name: what the name of the case and a word such as mask leave, or,
    if that is nothing, its folder's name."""
    if (name := stem_of(label)) == uid:
        return label.parent.name
    case = re.escape(uid)
    name = re.sub(rf"^{case}[-_. ]+|[-_. ]+{case}$", "", name)
    return next((shorter for shorter, _ in without(LABEL, name) if shorter), name)


# --- Channels of images without labels ----------------------------------------------------------


def channel_of(file: Path, names: Sequence[str]) -> tuple[str, str]:
    """Which of the channels a file holds, by the names that `find_pairs` gave them, and what it has in common
    with the files of the other channels; two empty texts if its name does not say which."""
    for name in names:
        _, _, pattern = name.partition(" ")
        if pattern:  # of rule 3
            match = compiled("--images", pattern).search(plain(file.as_posix()))
            if match:
                return name, match["name"]
        else:
            for common, _ in without([ending([re.escape(name)])], stem_of(file)):
                return name, str(file.parent / common)
    return "", ""


def check_channels(files: Sequence[Path], names: Sequence[str]) -> None:
    """Raises InputError if files are not in the order of their channels, as far as their names say it."""
    for file, name in zip(files, names, strict=True):
        if (found := channel_of(file, names)[0]) not in ("", name):
            why = f"by its name the channel {found}, but given as {name}"
            raise InputError(f"{file}: {why}; give the files in the order {', '.join(names)}")


def by_channels(folder: Path, names: Sequence[str]) -> list[tuple[Path, ...]]:
    """The files of every image in a folder and below, in the order of their channels. A file whose name says
    no channel is left out. Raises InputError if an image lacks a channel, or has one twice."""
    images: dict[str, list[tuple[str, Path]]] = {}
    for file in files_below(folder):
        name, common = channel_of(file, names) if file.name.lower().endswith(ENDINGS) else ("", "")
        if name:
            images.setdefault(common, []).append((name, file))
    for files in images.values():
        if sorted(name for name, _ in files) != sorted(names):
            has = ", ".join(name for name, _ in files)
            why = f"with the files of its other channels it has {has}, but {', '.join(names)} are needed"
            raise InputError(f"{files[0][1]}: {why}; complete them, or take it out")
    return [tuple(file for name in names for n, file in files if n == name) for files in images.values()]


# --- The rules ----------------------------------------------------------------------------------


def grouped(folder: Path, images: Sequence[Path], labels: Sequence[Path]) -> list[Group]:
    """Images and labels by what their names have in common."""
    stems = {stem_of(path) for path in images}
    possible = stems | {shorter for stem in stems for shorter, _ in without(IMAGE, stem)}
    groups: dict[str, Group] = {}
    for path in labels:
        stem = stem_of(path)
        shorter = [name for name, _ in without(LABEL, stem)]
        name = next((name for name in (stem, *shorter) if name in possible), [*shorter, stem][0])
        groups.setdefault(name, Group(folder, name, [], [])).labels.append(path)
    labelled = set(groups)
    waiting = labelled - stems  # labels whose images have another name
    for path in images:
        name, channel = stem_of(path), ""
        for shorter, word in without(IMAGE, name) if name not in labelled else ():
            if shorter in waiting:
                name, channel = shorter, "" if word in IMAGE_ENDINGS else word
                break
        groups.setdefault(name, Group(folder, name, [], [])).images.append((channel, path))
    return list(groups.values())


def whole(groups: Iterable[Group]) -> list[Group]:
    """The groups that have both images and labels."""
    return [group for group in groups if group.images and group.labels]


def in_two_folders(raw: Path, files: Sequence[Path]) -> list[Group]:
    """Rule 1. Raises InputError if folders of several names could hold the images, or the labels."""
    kinds = [{name.lower() for name in names} for names in (IMAGE_FOLDERS, LABEL_FOLDERS)]
    parents: dict[Path, tuple[list[Path], list[Path]]] = {}
    inside = by_folder(files)
    for folder in inside:
        for kind, names in enumerate(kinds):
            if folder != raw and folder.name.lower() in names:
                parents.setdefault(folder.parent, ([], []))[kind].append(folder)
    for parent, (of_images, _) in parents.items():
        if not of_images and parent != raw and len(inside.get(parent, ())) == 1:
            of_images.append(parent)
    parents = {parent: both for parent, both in parents.items() if all(both)}
    parents = {raw: parents[raw]} if raw in parents else parents
    found: list[Group] = []
    for parent, both in parents.items():
        for folders, what in zip(both, ("images", "labels"), strict=True):
            if len(folders) > 1:
                names = " and ".join(folder.name for folder in folders)
                raise InputError(f"{parent}: {names} may each hold the {what}; choose, as in {EXAMPLE}")
        images, labels = (inside[folder] for (folder,) in both)
        groups = grouped(parent, images, labels)
        if parent != raw and len(images) == 1 and not whole(groups):
            groups = [Group(parent, "", [("", images[0])], labels)]
        found += groups
    return found if whole(found) else []


def by_words(files: Sequence[Path]) -> list[Group]:
    """Rule 2. Raises InputError if the labels have several endings."""
    for pattern in LABEL:
        kind = {path: match[1].lower() for path in files if (match := pattern.search(stem_of(path)))}
        found: list[Group] = []
        for folder, here in by_folder(files).items():
            labels = [path for path in here if path in kind]
            images = [path for path in here if path not in kind]
            found += [group for group in grouped(folder, images, labels) if group.labels]
        if whole(found):
            break
    kinds = {kind[path]: group.folder for group in whole(found) for path in group.labels}
    if len(kinds) > 1:
        names = " and ".join(f"_{word}" for word in sorted(kinds))
        raise InputError(
            f"{min(kinds.values())}: {names} may each end the labels' names; choose, as in {EXAMPLE}"
        )
    # Labels of another kind, none of which has an image, are no labels of these.
    return [group for group in found if any(kind[path] in kinds for path in group.labels)]


def by_patterns(raw: Path, files: Sequence[Path], images: str, labels: str) -> list[Group]:
    """Rule 3. Raises InputError if a pattern cannot be understood, or no image has a label."""
    of_label = compiled("--labels", labels)
    of_image = [(pattern, compiled("--images", pattern)) for pattern in images.split(",")]
    groups: dict[str, Group] = {}
    places = {path: plain(path.relative_to(raw).as_posix()) for path in files}
    labelled = {path: match["name"] for path, place in places.items() if (match := of_label.search(place))}
    for path, place in places.items():
        if path in labelled:  # a label that looks like an image is none
            continue
        channels = 0
        for number, (pattern, of_channel) in enumerate(of_image, 1):
            if match := of_channel.search(place):
                channels += 1
                channel = f"{number:02d} {pattern}" if len(of_image) > 1 else ""
                name = match["name"]
                groups.setdefault(name, Group(raw, name, [], [])).images.append((channel, path))
        if channels > 1:
            raise InputError(f"{path}: {channels} patterns of --images match it; make them differ")
    # An image's name goes before a longer one: with {}_*, a_left_lung is of a, not of a_left.
    of_known = compiled("--labels", labels, [*groups])
    for path, name in labelled.items():
        if match := of_known.search(places[path]):
            name = match["name"]
        groups.setdefault(name, Group(raw, name, [], [])).labels.append(path)
    if not whole(groups.values()):
        imaged = sum(bool(group.images) for group in groups.values())
        found = sum(bool(group.labels) for group in groups.values())
        counts = f'--images "{images}" matches {imaged} cases, and --labels "{labels}" {found} cases'
        raise InputError(f"{raw}: {counts}, without a common {{}}; correct the patterns")
    return list(groups.values())


def compiled(option: str, pattern: str, names: Sequence[str] = ()) -> re.Pattern:
    """A pattern of rule 3 as a regular expression, whose group `name` is the common part: one of `names`,
    the longest that fits, or any."""
    if "{}" not in pattern and pattern.count("*") != 1:
        raise InputError(f"{option} {pattern}: write {{}} for what an image and its label have in common")
    parts = re.split(r"(\{\}|\*)", plain(pattern if "{}" in pattern else pattern.replace("*", "{}")))
    first = parts.index("{}")
    meaning = {"{}": "(?P=name)", "*": "[^/]*"}
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "[^/]+"
    text = (f"(?P<name>{name})" if i == first else meaning.get(p, re.escape(p)) for i, p in enumerate(parts))
    return re.compile(rf"(?:^|/){''.join(text)}$", re.IGNORECASE)


# --- The cases ----------------------------------------------------------------------------------


def checked(raw: Path, groups: Sequence[Group], several: bool) -> list[Case]:
    """The cases of all groups. One that lacks a file, or has one too many, has a fault. Where files of one
    name lie in several folders, the folder stands before the name. All are in no split yet."""
    cases: list[Case] = []
    groups = [group._replace(name=group.name or plain(group.folder.resolve().name)) for group in groups]
    times = Counter(group.name for group in groups)
    for group in groups:
        name = group.name
        if times[name] > 1:
            name = "-".join(dict.fromkeys((*map(plain, group.folder.relative_to(raw).parts), name)))
        channels, images = zip(*sorted(group.images), strict=True) if group.images else ((), ())
        these = listed((*images, *group.labels), raw)
        fault = ""
        if len(set(channels)) != max(len(images), 1) or not group.labels:
            counts = f"{counted(len(images), 'image')}, {counted(len(group.labels), 'label')} of one name"
            fix = "each image needs one label of its name; complete them, or use --skip-bad"
            fault = f"{raw}: {these}: {counts}; {fix}"
        elif len(group.labels) > 1 and not several:
            what = f"{listed(group.labels, raw)}: {len(group.labels)} labels of one image"
            fix = "use --unite if they are one class, or --class-per-file if each is a class by its name"
            fault = f"{raw}: {what}; {fix}, or choose some with --labels"
        cases.append(Case("", name, images, tuple(group.labels), fault, channels))
    usual = Counter(case.channels for case in cases if not case.fault).most_common(1)
    for i, case in enumerate(cases):
        if usual and not case.fault and case.channels != usual[0][0]:
            found, most = (", ".join(channels) or "none" for channels in (case.channels, usual[0][0]))
            fault = f"{case.images[0]}: channels {found}, but most cases have {most}; add what is missing"
            cases[i] = case._replace(fault=fault)
    return sorted(cases, key=lambda case: case.uid)
