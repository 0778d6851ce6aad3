"""How do diffusion, network, strategy and data make up one training step, and a run?
Section 5.3 of Fu et al. (2023).

    python train.py                                           # phantom_us, rec_xT: minutes on a laptop
    python train.py --dataset muscle_us --strategy rec_xT     # as in the paper (data: see docs/data.md)

The settings are in settings.py. Run the same command again to resume; on a CPU the result is bit for bit
that of an uninterrupted run (on a GPU: docs/tpu.md). A run's folder holds the training states `last` and
`previous` (the one before), the model files `best` (of the validation with the highest mean Dice at the last
sampling step, §5.3) and `final`, `log.jsonl`, and pictures. Reading order: TrainState, make_train_step,
validate, train.
"""

import dataclasses
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

import evaluate
from data import Batch, Dataset, augment, batch_indices, fingerprint, make_batch, open_dataset
from diffusion import (
    Image, Keys, Mask, Schedule, Time, TimeSampler, key_for, make_schedule, make_time_sampler, record_losses,
    sample_t,
)  # fmt: skip
from settings import Config, check, model_facts, network_arguments, parse_config
from strategies import STRATEGIES, batched, make_denoise, noise_loss, one_hot, segmentation_loss, soft_dice
from support.disk.command_line import as_typed
from support.disk.files import InputError, program, replace_file, sha256
from support.raw.images import counted, has_foreground
from support.machine.devices import (
    exit_this_host, first_host_first, is_first_host, make_mesh, check_hosts_agree, of_all_hosts,
    prepare_machine, provenance, rows_of_this_host, shardings,
)  # fmt: skip
from support.raw.phantoms import PHANTOMS
from support.results.pictures import over_steps, panels, png, training_curve
from support.disk.run_folder import (
    STATES, Journal, has_model_alone, interruptible, locked, move_aside, resume,
)  # fmt: skip
from support.results.scores import RunScores, over_cases, per_case, table
from support.raw.workers import prefetch
from unet import NETWORKS, count_parameters

# What is minimised, by what the network predicts.
LOSSES = {"x_0": "20 x cross entropy + Dice", "eps": "mean squared error of the noise"}
UNDEFINED = -1.0  # the Dice of validation cases without foreground, below every other one
SKIP_LIMIT = 10  # a run ends if, at a line of the log, this many updates in a row were skipped
PerExample = Float[Array, "batch"]


# What may differ when a run is resumed: nothing that changes what is learned.
MAY_CHANGE = {"steps", "data_dir", "run_dir", "remat", "mesh", "log_every", "save_every"}
ADVICE = {
    "steps": "the learning rate falls until the last step; to train on, add --restart-at {step} (the newest "
    "state), where it warms up and falls once more",
    "dtype": "on another kind of device, give --dtype {before} to resume",
    "convolutions": "on another kind of device, give --convolutions {before} to resume",
    "restart_at": "give --restart-at {before} to resume, or {step} (the newest state) to warm up once more",
}


# --- State --------------------------------------------------------------------------------------


class TrainState(eqx.Module):
    """All that a run carries from step to step, and all that its checkpoints hold. There is no
    random key, since every draw is a function of (seed, step)."""

    network: eqx.Module
    ema: eqx.Module | None
    opt_state: optax.OptState
    time_sampler: TimeSampler
    step: Int[Array, ""]
    skipped: Int[Array, ""]  # updates skipped because loss or gradient was not finite
    skipped_in_a_row: Int[Array, ""]


def open_data(config: Config) -> tuple[Dataset, Mesh]:
    """The data set, and the devices that share every batch. Raises InputError if settings do not fit them."""
    dataset = open_dataset(config.dataset, Path(config.data_dir), config.phantom_shape)
    mesh = make_mesh(config.mesh)
    check(config, dataset, mesh)
    return dataset, mesh


def make_network(config: Config, image_channels: int, classes: int, key: PRNGKeyArray) -> eqx.Module:
    """The network before the first step."""
    return NETWORKS[config.network](**network_arguments(config, image_channels, classes), key=key)


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping; from step `restart_at` on, its learning rate warms up, falls along a cosine, and
    then stays. Steps whose update is skipped do not count."""
    decay = config.decay_steps or config.steps - config.restart_at
    from_0 = optax.warmup_cosine_decay_schedule(
        config.learning_rate_start, config.learning_rate, min(config.warmup_steps, decay // 2),
        decay, config.learning_rate_end,
    )  # fmt: skip

    def learning_rate(step: int | Int[Array, ""]) -> Float[Array, ""]:
        return from_0(step - config.restart_at)

    adamw = optax.adamw(learning_rate, b1=0.9, b2=0.999, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), learning_rate


def make_state(config: Config, image_channels: int, classes: int) -> TrainState:
    """The state before the first step."""
    network = make_network(config, image_channels, classes, key_for("weights", config.seed))
    optimizer, _ = make_optimizer(config)
    strategy = STRATEGIES[config.strategy]
    # Without diffusion t has no meaning; drawn uniformly, its weights are 1.
    importance = config.time_sampling == "importance" and strategy.noisy_mask
    return TrainState(
        network=network,
        ema=jax.tree.map(jnp.copy, network) if config.ema_decay else None,
        opt_state=optimizer.init(eqx.filter(network, eqx.is_inexact_array)),
        time_sampler=make_time_sampler(config.train_timesteps - strategy.below_T, importance=importance),
        **{name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")},
    )


def with_weights_of(network: eqx.Module, other: eqx.Module) -> tuple[eqx.Module, list[str]]:
    """`network` with the arrays of `other` that have the same place and shape, and the places of the arrays
    that it keeps."""
    theirs = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(other)}
    kept = []

    def theirs_or_own(path: tuple, own: Array) -> Array:
        place = jax.tree_util.keystr(path)
        if place in theirs and theirs[place].shape == own.shape:
            return theirs[place]
        kept.append(place)
        return own

    return jax.tree_util.tree_map_with_path(theirs_or_own, network), kept


def begin(config: Config, dataset: Dataset) -> tuple[TrainState, dict]:
    """The first state of a run, with the weights of another model if `config.init_from` names one, and a
    record of that model. Raises InputError if it cannot be used."""
    state = make_state(config, dataset.image_channels, len(dataset.class_names))
    if not config.init_from:
        return state, {}
    model = evaluate.load(config.init_from)
    network, kept = with_weights_of(state.network, model.network)
    total = len(jax.tree.leaves(network))
    if 2 * len(kept) > total:
        raise InputError(
            f"{model.path}: {len(kept)} of {total} arrays have another shape or place than in this network; "
            "give the same --channels and --strides, or train without --init-from"
        )
    facts = model.facts
    origin = f"{facts.config.dataset}, {facts.config.strategy}, step {facts.step}"
    new = f"; new are {', '.join(kept)}" if kept else ""
    if is_first_host():
        print(f"starting from the weights of {model.path} ({origin}){new}", file=sys.stderr)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, network)
    record = {"path": str(model.path), "sha256": sha256(model.path), "new": kept, "of": origin}
    record["commit"] = facts.provenance.get("commit", "unknown")
    return dataclasses.replace(state, network=network, ema=ema), {"init_from": record}


@contextmanager
def open_run(
    config: Config, dataset: Dataset, mesh: Mesh, *, fresh: bool
) -> Iterator[tuple[TrainState, Journal, list[int]]]:
    """The state and the journal of a run, those of its newest checkpoint or new ones, and the signals that
    came meanwhile. The folder is this process's until the end of the `with` block. Raises InputError if the
    run began with other cases, images or settings (except those that may change)."""
    run, cases = Path(config.run_dir), fingerprint(dataset)
    facts = {"cases": cases, "content": dataset.content, "config": dataclasses.asdict(config), **provenance()}
    shared = facts["config"] | {"data_dir": "", "run_dir": ""}  # the places may have other names elsewhere
    check_hosts_agree(shared, "the hosts have different settings; type the same for all")
    if config.restart_at and (fresh or not any((run / name).exists() for name in STATES)):
        raise InputError(f"{run}: no state to go on from; leave out --restart-at {config.restart_at}")
    if fresh or has_model_alone(run):
        if config.init_from and Path(config.init_from).resolve().is_relative_to(run.resolve()):
            raise InputError(f"{run}: would be moved aside with --init-from in it; give another --run-dir")
        move_aside(run)
    with locked(run), interruptible() as caught:
        with first_host_first():
            make = partial(make_state, config, dataset.image_channels, len(dataset.class_names))
            may_change = MAY_CHANGE if config.decay_steps else MAY_CHANGE - {"steps"}
            opened = resume(run, make, facts, dataclasses.asdict(Config()), may_change, ADVICE)
            if opened is None:
                state, begun = begin(config, dataset)
                opened = state, Journal(run, facts | {"begun": begun}, {"dice": UNDEFINED, "step": 0}, [])
        state, journal = opened
        elsewhere = f"{run}: the hosts see different files; --run-dir must be on a shared disk"
        check_hosts_agree(int(state.step), elsewhere)
        different = f"{config.dataset}: the hosts have different cases; copy one file to all"
        check_hosts_agree(cases + dataset.content, different)
        if not state.step:
            journal.save(state, 0)  # so that a run that is killed never leaves a model without a state
        yield eqx.filter_shard(state, shardings(mesh).replicated), journal, caught


# --- The training step --------------------------------------------------------------------------


def loss_fn(
    network: eqx.Module, image: Image, x_0: Mask, t: Time, weight: PerExample, keys: Keys, *,
    teacher: eqx.Module | None, config: Config, schedule: Schedule,
) -> tuple[Float[Array, ""], tuple[PerExample, PerExample]]:  # fmt: skip
    """The importance-weighted mean of L, and also L and the soft Dice score of every example (NaN
    for one without foreground)."""
    denoise = make_denoise(batched(network), schedule, config.prediction)
    first = denoise if teacher is None else make_denoise(batched(teacher), schedule, config.prediction)
    denoised = STRATEGIES[config.strategy].training_pass(denoise, first, schedule, image, x_0, t, keys)
    if config.prediction == "eps":
        loss = noise_loss(schedule, denoised.output, x_0, denoised.x_t, t)
    else:
        loss = segmentation_loss(denoised.output, x_0)  # (2c), (3c), (4e), (5e), (7e), (8f)
    dice, present = soft_dice((denoised.x_0_hat + 1) / 2, x_0)
    dice = jnp.sum(dice, axis=1) / jnp.sum(present, axis=1)
    return jnp.mean(weight * loss), (loss, dice)


def gradient_in_parts(
    loss: Callable, network: eqx.Module, examples: PyTree, parts: int
) -> tuple[PyTree, tuple[Array, tuple[Array, Array]]]:
    """The gradient of the mean of `loss` over the examples, and the outputs of `loss`, computed part
    by part, so that memory is needed for one part only."""
    value_and_grad = eqx.filter_value_and_grad(loss, has_aux=True)

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        outputs, gradient = value_and_grad(network, *part)
        return jax.tree.map(lambda a, b: a + b / parts, total, gradient), outputs

    zero = jax.tree.map(jnp.zeros_like, eqx.filter(network, eqx.is_inexact_array))
    if parts == 1:  # no loop, so that XLA can overlap this with other work
        return add(zero, examples)

    # A part takes every `parts`-th example, so that all devices share every part.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), examples)
    gradient, (mean, each) = jax.lax.scan(add, zero, split)
    return gradient, (mean, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1), each))


def make_train_step(
    config: Config, network: eqx.Module, mesh: Mesh
) -> Callable[[Batch, TrainState], tuple[TrainState, dict[str, Array]]]:
    """The whole step, from batch and state to state and metrics. It is compiled once, with the options of
    `network`, and the state is donated (its memory is used again). The devices of `mesh` share the batch;
    means are over all of it."""
    schedule = make_schedule(config.schedule, config.train_timesteps, config.signal)
    optimizer, learning_rate = make_optimizer(config)
    per_voxel, per_example, replicated = shardings(mesh)
    limits = {name: getattr(config, name) for name in ("rotation", "scaling", "translation", "foreground")}

    # Every leaf of the state is an array, so jax.jit suffices, whose calls are faster than eqx.filter_jit's.
    @partial(jax.jit, donate_argnames="state", compiler_options=network.compiler_options(config.patch_shape))
    def train_step(batch: Batch, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        # All that is random in this step follows from the seed and the number of the step.
        key = jax.random.fold_in(key_for("training", config.seed), state.step)
        key_augment, key_t, key_strategy = jax.random.split(key, 3)

        # A random patch of every image, and its label as a mask of -1 and 1.
        with jax.named_scope("augment"):
            keys = jax.random.split(key_augment, config.batch_size)
            image, label = augment(batch, keys, config.patch_shape, **limits)
            x_0 = one_hot(label, network.classes)

        # A time for every example, with the weight that compensates for how often it is drawn.
        t, weight = sample_t(state.time_sampler, key_t, config.batch_size)
        keys = jax.random.split(key_strategy, config.batch_size)
        examples = eqx.filter_shard((image, x_0), per_voxel)
        examples += eqx.filter_shard((t, weight, keys), per_example)

        # The strategy's one or two passes of the network, the loss, and its gradient.
        with jax.named_scope("gradient"):
            teacher = state.ema if config.teacher == "ema" else None
            loss = partial(loss_fn, teacher=teacher, config=config, schedule=schedule)
            gradient, outputs = gradient_in_parts(loss, state.network, examples, config.accumulate)
            mean, (losses, dice) = outputs

        # The new weights, their average, and what importance sampling learns from the losses.
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.network)
            new = eqx.apply_updates(state.network, updates)
            decay = config.ema_decay
            ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, new) if decay else None
            time_sampler = record_losses(state.time_sampler, t, losses)

            # One NaN in the weights or in the history of losses would stay forever.
            norm = optax.tree.norm(gradient)
            skip = ~jnp.isfinite(norm + jnp.sum(losses) + jnp.sum(mean))
            old = (state.network, state.ema, state.opt_state, state.time_sampler)
            kept = jax.tree.map(lambda a, b: jnp.where(skip, a, b), old, (new, ema, opt_state, time_sampler))
            in_a_row = (state.skipped_in_a_row + 1) * skip
            after = TrainState(*kept, state.step + 1, state.skipped + skip, in_a_row)

        metrics = {
            "loss": jnp.mean(losses), "weighted_loss": jnp.mean(mean), "dice": jnp.nanmean(dice),
            "gradient_norm": norm, "learning_rate": learning_rate(state.step - state.skipped),
            "skipped": after.skipped, "skipped_in_a_row": in_a_row,
        }  # fmt: skip
        return eqx.filter_shard((after, metrics), replicated)

    return train_step


# --- Validation ---------------------------------------------------------------------------------


def validate(
    model: evaluate.Model, dataset: Dataset, mesh: Mesh, journal: Journal, *, last: bool
) -> RunScores:
    """The scores of the validation cases, as in testing (except for distances, at the last step only), always
    with the same noise. They go to the log, and a picture of the first few goes beside it. The model becomes
    `best` if its mean Dice at the last sampling step is the highest so far (§5.3), and `final` at the last
    training step."""
    config, step, count = model.facts.config, model.facts.step, len(dataset.uids["validation"])
    cases = (dataset.load("validation", i) for i in range(config.validation_cases or count)[:count])
    scored, rows, uids = [], [], []
    for case, probability in model.predict(cases, model.sampling(seed=config.seed), mesh=mesh):
        classes = evaluate.clean(config.dataset, probability.argmax(-1)).astype(np.uint8)
        scored.append(evaluate.score(classes, case, probability.shape[-1], last_distance=True))
        if len(rows) < 4:
            captions = [f"Dice {100 * dice:.1f}" for dice in per_case(scored[-1].dice)]
            rows.append(over_steps(*evaluate.in_pictures(case, classes, probability), captions))
            uids.append(case.uid[:32])
    scores = evaluate.scores_of(model, config.sampler, scored)
    dice = over_cases(scores.dice)
    journal.write(step, {"validation_dice": dice.tolist()})
    # Without foreground in any case there is no Dice, and so nothing to choose by: the newest model is kept.
    chosen_by = float(dice[-1]) if np.isfinite(dice[-1]) else UNDEFINED
    names = ["best"] * journal.record_best(step, chosen_by) + ["final"] * last
    if is_first_host():
        title = f"{config.dataset} ({dataset.source}), {config.strategy}, {config.sampler}, validation"
        figure = panels(rows, dataset.class_names, beside=uids, title=title)
        replace_file(journal.run / f"validation-{step:06d}.png", png(figure))
        for name in names:
            facts = dataclasses.replace(model.facts, dice=chosen_by)
            evaluate.save(journal.run / name, model.network, facts)
    return scores


# --- The run ------------------------------------------------------------------------------------


def batches(config: Config, dataset: Dataset, mesh: Mesh, start: int) -> Iterator[Batch]:
    """The batches of the steps from `start` (0, 1, ...) on, made ahead of time and placed on the devices."""
    per_example = shardings(mesh).per_example
    rows = rows_of_this_host(per_example, config.batch_size)

    def place(step: int) -> Batch:
        batch = make_batch(dataset, config.seed, step, config.batch_size, rows)
        return jax.tree.map(partial(jax.make_array_from_process_local_data, per_example), batch)

    return prefetch(place, start, config.steps)


def check_finite(config: Config, dataset: Dataset, metrics: dict[str, float], step: int) -> None:
    """Raises InputError if too many updates in a row were skipped, the last one at `step`."""
    if metrics["skipped_in_a_row"] < SKIP_LIMIT:
        return
    uids, recent = dataset.uids["train"], range(max(step - SKIP_LIMIT, 0), step)
    seen = [uids[i] for s in recent for i in batch_indices(len(uids), config.seed, s, config.batch_size)]
    names = ", ".join(list(dict.fromkeys(seen))[:10])
    raise InputError(
        f"{config.run_dir}: loss or gradient was not finite in {SKIP_LIMIT} steps in a row, up to step "
        f"{step}; look at their samples ({names} ...), or train again with a lower --learning-rate and "
        "another --run-dir; what was saved before is kept and is finite"
    )


def train(config: Config, *, fresh: bool = False) -> int | None:
    """Trains from the newest state in the run's folder to the last step, or to a signal, whose
    number it returns. Raises InputError."""
    dataset, mesh = open_data(config)
    with open_run(config, dataset, mesh, fresh=fresh) as (state, journal, caught):
        train_step = make_train_step(config, state.network, mesh)
        facts = model_facts(config, dataset, journal.facts["begun"])
        say_what_begins(config, dataset, state)
        start, scores = int(state.step), None
        with tqdm(total=config.steps, initial=start, disable=not is_first_host()) as bar:
            for step, batch in enumerate(batches(config, dataset, mesh, start), start + 1):
                state, metrics = train_step(batch, state)
                if step == start + 1:
                    bar.unpause()  # the time that is left is estimated without that of compiling
                    bar.set_postfix(loss=f"{metrics['loss'].item():.3g}")
                bar.update()
                validating = step % config.validate_every == 0 or step == config.steps
                # Only now and then are numbers read: waiting for every step would leave the device idle.
                logging = step % config.log_every == 0 or validating
                if logging:
                    metrics = {name: value.item() for name, value in metrics.items()}
                    journal.write(step, metrics)
                if validating:
                    bar.set_postfix_str("validating")
                    network = state.ema if config.evaluate_with == "ema" else state.network
                    now = dataclasses.replace(facts, step=step)
                    model = evaluate.Model(network, now, journal.run / "best")
                    scores = validate(model, dataset, mesh, journal, last=step == config.steps)
                if logging:
                    bar.set_postfix(journal.newest())
                # All hosts stop at the same step. Several of them ask each other only at a line of the log.
                asking = jax.process_count() == 1 or logging
                stopped = max(of_all_hosts(caught[0] if caught else 0)) if asking else 0
                if validating or stopped or journal.due(config.save_every, step):
                    journal.save(state, step)
                if logging:
                    check_finite(config, dataset, metrics, step)
                if stopped and step < config.steps:
                    print(f"\nstopped and saved at step {step}; the same command resumes it", file=sys.stderr)
                    return stopped
        if is_first_host():
            say_what_came(config, dataset, journal, scores)
    return None


def say_what_begins(config: Config, dataset: Dataset, state: TrainState) -> None:
    """Prints the data, the settings in force, and why nothing moves at first."""
    if not is_first_host():
        return
    few, left = dataset.uids["validation"][: config.validation_cases or None], config.steps - int(state.step)
    cache = jax.config.jax_compilation_cache_dir
    lines = [
        f"{config.dataset} ({dataset.source}): {len(dataset.uids['train'])} training cases, "
        f"{config.strategy}, {count_parameters(state.network):,} parameters, "
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        f"{config.network}, channels {as_typed(config.channels)}; patch {as_typed(config.patch_shape)}; "
        f"batch {config.batch_size}; learning rate {config.learning_rate:g}; {left} steps; a validation on "
        f"{len(few)} cases every {config.validate_every}",
        f"compiling (once; kept in {cache} for the next start) ..." if cache else "compiling ...",
    ]
    if left and config.dataset not in PHANTOMS:
        if not any(has_foreground(dataset.load("validation", i).label) for i in range(len(few))):
            lines.append("NB: no validation case has foreground, so that the newest model is kept as best.")
        elif len(few) < 3:
            lines.append(f"NB: {counted(len(few), 'validation case')} will choose the best model.")
    print("\n".join(lines if left else lines[:1]), file=sys.stderr)


def say_what_came(config: Config, dataset: Dataset, journal: Journal, scores: RunScores | None) -> None:
    """Draws the training curve, and prints the last validation and what can be done next."""
    run, best = journal.run, journal.best
    title = f"{config.dataset} ({dataset.source}), {config.strategy}"
    replace_file(run / "curve.png", png(training_curve(journal.lines, title, LOSSES[config.prediction])))
    if scores:  # otherwise the run had ended before
        print(f"\nvalidation after step {config.steps}, {config.sampler}:\n")
        print(table([(config.strategy, scores)]))
    dice = f"{100 * best['dice']:.2f} %" if best["dice"] > UNDEFINED else "-, no foreground in any case"
    print(f"\nbest: validation Dice {dice} at step {best['step']}")
    print(f"pictures: {run}/validation-{config.steps:06d}.png, {run}/curve.png")
    print(f"next: python evaluate.py test {shlex.quote(str(run))}")


def main(argv: Sequence[str] | None = None) -> None:
    prepare_machine()
    with program(exit_this_host):
        config, fresh = parse_config(argv, __doc__)
        if train(config, fresh=fresh) == signal.SIGINT:
            sys.exit(130)


if __name__ == "__main__":
    main()
