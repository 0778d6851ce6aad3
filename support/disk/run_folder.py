"""What does a run leave in its folder, and how does it resume from there after it was killed?

`log.jsonl`, the training states `last` and `previous` (the one before), and pictures. The model files `best`
and `final` are evaluate.py's. Every file but the log is moved into place, so that it is whole at any moment.
The log is appended to, and a line that was cut off is left out.
"""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import equinox as eqx
import numpy as np

from support.disk.files import InputError, one_line, read_signed, replace_file, tuples, write_signed, writing
from support.machine.devices import is_first_host

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

STATE_VERSION = 1
STATES, MODELS = ("new", "last", "previous"), ("best", "final")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes from training in this folder, until this one ends, even if it is killed. Of
    several hosts, the first holds the lock. Raises InputError."""
    if not is_first_host():
        yield
        return
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / "lock", "a")  # noqa: SIM115  (closed below)
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{run}: another process is training here; wait for it, or give another --run-dir"
            ) from None
        except OSError as error:  # some network disks have no locks
            print(f"NB: {run}: cannot be locked ({error.strerror}); start only one run here", file=sys.stderr)
        yield


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM, SIGHUP or SIGINT (Ctrl-C). A second one ends
    the run."""
    caught: list[int] = []

    def catch(number: int, _) -> None:
        caught.append(number)
        restore_handlers()
        print("\nstopping soon, and saving; a second signal stops at once", file=sys.stderr)

    numbers = {getattr(signal, name, signal.SIGTERM) for name in ("SIGTERM", "SIGHUP", "SIGINT")}
    old = {number: signal.signal(number, catch) for number in numbers}  # Windows has no SIGHUP

    def restore_handlers() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    try:
        yield caught
    finally:
        restore_handlers()


def move_aside(run: Path) -> None:
    """Makes room for a fresh run: the files of the old one go to a folder beside it. Raises InputError."""
    if is_first_host() and run.exists():
        aside = Path(f"{run.resolve()}.{time.strftime('%Y%m%d-%H%M%S')}")
        with locked(run):  # which Windows does not rename while a file in it is open
            aside.mkdir()
            # The states first: what is left by a program that was killed here is then no run to resume.
            for path in sorted(run.iterdir(), key=lambda path: path.name not in STATES):
                if path.name != "lock":
                    os.replace(path, aside / path.name)
        print(f"the old run is now {aside}", file=sys.stderr)


def has_model_alone(run: Path) -> bool:
    """Whether a folder holds a model, but no state from which its training could go on: a new training in it
    would replace the model."""
    models, states = (any((run / name).exists() for name in names) for names in (MODELS, STATES))
    return models and not states


# --- Training states ----------------------------------------------------------------------------


def save_state(path: Path, state: eqx.Module, header: dict) -> None:
    """Writes a training state: the facts about the run, then all arrays."""
    arrays = io.BytesIO()
    eqx.tree_serialise_leaves(arrays, state)
    write_signed(path, {"state": STATE_VERSION, **header}, arrays.getvalue())


def read_state(path: Path) -> tuple[dict, bytes]:
    """The facts about the run, and the arrays. Raises InputError if the file is missing, damaged,
    or not a training state of this version of the code."""
    header, arrays = read_signed(path)
    if header.pop("state", None) != STATE_VERSION:
        raise InputError(f"{path}: not a state of this version of the code; train again with --fresh")
    return header, arrays


def promote(run: Path) -> None:
    """Renames the state `last`, if there is one, to `previous`, and `new` to `last`."""
    if (run / "last").exists():
        os.replace(run / "last", run / "previous")
    os.replace(run / "new", run / "last")


def newest_state(run: Path) -> tuple[dict, bytes] | None:
    """Header and arrays of `last` or, if it is damaged, of `previous`; None for a new run. Raises
    InputError if both are damaged."""
    # A process that was killed while saving can leave these. `new` is whole, as it was moved into place.
    for name in (*STATES, *MODELS, "log.jsonl"):
        (run / f"{name}.partial").unlink(missing_ok=True)
    if (run / "new").exists():
        promote(run)
    there = [run / name for name in ("last", "previous") if (run / name).exists()]
    for path in there:
        try:
            found = read_state(path)
        except InputError as error:
            if path == there[-1]:
                raise
            print(f"{error}; going back to {there[-1]}", file=sys.stderr)
            continue
        if path != there[0]:  # otherwise the next save would make it `previous`
            os.replace(there[0], run / "last.damaged")
        return found
    return None


# --- The log ------------------------------------------------------------------------------------


def read_log(path: Path, step: int) -> list[dict]:
    """The log's lines up to a step. What a killed run wrote after its last checkpoint is left out."""
    lines: list[dict] = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):  # cut off when the machine stopped, or damaged since
            line = json.loads(text)
            lines += [line] if line["step"] <= step else []
    return lines


class Journal:
    """What a run writes while it trains. `facts` is in every state's header; `best` is the highest
    validation score so far, with its step. Of several hosts, only the first writes."""

    def __init__(self, run: Path, facts: dict, best: dict, lines: list[dict]):
        self.run, self.facts, self.best, self.lines = run, facts, best, lines
        self.saved, self.writes = time.monotonic(), is_first_host()
        if self.writes:
            replace_file(run / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write(self, step: int, values: dict) -> None:
        """Adds a line to the log. JSON has no NaN, so values that are not finite become null."""
        line = {name: value if np.isfinite(value).all() else None for name, value in values.items()}
        self.lines.append({"step": step} | line)
        if not self.writes:
            return
        with writing(self.run / "log.jsonl"), open(self.run / "log.jsonl", "a") as log:
            log.write(json.dumps(self.lines[-1]) + "\n")
            log.flush()
            os.fsync(log.fileno())  # no state on the disk is to be newer than its log

    def newest(self) -> dict[str, str]:
        """What the progress bar shows: the newest values of the log."""
        line = {name: value for line in self.lines for name, value in line.items()}
        line["validation"] = (line.pop("validation_dice", None) or [None])[-1]
        shown = ("loss", "dice", "validation", "skipped")
        return {name: f"{line[name]:.3g}" for name in shown if line.get(name)}

    def record_best(self, step: int, dice: float) -> bool:
        """Remembers a validation's score if it is the highest so far, or undefined (below 0). Returns whether
        it is."""
        if better := dice > self.best["dice"] or max(dice, self.best["dice"]) < 0:
            self.best = {"dice": dice, "step": step}
        return better

    def save(self, state: eqx.Module, step: int) -> None:
        """Saves `last`; the one before becomes `previous`, so that a damaged file costs little."""
        if not self.writes:
            return
        save_state(
            self.run / "new", state, self.facts | {"step": step, "best": self.best, "lines": len(self.lines)}
        )
        promote(self.run)
        self.saved = time.monotonic()

    def due(self, every: str, step: int) -> bool:
        """Whether it is time to save: `every` is in steps (200) or in minutes (10m)."""
        if every.endswith("m"):
            return time.monotonic() - self.saved >= 60 * float(every[:-1])
        return step % int(every) == 0


# --- Resuming -----------------------------------------------------------------------------------


def resume(
    run: Path, make_state: Callable[[], eqx.Module], facts: dict, usual: dict, may_change: set[str],
    advice: dict[str, str],
) -> tuple[eqx.Module, Journal] | None:  # fmt: skip
    """The state and the journal of a run's newest checkpoint, or None if there is none. `facts` says what the
    run is now, `config` among it. Raises InputError if it began with other cases, images or settings (except
    those that `may_change`); `usual` has settings that are newer than a state, and `advice` says what to do
    about a setting that differs. At the step `restart_at`, it and the length may change; the log says so, and
    `begun`, which every later model keeps."""
    found, config, facts = newest_state(run), facts["config"], dict(facts)
    if found is None:
        return None
    header, arrays = found
    try:
        before, best = usual | header["config"], header["best"]
        step, length, facts["begun"] = header["step"], header["lines"], header["begun"]
        restarts = config["restart_at"] == step != before["restart_at"]
        if restarts:
            may_change = may_change | {"steps", "restart_at"}
            facts["begun"]["restarts"] = [*facts["begun"].get("restarts", []), step]
        if config["steps"] < step:
            least = f"{step} or more" if "steps" in may_change else before["steps"]
            raise InputError(f"{run}: this run has come to step {step}; give --steps {least}")
        for name in config:
            if name not in may_change and tuples(before[name]) != config[name]:
                other = "give another --run-dir, or --fresh to start over (the old run is moved aside)"
                fix = advice.get(name, other).format(before=before[name], step=step)
                raise InputError(
                    f"{run}: this run has {name} = {tuples(before[name])}, not {config[name]}; {fix}"
                )
        if header["cases"] != facts["cases"]:
            raise InputError(
                f"{run}: {config['dataset']} now has other cases or classes; use --fresh, or begin with its "
                f"weights: --init-from {run} and another --run-dir"
            )
        if header.get("content", facts["content"]) != facts["content"]:  # older states do not have it
            raise InputError(
                f"{run}: {config['dataset']} now has other images or labels under the same names; put the "
                "file back with which this run began, or use --fresh"
            )
        how = ", with a new warm-up of the learning rate" if restarts else ""
        say = partial(print, file=sys.stderr) if is_first_host() else lambda _: None
        say(f"resuming from step {step}{how}")
        if header["devices"] != facts["devices"]:
            moved = f"it ran on {header['devices']}, now on {facts['devices']}"
            say(f"{moved}: results agree within rounding, not bit for bit")
        state = eqx.tree_deserialise_leaves(io.BytesIO(arrays), eqx.filter_eval_shape(make_state))
    except InputError:
        raise
    except Exception as error:  # settings and arrays of other code can fail anywhere
        raise InputError(
            f"{run / 'last'}: from another version of this code ({one_line(error)}); train again with --fresh"
        ) from error
    lines = read_log(run / "log.jsonl", step)
    if len(lines) < length:
        say(f"{run / 'log.jsonl'}: {length - len(lines)} lines are lost")
    journal = Journal(run, facts, best, lines)
    if restarts and {"step": step, "restart_at": step} not in lines:
        journal.write(step, {"restart_at": step})
    return state, journal
