"""What do methods of other papers do in this one's frame: the same network, loss, steps, seeds and scores?

Flow matching is a schedule here, because the network predicts x_0; the others are strategies. Each came in
through `SCHEDULES` or `STRATEGIES`, as a reader's own would.

    python experiments/beyond.py --dataset phantom_us --at-once 2

trains and scores what docs/beyond.md predicts, as finding.py does and beside its runs, and makes the tables
of that page. The scores are kept in docs/finding/, and the same command resumes.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from compare import HERE, parse
from finding import PLAIN, TWO, Run, carry_out, chosen, read_rows
from jax.lax import stop_gradient
from results import (
    SEEDS, STEPS, Dice, Key, Study, cell, effect_of, ends, filled, interval, table, trainings,
    within_two_points,
)  # fmt: skip

import finding
from diffusion import SCHEDULES, TIMESTEPS, Schedule, ddpm_step, gaussian, q_sample, respace
from settings import PRESETS
from strategies import STRATEGIES, Denoised, Strategy, one_hot
from support.disk.files import program, replace_file

PAGE, EFFECTS = HERE / "docs" / "beyond.md", HERE / "docs" / "finding" / "beyond.md"
K = STEPS  # of sampling
GAMMA = 0.1  # how far `perturbed_input` perturbs
PASSES = {"rec_xT": 2, "self_aligned": 2, "on_policy": K}  # in a training step; the others make one

# --- The methods --------------------------------------------------------------------------------


def flow_schedule(T: int = TIMESTEPS, s_T: float = 0.999) -> Schedule:
    """Flow matching on straight paths, z_s = (1 - s) x_0 + s eps (Liu et al. 2022, arXiv 2209.03003; Lipman
    et al. 2022, arXiv 2210.02747). x = z_s / sqrt((1 - s)^2 + s^2) has

        alpha_bar = (1 - s)^2 / ((1 - s)^2 + s^2),

    and Euler's steps along dz/ds = eps_hat - x_0_hat are those of DDIM. Row t is s = s_T t / T. At s = 1
    nothing of x_0 is left, and no step of DDPM or DDIM could begin there, so that s_T is a little less.
    """
    s = s_T * np.arange(T + 1) / T
    alpha_bar, rest = (1 - s) ** 2 / ((1 - s) ** 2 + s**2), s**2 / ((1 - s) ** 2 + s**2)
    beta = np.append(0, 1 - alpha_bar[1:] / alpha_bar[:-1])
    tables = (jnp.asarray(table, jnp.float32) for table in (beta, alpha_bar, rest))
    return Schedule(*tables, jnp.arange(T + 1))


def fixed_T(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """f(x_T, T) of pure noise, whatever t is: between no diffusion and (3). The noise holds nothing of the
    mask, and one step of sampling is all there is."""
    return denoise(image, jnp.full_like(t, schedule.T), gaussian(keys, x_0), None)


def on_policy(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """x_t as sampling makes it, by K - k steps of DDPM from noise (§3.1, Inference), at one of its K times
    t_k, which is drawn evenly by t. It is where (4) leads to: (4c) noises a prediction anew, but sampling
    goes on with the noise that it has."""
    few = respace(schedule, K)
    rows = jnp.searchsorted(schedule.timestep, few.timestep)  # those of `schedule`
    fold_in = jax.vmap(jax.random.fold_in, (0, None))

    def step(x, k):
        at = jnp.full_like(t, k)
        x_0_hat = teacher(image, rows[at], x, None).x_0_hat
        x = ddpm_step(few, x_0_hat, x, at, gaussian(fold_in(keys, k), x_0))
        return x, x

    x_T = gaussian(fold_in(keys, 0), x_0)
    path = jnp.append(x_T[None], jax.lax.scan(step, x_T, jnp.arange(K, 1, -1))[1], axis=0)
    k = 1 + (t - 1) * K // schedule.T
    x_t = stop_gradient(path[K - k, jnp.arange(len(t))])
    return denoise(image, rows[k], x_t, None)


def self_aligned(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Self-aligned denoising (Ji et al. 2023, arXiv 2303.17559, and its code): as (4), but of the prediction
    only the class of each voxel is kept, and the noise is the same again. Needs t < T."""
    eps = gaussian(keys, x_0)
    x_0_hat = teacher(image, jnp.full_like(t, schedule.T), eps, None).x_0_hat
    mask = one_hot(jnp.argmax(x_0_hat, axis=-1), x_0.shape[-1])  # has no gradient
    return denoise(image, t, q_sample(schedule, mask, t, eps), None)


def perturbed_input(denoise, teacher, schedule, image, x_0, t, keys) -> Denoised:
    """Input perturbation (Ning et al. 2023, arXiv 2301.11706): (3) with x_t = sqrt(alpha_bar_t) x_0 +
    sqrt(1 - alpha_bar_t) (eps + gamma xi), where xi is noise, too, and gamma = 0.1. A network that predicts
    eps must tell the two apart. One that predicts x_0 sees noise that is sqrt(1 + gamma^2) as strong."""
    eps = jnp.sqrt(1 + GAMMA**2) * gaussian(keys, x_0)
    return denoise(image, t, q_sample(schedule, x_0, t, eps), None)


METHODS = {
    "fixed_T": Strategy(fixed_T, "Diff. $t = T$"),
    "on_policy": Strategy(on_policy, "Diff. on policy"),
    "self_aligned": Strategy(self_aligned, "Diff. self-aligned", below_T=True),
    "perturbed": Strategy(perturbed_input, "Diff. perturbed"),
}


@contextmanager
def known() -> Iterator[None]:
    """While it lasts, every program knows the methods by their names."""
    with mock.patch.dict(STRATEGIES, METHODS), mock.patch.dict(SCHEDULES, flow=flow_schedule):
        yield


# --- What a noisy mask gives away ---------------------------------------------------------------


def snr(schedule: Schedule) -> np.ndarray:
    """alpha_bar_t / (1 - alpha_bar_t) for t = 1..T."""
    return np.asarray(schedule.alpha_bar, float)[1:] / np.asarray(schedule.one_minus_alpha_bar, float)[1:]


def gives_away(schedule: Schedule, voxels: int = 1) -> float:
    """The share of times at which less than 1 % of the voxels of a mask of two classes is wrong, if each
    is read from x_t alone, as the class of its larger value: Phi(-sqrt(2 SNR)) of them are. The mean of n
    `voxels` of one class has n times the signal-to-noise ratio."""
    return float(np.mean(scipy.stats.norm.sf(np.sqrt(2 * voxels * snr(schedule))) < 0.01))


def matching_b(schedule: Schedule, other: Schedule, voxels: int = 1) -> float:
    """The b with which `schedule` gives the mask away up to the same time as `other` does at b = 1."""
    last = round(gives_away(other, voxels) * other.T) - 1
    return float(np.sqrt(snr(other)[last] / snr(schedule)[last]))


# --- The predictions, and what the scores say of them -------------------------------------------

ONE_STEP = "one step"  # fixed_T has no other, as no_diff
TENTH = "a tenth, from diff"
TUNED = ("diff", "rec_xT", "self_aligned")  # with it
MATCHED = {"cosine": "cosine, b = 0.476", "flow": "flow, b = 0.344"}  # by `matching_b`
BELOW, ABOVE, WITHIN = "below 0", "above 0", "within -2 to 2"


class Beyond(Study):
    """What the trainings on one data set say of the predictions. A key is the number of a prediction, what it
    says of an effect, and the effect."""

    def planned(self) -> dict[Key, Dice]:
        first, last, gain, found = self.first, self.last, self.gain, {}
        both = {"first step": first, "gain": gain}
        for schedule, matched in MATCHED.items():
            for name, score in both.items():
                change = score("diff", schedule) - score("diff")
                found["1", BELOW, f"diff, {schedule} minus linear, {name}"] = change
            change = [last(strategy, schedule) - last(strategy) for strategy in TWO]
            name = f"{schedule} minus linear, for diff minus for rec_xT, last step"
            found["2", BELOW, name] = change[0] - change[1]
            for strategy, (name, score) in product(TWO, both.items()):
                change = score(strategy, matched) - score(strategy)
                found["3", WITHIN, f"{strategy}, {matched}, minus linear, {name}"] = change
        found["4", WITHIN, "fixed_T minus no_diff"] = last("fixed_T", ONE_STEP) - last("no_diff")
        found["5", ABOVE, "on_policy, gain"] = gain("on_policy")
        found["5", WITHIN, "on_policy minus rec_xT, last step"] = last("on_policy") - last("rec_xT")
        found["6", WITHIN, "self_aligned minus rec_xT, last step"] = last("self_aligned") - last("rec_xT")
        found["7", WITHIN, "perturbed minus diff, last step"] = last("perturbed") - last("diff")
        found["7", WITHIN, "perturbed minus diff, gain"] = gain("perturbed") - gain("diff")
        diff, rec_xT, self_aligned = (last(name, TENTH) for name in TUNED)
        found["8", WITHIN, "rec_xT, a tenth minus whole, last step"] = rec_xT - last("rec_xT")
        found["8", ABOVE, "rec_xT minus diff, a tenth, last step"] = rec_xT - diff
        found["8", WITHIN, "self_aligned minus rec_xT, a tenth, last step"] = self_aligned - rec_xT
        return found

    def fate(self, key: Key) -> str:
        """An effect, and whether it is as predicted."""
        effect = self.effects[key]
        if effect is None or effect.seeds < SEEDS:
            return "-"
        if key[1] == WITHIN:
            shown, against = within_two_points([effect])
        else:
            sure, rises = self.p[key] < 0.05, effect.mean > 0
            shown, against = sure and rises == (key[1] == ABOVE), sure and rises == (key[1] == BELOW)
        return f"{cell(self, key)}: {'as predicted' if shown else 'against it' if against else 'open'}"


def predictions(studies: list[Beyond]) -> list[str]:
    """Every effect of the plan: what was predicted, and what came out."""
    keys = sorted(studies[0].effects, key=lambda key: key[0])
    lines = [[*key, *(study.fate(key) for study in studies)] for key in keys]
    return table(["", "predicted", "effect", *(study.name for study in studies)], lines)


# --- The pages ----------------------------------------------------------------------------------


def scores(folder: Path, studies: list[Beyond]) -> list[str]:
    """What every training costs and reaches: passes of the network per training step and per image, on each
    data set Dice at both ends and the gain, and on the last one seconds per training step."""
    lines = []
    for strategy, variant in TRAININGS:
        passes = f"{PASSES.get(strategy, 1)}, {1 if strategy in ('no_diff', 'fixed_T') else K}"
        line = [f"`{strategy}`" + f", {variant}" * (variant != PLAIN), passes]
        for study in studies:
            gain = effect_of(study.gain(strategy, variant))
            line += [ends(study, strategy, variant) + (f", {interval(gain)}" if gain else "")]
        lines.append([*line, seconds_of(folder / f"beyond-{studies[-1].name}.json", strategy, variant)])
    return table(["", "passes", *(study.name for study in studies), "seconds"], lines)


def seconds_of(path: Path, strategy: str, variant: str) -> str:
    """The least seconds per step of a method's trainings, since others may have shared the machine."""
    facts = json.loads(path.read_text())["runs"] if path.exists() else {}
    names = [Run(strategy, variant, seed).folder(path).name for seed in range(1, SEEDS + 1)]
    took = [facts[name]["seconds"] for name in names if facts.get(name, {}).get("seconds")]
    return f"{min(took):.2f}" if took else "-"


def pages(page: Path, effects: Path) -> dict[Path, bytes]:
    """The new content of both pages, from the scores beside the second. Raises InputError."""
    folder, names = effects.parent, [dataset.removeprefix("folder:") for dataset in PLAN]
    names = [name for name in names if (folder / f"beyond-{name}.csv").exists()]
    rows = [read_rows(folder / f"{name}.csv") | read_rows(folder / f"beyond-{name}.csv") for name in names]
    studies = [Beyond(*known) for known in zip(names, rows, strict=True)]
    # `diff`, from whose models others start, is trained again; no_diff and rec_xT are finding.py's.
    planned = {f"beyond-{name}": SEEDS * (len(TRAININGS) - len(OF_FINDING) + 1) for name in names}
    return {
        page: filled(page, scores=scores(folder, studies)),
        effects: filled(effects, trainings=trainings(folder, planned), predictions=predictions(studies)),
    }


# --- The trainings ------------------------------------------------------------------------------

OF_FINDING = [("no_diff", PLAIN), *((name, PLAIN) for name in TWO)]  # finding.py may have trained them
TRAININGS = [
    *OF_FINDING,
    *((name, variant) for pair in MATCHED.items() for variant in pair for name in TWO),
    ("fixed_T", ONE_STEP), *((name, PLAIN) for name in ("on_policy", "self_aligned", "perturbed")),
    *((name, TENTH) for name in TUNED),
]  # fmt: skip
PLAN = {"phantom_us": TRAININGS, "folder:nerve_64": TRAININGS}


def options_of(run: Run, dataset: str, runs_dir: Path) -> list[str]:
    """What a training is given beside the strategy, the seed and the folder."""
    if run.variant == TENTH:
        steps = PRESETS[dataset.partition(":")[0]]["steps"] // 10
        start = Run("diff", PLAIN, run.seed).folder(runs_dir)
        return ["--init-from", str(start), "--steps", str(steps), "--learning-rate", "1e-4"]
    if run.variant == ONE_STEP:
        return ["--sampling-steps", "1"]
    schedule, _, b = run.variant.partition(", b = ")
    return [] if run.variant == PLAIN else ["--schedule", schedule, "--signal", b or "1"]


def train_and_score(folder: Path, run: Run, options: list[str]) -> None:
    """`finding.train_and_score`, in a process that knows the methods."""
    with known():
        finding.train_and_score(folder, run, options)


def main() -> None:
    args, more = parse(__doc__, "runs/finding", "1,2,3", dict.fromkeys(name for name, _ in TRAININGS))
    with program(), known():
        runs, name = chosen(args, PLAN), args.dataset.removeprefix("folder:")
        # What finding.py has scored is not trained again, but for `diff`, from whose models others start.
        theirs = {run for run in read_rows(EFFECTS.with_name(f"{name}.csv")) if run.strategy != "diff"}
        for late in (False, True):
            part = [run for run in runs if run not in theirs and (run.variant == TENTH) == late]
            wanted = {run: options_of(run, args.dataset, args.runs_dir) for run in part}
            carry_out(EFFECTS.with_name(f"beyond-{name}.csv"), wanted, args, more, train_and_score)
        for path, content in pages(PAGE, EFFECTS).items():
            replace_file(path, content)


if __name__ == "__main__":
    main()
