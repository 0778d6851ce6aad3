"""How do files stay whole, and how does a program end when it cannot continue?"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line that names the file or the
    option, says what is wrong with it, and how to put it right."""


def one_line(error: Exception) -> str:
    """What an exception says, on one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def tuples(value: object) -> object:
    """JSON's lists as tuples, at every depth."""
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


class Quiet:
    """Standard error, whose reader may go away: no run fails because nobody sees its progress bar."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def program(leave: Callable[[int], object] = sys.exit) -> Iterator[None]:
    """How every program of this project ends. An InputError, or an OSError such as a full disk, becomes one
    line on standard error and exit status 2; Ctrl-C becomes status 130. A reader of standard output that has
    read enough, such as `| head`, ends the program with status 1. `leave` takes the status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may have no ±
    stderr = sys.stderr
    if stderr is None:  # closed from the start
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (open as long as the program runs)
    else:
        sys.stderr = Quiet(stderr)
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        # When Python ends, it writes what is left in the buffer: it must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except (InputError, OSError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        leave(130)
    finally:
        sys.stderr = stderr


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into an InputError which says that this file cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); make room, or choose another folder"
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes, and moves into place, so that a reader finds the old file or
    the new one, always whole, even if the machine stopped. Raises InputError if writing fails."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # left only where something failed
        if hasattr(os, "O_DIRECTORY"):  # the folder holds the new name; Windows cannot open one
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_signed(path: Path, header: dict, content: bytes) -> None:
    """Writes a file of three parts: a line with the SHA-256 of the other two, a line of JSON, and bytes."""
    signed = json.dumps(header).encode() + b"\n" + content
    replace_file(path, hashlib.sha256(signed).hexdigest().encode() + b"\n" + signed)


def read_signed(path: Path) -> tuple[dict, bytes]:
    """The JSON and bytes of a `write_signed` file. Raises InputError if it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; train first: python train.py --help")
    digest, _, signed = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(signed).hexdigest().encode():
        raise InputError(f"{path}: the file is damaged; copy it again, or train again")
    header, _, content = signed.partition(b"\n")
    try:
        return dict(json.loads(header)), content
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a file of this program ({one_line(error)}); train again") from error
