"""How good are the masks beside nnU-Net's, and how much CPU time do both take?

    pip install nnunetv2
    python experiments/nnunet.py --dataset hippocampus_mr --methods nnU-Net:250,no_diff:1000

trains nnU-Net (version 2, Isensee et al. 2021) on a CPU, on the training cases of a data set of volumes, and
our networks with the data set's preset, each for the given number of steps. All are scored on the test cases
by the definitions of evaluate.py. nnU-Net gets the prepared images of the data set's file and plans,
preprocesses, augments, trains and predicts them as it always does (configuration 3d_fullres, epochs of 250
steps, flips at test time). Its last network is used; of ours, the best by validation.

The CPU minutes are those of training and validation, without preparation and testing. Where a training was
resumed, they are those of its last part, scaled up; a resumed training of nnU-Net draws other batches. What
is finished is kept in docs/finding/ and not trained again. Further options are passed to train.py.
"""

import argparse
import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import nibabel as nib
import numpy as np
from ablation import in_own_process
from compare import HERE, side_by_side
from finding import row, short

import evaluate
import train
from data import SPLITS, Dataset, Sample, fingerprint, open_dataset
from strategies import STRATEGIES
from support.command_line import check_counts, described
from support.files import InputError, one_line, program, replace_file
from support.images import IGNORED
from support.machine import keep_memory, provenance
from support.run_folder import read_state
from support.scores import paired, per_case, show_p

EPOCH = 250  # steps, of nnU-Net
NNUNET = "nnU-Net"
DATASET = "Dataset001_ours"  # as nnU-Net names it


class Method(NamedTuple):
    """One training."""

    name: str  # a strategy, or nnU-Net
    steps: int

    def folder(self, runs_dir: Path) -> Path:
        return runs_dir / f"{self.name}-{self.steps}"


# --- nnU-Net ------------------------------------------------------------------------------------


def cases(dataset: Dataset, *splits: str) -> Iterator[Sample]:
    """The cases of some splits. Raises InputError for what nnU-Net is not prepared for here."""
    for split in splits:
        for i in range(len(dataset.uids[split])):
            case = dataset.load(split, i)
            if case.label.ndim != 3 or (case.label == IGNORED).any():
                raise InputError(
                    f"{dataset.name}: {split}/{case.uid} is no volume, or has voxels that are ignored; "
                    "choose another data set to compare with nnU-Net"
                )
            yield case


def base_of(runs_dir: Path, dataset: Dataset) -> Path:
    """The folder of what nnU-Net prepares, another one for each split."""
    return runs_dir.absolute() / f"nnunet-{fingerprint(dataset)[:8]}"


def export(base: Path, _: None, options: list[str]) -> None:
    """Plans and preprocesses the data set for nnU-Net, with our split, in the folder `base`."""
    with open(f"{base}.txt", "a") as file, redirect_stdout(file), redirect_stderr(file), program():
        prepare(open_dataset_of(options), *(base / name / DATASET for name in ("raw", "preprocessed")))


def prepare(dataset: Dataset, raw: Path, preprocessed: Path) -> None:
    """What `export` does, once nnU-Net knows these folders."""
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True, exist_ok=True)
    for case in cases(dataset, "train", "validation"):
        affine = np.diag([*case.spacing, 1])
        nib.save(nib.Nifti1Image(case.label.astype(np.uint8), affine), raw / f"labelsTr/{case.uid}.nii.gz")
        for channel in range(dataset.image_channels):
            path = raw / f"imagesTr/{case.uid}_{channel:04}.nii.gz"
            nib.save(nib.Nifti1Image(case.image[..., channel], affine), path)
    names = dataset.channel_names or [f"channel {n}" for n in range(dataset.image_channels)]
    generate_dataset_json(
        str(raw), dict(enumerate(names)), {c: n for n, c in enumerate(dataset.class_names)},
        sum(len(dataset.uids[split]) for split in ("train", "validation")), ".nii.gz",
        license=dataset.source, converted_by="experiments/nnunet.py",
    )  # fmt: skip
    api.extract_fingerprints([1], num_processes=1)
    api.plan_experiments([1])
    api.preprocess([1], configurations=("3d_fullres",), num_processes=(1,))
    split = [{"train": dataset.uids["train"], "val": dataset.uids["validation"]}]
    replace_file(preprocessed / "splits_final.json", json.dumps(split).encode())


def trainer_of(folder: Path, plan: Path, steps: int) -> object:
    """nnU-Net's trainer, with what it has learned so far."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    saved = sorted(folder.rglob("checkpoint_final.pth")) or sorted(folder.rglob("checkpoint_latest.pth"))
    plans = json.loads((plan / "nnUNetPlans.json").read_text()) | {"continue_training": bool(saved)}
    facts = json.loads((plan / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, facts, torch.device("cpu"))
    trainer.num_epochs, trainer.save_every = steps // EPOCH, 1
    trainer.initialize()
    if saved:
        try:
            trainer.load_checkpoint(str(saved[0]))
        except Exception as error:  # nnU-Net writes it in place
            raise InputError(
                f"{saved[0]}: not readable ({one_line(error)}); delete it, and run again"
            ) from error
    torch.manual_seed(trainer.current_epoch)
    np.random.seed(trainer.current_epoch)  # which nnU-Net draws from
    return trainer


def train_nnunet(folder: Path, method: Method, options: list[str]) -> None:
    """Trains nnU-Net and leaves the scores of the test cases in scores.json."""
    # Without processes of its own, the augmentation is timed, too.
    os.environ.update(nnUNet_results=str(folder), nnUNet_n_proc_DA="0")
    with open(f"{folder}.txt", "a") as file, redirect_stdout(file), redirect_stderr(file), program():
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        ran = provenance() | {name: version(name) for name in ("nnunetv2", "torch")}
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        dataset = open_dataset_of(options)
        trainer = trainer_of(folder, base_of(folder.parent, dataset) / "preprocessed" / DATASET, method.steps)
        first = trainer.current_epoch

        def rest() -> float:
            if first < trainer.num_epochs:
                trainer.run_training()
            return 1 - first / trainer.num_epochs

        minutes = minutes_of(folder, rest)
        trainer.set_deep_supervision_enabled(False)
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.manual_initialization(
            trainer.network, trainer.plans_manager, trainer.configuration_manager,
            [trainer.network.state_dict()], trainer.dataset_json, "",
            trainer.inference_allowed_mirroring_axes,
        )  # fmt: skip
        found = []
        for case in cases(dataset, "test"):
            # As nnU-Net's reader gives a volume: channels first, and the axes z, y, x.
            image, spacing = case.image.transpose(3, 2, 1, 0), case.spacing[::-1]
            classes = predictor.predict_single_npy_array(image, {"spacing": spacing}).transpose(2, 1, 0)
            found.append((case, classes[None]))
        leave(folder, method, dataset, minutes, found, ran)


# --- Ours ---------------------------------------------------------------------------------------


def open_dataset_of(options: list[str]) -> Dataset:
    """The data set that train.py's options name."""
    config, _ = train.parse_config(options)
    return open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)


def train_ours(folder: Path, method: Method, options: list[str]) -> None:
    """Trains one of our networks and leaves the scores of the test cases, by DDPM, in scores.json."""
    keep_memory()
    with open(f"{folder}.txt", "a") as file, redirect_stdout(file), redirect_stderr(file), program():
        ran = provenance()
        more = ["--strategy", method.name, "--steps", str(method.steps), "--run-dir", str(folder)]
        config, _ = train.parse_config([*options, *more])
        first = read_state(folder / "last")[0]["step"] if (folder / "last").exists() else 0

        def rest() -> float:
            if train.train(config) is not None:
                raise InputError(f"{folder}: stopped; the same command resumes it")
            return 1 - first / method.steps

        minutes, model = minutes_of(folder, rest), evaluate.load(folder)
        dataset = model.dataset()
        found = [
            (case, evaluate.clean(model.facts.dataset, probability.argmax(-1))[-1:])
            for case, probability in model.predict(cases(dataset, "test"))
        ]
        leave(folder, method, dataset, minutes, found, ran)


def minutes_of(folder: Path, rest: Callable[[], float]) -> float:
    """The CPU minutes of a whole training. `rest` does what is left of it and returns which share of the
    whole that was. They are kept in a file, since a finished training cannot be timed again."""
    path = folder / "minutes.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.process_time()
    share = rest()
    minutes = (time.process_time() - start) / 60 / share if share else float("nan")
    replace_file(path, json.dumps(minutes).encode())
    return minutes


# --- Scores and report --------------------------------------------------------------------------

COLUMNS = ("method", "steps", "CPU minutes", "case", "dice", "hausdorff_95")  # then Dice of each class


def leave(
    folder: Path, method: Method, dataset: Dataset, minutes: float, found: list, ran: dict[str, str]
) -> None:
    """Writes a row of COLUMNS per test case, and what `ran`."""
    rows = []
    for case, classes in found:
        score = evaluate.score(classes, case, len(dataset.class_names))
        means = (f"{per_case(values)[0]:.6f}" for values in (score.dice, score.hausdorff))
        rows.append([*method, f"{minutes:.1f}", case.uid, *means, *(f"{d:.6f}" for d in score.dice[0])])
    facts = {"source": dataset.source, "classes": dataset.class_names[1:], "unit": dataset.unit, **ran}
    replace_file(folder / "scores.json", json.dumps({"facts": facts, "rows": rows}).encode())


def read(path: Path) -> tuple[dict[Method, list[list[str]]], dict]:
    """The rows of every training in a data set's file, and their facts."""
    rows: dict[Method, list[list[str]]] = {}
    if not path.exists():
        return rows, {"runs": {}}
    with open(path, newline="") as file:
        for cells in list(csv.reader(file))[1:]:
            rows.setdefault(Method(cells[0], int(cells[1])), []).append(cells)
    return rows, json.loads(path.with_suffix(".json").read_text())


def collect(path: Path, folders: dict[Method, Path]) -> tuple[dict[Method, list[list[str]]], dict]:
    """Adds the rows and facts of finished trainings to the data set's file. Returns what is in it then."""
    rows, facts = read(path)
    for method, folder in folders.items():
        if method not in rows and (folder / "scores.json").exists():
            found = json.loads((folder / "scores.json").read_text())
            rows[method] = [list(map(str, cells)) for cells in found["rows"]]
            facts |= {key: found["facts"].pop(key) for key in ("source", "classes", "unit")}
            facts["runs"][folder.name] = found["facts"]
    names = [NNUNET, *STRATEGIES]
    rows = dict(sorted(rows.items(), key=lambda item: (names.index(item[0].name), item[0].steps)))
    if rows:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*COLUMNS, *facts["classes"]])
        writer.writerows(cells for method in rows.values() for cells in method)
        replace_file(path.with_suffix(".json"), (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())
        replace_file(path, text.getvalue().encode())
    return rows, facts


def report_of(name: str, rows: dict[Method, list[list[str]]], facts: dict) -> str:
    """The table in Markdown, of the scores and their facts alone."""
    ran = {f"{one['devices']}, commit {short(one['commit'])}" for one in facts["runs"].values()}
    distances = f"HD95 ({facts['unit']})"
    heads = ["", "steps", "CPU minutes", "Dice", *facts["classes"], distances, "difference", "p"]
    lines = [
        f"# Beside nnU-Net on {name}",
        "",
        f"One training each, scored on the same {len(next(iter(rows.values())))} test cases. Dice in percent",
        "and 95 % Hausdorff distance are means over the cases. The difference is that of Dice to",
        "nnU-Net's longest training, with p of a paired t-test over the cases.",
        "",
        row(*heads),
        "|---" * len(heads) + "|",
    ]
    values = {m: {cells[3]: np.array(cells[4:], float) for cells in rows[m]} for m in rows}
    theirs = [method for method in rows if method.name == NNUNET][-1:]
    for method, mine in values.items():
        dice, distance, *classes = np.nanmean(list(mine.values()), axis=0)
        beside = ["", ""]
        if theirs and method.name != NNUNET:
            pairs = np.array([(mine[case][0], values[theirs[0]][case][0]) for case in mine])
            p = paired(pairs[:, 0], pairs[:, 1])[0]
            beside = [f"{100 * np.nanmean(pairs[:, 0] - pairs[:, 1]):+.2f}", show_p(p)]
        scores = [f"{100 * d:.2f}" for d in (dice, *classes)]
        lines.append(row(*method, rows[method][0][2], *scores, f"{distance:.2f}", *beside))
    lines += [
        "",
        "This page is made by `experiments/nnunet.py` from the scores beside it.",
        f"Hardware: {'; '.join(sorted(ran))}.",
        f"Data: {facts['source']}.",
    ]
    return "\n".join(lines) + "\n"


def methods(words: str) -> list[Method]:
    """The trainings that were asked for. Raises InputError for what is none."""
    found = []
    for word in words.split(","):
        name, _, steps = word.partition(":")
        if name not in (NNUNET, *STRATEGIES) or not steps.isdecimal() or not int(steps):
            raise InputError(f"--methods: {word!r} is no method and its steps, such as {NNUNET}:{EPOCH}")
        if name == NNUNET and int(steps) % EPOCH:
            raise InputError(
                f"--methods: nnU-Net's steps must be a multiple of {EPOCH}, the steps of an epoch"
            )
        found.append(Method(name, int(steps)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, **described(__doc__))
    text = "A data set of volumes. Default: hippocampus_mr."
    parser.add_argument("--dataset", default="hippocampus_mr", help=text)
    wanted = f"{NNUNET}:{EPOCH},no_diff:1000"
    text = f"What to train, and for how many steps. Default: {wanted}."
    parser.add_argument("--methods", default=wanted, help=text)
    parser.add_argument("--runs-dir", help="The folder of the runs. Default: runs/nnunet-<dataset>.")
    text = "How many trainings run side by side, each with CPU cores of its own. Default: 1."
    parser.add_argument("--at-once", type=int, default=1, help=text)
    args, more = parser.parse_known_args()
    check_counts(parser, args, at_once=1)
    name = args.dataset.removeprefix("folder:")
    path = HERE / "docs" / "finding" / f"nnunet-{name}.csv"
    with program():
        options = ["--dataset", args.dataset, *more]
        runs_dir = Path(args.runs_dir or f"runs/nnunet-{name}")
        folders = {method: method.folder(runs_dir) for method in methods(args.methods)}
        done, _ = collect(path, folders)
        missing = [method for method in folders if method not in done]
        if missing:
            dataset = open_dataset_of(options)
            for _ in cases(dataset, *SPLITS):
                pass
            runs_dir.mkdir(parents=True, exist_ok=True)
        if NNUNET in {method.name for method in missing}:
            if not find_spec("nnunetv2"):
                raise InputError("nnU-Net is not installed; run: pip install nnunetv2")
            base = base_of(runs_dir, dataset)
            places = {f"nnUNet_{folder}": f"{base / folder}" for folder in ("raw", "preprocessed")}
            os.environ.update(places, nnUNet_n_proc_DA="1", nnUNet_compile="false")
            if not (base / "preprocessed" / DATASET / "splits_final.json").exists():
                in_own_process(export, base, None, options)
        os.environ["JAX_PLATFORMS"] = "cpu"  # in the processes of the trainings
        train_one = {method: train_nnunet if method.name == NNUNET else train_ours for method in missing}
        jobs = [
            partial(in_own_process, train_one[method], folders[method], method, options) for method in missing
        ]
        side_by_side(jobs, args.at_once)
        page = report_of(args.dataset, *collect(path, folders))
        replace_file(path.with_suffix(".md"), page.encode())
        print(f"{path.with_suffix('.md')}: the report")


if __name__ == "__main__":
    main()
