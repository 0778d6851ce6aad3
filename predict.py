"""How do you get a mask for your own image, on the image's own grid?

    python predict.py runs/hippocampus_mr-rec_xT image.nii.gz -o masks

needs only a model: a run's folder, or a model file that somebody sent. Images are prepared like the training
images. For each it writes `<name>-mask` (with the image's affine, or a picture's size), `<name>.json` (the
classes, and what ran) and `<name>-overlay.png` to look at. This is research code, not for clinical use.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data import Sample
from diffusion import SAMPLERS
from evaluate import Model, clean, load
from recipes import RECIPES
from support.command_line import add_sampling_options, check_counts, described
from support.files import InputError, program, replace_file
from support.images import (
    ENDINGS, Grid, classes_on_grid, encode_like, grid_of, is_nifti, on_grid, read_channels,
)  # fmt: skip
from support.machine import prepare_machine, provenance
from support.phantoms import PHANTOMS
from support.pictures import PALETTE, overlay, png
from support.recipe import images_in


class Target(NamedTuple):
    """An image to predict, prepared as in training (`case`, whose label is empty), and the grid of its first
    file, on which the mask is written."""

    name: str
    files: tuple[Path, ...]
    case: Sample
    grid: Grid


def find_images(given: Sequence[str], dataset: str) -> list[tuple[Path, ...]]:
    """The files of every image: one file, or one per channel, typed with commas between them. A
    folder stands for all images in it. Raises InputError."""
    in_folder = RECIPES[dataset].find_images if dataset in RECIPES else images_in
    found: list[tuple[Path, ...]] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            more = in_folder(path)
        else:
            more = [tuple(Path(part) for part in ([text] if path.exists() else text.split(",")))]
        if not more:
            raise InputError(f"{path}: no images in it ({', '.join(ENDINGS)})")
        found += more
    return found


def read_target(files: Sequence[Path], model: Model) -> Target:
    """An image and its grid. Raises InputError where the model cannot take it."""
    first, facts, volumes = files[0], model.facts, model.facts.unit == "mm"
    if facts.dataset in PHANTOMS:
        raise InputError(f"{model.path}: trained on made-up images; train on real ones to predict real ones")
    for file in files:
        if file.is_file() and is_nifti(file) != volumes:
            raise InputError(f"{file}: {model.path} takes {'NIfTI files' if volumes else 'pictures'}")
    volume = read_channels(files, facts.image_channels)
    if (channels := volume.image.shape[-1]) != facts.image_channels:
        raise InputError(
            f"{first}: {channels} channels, but {model.path} was trained on {facts.image_channels}"
            + ("; give their files with commas between them" if channels < facts.image_channels else "")
        )
    grid, volume = grid_of(first, volume.label.shape), model.prepare(volume, first)
    if volume.label.ndim != len(facts.patch_shape):
        raise InputError(f"{first}: {volume.label.ndim}D, but {model.path} takes {len(facts.patch_shape)}D")
    name = re.sub(r"(\.nii)?\.[^.]+$", "", first.name, flags=re.IGNORECASE)
    case = Sample(volume.image, volume.label, volume.spacing(), name, volume.affine)
    return Target(name, tuple(files), case, grid)


def classify(probability: Float[np.ndarray, "*spatial classes"], target: Target) -> np.ndarray:
    """The most probable class at each voxel of the file, computed class by class to save memory."""
    mask = np.zeros(target.grid.shape, np.uint8)
    highest = on_grid(probability[..., 0], target.case.affine, target.grid, 1.0)
    for c in range(1, probability.shape[-1]):
        placed = on_grid(probability[..., c], target.case.affine, target.grid, 0.0)
        mask[placed > highest] = c
        highest = np.maximum(highest, placed)
    return mask


def write_prediction(
    stem: Path, model: Model, target: Target, probabilities: np.ndarray, args: argparse.Namespace
) -> None:
    """Writes `<stem>-mask` (and `-step1` ..., `-probabilities`, `-variance` if asked for), `<stem>.json`
    and `<stem>-overlay.png` of probabilities [seed, K, *spatial, classes], averaged over the seeds. The
    variance is summed over the classes and halved: with two classes, it is that of either probability."""
    facts, mean = model.facts, probabilities.mean(axis=0)
    names, classes = facts.class_names, clean(facts.dataset, mean.argmax(-1))
    # Post-processing is defined on classes; without it, probabilities give smoother outlines.
    cleaned = facts.dataset in RECIPES and RECIPES[facts.dataset].post_process
    steps = np.eye(len(names), dtype=np.float32)[classes] if cleaned else mean
    outputs: dict[str, np.ndarray] = {}
    if args.all_steps:
        outputs = {f"step{k}": classify(step, target) for k, step in enumerate(steps, 1)}
    outputs["mask"] = outputs[f"step{len(steps)}"] if args.all_steps else classify(steps[-1], target)
    variance = None
    if len(probabilities) > 1:
        variance = probabilities[:, -1].var(axis=0).sum(-1) / 2
        outputs["variance"] = on_grid(variance, target.case.affine, target.grid, 0.0)
    if args.probabilities:
        outputs["probabilities"] = classes_on_grid(mean[-1], target.case.affine, target.grid)
    saved = {}
    for what, values in outputs.items():
        ending, content = encode_like(values, target.files[0], PALETTE)
        saved[what] = f"{stem.name}-{what}{ending}"
        replace_file(stem.with_name(saved[what]), content)
    ran = {
        "images": [str(file) for file in target.files], "files": saved, "classes": dict(enumerate(names)),
        "model": str(model.path), "trained_steps": facts.step,
        "trained_on": f"{facts.dataset} ({facts.source})", "sampling_steps": len(mean),
        "seeds": len(probabilities), **provenance(),
    }  # fmt: skip
    replace_file(stem.with_name(f"{stem.name}.json"), json.dumps(ran, indent=2).encode())
    trained = f"{facts.config.get('strategy')}, {facts.step} steps on {facts.dataset} ({facts.source})"
    figure = overlay(
        target.case.image[..., 0], classes[-1], variance, names, f"{target.files[0].name}, by {trained}"
    )
    replace_file(stem.with_name(f"{stem.name}-overlay.png"), png(figure))


def predict(args: argparse.Namespace) -> None:
    """A mask for every image. Raises InputError."""
    model = load(args.model)
    out, diffusion = args.output or model.path.parent / "predictions", model.network.noisy_mask
    images = find_images(args.images, model.facts.dataset)
    if missing := [file for files in images for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    seeds = range(args.seed, args.seed + (args.seeds if diffusion else 1))
    K = args.sampling_steps if diffusion else 1
    written: set[str] = set()
    for files in tqdm(images, "images", disable=len(images) == 1):
        target = read_target(files, model)
        if target.name in written:
            raise InputError(f"{files[0]}: another image of this name was predicted before; rename one")
        written.add(target.name)
        found = [model.predict_image(target.case, sampler=args.sampler, K=K, seed=seed) for seed in seeds]
        write_prediction(out / target.name, model, target, np.stack(found), args)
    print(f"{len(images)} mask{'s' * (len(images) != 1)} in {out}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(**described(__doc__))
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="A run folder of train.py, or a model file."
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="PNG, TIFF, JPEG or NIfTI files, or folders of them; "
        "files of one channel each with commas between them: t1.nii,t1ce.nii,...",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, help="The folder to fill. Default: predictions beside the model."
    )
    parser.add_argument(
        "--sampler", default="", choices=["", *SAMPLERS], help="Default: that of the model's validation."
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="Samplings to average; 2 or more give a variance. Default: 1."
    )
    parser.add_argument("--probabilities", action="store_true", help="Also write every class's probability.")
    parser.add_argument("--all-steps", action="store_true", help="Write the mask of every sampling step.")
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    check_counts(parser, args, seed=0, seeds=1, sampling_steps=0)
    prepare_machine()
    with program():
        predict(args)


if __name__ == "__main__":
    main()
