"""What does a network make of its own predictions?

    python experiments/passes.py runs/hippocampus_mr-rec_xt1 runs/hippocampus_mr-rec_xT

prints two tables of Dice scores (percent) for every run of diffusion.

The first, on training patches, adds the noise of a time t to the truth, predicts, adds the noise of
t - 1 to the prediction, predicts again, and so on. Recycling from x_{t+1} (5) requires only the
SECOND of two predictions to be right; the first, made from the noisy truth, is not trained. If a
network has learned a cycle of two (wrong from right, right from wrong), its scores go up and down.

The second is about the last sampling steps, where x_t has almost no noise. On validation patches, it
adds the noise of smaller and smaller t to predictions, and lets the network predict once more: from
its first prediction, as recycling does in training (4c), and from its last but one, as in sampling.
A network that returns its input has learned that x_t holds the answer. If both columns change with
t, although the masks are the same and hardly noisy, the number t alone is the cause; if only the
second falls, the masks of sampling differ from those of training.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import evaluate
from data import Dataset
from diffusion import Image, Keys, Mask, Schedule, gaussian, make_schedule, q_sample, respace
from strategies import batched, make_denoise, one_hot
from support.command_line import Parser, described
from support.files import InputError, program
from support.images import box_of, centre_start
from support.machine import ignore_absent_tpu, keep_memory

CASES = {"train": 8, "validation": 16}  # how many of the first cases
PASSES = 4
DRAWS = 4  # of the noise
TIMES = (501, 251, 100, 50, 20, 10, 5, 2, 1)


def patches(dataset: Dataset, split: str, patch_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the first cases of a split, a patch from the middle of each."""
    cases = [dataset.load(split, i) for i in range(min(CASES[split], len(dataset.uids[split])))]
    starts = [centre_start(case.label.shape, patch_shape) for case in cases]
    return tuple(
        np.stack([box_of(getattr(case, what), patch_shape, a) for case, a in zip(cases, starts, strict=True)])
        for what in ("image", "label")
    )


def percent(mask: Mask, label: np.ndarray) -> float:
    """Mean Dice over the foreground classes, of all patches together."""
    found, classes = np.asarray(mask.argmax(-1)), mask.shape[-1]
    return 100 * np.nanmean([evaluate.dice(found == c, label == c) for c in range(1, classes)])


def predictor(model: evaluate.Model) -> tuple[Schedule, Callable[[Image, Mask, int, Keys], Mask]]:
    """The schedule of training, and a program that adds the noise of t to a mask and predicts."""
    facts = model.facts
    schedule = make_schedule(facts.schedule, facts.train_timesteps)
    denoise = make_denoise(batched(model.network), schedule, facts.prediction)

    @jax.jit
    def predict(image: Image, mask: Mask, t: int, keys: Keys) -> Mask:
        t = jnp.full(len(image), t)
        return denoise(image, t, q_sample(schedule, mask, t, gaussian(keys, mask)), None).x_0_hat

    return schedule, predict


def noise_keys(seed: int, use: int, count: int) -> Keys:
    """A key for every patch. What is drawn for one use does not depend on the others."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), use), count)


def again_and_again(model: evaluate.Model, dataset: Dataset) -> None:
    """Prints the first table."""
    image, label = patches(dataset, "train", model.facts.patch_shape)
    _, predict = predictor(model)
    print(f"\n{len(image)} training patches: prediction 1 (from the truth), 2 (from prediction 1), ...\n")
    for first in np.linspace(model.facts.train_timesteps, PASSES, 9, dtype=int):
        mask, dices = one_hot(label, model.network.classes), []
        for n in range(PASSES):
            mask = predict(image, mask, first - n, noise_keys(0, n, len(image)))
            dices.append(percent(mask, label))
        print(f"t = {first:4d}:" + "".join(f"{d:8.1f}" for d in dices))


def at_the_end(model: evaluate.Model, dataset: Dataset) -> None:
    """Prints the second table."""
    facts, network = model.facts, model.network
    image, label = patches(dataset, "validation", facts.patch_shape)
    schedule, predict = predictor(model)
    few = respace(schedule, facts.sampling_steps)
    sample = evaluate.prediction_program(network, facts.patch_shape, "ddpm", facts.prediction)
    keys = [noise_keys(n, 0, len(image)) for n in range(DRAWS)]
    draws = [2 * sample(network, few, image, key) - 1 for key in keys]
    masks = np.mean([[percent(mask, label) for mask in steps] for steps in draws], axis=0)
    print(f"\n{len(image)} validation patches, {DRAWS} draws of noise\n")
    print("over the sampling steps:" + "".join(f"{d:8.2f}" for d in masks))
    print(f"           from the first ({masks[0]:.2f})     from the last but one ({masks[-2]:.2f})")
    for t in (t for t in TIMES if t <= facts.train_timesteps):
        columns = []
        for k in (0, -2):
            again = [predict(image, x[k], t, noise_keys(n, t, len(image))) for n, x in enumerate(draws)]
            columns.append(np.mean([percent(mask, label) for mask in again]))
        print(f"t = {t:4d} {columns[0]:20.2f} {columns[1]:30.2f}")


def main() -> None:
    parser = Parser(**described(__doc__))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders of train.py, or model files.")
    text = "Where the HDF5 file is. Default: where it was in training."
    parser.add_argument("--data-dir", default="", help=text)
    args = parser.parse_args()
    ignore_absent_tpu()
    keep_memory()
    with program():
        for run in args.runs:
            model = evaluate.load(run)
            network = model.network
            if not network.noisy_mask or network.self_condition or model.facts.sampling_steps < 2:
                raise InputError(f"{run}: give one of diff, rec_xt1 or rec_xT, with 2 or more sampling steps")
            dataset = model.dataset(args.data_dir)
            print(f"{run}: Dice scores (%)")
            again_and_again(model, dataset)
            at_the_end(model, dataset)


if __name__ == "__main__":
    main()
