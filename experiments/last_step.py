"""What does a network do at the last sampling steps, where x_t has almost no noise?

    python experiments/last_step.py runs/phantom_us-rec_xT

predicts the validation cases' central patches from masks noised to smaller and smaller t: the network's
first prediction, as recycling does in training (4c), and its last but one, as in sampling. Prints the Dice
score (percent) of what it makes of either, beside the scores of what it was given. A network that gives
back what it was given has learned that x_t holds the answer. Where both columns move with t, though the
masks are the same and hardly noised, it is the number t alone that moves them; where only the second falls,
sampling shows the network other masks than training did.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from data import Batch, InputError, augment, open_dataset
from diffusion import gaussian, q_sample, respace
from evaluate import dice, network, predict_patches
from strategies import make_denoise
from train import load_run, make_schedule

CASES, DRAWS = 16, 4
TIMES = (501, 251, 100, 50, 20, 10, 5, 2, 1)


def central_patches(dataset, patch_shape):
    """Images and labels of the first validation cases."""
    cases = [dataset.load("validation", i) for i in range(min(CASES, len(dataset.uids["validation"])))]
    batches = []
    for case in cases:
        arrays = (
            case.image,
            case.label,
            np.array(case.label.shape, np.int32),
            np.array(case.spacing, np.float32),
        )
        batch = Batch(*(array[None] for array in arrays))
        keys = jax.random.split(jax.random.key(0), 1)
        nothing = {"rotation": 0.0, "scaling": 0.0, "translation": (0,) * len(patch_shape)}
        batches.append(augment(batch, keys, patch_shape, **nothing))
    return (jnp.concatenate(arrays) for arrays in zip(*batches, strict=True))


def show(run: str) -> None:
    """Prints the table of one run. Raises InputError."""
    config, model, header = load_run(run)
    if not model.noisy_mask or model.self_condition:
        raise InputError(f"{run}: give a run of diff, rec_xt1 or rec_xT")
    schedule = make_schedule(config)
    denoise = make_denoise(network(model), schedule, config.prediction)
    dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
    image, label = central_patches(dataset, config.patch_shape)
    truth = np.asarray(label)

    @jax.jit
    def again(mask, t, keys):
        t = jnp.full(len(image), t)
        return denoise(image, t, q_sample(schedule, mask, t, gaussian(keys, mask)), None).x_0_hat

    def percent(mask):
        found, foreground = np.asarray(mask.argmax(-1)), range(1, header["classes"])
        return 100 * np.nanmean([dice(found == c, truth == c) for c in foreground])

    few, options = respace(schedule, config.sampling_steps), {"prediction": config.prediction}
    draws = [jax.random.split(jax.random.key(n), len(image)) for n in range(DRAWS)]
    sampled = [2 * predict_patches(model, few, image, keys, sampler="ddpm", **options) - 1 for keys in draws]
    steps = [np.mean([percent(masks[k]) for masks in sampled]) for k in range(config.sampling_steps)]
    print(f"{run}: {len(image)} validation patches, {DRAWS} draws of noise")
    print("over the sampling steps:" + "".join(f"{d:8.2f}" for d in steps))
    print(f"           from the first ({steps[0]:.2f})     from the last but one ({steps[-2]:.2f})")
    for t in (t for t in TIMES if t <= config.train_timesteps):
        noise = [jax.vmap(jax.random.fold_in, (0, None))(keys, 1000 + t) for keys in draws]
        first, late = (
            np.mean([percent(again(masks[k], t, keys)) for masks, keys in zip(sampled, noise, strict=True)])
            for k in (0, -2)
        )
        print(f"t = {t:4d} {first:20.2f} {late:30.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, of diffusion")
    for run in parser.parse_args().runs:
        show(run)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
