"""How do you get a mask for your own image, on the image's own grid?

    python predict.py runs/hippocampus_mr-rec_xT image.nii.gz -o masks

needs only a model: a run's folder, or a model file that somebody sent. Images are prepared like the training
images. For each it writes `<name>-mask` (with the image's affine, or a picture's size), `<name>.json` (the
classes, and what ran) and `<name>-overlay.png` to look at. This is research code, not for clinical use.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import Sample
from diffusion import SAMPLERS
from evaluate import BLENDS, Model, Probabilities, Sampling, files_of, load
from support.disk.command_line import Parser, add_sampling_options, check_counts
from support.disk.files import InputError, program, replace_file
from support.raw.images import (
    COLOUR, ENDINGS, Grid, Volume, classes_on_grid, counted, cut, encode_like, files_in, flat, fullest_slice,
    most_probable, on_grid, plain, show_value, stem_of, turned,
)  # fmt: skip
from support.raw.pairing import LABEL_ENDINGS, by_channels, ending
from support.machine.devices import prepare_machine, provenance
from support.results.pictures import PALETTE, Panel, overlay, png


# How the name of a label ends, or that of a file that this program writes, which begins with an image's.
BESIDE = ending((*LABEL_ENDINGS, "overlay", "variance", "probabilities", "step"), r"[-_ ]?\d*")


class Target(NamedTuple):
    """An image to predict: as it was read, the grid of its first file, on which the mask is written, and
    prepared as in training (`case`, whose label is empty)."""

    files: tuple[Path, ...]
    read: Volume
    grid: Grid
    case: Sample


def find_images(given: Sequence[str], names: Sequence[str]) -> list[tuple[Path, ...]]:
    """The files of every image: one file, or one per channel, typed with commas between them. A
    folder stands for all images in it, whose channels have these names, if any. Raises InputError."""
    found: list[tuple[Path, ...]] = []
    for text in given:
        path = Path(text)
        more = [tuple(files_of(text))]
        if path.is_dir():
            alone = [(file,) for file in files_in(path, *ENDINGS)]
            more = without_masks(by_channels(path, names) if names else alone)
        if not more:
            of = f" of the channels {', '.join(names)}" if names else ""
            raise InputError(f"{path}: no images{of} in it ({', '.join(ENDINGS)})")
        found += more
    return found


def without_masks(images: Sequence[tuple[Path, ...]]) -> list[tuple[Path, ...]]:
    """The images of a folder without the masks that stand beside them, as training data has them or as this
    program writes them: files whose names are an image's and a word such as mask."""
    stems = [stem_of(files[0]) for files in images]
    known = {*stems, *(stem.removesuffix("_0000") for stem in stems)}
    masks = {stem for stem in stems if BESIDE.search(stem) and BESIDE.sub("", stem) in known}
    kept = [files for files in images if stem_of(files[0]) not in masks]
    if len(kept) < len(images):
        masks = counted(len(images) - len(kept), "mask")
        print(f"NB: left out {masks} beside the images", file=sys.stderr)
    return kept


def names_of(images: Sequence[tuple[Path, ...]]) -> list[str]:
    """The name of each image, after that of its first file, without nnU-Net's `_0000` if all have it, as the
    labels are called; if several images have the same, that of its folder stands in front. Raises InputError
    if this does not tell them apart."""
    stems = [stem_of(files[0]) for files in images]
    if all(stem.endswith("_0000") for stem in stems):
        stems = [stem.removesuffix("_0000") for stem in stems]
    names = [
        stem if stems.count(stem) == 1 else f"{files[0].resolve().parent.name}-{stem}"
        for files, stem in zip(images, stems, strict=True)
    ]
    for files, name in zip(images, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{files[0]}: another image has this name and folder's name; rename one")
    return names


def write_prediction(
    stem: Path, model: Model, target: Target, mean: Probabilities, last: Sequence[np.ndarray],
    sampling: Sampling, args: argparse.Namespace,
) -> None:  # fmt: skip
    """Writes `<stem>-mask` (and `-step1` ..., `-probabilities`, `-variance` if asked for), `<stem>.json`
    and `<stem>-overlay.png` of the probabilities, averaged over the seeds, and those of each seed's `last`
    step. Their variance is summed over the classes and halved: with two classes, it is that of either
    probability."""
    facts = model.facts
    dataset, names = facts.config.dataset, facts.class_names
    post_process = model.recipe().post_process
    # It is defined on classes; without it, probabilities give smoother outlines.
    steps = np.eye(len(names), dtype=np.float32)[post_process(mean.argmax(-1))] if post_process else mean
    kept = steps if args.all_steps else steps[-1:]
    masks = [most_probable(step, target.case.affine, target.grid) for step in kept]
    outputs = {f"step{k}": mask for k, mask in enumerate(masks, 1)} if args.all_steps else {}
    outputs["mask"] = masks[-1]
    if args.own_numbers:
        outputs |= {what: own_numbers(mask, model) for what, mask in outputs.items()}
    if len(last) > 1:
        variance = np.var(last, axis=0).sum(-1) / 2
        outputs["variance"] = on_grid(variance, target.case.affine, target.grid, 0.0)
    if args.probabilities:
        outputs["probabilities"] = classes_on_grid(mean[-1], target.case.affine, target.grid)
    encoded = {what: encode_like(values, target.files[0], PALETTE) for what, values in outputs.items()}
    saved = {what: f"{stem.name}-{what}{ending}" for what, (ending, _) in encoded.items()}
    ran = {
        "images": [str(file) for file in target.files], "files": saved, "classes": dict(enumerate(names)),
        "numbers": [n if n < COLOUR else show_value(n) for n in facts.numbers],
        "own_numbers": args.own_numbers, "threshold": facts.threshold if facts.threshold >= 0 else None,
        "channels": facts.channel_names, "blend": sampling.blend,
        "model": str(model.path), "trained_steps": facts.step,
        "trained_on": f"{dataset} ({facts.source})", "sampling_steps": len(mean),
        "seeds": len(last), **provenance(),
    }  # fmt: skip
    # First, so that what a killed program leaves is known to be its own.
    replace_file(stem.with_name(f"{stem.name}.json"), json.dumps(ran, indent=2).encode())
    for what, (_, content) in encoded.items():
        replace_file(stem.with_name(saved[what]), content)
    trained = f"{facts.config.strategy}, {facts.step} steps on {dataset} ({facts.source})"
    drawn = [masks[-1], *([outputs["variance"]] if "variance" in outputs else [])]
    read = target.read if target.read.label.shape[-1] == 1 else flat(target.read)  # one slice of any axis
    drawn = [turned(values, target.grid.affine)[0].reshape(read.label.shape) for values in drawn]
    z = fullest_slice(drawn[0])
    image, mask, *drawn = (cut(values, z) for values in (read.image[..., 0], *drawn))
    panel = Panel(image, mask, read.spacing())
    figure = overlay(panel, *drawn, names=names, title=f"{plain(target.files[0].name)}, by {trained}")
    replace_file(stem.with_name(f"{stem.name}-overlay.png"), png(figure))


def own_numbers(mask: np.ndarray, model: Model) -> np.ndarray:
    """A mask with the numbers that the classes have in the label files. Raises InputError if they are not
    known, or cannot be in a mask of this kind."""
    numbers, most = model.facts.numbers, 2**31 if model.facts.unit == "mm" else 256
    if len(numbers) != len(model.facts.class_names) or max(numbers) >= most:
        known = ", ".join(map(show_value, numbers))
        why = f"the label files had {known}" if known else "it does not know them"
        raise InputError(f"{model.path}: no mask with --own-numbers ({why}); leave the option out")
    return np.array(numbers, np.uint8 if max(numbers) < 256 else np.int32)[mask]


def check_output(out: Path, names: Sequence[str]) -> None:
    """Raises InputError if the folder holds a file that a prediction would replace, such as an image's
    own mask or JSON file. Where the JSON file of that name is one of this program, all of them are."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: this is a file; give a folder as -o")
    kinds = r"mask|overlay|variance|probabilities|step\d+"
    pattern = re.compile(rf"(.+)(?:\.json|-(?:{kinds})\.[a-z.]+)", re.I)
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        match = pattern.fullmatch(plain(path.name))
        if match and match[1] in names:
            facts = {}
            with suppress(OSError, ValueError, TypeError):
                facts = dict(json.loads((out / f"{match[1]}.json").read_bytes()))
            if not {"model", "trained_on", "files"} <= facts.keys():
                raise InputError(f"{path}: would be replaced, but is no prediction; give another -o")


def predict(args: argparse.Namespace) -> None:
    """A mask for every image. Raises InputError; with --skip-bad only if no image can be predicted."""
    model = load(args.model)
    facts, diffusion = model.facts, model.network.noisy_mask
    out = args.output or model.path.parent / "predictions"
    images = find_images(args.images, facts.channel_names)
    if facts.image_channels > 1 and facts.channel_names:
        print(f"channels, in this order: {', '.join(facts.channel_names)}", file=sys.stderr)
    seeds = range(args.seed, args.seed + (args.seeds if diffusion else 1))
    K = args.sampling_steps if diffusion else 1
    how = model.sampling(sampler=args.sampler, K=K, blend=args.blend)
    names, written = names_of(images), 0
    check_output(out, names)
    if args.own_numbers:
        own_numbers(np.zeros(0, int), model)  # raises now what it would raise after all the sampling
    if not args.skip_bad and (missing := [file for files in images for file in files if not file.is_file()]):
        raise InputError(f"{missing[0]}: no such file")  # before any of them is predicted
    for files, name in zip(tqdm(images, "images", disable=len(images) == 1), names, strict=True):
        try:
            read, grid = model.read(files)
            target = Target(files, read, grid, model.prepare(read, files[0]))
        except InputError as error:
            if not args.skip_bad:
                raise
            tqdm.write(str(error), file=sys.stderr)
            continue
        mean, last = 0.0, []
        for seed in seeds:
            found = model.predict_image(target.case, how._replace(seed=seed))
            mean, last = mean + found / len(seeds), [*last, found[-1].copy()]  # a view would keep all steps
        write_prediction(out / name, model, target, mean, last, how, args)
        written += 1
    if not written:
        raise InputError(f"{args.images[0]}: no image can be used, for the reasons above")
    if skipped := len(images) - written:
        print(f"{skipped} of {len(images)} images skipped", file=sys.stderr)
    print(f"{counted(written, 'mask')} in {out}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="A run folder of train.py, or a model file."
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="PNG, TIFF, JPEG, GIF, BMP or NIfTI files, or folders; "
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
    text = "Write the numbers that the classes had in the label files, in place of 0, 1, 2, ..."
    parser.add_argument("--own-numbers", action="store_true", help=text)
    text = "Name the images that cannot be used, and go on."
    parser.add_argument("--skip-bad", action="store_true", help=text)
    parser.add_argument(
        "--blend", default="", choices=["", *BLENDS], help="How an image of several patches is put together: "
        "by their plain mean, as in the paper; or by one with Gaussian weights, of patches that overlap by "
        "half, as in nnU-Net (slower). Default: that of the model's validation.",
    )  # fmt: skip
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    check_counts(parser, args, seed=0, seeds=1, sampling_steps=0)
    prepare_machine()
    with program():
        predict(args)


if __name__ == "__main__":
    main()
