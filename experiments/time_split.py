"""Where does the time of one training step go? The parts of train.make_train_step, each compiled and
timed alone beside the whole: data, augmentation, first pass, second pass with its gradient, update.

    python experiments/time_split.py --dataset hippocampus_mr

takes every option of train.py; --strategy is rec_xT. Prints medians of 10 repeats.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import train
from data import InputError, augment, make_batch, open_dataset
from diffusion import gaussian, sample_t, update
from evaluate import keep_memory, network
from strategies import make_denoise, one_hot


def median_ms(function, *args) -> float:
    """Median wall time of 10 calls after one that compiles, in ms."""
    return median_ms_of_steps(lambda _: (None, function(*args)), None)[0]


def median_ms_of_steps(step, state) -> tuple[float, PyTree]:
    """The same for a function that returns the next state and more; also the last state."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:]), state


def main() -> None:
    keep_memory()
    config, _ = train.parse_config([*sys.argv[1:], "--strategy", "rec_xT"])
    dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
    classes, size = len(dataset.class_names), config.batch_size
    state = train.make_state(config, dataset.image_channels, classes)
    schedule, (optimizer, _) = train.make_schedule(config), train.make_optimizer(config)
    keys = jax.random.split(jax.random.key(0), size)

    def read(step: int):
        return jax.device_put(make_batch(dataset, config.seed, step, size))

    @jax.jit
    def augmented(batch):
        limits = {name: getattr(config, name) for name in ("rotation", "scaling", "translation")}
        image, label = augment(batch, keys, config.patch_shape, **limits)
        return image, one_hot(label, classes)

    @jax.jit
    def first_pass(model, image, x_0):
        denoise = make_denoise(network(model), schedule, config.prediction)
        return denoise(image, jnp.full(size, schedule.T), gaussian(keys, x_0), None).x_0_hat

    single = train.dataclasses.replace(config, strategy="diff")  # one pass, and its gradient

    @jax.jit
    def gradient(model, image, x_0):
        t, weight = sample_t(state.time_sampler, keys[0], size)
        grad = eqx.filter_value_and_grad(train.loss_fn, has_aux=True)
        return grad(model, None, single, schedule, image, x_0, t, weight, keys)

    @partial(jax.jit, donate_argnames="state")  # as in the step: the new state takes the old one's place
    def updated(gradient, state):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.model)
        time_sampler = update(state.time_sampler, jnp.ones(size, int), jnp.ones(size))
        model = eqx.apply_updates(state.model, updates)
        new = {"model": model, "opt_state": opt_state, "time_sampler": time_sampler, "step": state.step + 1}
        return train.dataclasses.replace(state, **new), optax.tree.norm(gradient)

    batch = read(0)
    image, x_0 = augmented(batch)
    _, grads = gradient(state.model, image, x_0)
    parts = {
        "data": median_ms(read, 1),
        "augmentation": median_ms(augmented, batch),
        "first pass": median_ms(first_pass, state.model, image, x_0),
        "second pass + gradient": median_ms(gradient, state.model, image, x_0),
    }
    parts["update"], state = median_ms_of_steps(lambda state: updated(grads, state), state)
    step = train.make_train_step(config, classes, train.make_mesh(config, jax.devices()[:1]))
    whole, _ = median_ms_of_steps(lambda state: step(batch, state), state)
    total = sum(parts.values())
    print(f"{config.dataset}, patch {config.patch_shape}, batch {size}, {jax.devices()[0].device_kind}")
    for name, ms in parts.items():
        print(f"{name:24s}{ms:10.1f} ms {100 * ms / total:6.1f} %")
    print(f"{'sum':24s}{total:10.1f} ms\n{'the whole step':24s}{whole:10.1f} ms (data is read meanwhile)")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
