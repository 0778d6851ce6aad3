"""How fast is a training step on this machine?

    python experiments/speed.py --dataset phantom_us --strategies diff,rec_xT

times the training step of every strategy, and sampling, on made-up arrays, so that the paper's data sets are
not needed; it takes the options of train.py, too. The programs take turns, so that other work on the machine
affects all of them.

It prints medians of the wall time with their quartiles, and the memory that XLA plans for intermediate
values.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import train
from data import Batch, open_dataset
from diffusion import SAMPLERS, key_for, make_schedule, respace
from evaluate import prediction_program
from strategies import STRATEGIES
from support.disk.command_line import Parser, check_counts
from support.disk.files import InputError, program
from support.machine.devices import ignore_absent_tpu, keep_memory, make_mesh, provenance, shardings
from support.results.scores import as_text

# --- Made-up arrays -----------------------------------------------------------------------------


class Case(NamedTuple):
    """What the stored cases of a data set are like."""

    canvas: tuple[int, ...]
    image_channels: int
    classes: int


# The cases of the paper (§5.2). Their sizes follow from the patches and their overlaps.
PAPER = {
    "muscle_us": Case((480, 512), 1, 2), "amos_ct": Case((192, 128, 128), 1, 16),
    "prostate_mr": Case((256, 256, 48), 1, 9), "brats_mr": Case((179, 219, 155), 4, 2),
}  # fmt: skip


def case_of(config: train.Config) -> Case:
    """The cases of a data set, at least as large as a patch. The data set is opened only if it is
    not in PAPER. Raises InputError."""
    if config.dataset in PAPER:
        case = PAPER[config.dataset]
    else:
        dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
        case = Case(dataset.canvas, dataset.image_channels, len(dataset.class_names))
    return case._replace(canvas=tuple(map(max, case.canvas, config.patch_shape)))


def made_up_batch(case: Case, size: int) -> Batch:
    """Noise, of the shapes of a real batch."""
    key_image, key_label = jax.random.split(jax.random.key(0))
    dims = len(case.canvas)
    return Batch(
        jax.random.normal(key_image, (size, *case.canvas, case.image_channels)),
        jax.random.randint(key_label, (size, *case.canvas), 0, case.classes, jnp.uint8),
        jnp.tile(jnp.array(case.canvas, jnp.int32), (size, 1)), jnp.ones((size, dims)),
    )  # fmt: skip


# --- Programs and their times -------------------------------------------------------------------


class Timed:
    """A compiled program and the times of its calls. `call` takes and returns what goes from one call to the
    next."""

    def __init__(self, name: str, lowered: jax.stages.Lowered, call: Callable, carry: object = None):
        self.name, self.call, self.carry = name, call, carry
        self.compiled, self.times = lowered.compile(), []
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes
        self.run()  # the first call is unlike the others

    def run(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.call(self.compiled, self.carry))
        return time.perf_counter() - start


def training(config: train.Config, case: Case) -> Timed:
    """A training step."""
    mesh = make_mesh(config.mesh)
    _, per_example, replicated = shardings(mesh)
    batch = jax.device_put(made_up_batch(case, config.batch_size), per_example)
    state = eqx.filter_shard(train.make_state(config, case.image_channels, case.classes), replicated)
    lowered = train.make_train_step(config, state.network, mesh).lower(batch, state)
    return Timed(f"train {config.strategy}", lowered, lambda step, state: step(batch, state)[0], state)


def sampling(config: train.Config, case: Case, sampler: str) -> Timed:
    """All sampling steps of one batch of patches."""
    network = train.make_network(config, case.image_channels, case.classes, key_for("weights", 0))
    K = config.sampling_steps if network.noisy_mask else 1
    schedule = respace(make_schedule(config.schedule, config.train_timesteps), K)
    shape = (config.batch_size, *config.patch_shape, case.image_channels)
    image, keys = jax.random.normal(jax.random.key(0), shape), jax.random.split(jax.random.key(1), shape[0])
    given = (network, schedule, image, keys)
    lowered = prediction_program(network, config.patch_shape, sampler, config.prediction).lower(*given)
    name = f"sample {config.strategy} {sampler}, K = {K}"
    return Timed(name, lowered, lambda sample, _: sample(*given))


# --- The program --------------------------------------------------------------------------------


def show(config: train.Config, programs: list[Timed], repeats: int) -> None:
    """Runs the programs in turn and prints a table. The first turn is not timed, since each program then
    still looks for free memory."""
    for turn in range(repeats + 1):
        for timed in programs:
            seconds = timed.run()
            if turn > 0:
                timed.times.append(seconds)
    print(
        f"{config.dataset}, patch {config.patch_shape}, batch {config.batch_size}, channels "
        f"{config.channels}, {config.dtype}, {provenance()['devices']}, {repeats} repeats\n"
    )
    rows = [["", "ms", "quartiles", "samples/s", "temporaries"]]
    for timed in programs:
        low, median, high = 1e3 * np.percentile(timed.times, (25, 50, 75))
        speed, memory = f"{1e3 * config.batch_size / median:.2f}", f"{timed.temporaries / 2**20:.1f} MiB"
        rows.append([timed.name, f"{median:.1f}", f"{low:.1f} - {high:.1f}", speed, memory])
    print(as_text(rows))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="How often each is run. Default: 7.")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="Which ones. Default: all.")
    text = "ddpm, ddim or both: also time sampling with the last strategy's network. Default: neither."
    parser.add_argument("--samplers", default="", help=text)
    args, more = parser.parse_known_args()
    check_counts(parser, args, repeats=1)
    ignore_absent_tpu()
    keep_memory()
    with program():
        samplers = list(filter(None, args.samplers.split(",")))
        if unknown := set(samplers) - set(SAMPLERS):
            raise InputError(f"--samplers: {', '.join(unknown)} is not one of {', '.join(SAMPLERS)}")
        configs = [train.parse_config([*more, "--strategy", name])[0] for name in args.strategies.split(",")]
        for config in configs:
            train.check(config)
        case = case_of(configs[0])
        programs = [training(config, case) for config in configs]
        programs += [sampling(configs[-1], case, sampler) for sampler in samplers]
        show(configs[0], programs, args.repeats)


if __name__ == "__main__":
    main()
