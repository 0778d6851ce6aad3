"""The command line, the step on one and on eight devices, resuming, checkpoints."""

import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from made import (
    batch_number, dataset_of, leaves, left_behind, mesh, one_line, quick, state_of, stepper, tiny,
    train_until_killed,
)  # fmt: skip

import data
import evaluate
import settings
import train
from strategies import STRATEGIES
from support.machine import cpu_convolution
from support.disk import run_folder
from support.disk.files import InputError, write_signed
from support.machine.devices import shardings

HERE = Path(__file__).parent.parent


def steps(config, devices, n=2):
    """n training steps from the start: losses, gradient norms and the last state."""
    step, state, metrics = stepper(config, devices), None, []
    for i in range(n):
        more, state = step(i, batch=batch_number(config, i), state=state)
        metrics.append([more[name] for name in ("loss", "weighted_loss", "dice", "gradient_norm")])
    return np.array(metrics), state


OTHERS = sorted(STRATEGIES.keys() - {"rec_xT"})
EVERY_STRATEGY = ["rec_xT", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
LAYOUTS = {"rec_xT": "data=4,space=2", "no_diff": "", "diff": "data=4,space=2", "sc_xt": "data=8",
           "sc_xt1": "data=2,space=4", "rec_xt1": ""}  # fmt: skip


def fast(strategy="rec_xT"):
    """The settings of several tests, so that one step is compiled for all of them."""
    return tiny(strategy=strategy, learning_rate=3e-3, steps=60, rotation=0.0, scaling=0.0)


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_one_device_and_eight_give_the_same_losses(strategy):
    """Only the order of float32 sums differs: 1e-5 at the first step. The second follows an update of
    AdamW, which turns a gradient that is nearly zero into a whole step: 2e-3."""
    config, layout = fast(strategy), LAYOUTS[strategy]
    one, eight = steps(config, 1)[0], steps(dataclasses.replace(config, mesh=layout), 8)[0]
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], eight[1], rtol=2e-3)
    assert np.isfinite(one).all()


def assert_the_same_gradient(*states):
    """Every parameter's gradient (after one step, AdamW's first moment is a tenth of it) to 1e-5 of its
    largest value."""
    moments = [optax.tree.get(state.opt_state, "mu") for state in states]
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(a).max(), 1e-4))


VOLUMES = {
    "dataset": "phantom_ct", "phantom_shape": (16, 16, 16), "patch_shape": (16, 16, 8), "channels": (4, 8),
    "strides": ((2, 2, 2),), "translation": (1, 1, 1), "transformer": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("convolutions", ["native", "cpu", "tpu"])
def test_volumes_split_over_devices_give_the_same_gradient_and_prediction(convolutions):
    """The predicted probabilities to 1e-5."""
    config = tiny(**VOLUMES | {"convolutions": convolutions, "batch_size": 2})
    split = dataclasses.replace(config, mesh="data=2,space=4")
    (_, one), (_, eight) = steps(config, 1, n=1), steps(split, 8, n=1)
    assert_the_same_gradient(one, eight)
    dataset = dataset_of(config)
    case, facts = dataset.load("test", 0), settings.model_facts(config, dataset, {})
    *_, whole = shardings(mesh(split, 8))
    predicted = []
    for network, devices in ((one.network, None), (jax.device_put(one.network, whole), mesh(split, 8))):
        model = evaluate.Model(network, facts, Path())
        [(_, probability)] = model.predict([case], model.sampling(K=2), batch_size=2, mesh=devices)
        predicted.append(probability)
    np.testing.assert_allclose(*predicted, atol=1e-5)


@pytest.mark.parametrize("layout", ["data=3", "data=4,space=4"])
def test_a_mesh_for_other_devices_is_refused(layout):
    with pytest.raises(InputError, match=f"--mesh {layout} is for .* devices, but there are 8"):
        mesh(tiny(mesh=layout), 8)


def test_convolutions_for_a_cpu_give_the_same_gradient(monkeypatch):
    """With what is otherwise done for large images alone: bands, and another library in XLA."""
    native, state = steps(fast(), 1, n=1)
    monkeypatch.setattr(cpu_convolution, "is_large", lambda *_: True)
    for convolutions in ("native", "cpu"):
        asked = cpu_convolution.compiler_options(convolutions, (32, 32), 4)
        assert bool(asked) == (convolutions == "cpu")
    in_bands, other = steps(dataclasses.replace(fast(), convolutions="cpu"), 1, n=1)
    np.testing.assert_allclose(in_bands, native, rtol=1e-5)
    assert_the_same_gradient(state, other)


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_the_loss_falls(strategy):
    """In 60 steps; for a fair end, the mean of the last ten."""
    losses, _ = steps(fast(strategy), 1, n=60)
    assert losses[-10:, 0].mean() < 0.6 * losses[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        {"prediction": "eps", "dtype": "bfloat16"}, {"schedule": "cosine", "strategy": "sc_xt1"},
        {"teacher": "ema", "ema_decay": 0.5}, {"time_sampling": "uniform", "train_timesteps": 5},
        {"remat": 2, "time_dim": 0}, {"channels": (4, 8), "strides": ((2, 2),), "transformer": True},
    ],
)  # fmt: skip
def test_options_train(extra):
    losses, state = steps(tiny(**extra), 1)
    assert np.isfinite(losses).all() and losses[0, 3] > 0
    assert (state.ema is not None) == ("ema_decay" in extra)


def test_the_ema_teacher_makes_the_first_pass():
    """At the first step the average is the network itself; afterwards its first pass differs."""
    ways = ({}, {"teacher": "ema", "ema_decay": 0.999})
    plain, ema = (steps(quick(learning_rate_start=0.05, **way), 1)[0] for way in ways)
    np.testing.assert_allclose(plain[0], ema[0], rtol=1e-5)
    assert abs(plain[1, 0] - ema[1, 0]) > 1e-4


def test_nothing_is_compiled_after_the_first_validation(tmp_path, monkeypatch):
    """Two more validations, each with a last batch that is not full, and four more steps: JAX reports
    every program that it makes or finds in its cache."""
    made, after = [], []
    record = lambda event, *_, **__: made.append(event) if "backend_compile" in event else None  # noqa: E731
    real = train.validate

    def counted(*args, **more):
        result = real(*args, **more)
        after.append(len(made))
        return result

    monkeypatch.setattr(train, "validate", counted)
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        train.train(quick(steps=6, decay_steps=6, run_dir=str(tmp_path / "run"), ema_decay=0.9))
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert len(after) == 3 and after[0] > 0 and after[1:] == after[:1] * 2


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """Six steps in one go, and six steps of which the process dies after step five, that is after the
    checkpoint of step four: the same checkpoints and the same log."""
    config = quick(steps=6, decay_steps=6, run_dir=str(tmp_path / "one"), ema_decay=0.9)
    train.train(config)
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "two"))
    train_until_killed(cut, 5)
    with open(tmp_path / "two" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # cut in the middle of a line
    train.train(cut)
    files, log = left_behind(tmp_path / "one")
    assert (files, log) == left_behind(tmp_path / "two")
    assert len(files) == 3 and len(log.splitlines()) == 9
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = quick(steps=2, decay_steps=4, run_dir=str(tmp_path_factory.mktemp("runs") / "run"))
    train.train(config)
    return config


def test_a_run_leaves_what_the_readme_promises(run, capsys):
    folder = Path(run.run_dir)
    names = {path.name for path in folder.iterdir()}
    states, pictures = {"last", "previous"}, {"curve.png", "validation-000002.png"}
    assert names == states | pictures | {"best", "final", "lock", "log.jsonl"}
    header, _ = run_folder.read_state(folder / "last")
    assert {"commit", "devices", "jax", "date", "config"} <= set(header)
    facts = evaluate.load(folder / "final").facts
    assert "MADE UP" in facts.source and facts.step == 2 and facts.config == run
    evaluate.main(
        ["test", run.run_dir, "--split", "validation", "--sampler", "ddpm,ddim", "--checkpoint", "final"]
    )
    out = capsys.readouterr().out
    assert "ddpm" in out and "ddim" in out and "±" in out
    assert (folder / "scores" / "validation-final-ddpm-5-seed0.csv").exists()
    facts = json.loads((folder / "scores" / "validation-final-ddim-5-seed0.json").read_text())
    assert facts["cases"] == 30 and facts["config"] == header["config"]


def test_another_setting_is_refused_and_fresh_moves_the_old_run_aside(run, tmp_path):
    folder = shutil.copytree(run.run_dir, tmp_path / "run")
    other = dataclasses.replace(run, channels=(6,), run_dir=str(folder))
    with pytest.raises(InputError, match=r"channels = \(4,\), not \(6,\)"):
        train.train(other)
    before = (folder / "last").read_bytes()
    train.train(other, fresh=True)
    [aside] = [path for path in tmp_path.iterdir() if path != folder]
    assert (aside / "last").read_bytes() == before != (folder / "last").read_bytes()


def test_a_model_without_a_state_is_not_replaced(run, tmp_path):
    folder = shutil.copytree(run.run_dir, tmp_path / "run")
    for name in run_folder.STATES:
        (folder / name).unlink(missing_ok=True)
    (folder / "mine.h5.partial").write_text("of another program")
    before = (folder / "best").read_bytes()
    with pytest.raises(InputError, match="moved aside with --init-from in it"):
        train.train(dataclasses.replace(run, run_dir=str(folder), init_from=str(folder / "best")))
    train.train(dataclasses.replace(run, run_dir=str(folder), steps=1))
    [aside] = [path for path in tmp_path.iterdir() if path != folder]
    assert (aside / "best").read_bytes() == before
    assert (aside / "mine.h5.partial").read_text() == "of another program"


def test_a_run_has_a_state_before_it_has_a_model(run, tmp_path):
    """So that one that is killed is never taken for a model that stands alone."""
    train_until_killed(dataclasses.replace(run, run_dir=str(tmp_path)), 0)
    assert run_folder.read_state(tmp_path / "last")[0]["step"] == 0


def nan_at(*bad):
    """make_batch, with an image of NaN at some steps (0, 1, ...)."""
    real = train.make_batch

    def broken(dataset, seed, step, *more):
        batch = real(dataset, seed, step, *more)
        return batch._replace(image=np.full_like(batch.image, np.nan)) if step in bad else batch

    return broken


def test_one_bad_batch_changes_nothing_but_the_counts_and_a_good_one_moves_the_average(monkeypatch):
    monkeypatch.setattr(data, "make_batch", nan_at(1))
    config, states, rates = quick(ema_decay=0.9), [None], []
    step = stepper(config)
    for number in range(3):
        metrics, state = step(number, batch=batch_number(config, number), state=states[-1])
        states.append(state)
        rates.append(metrics["learning_rate"])
    _, before, after, later = states
    for name in ("network", "ema", "opt_state", "time_sampler"):
        assert eqx.tree_equal(getattr(before, name), getattr(after, name))
    for old, new, mean in zip(*map(jax.tree.leaves, (after.ema, later.network, later.ema)), strict=True):
        np.testing.assert_allclose(mean, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-6)
    counts = [(int(s.step), int(s.skipped), int(s.skipped_in_a_row)) for s in states[1:]]
    assert counts == [(1, 0, 0), (2, 1, 1), (3, 1, 0)]
    assert rates[0] < rates[1] == rates[2]  # of the warm-up, which waits for the skipped update
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(later.network, eqx.is_array)))


def test_bad_batches_in_a_row_stop_the_run_and_name_their_samples(tmp_path, monkeypatch):
    """They stop the run even if it would have ended with them."""
    config = quick(steps=5, run_dir=str(tmp_path / "run"), save_every="1")
    monkeypatch.setattr(train, "SKIP_LIMIT", 3)
    monkeypatch.setattr(train, "make_batch", nan_at(0, 2, 3, 4))
    with pytest.raises(InputError, match=r"not finite in 3 steps in a row, up to step 5") as stop:
        train.train(config)
    dataset = dataset_of(config)
    shown = re.search(r"samples \((.*) \.\.\.\)", str(stop.value))[1].split(", ")
    seen = [i for step in (2, 3, 4) for i in data.batch_indices(len(dataset.uids["train"]), 0, step, 8)]
    assert shown == [dataset.uids["train"][i] for i in seen][: len(shown)] and len(shown) == 10
    state = state_of(config)
    assert int(state.step) == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(state.network, eqx.is_array)))


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(run, tmp_path, capsys):
    """Three runs of four steps: whole; with `last` damaged; with `previous` damaged as well."""
    config = dataclasses.replace(run, steps=4, run_dir=str(tmp_path / "whole"))
    train.train(config)
    folder = Path(shutil.copytree(config.run_dir, tmp_path / "damaged"))
    (folder / "last").write_bytes((folder / "last").read_bytes()[:-1])
    again = dataclasses.replace(config, run_dir=str(folder))
    capsys.readouterr()
    train.train(again)
    said = capsys.readouterr().err
    assert "the file is damaged" in said and "resuming from step 2" in said
    assert leaves(folder / "last") == leaves(Path(config.run_dir) / "last")
    assert run_folder.read_state(folder / "previous")[0]["step"] == 2 and (folder / "last.damaged").exists()
    for name in ("last", "previous"):
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        train.train(again)


def test_a_damaged_log_is_said_and_the_run_goes_on(run, tmp_path, capsys):
    """The lines that can be read stay."""
    folder = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    log = folder / "log.jsonl"
    first, _, *others = log.read_bytes().splitlines(keepends=True)
    damage = [b"\xff\xfe\n", b"[[[1]]]\n", b"7\n", b'{"loss": 1.0}\n', b'{"step": "x"}\n', b'{"step": \n']
    log.write_bytes(b"".join([first, *damage, *others[:-1]]))
    capsys.readouterr()
    train.train(dataclasses.replace(run, run_dir=str(folder), steps=3))
    assert "log.jsonl: 2 lines are lost" in capsys.readouterr().err
    after = log.read_bytes().splitlines(keepends=True)
    assert after[:-2] == [first, *others[:-1]]
    assert [json.loads(line)["step"] for line in after[-2:]] == [3, 3]


def test_other_cases_under_the_same_name_are_refused(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run.run_dir, tmp_path / "run")
    real = train.open_dataset

    def other(*args):
        dataset = real(*args)
        return dataset._replace(uids=dataset.uids | {"train": dataset.uids["train"][1:]})

    monkeypatch.setattr(train, "open_dataset", other)
    with pytest.raises(InputError, match=r"now has other cases.* --init-from .*run and another --run-dir"):
        train.train(dataclasses.replace(run, run_dir=str(folder), steps=4))
    monkeypatch.setattr(evaluate, "open_dataset", other)
    with pytest.raises(InputError, match="test cases may be among those trained on"):
        evaluate.load(folder).dataset()


def test_other_images_under_the_same_names_are_refused(run, tmp_path):
    folder = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    header, arrays = run_folder.read_state(folder / "last")
    header |= {"state": run_folder.STATE_VERSION, "content": "of another file"}
    write_signed(folder / "last", header, arrays)
    with pytest.raises(InputError, match="other images or labels under the same names"):
        train.train(dataclasses.replace(run, run_dir=str(folder), steps=4))


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    hold = "import sys, time, pathlib; sys.path.insert(0, sys.argv[1]); from support.disk import run_folder\n"
    hold += "with run_folder.locked(pathlib.Path(sys.argv[2])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold, HERE, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is training here"):
            train.train(tiny(run_dir=str(tmp_path)))
        other.kill()
    with run_folder.locked(tmp_path):
        assert not (tmp_path / "last").exists()


def test_a_full_disk_leaves_the_old_checkpoint(run, tmp_path, capsys):
    """The fault is made: no file may grow beyond 20 kB, which a checkpoint does and the log does not."""
    folder = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    before = (folder / "last").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(InputError, match=r"new: cannot be written \(File too large\); make room"):
            train.train(dataclasses.replace(run, run_dir=str(folder), steps=4, save_every="1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "last").read_bytes() == before and not list(folder.glob("*.partial"))
    train.train(dataclasses.replace(run, run_dir=str(folder), steps=3))
    assert run_folder.read_state(folder / "last")[0]["step"] == 3


# --- The command line ---


def test_the_presets_are_those_of_the_paper():
    """§5.2 and §5.3, and where the paper's table is lost the authors' public settings."""
    names = ("muscle_us", "amos_ct", "prostate_mr", "brats_mr")
    found = {name: settings.parse_config(["--dataset", name])[0] for name in names}
    volume, plane = ((2, 2, 2),) * 3, ((2, 2),) * 3
    expected = {
        "muscle_us": ((480, 512), plane, 64, 8000, (10, 10)),
        "amos_ct": ((128, 128, 128), volume, 8, 12_500, (10, 10, 10)),
        "prostate_mr": ((256, 256, 32), ((2, 2, 1), *volume[1:]), 8, 12_500, (20, 20, 4)),
        "brats_mr": ((128, 128, 128), volume, 8, 12_500, (20, 20, 4)),
    }
    for name, config in found.items():
        shape = config.patch_shape, config.strides, config.batch_size, config.steps, config.translation
        assert shape == expected[name], name
        assert (config.channels, config.heads, config.head_dim) == ((32, 64, 128, 256), 8, 64)
        assert (config.rotation, config.scaling, config.time_dim) == (0.088, 0.15, 256)
        assert (config.train_timesteps, config.schedule, config.sampling_steps) == (1001, "linear", 5)
        assert (config.validate_every, config.time_sampling) == (500, "importance")
        assert (config.clip_norm, config.weight_decay, config.warmup_steps) == (1.0, 1e-8, 100)
        assert config.blend == "mean"


@pytest.mark.parametrize("name", sorted(set(settings.PRESETS) - {"folder"}))  # its file has the shapes
def test_every_preset_fits_its_data(name):
    config, _ = settings.parse_config(["--dataset", name])
    dims = len(config.patch_shape)
    uids = {"train": ("a",), "validation": ("b",), "test": ()}
    dataset = data.Dataset(name, ("a", "b"), 1, "mm", "", uids, (64,) * dims, lambda *_: None)
    settings.check(config, dataset, mesh(config))
    total = np.prod([(1,) * dims, *config.strides], axis=0)
    assert all(n % s == 0 for n, s in zip(config.patch_shape, total, strict=True))


@pytest.mark.parametrize(
    "words, says",
    [
        (["--dataset", "muscle_us"], "prepare.py build muscle_us"),
        (["--batch-size", "7", "--accumulate", "2"], "multiple of --accumulate"),
        (["--teacher", "ema"], "--ema-decay"), (["--strategy", "no_diff", "--prediction", "eps"], "eps"),
        (["--patch-shape", "8,8,8"], "--patch-shape"), (["--strides", "2x2"], "--strides"),
        (["--sampling-steps", "0"], "--sampling-steps"), (["--steps", "0"], "--steps"),
        (["--phantom-shape", "8,8"], "phantom_shape"), (["--translation", "1,1,1"], "--translation"),
        (["--strides", "2x2x2,2x2x2"], "--strides"), (["--strides", "0x0,2x2"], "--strides"),
        (["--accumulate", "0"], "--accumulate"), (["--time-dim", "255"], "--time-dim"),
        (["--seed", "-1"], "--seed"), (["--foreground", "1.5"], "--foreground must be 1 or less"),
        (["--steps", "5", "--restart-at", "5"], "--restart-at must be below --steps"),
        (["--channels", "0,8,8"], "--channels"),
        (["--save-every", "10h"], "--save-every"), (["--save-every", "0"], "--save-every"),
        (["--train-timesteps", "1"], "--train-timesteps"), (["--patch-shape", "4,4"], "lowest level"),
        (["--network", "Nothing"], "--network"), (["--unknown", "1"], "--unknown 1"),
        (["--step", "3"], "--step 3"),  # no abbreviation of --steps
        (["--strategy", "nonsense"], "--strategy"), (["--channels", "a,b"], "--channels"),
        (["--run-dir", f"{__file__}/run"], __file__), (["--run-dir", "/proc/run"], "/proc/run"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_status_2(words, says, tmp_path, capsys):
    folders = ["--run-dir", tmp_path / "run", "--data-dir", tmp_path]
    assert says in one_line(capsys, train.main, *folders, *words) and not (tmp_path / "run").exists()
