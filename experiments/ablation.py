"""Which parts of the method matter, and what do the slips in the authors' code cost? One change at a time:

    python experiments/ablation.py --seeds 0,1,2 --at-once 2

trains `diff` and `rec_xT` on a small data set as they are, and once more with each change listed in this
file, and scores the test split. Some changes are options of train.py. The others are faults, or were tried
and rejected. They exist only here, and each replaces one function of the project while the same program
trains and samples. Further options are passed to train.py. Existing results are not computed again.
"""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from compare import dice_of, parse, test_cases
from finding import Run, carry_out, read_rows
from jax.lax import stop_gradient

import diffusion
import evaluate
import finding
import strategies
import train
from support.disk.command_line import as_typed
from support.disk.files import InputError, program
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
# Changes of sampling alone, with the networks "as it is": K (0: as in training), samples, and of the program.
SAMPLED: dict[str, tuple[int, int, list]] = {
    "told t = T k / K in sampling": (0, 1, [patch(evaluate, "respace", wrong_times)]),
    "2 sampling steps": (2, 1, []),
    "10 sampling steps": (10, 1, []),
    "20 sampling steps": (20, 1, []),
    "mean of 4 samples": (0, 4, []),
}


# --- Training and scoring -----------------------------------------------------------------------


def scored(run: Run, model: evaluate.Model, plain: evaluate.Model | None) -> list[list]:
    """The rows of finding.py; after those of "as it is", also those with the changes of SAMPLED."""
    rows, cases, name = finding.scored(run, model, plain), test_cases(model), model.facts.config.dataset
    for variant, (K, draws, changes) in SAMPLED.items() if run.variant == "as it is" else ():
        for change in changes:
            change.start()
        for sampler in diffusion.SAMPLERS:
            how = [model.sampling(sampler=sampler, K=K, seed=seed) for seed in range(draws)]
            drawn = zip(*(model.predict(cases, one) for one in how), strict=True)
            for case, same_case in zip(cases, drawn, strict=True):
                mean = np.mean([probability for _, probability in same_case], axis=0)
                rows.append([run.strategy, variant, run.seed, sampler, case.uid, *dice_of(mean, case, name)])
        mock.patch.stopall()
    return rows


def train_and_score(folder: Path, run: Run, options: list[str]) -> None:
    """`finding.train_and_score`, in a process whose program is changed."""
    for change in TRAINED[run.variant][1]:
        change.start()
    finding.train_and_score(folder, run, options, scored)


# --- The table ----------------------------------------------------------------------------------


def table(kept: dict[Run, list[list[str]]], strategy: str, seeds: Sequence[int]) -> list[list[str]]:
    """One line per change: the mean and standard deviation, over training seeds, of the test cases' mean
    Dice, and its difference from "as it is" at the last step, per seed and tested over the cases."""

    def dice(name: str, sampler: str) -> np.ndarray:  # [seed, case, step], percent
        runs = [kept.get(Run(strategy, name, seed), []) for seed in seeds]
        return 100 * np.array([[row[5:] for row in run if row[3] == sampler] for run in runs], float)

    lines = [["", *(f"{s} {of}" for s in diffusion.SAMPLERS for of in ("first", "last", "change", "p"))]]
    for name in [*TRAINED, *SAMPLED]:
        if any(Run(strategy, name, seed) not in kept for seed in seeds):
            continue
        line = [name]
        for sampler in diffusion.SAMPLERS:
            values, base = dice(name, sampler), dice("as it is", sampler)
            means = np.nanmean(values, axis=1)
            line += [f"{means[:, k].mean():.2f} ± {means[:, k].std(ddof=1):.2f}" for k in (0, -1)]
            if name == "as it is":
                line += ["", ""]
                continue
            change = means[:, -1] - np.nanmean(base, axis=1)[:, -1]
            p, _ = paired(values[..., -1].mean(axis=0), base[..., -1].mean(axis=0))
            line += [f"{change.mean():+.2f} ± {change.std(ddof=1):.2f}", show_p(p)]
        lines.append(line)
    return lines


def main() -> None:
    args, more = parse(__doc__, "runs/ablation", "0,1,2", ("diff", "rec_xT"))
    path, runs = args.runs_dir / "ablation.csv", {}
    for seed, (name, (options, _)), strategy in product(args.seeds, TRAINED.items(), args.strategies):
        if strategy == "rec_xT" or not name.startswith(RECYCLING_ONLY):
            runs[Run(strategy, name, seed)] = options
    with program():
        if len(args.seeds) < 2:
            raise InputError("--seeds needs two or more: the table shows their spread")
        carry_out(path, runs, args, more, train_and_score)
        for strategy in args.strategies:
            print(f"\n{strategy}, {args.dataset}, training seeds {as_typed(args.seeds)}; Dice (%)\n")
            print(*as_markdown(table(read_rows(path), strategy, args.seeds)), sep="\n")


if __name__ == "__main__":
    main()
