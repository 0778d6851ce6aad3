"""Which image belongs to which label in a folder as it came from its archive?

The first of these rules that finds a pair is used, and folders may lie at any depth. Upper and lower case do
not matter in the lists of names below.

1. Two folders beside each other, one of IMAGE_FOLDERS and one of LABEL_FOLDERS, with files of the same names.
   Endings are allowed: a label may have one of LABEL_ENDINGS, an image one of IMAGE_ENDINGS or CHANNELS.

       images/  a.png   b.png                imagesTr/  a_0000.nii.gz   a_0001.nii.gz   (two channels)
       masks/   a.png   b_mask.png           labelsTr/  a.nii.gz

   Two such folders directly in the given one are used alone; otherwise all such folders below it are.

2. Images and labels in one folder, or in a folder per case. A label has one of LABEL_ENDINGS, perhaps with a
   number; its image has the same name without it, or with one of IMAGE_ENDINGS, or is several files that end
   in CHANNELS. What no label belongs to is left out.

       benign/      x (1).png   x (1)_mask.png   x (1)_mask_1.png          (one image with two labels)
       patient001/  patient001_frame01.nii.gz   patient001_frame01_gt.nii.gz
       case_002/    case_002_flair.nii.gz   case_002_t1.nii.gz   case_002_t2.nii.gz   case_002_seg.nii.gz
       case_003/    image.nii.gz   label.nii.gz                            (then the folder names the case)

3. Two patterns that are typed, which replace the rules above. `{}` is what an image and its label have in
   common, and `*` any other text; where there is no `{}`, the only `*` has that meaning. A pattern is
   compared with the end of a path, from the name of a folder or a file on. Several patterns with commas
   between them are channels.

       --images "images/{}_training.tif" --labels "1st_manual/{}_manual1.gif"
       --images "{}_pre.nii,{}_post.nii" --labels "{}_lesion.nii"

Where two answers are possible, such as two folders of labels, the answer is an error, not a guess.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from support.files import InputError
from support.images import ENDINGS

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


LABEL = ending(LABEL_ENDINGS, r"[-_ ]?\d*")
IMAGE = ending((*IMAGE_ENDINGS, *CHANNELS))
PATIENT = r"^[a-zA-Z]*\d+"  # with which many names of cases begin


class Pair(NamedTuple):
    """The files of a case: its image, in as many files as it has channels, and its labels. `fault` says
    why they cannot be used as they are, or is empty."""

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    channels: tuple[str, ...]  # by which the names of the images' files differ
    fault: str = ""


class Found(NamedTuple):
    """What a folder holds: its cases in the order of their names, and the files that are in none."""

    pairs: list[Pair]
    others: list[Path]


class Group(NamedTuple):
    """Files that have a name in common: images, each with its channel, and labels."""

    folder: Path
    images: list[tuple[str, Path]]
    labels: list[Path]


def find_pairs(raw: Path, images: str = "", labels: str = "") -> Found:
    """The cases of a folder by the rules above; `images` and `labels` are the patterns of rule 3, or empty.
    Raises InputError where none is found, or several answers are possible."""
    files = files_below(raw)
    readable = [path for path in files if path.name.lower().endswith(ENDINGS)]
    if bool(images) != bool(labels):
        raise InputError("--images and --labels belong together; type both")
    if images:
        groups = by_patterns(raw, readable, images, labels)
    else:
        groups = in_two_folders(raw, readable) or by_endings(readable)
    if not groups:
        what = f"no {', '.join(ENDINGS)} files in it"
        if readable:
            some = ", ".join(str(path.relative_to(raw)) for path in (readable[0], readable[-1]))
            what = f"no pairs of images and labels among {len(readable)} files, such as {some}"
        fix = "put them in the folders images and labels, or end the labels' names in _mask, or type how they"
        example = '--images "{}.tif" --labels "{}_manual1.gif"'
        raise InputError(f"{raw}: {what}; {fix} are named, such as {example}")
    pairs = checked(raw, groups)
    used = {path for pair in pairs for path in pair.images + pair.labels}
    return Found(pairs, [path for path in files if path not in used])


def summary(found: Found, raw: Path, group: str) -> str:
    """What was found, in lines: how many cases, three of them, and what is left out. Where no `group` of
    cases was asked for but folders may be patients, it says so."""
    pairs = [pair for pair in found.pairs if not pair.fault]
    channels = next((pair.channels for pair in pairs if len(pair.channels) > 1), ())
    lines = [f"{len(pairs)} images with labels" + (f"; channels: {', '.join(channels)}" if channels else "")]
    examples = sorted({0, len(pairs) // 2, len(pairs) - 1}) if pairs else []
    for pair in (pairs[i] for i in examples):
        lines.append(f"  {pair.name}: {listed(pair.images, raw)} with {listed(pair.labels, raw)}")
    if found.others:
        some = listed(found.others[:3], raw)
        lines.append(f"{len(found.others)} other files left out, such as {some}")
    folders = Counter(
        pair.labels[0].parent for pair in pairs if pair.labels[0].parent == pair.images[0].parent
    )
    shared = [folder for folder, count in folders.items() if count > 1]
    if not group and len(folders) > 2 and shared:
        fix = f'if it is a patient, keep its cases in one split with --group, such as --group "{PATIENT}"'
        lines.append(f"NB: {shared[0].relative_to(raw)} holds {folders[shared[0]]} cases; {fix}")
    return "\n".join(lines)


def listed(paths: Sequence[Path], raw: Path) -> str:
    """Files with their folders, each folder once."""
    folders = [None, *(path.parent for path in paths)]
    shown = (
        path.name if path.parent == before else str(path.relative_to(raw))
        for path, before in zip(paths, folders, strict=False)
    )  # fmt: skip
    return ", ".join(shown)


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


def plain(text: str | Path) -> str:
    """A name as NFC: systems encode accents in several ways, and names of different machines shall match."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode(errors="replace"))


def stem_of(path: Path) -> str:
    """A file's name without .png, .nii.gz and the like."""
    return plain(path.name[: -max(len(e) for e in ENDINGS if path.name.lower().endswith(e))])


def without(pattern: re.Pattern, stem: str) -> tuple[str, str]:
    """A name without such an ending, and the ending; the whole name where it has none."""
    match = pattern.search(stem)
    return (stem[: match.start()], match[1].lower()) if match else (stem, "")


# --- Channels of images without labels ----------------------------------------------------------


def channel_of(file: Path, names: Sequence[str]) -> tuple[str, str]:
    """Which of the channels a file holds, by the names that `find_pairs` gave them, and what it has in common
    with the files of the other channels; two empty texts where its name does not say which."""
    for name in names:
        _, _, pattern = name.partition(" ")
        if pattern:  # of rule 3
            match = compiled("--images", pattern).search(plain(file.as_posix()))
            if match:
                return name, match["name"]
        else:
            common, channel = without(ending([re.escape(name)]), stem_of(file))
            if channel:
                return name, str(file.parent / common)
    return "", ""


def check_channels(files: Sequence[Path], names: Sequence[str]) -> None:
    """Raises InputError where files are not in the order of their channels, as far as their names say it."""
    for file, name in zip(files, names, strict=True):
        if (found := channel_of(file, names)[0]) not in ("", name):
            why = f"by its name the channel {found}, but given as {name}"
            raise InputError(f"{file}: {why}; give the files in the order {', '.join(names)}")


def by_channels(folder: Path, names: Sequence[str]) -> list[tuple[Path, ...]]:
    """The files of every image in a folder and below, in the order of their channels. A file whose name says
    no channel is left out. Raises InputError where an image lacks a channel, or has one twice."""
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


def grouped(folder: Path, images: Sequence[Path], labels: Sequence[Path]) -> dict[str, Group]:
    """Images and labels by what their names have in common."""
    stems, groups = {stem_of(path) for path in images}, {}
    for path in labels:
        stem = stem_of(path)
        name = stem if stem in stems else without(LABEL, stem)[0]
        groups.setdefault(name, Group(folder, [], [])).labels.append(path)
    labelled = set(groups)
    waiting = labelled - stems  # labels whose images have another name
    for path in images:
        name, channel = stem_of(path), ""
        shorter, word = without(IMAGE, name)
        if name not in labelled and shorter in waiting:
            name, channel = shorter, "" if word in IMAGE_ENDINGS else word
        groups.setdefault(name, Group(folder, [], [])).images.append((channel, path))
    return groups


def complete(groups: Iterable[Group]) -> bool:
    return any(group.images and group.labels for group in groups)


def in_two_folders(raw: Path, files: Sequence[Path]) -> list[tuple[str, Group]]:
    """Rule 1. Raises InputError where folders of several names could hold the images, or the labels."""
    kinds = [{name.lower() for name in names} for names in (IMAGE_FOLDERS, LABEL_FOLDERS)]
    parents: dict[Path, tuple[list[Path], list[Path]]] = {}
    inside = by_folder(files)
    for folder in inside:
        for kind, names in enumerate(kinds):
            if folder != raw and folder.name.lower() in names:
                parents.setdefault(folder.parent, ([], []))[kind].append(folder)
    parents = {parent: both for parent, both in parents.items() if all(both)}
    parents = {raw: parents[raw]} if raw in parents else parents
    found: list[tuple[str, Group]] = []
    for parent, both in parents.items():
        for folders, what in zip(both, ("images", "labels"), strict=True):
            if len(folders) > 1:
                names = " and ".join(folder.name for folder in folders)
                fix = typed(parent, inside[both[0][0]][0], inside[both[1][0]][0])
                raise InputError(f"{parent}: {names} may each hold the {what}; choose, as in {fix}")
        ((images,), (labels,)) = both
        found += grouped(parent, inside[images], inside[labels]).items()
    return found if complete(group for _, group in found) else []


def by_endings(files: Sequence[Path]) -> list[tuple[str, Group]]:
    """Rule 2. Raises InputError where the labels have several endings."""
    found: list[tuple[str, Group]] = []
    for folder, here in by_folder(files).items():
        labels = {path for path in here if LABEL.search(stem_of(path))}
        groups = grouped(folder, [path for path in here if path not in labels], sorted(labels))
        found += [(name, group) for name, group in groups.items() if group.labels]
    whole = [group for _, group in found if group.images]
    kinds = {without(LABEL, stem_of(path))[1]: (group, path) for group in whole for path in group.labels}
    if len(kinds) > 1:
        group, path = min(kinds.values(), key=lambda item: item[1])
        fix = typed(group.folder, group.images[0][1], path)
        names = " and ".join(f"_{kind}" for kind in sorted(kinds))
        raise InputError(f"{group.folder}: {names} may each end the labels' names; choose, as in {fix}")
    # Labels of another kind, none of which has an image, are no labels of these.
    return [
        (name, group)
        for name, group in found
        if any(without(LABEL, stem_of(path))[1] in kinds for path in group.labels)
    ]


def by_patterns(raw: Path, files: Sequence[Path], images: str, labels: str) -> list[tuple[str, Group]]:
    """Rule 3. Raises InputError where a pattern cannot be understood, or no image has a label."""
    of_label = compiled("--labels", labels)
    of_image = [(pattern, compiled("--images", pattern)) for pattern in images.split(",")]
    groups: dict[str, Group] = {}
    for path in files:
        place = plain(path.relative_to(raw).as_posix())
        if match := of_label.search(place):  # a label that looks like an image is none
            groups.setdefault(match["name"], Group(raw, [], [])).labels.append(path)
            continue
        channels = 0
        for number, (pattern, of_channel) in enumerate(of_image, 1):
            if match := of_channel.search(place):
                channels += 1
                channel = f"{number:02d} {pattern}" if len(of_image) > 1 else ""
                groups.setdefault(match["name"], Group(raw, [], [])).images.append((channel, path))
        if channels > 1:
            raise InputError(f"{path}: {channels} patterns of --images match it; make them differ")
    if not complete(groups.values()):
        names = [
            f"{len(found)} cases" + (f" ({{}} is {found[0]})" if found else "")
            for found in (
                [name for name, group in groups.items() if group.images],
                [name for name, group in groups.items() if group.labels],
            )
        ]
        counts = f'--images "{images}" matches {names[0]}, and --labels "{labels}" {names[1]}'
        raise InputError(f"{raw}: {counts}, without a common {{}}; correct the patterns")
    return list(groups.items())


def compiled(option: str, pattern: str) -> re.Pattern:
    """A pattern of rule 3 as a regular expression, whose group `name` is the common part."""
    if "{}" not in pattern and pattern.count("*") != 1:
        raise InputError(f"{option} {pattern}: write {{}} for what an image and its label have in common")
    parts = re.split(r"(\{\}|\*)", plain(pattern if "{}" in pattern else pattern.replace("*", "{}")))
    first = parts.index("{}")
    meaning = {"{}": "(?P=name)", "*": "[^/]*"}
    text = (r"(?P<name>[^/]+)" if i == first else meaning.get(p, re.escape(p)) for i, p in enumerate(parts))
    return re.compile(rf"(?:^|/){''.join(text)}$", re.IGNORECASE)


def typed(folder: Path, image: Path, label: Path) -> str:
    """The two options that would name this image and this label, and others like them."""
    stems = [stem_of(image), stem_of(label)]
    common = os.path.commonprefix(stems).rstrip("-_. ")  # noqa: RUF071  (characters are meant)
    if not common:
        backwards = os.path.commonprefix([stem[::-1] for stem in stems])  # noqa: RUF071
        common = backwards[::-1].lstrip("-_. ")
    options = []
    for (what, path), stem in zip((("images", image), ("labels", label)), stems, strict=True):
        name = (stem.replace(common, "{}", 1) if common else "{}") + plain(path.name)[len(stem) :]
        options.append(f'--{what} "{path.relative_to(folder).with_name(name).as_posix()}"')
    return " ".join(options)


# --- The cases ----------------------------------------------------------------------------------


def checked(raw: Path, groups: Sequence[tuple[str, Group]]) -> list[Pair]:
    """The cases of all groups. One that lacks a file, or has one too many, has a fault. Where files of one
    name lie in several folders, the folder stands before the name."""
    cases: list[Pair] = []
    groups = [(name or plain(group.folder.resolve().name), group) for name, group in groups]
    times = Counter(name for name, _ in groups)
    for name, group in groups:
        if times[name] > 1:
            name = "-".join(dict.fromkeys((*map(plain, group.folder.relative_to(raw).parts), name)))
        channels, images = zip(*sorted(group.images), strict=True) if group.images else ((), ())
        these = listed((*images, *group.labels), raw)
        fault = ""
        if len(set(channels)) != max(len(images), 1) or not group.labels:
            counts = f"{len(images)} images, {len(group.labels)} labels"
            fault = f"{raw}: {these}: {counts} of one name; each image needs one label of its name"
        cases.append(Pair(name, images, tuple(group.labels), channels, fault))
    usual = Counter(case.channels for case in cases if not case.fault).most_common(1)
    for i, case in enumerate(cases):
        if usual and not case.fault and case.channels != usual[0][0]:
            found, most = (", ".join(channels) or "none" for channels in (case.channels, usual[0][0]))
            fault = f"{case.images[0]}: channels {found}, but most cases have {most}; add what is missing"
            cases[i] = case._replace(fault=fault)
    return sorted(cases, key=lambda case: case.name)
