"""Male pelvic MR (Section 5.2.3): 7 institutions, in the order of `institution.txt`.

In each, the first 2 of n cases are for validation, the next int(0.75 n) - 4 for training, the rest for tests.
"""

from pathlib import Path

from data import normalise
from support.raw.images import Volume, crop, resample
from support.raw.recipe import Case, Download, Plan, Recipe, locate

NAMES = (
    "background, bladder, bone, obturator internus, transition zone, central gland, rectum, "
    "seminal vesicle, neurovascular bundle"
)


def plan(raw: Path) -> Plan:
    listed = locate(raw, "institution.txt") / "institution.txt"
    folder = locate(raw, "data") / "data"
    folder = folder / "data" if (folder / "data").is_dir() else folder  # the archive has data/data
    institutions: dict[str, list[str]] = {}
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        if len(words := line.split()) == 2:
            institutions.setdefault(words[1], []).append(words[0])
    cases = []
    for uids in institutions.values():
        trained = max(2, int(0.75 * len(uids)) - 2)
        for i, uid in enumerate(uids):
            split = "validation" if i < 2 else "train" if i < trained else "test"
            cases.append(Case(split, uid, (folder / f"{uid}_img.nii",), (folder / f"{uid}_mask.nii",)))
    return Plan(
        cases, range(9), NAMES.split(", "), "Li et al. 2022, Zenodo 7013610",
        "RAS; 0.75 x 0.75 x 2.5 mm; zero mean, unit variance; centre 256 x 256 x 48", "mm",
        counts=(411, 14, 164),
    )  # fmt: skip


def prepare(volume: Volume, path: Path) -> Volume:
    volume = resample(volume, (0.75, 0.75, 2.5), path)
    return crop(volume._replace(image=normalise(volume.image)), (256, 256, 48))


FILES = "https://zenodo.org/record/7013610/files"
RECIPE = Recipe(plan, prepare, Download(
    {name: (f"{FILES}/{name}", "") for name in ("institution.txt", "data.zip")},
    "open; its terms are on https://zenodo.org/record/7013610",
    "Y. Li et al., Prototypical few-shot segmentation for cross-institution male pelvic structures with "
    "spatial registration, 2022",
))  # fmt: skip
