"""How fast is a training step, and sampling, on this machine? Every strategy, in one run, on made-up arrays:

    python experiments/bench.py --dataset muscle_us --batch-size 1
    python experiments/bench.py --dataset phantom_us --strategies diff,rec_xT --profile trace

takes every option of train.py; no data is needed for the paper's sets. The strategies take turns, so that
what else the machine does meanwhile meets all of them. Prints a table and, as its last line, JSON: medians
of the wall time with their quartiles; the work (XLA's count before optimisation) per second, and its share of
what a plain matrix product of the same type reaches in this run; the memory that XLA plans for intermediate
values. --profile writes a trace of one more step each, for TensorBoard or Perfetto.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import train
from data import Batch, InputError, open_dataset
from diffusion import SAMPLERS, respace
from evaluate import keep_memory, prediction_program, provenance
from strategies import STRATEGIES

# Size of a case, image channels, classes (§5.2); the sizes follow from the patches and their overlaps.
PAPER = {
    "muscle_us": ((480, 512), 1, 2), "amos_ct": ((192, 128, 128), 1, 16),
    "prostate_mr": ((256, 256, 48), 1, 9), "brats_mr": ((179, 219, 155), 4, 4),
}  # fmt: skip


def case_shapes(config: train.Config) -> tuple[tuple[int, ...], int, int]:
    """Size of the stored cases, image channels and classes of a data set; its file is read only where the
    paper does not say. No patch is larger than a case. Raises InputError."""
    if config.dataset in PAPER:
        canvas, image_channels, classes = PAPER[config.dataset]
        return tuple(map(max, canvas, config.patch_shape)), image_channels, classes
    dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
    return dataset.canvas, dataset.image_channels, len(dataset.class_names)


def made_up_batch(config: train.Config) -> Batch:
    """Noise, of the shapes of a real batch."""
    canvas, image_channels, classes = case_shapes(config)
    rng, n = np.random.default_rng(0), config.batch_size
    return Batch(
        rng.standard_normal((n, *canvas, image_channels), np.float32),
        rng.integers(0, classes, (n, *canvas), np.uint8),
        np.full((n, len(canvas)), canvas, np.int32), np.ones((n, len(canvas)), np.float32),
    )  # fmt: skip


class Timed:
    """A compiled program, its work, and the times of its calls. `call` takes and gives what goes from one
    call to the next. `turns`: of a loop in it, whose work XLA counts once."""

    def __init__(self, name: str, lowered, call: Callable, carry: object = None, turns: int = 1):
        self.name, self.times, self.carry, self.call = name, [], carry, call
        compiled = lowered.compile()
        self.program, self.flops = compiled, turns * lowered.cost_analysis()["flops"]
        self.temporaries = compiled.memory_analysis().temp_size_in_bytes
        self.run()  # the first call is not like the others

    def run(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.call(self.program, self.carry))
        return time.perf_counter() - start


def training(config: train.Config) -> Timed:
    _, image_channels, classes = case_shapes(config)
    mesh = train.make_mesh(config)
    _, rows, whole = train.shardings(mesh)
    batch = jax.device_put(made_up_batch(config), rows)
    state = eqx.filter_shard(train.make_state(config, image_channels, classes), whole)
    lowered = train.make_train_step(config, classes, mesh).lower(batch, state)
    return Timed(f"train {config.strategy}", lowered, lambda step, state: step(batch, state)[0], state)


def sampling(config: train.Config, sampler: str) -> Timed:
    """Of one batch of patches, K steps in one program."""
    _, image_channels, classes = case_shapes(config)
    model = train.make_model(config, image_channels, classes, train.key_for("weights", 0))
    schedule = respace(train.make_schedule(config), config.sampling_steps)
    image = jnp.asarray(
        np.random.default_rng(0).standard_normal(
            (config.batch_size, *config.patch_shape, image_channels), np.float32
        )
    )
    arguments = model, schedule, image, jax.random.split(jax.random.key(0), config.batch_size)
    program = prediction_program(model, config.patch_shape)
    lowered = program.lower(*arguments, sampler=sampler, prediction=config.prediction)
    return Timed(
        f"sample {config.strategy} {sampler}, K = {config.sampling_steps}",
        lowered,
        lambda compiled, _: compiled(*arguments),
        None,
        config.sampling_steps,
    )


def matmul(dtype: str) -> Timed:
    """The rate to compare with: a product of two 2048 x 2048 matrices."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048), dtype)
    return Timed("matrix product", jax.jit(jnp.dot).lower(a, a), lambda dot, _: dot(a, a))


def show(config: train.Config, programs: list[Timed], repeats: int, settings: list[str]) -> None:
    """Runs the programs in turns and prints the table, and JSON. The first is the rate to compare with.
    The first turn is not timed: each finds its memory between what the others hold."""
    for turn in range(repeats + 1):
        for program in programs:
            seconds = program.run()
            if turn > 0:
                program.times.append(seconds)
    rates = [program.flops / np.median(program.times) for program in programs]
    print(
        f"{config.dataset}, patch {config.patch_shape}, batch {config.batch_size}, {config.dtype}, channels "
        f"{config.channels}, {provenance()['devices']}, {repeats} repeats\n\n"
        f"{'':32s}{'ms':>9}{'quartiles':>19}{'samples/s':>11}{'GFLOP':>9}{'GFLOP/s':>9}{'of product':>12}"
        f"{'temporaries':>14}"
    )  # fmt: skip
    results = []
    for program, rate in zip(programs, rates, strict=True):
        low, median, high = np.percentile(program.times, (25, 50, 75))
        speed = 0.0 if program is programs[0] else config.batch_size / median
        print(
            f"{program.name:32s}{1e3 * median:9.1f}{f'{1e3 * low:.1f} - {1e3 * high:.1f}':>19}{speed:11.2f}"
            f"{program.flops / 1e9:9.2f}{rate / 1e9:9.1f}{100 * rate / rates[0]:10.1f} %"
            f"{program.temporaries / 2**20:10.1f} MiB"
        )
        results.append(
            {"what": program.name, "seconds": program.times, "flop": program.flops,
             "temporary_bytes": program.temporaries}
        )  # fmt: skip
    print("\n" + json.dumps({"settings": settings, **provenance(), "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="all, where not given")
    parser.add_argument("--samplers", default="", help="ddpm, ddim: time sampling, too, of the last strategy")
    parser.add_argument("--repeats", type=int, default=7, help="of every program")
    parser.add_argument("--profile", default="", metavar="DIR", help="write a trace there")
    args, more = parser.parse_known_args()
    keep_memory()
    if unknown := set(filter(None, args.samplers.split(","))) - set(SAMPLERS):
        parser.error(f"--samplers: {', '.join(unknown)} is none of {', '.join(SAMPLERS)}")
    configs = [train.parse_config([*more, "--strategy", name])[0] for name in args.strategies.split(",")]
    for config in configs:
        train.check_settings(config)
    programs = [matmul(configs[0].dtype), *map(training, configs)]
    programs += [sampling(configs[-1], sampler) for sampler in filter(None, args.samplers.split(","))]
    if args.profile:
        with jax.profiler.trace(args.profile):
            for program in programs:
                program.run()
    show(configs[0], programs, args.repeats, more)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
