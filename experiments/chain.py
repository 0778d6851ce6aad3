"""What does a network make of its own prediction, again and again? Recycling from x_{t+1} (5) asks that the
SECOND of two predictions is right; the first saw the truth with noise, and nothing asks that it is right.

    python experiments/chain.py runs/hippocampus_mr-rec_xt1

noises the truth to a time t, predicts, noises the prediction to the time before, predicts, and so on, on
training patches. Prints the Dice score (percent) of every prediction. A network that has learned a cycle of
two (wrong from right, right from wrong) shows it by going up and down.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from data import InputError, augment, make_batch, open_dataset
from diffusion import gaussian, q_sample
from evaluate import dice, network
from strategies import make_denoise, one_hot
from train import load_run, make_schedule

CASES, PASSES = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, of diffusion")
    for run in parser.parse_args().runs:
        config, model, header = load_run(run)
        if not model.noisy_mask:
            raise InputError(f"{run}: no diffusion in it; give a run that has")
        schedule = make_schedule(config)
        dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
        keys = jax.random.split(jax.random.key(0), CASES)
        image, label = augment(
            make_batch(dataset, 0, 0, CASES), keys, config.patch_shape,
            rotation=0.0, scaling=0.0, translation=(0,) * len(config.patch_shape),
        )  # fmt: skip
        denoise = make_denoise(network(model), schedule, config.prediction)

        @jax.jit
        def predict(mask, t, keys, denoise=denoise, image=image, schedule=schedule):
            t = jnp.full(CASES, t)
            return denoise(image, t, q_sample(schedule, mask, t, gaussian(keys, mask)), None).x_0_hat

        print(f"{run}: Dice of prediction 1 (from the truth), 2 (from prediction 1), ...")
        for first in np.linspace(config.train_timesteps, PASSES, 9, dtype=int):
            mask, dices = one_hot(label, header["classes"]), []
            for n in range(PASSES):
                mask = predict(mask, first - n, jax.vmap(jax.random.fold_in, (0, None))(keys, n))
                found, truth = np.asarray(mask.argmax(-1)), np.asarray(label)
                dices.append(np.nanmean([dice(found == c, truth == c) for c in range(1, header["classes"])]))
            print(f"t = {first:4d}:" + "".join(f"{100 * d:8.1f}" for d in dices))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
