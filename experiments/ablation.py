"""Which parts of the method matter, and what do the slips in the authors' code cost? One change at a time:

    python experiments/ablation.py --seeds 0,1,2 --at-once 2

trains `diff` and `rec_xT` on a small data set as they are, and once more with each change listed in this
file, and scores the test split. Some changes are options of train.py. The others are faults, or were tried
and rejected. They exist only here, and each replaces one function of the project while the same program
trains and samples. Further options are passed to train.py. Existing results are not computed again.
"""

import json
import sys
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from compare import dice_of, parse, side_by_side, test_cases, trained
from jax.lax import stop_gradient

import diffusion
import evaluate
import strategies
import train
from support.disk.command_line import as_typed
from support.disk.files import InputError, program, replace_file
from support.results.scores import as_markdown, paired, show_p

# --- Changes of the program ---------------------------------------------------------------------


def clipped_denoise(network, schedule, prediction):
    """`make_denoise` whose network sees x_t clipped to [-1, 1], as in the authors' code."""

    def clipped(image, t, x_t, x_0_hat):
        return network(image, t, jnp.clip(x_t, -1, 1), x_0_hat)

    return strategies.make_denoise(clipped, schedule, prediction)


def biased_sample_t(sampler, key, batch):
    """`sample_t` with weights T p_t, as in the authors' code; dividing by T p_t makes the loss unbiased."""
    t, weight = diffusion.sample_t(sampler, key, batch)
    return t, 1 / weight


def equal_loss(logits, x_0):
    """Cross entropy and Dice loss 1:1, where the paper has 20:1."""
    return strategies.segmentation_loss(logits, x_0) - 19 * strategies.cross_entropy(logits, x_0)


def recycle_twice(denoise, teacher, schedule, image, x_0, t, keys):
    """(4) with a second recycling half-way between T and t."""
    T = jnp.full_like(t, schedule.T)
    x_0_hat, (*firsts, keys_t) = x_0, strategies.split_keys(keys, 3)
    for time, keys_time in zip((T, (T + t) // 2), firsts, strict=True):
        x = diffusion.q_sample(schedule, x_0_hat, time, diffusion.gaussian(keys_time, x_0))
        x_0_hat = stop_gradient(teacher(image, time, x, None).x_0_hat)
    x_t = diffusion.q_sample(schedule, x_0_hat, t, diffusion.gaussian(keys_t, x_0))
    return denoise(image, t, x_t, None)


def wrong_times(schedule, K):
    """`respace`, except that the network is told t = T k / K in place of t_k, as in the authors' code."""
    right = diffusion.respace(schedule, K)
    return eqx.tree_at(lambda s: s.timestep, right, jnp.arange(K + 1) * diffusion.TIMESTEPS // K)


# --- The changes --------------------------------------------------------------------------------

patch = mock.patch.object
TWICE = strategies.STRATEGIES["rec_xT"]._replace(training_pass=recycle_twice)
FEW = ["--train-timesteps", "51"]  # so few that importance sampling sees each one often
TRAINED: dict[str, tuple[list[str], list]] = {  # options, and changes of the program
    "as it is": ([], []),
    "not told t (--time-dim 0)": (["--time-dim", "0"], []),
    "5 noise levels in training": (["--train-timesteps", "5"], []),
    "51 noise levels": (FEW, []),
    "51, importance sampling of t": ([*FEW, "--time-sampling", "importance"], []),
    "51, importance sampling, biased weights": (
        [*FEW, "--time-sampling", "importance"], [patch(train, "sample_t", biased_sample_t)]),
    "x_t clipped before the network": (
        [], [patch(module, "make_denoise", clipped_denoise) for module in (train, evaluate)]),
    "without Transformer": (["--no-transformer"], []),
    "loss 1:1": ([], [patch(train, "segmentation_loss", equal_loss)]),
    "averaged teacher (--teacher ema)": (["--teacher", "ema", "--ema-decay", "0.99"], []),
    "recycled twice": ([], [mock.patch.dict(strategies.STRATEGIES, rec_xT=TWICE)]),
}  # fmt: skip
RECYCLING_ONLY = ("averaged", "recycled")  # first words of the changes that apply to rec_xT only
SAMPLED: dict[str, tuple[dict, list]] = {  # changes of sampling alone, with the networks "as it is"
    "told t = T k / K in sampling": ({}, [patch(evaluate, "respace", wrong_times)]),
    "2 sampling steps": ({"K": 2}, []),
    "10 sampling steps": ({"K": 10}, []),
    "20 sampling steps": ({"K": 20}, []),
    "mean of 4 samples": ({"draws": 4}, []),
}


# --- Training and scoring -----------------------------------------------------------------------


def test_dice(model: evaluate.Model, sampler: str, K: int = 0, draws: int = 1) -> list[list[str]]:
    """Dice of every test case at every sampling step, for the mean probability of `draws` samples."""
    cases, name = test_cases(model), model.facts.config.dataset
    samples = [model.predict(cases, model.sampling(sampler=sampler, K=K, seed=seed)) for seed in range(draws)]
    probabilities = (np.mean([p for _, p in same_case], axis=0) for same_case in zip(*samples, strict=True))
    return [dice_of(mean, case, name) for mean, case in zip(probabilities, cases, strict=True)]


def train_and_score(folder: Path, name: str, options: list[str]) -> None:
    """Trains with one change and scores with both samplers; "as it is" also with the changes of SAMPLED."""
    extra, changes = TRAINED[name]
    for change in changes:
        change.start()
    model, ran = trained(folder, [*options, *extra])
    results = {name: {sampler: test_dice(model, sampler) for sampler in diffusion.SAMPLERS}}
    for sampled, (arguments, changes) in SAMPLED.items() if name == "as it is" else ():
        for change in changes:
            change.start()
        results[sampled] = {s: test_dice(model, s, **arguments) for s in diffusion.SAMPLERS}
        mock.patch.stopall()
    facts = {"trained_steps": model.facts.config.steps, "source": model.facts.source, **ran}
    replace_file(folder / "ablation.json", json.dumps({"facts": facts, "dice": results}).encode())


# --- The table ----------------------------------------------------------------------------------


def rows(folders: list[Path]) -> list[list[str]]:
    """One line per change: the mean and standard deviation, over training seeds, of the test cases' mean
    Dice, and its difference from "as it is" at the last step, per seed and tested over the cases."""
    read = [json.loads((folder / "ablation.json").read_text())["dice"] for folder in folders]
    names = list(dict.fromkeys(name for one in read for name in one))
    names.sort(key=list({**TRAINED, **SAMPLED}).index)

    def dice(name: str, sampler: str) -> np.ndarray:  # [seed, case, step], percent
        return 100 * np.array([one[name][sampler] for one in read if name in one], float)

    lines = []
    for name in names:
        line = [name]
        for sampler in diffusion.SAMPLERS:
            values, base = dice(name, sampler), dice("as it is", sampler)
            seeds = np.nanmean(values, axis=1)
            line += [f"{seeds[:, k].mean():.2f} ± {seeds[:, k].std(ddof=1):.2f}" for k in (0, -1)]
            if name == "as it is":
                line += ["", ""]
                continue
            change = seeds[:, -1] - np.nanmean(base, axis=1)[:, -1]
            p, _ = paired(values[..., -1].mean(axis=0), base[..., -1].mean(axis=0))
            line += [f"{change.mean():+.2f} ± {change.std(ddof=1):.2f}", show_p(p)]
        lines.append(line)
    return lines


def main() -> None:
    args, more = parse(__doc__, "runs/ablation", seeds="0,1,2", strategies="diff,rec_xT")
    folders: dict[str, list[Path]] = {strategy: [] for strategy in args.strategies}
    jobs = {}
    for seed, (number, name), strategy in product(args.seeds, enumerate(TRAINED), args.strategies):
        if strategy != "rec_xT" and name.startswith(RECYCLING_ONLY):
            continue
        folder = args.runs_dir / f"{strategy}-{number}-seed{seed}"
        folders[strategy].append(folder)
        options = ["--dataset", args.dataset, "--strategy", strategy, "--seed", str(seed), *more]
        if not (folder / "ablation.json").exists():
            jobs[folder] = name, options
    with program():
        if len(args.seeds) < 2:
            raise InputError("--seeds needs two or more: the table shows their spread")
        side_by_side(train_and_score, jobs, args.at_once)
        heads = ["", *(f"{s} {of}" for s in diffusion.SAMPLERS for of in ("first", "last", "change", "p"))]
        for strategy, made in folders.items():
            print(f"\n{strategy}, {args.dataset}, training seeds {as_typed(args.seeds)}; Dice (%)\n")
            print(*as_markdown([heads, *rows(made)]), sep="\n")


if __name__ == "__main__":
    main()
