"""What does a program run on? Memory, compiled programs, devices, hosts, and a record of them."""

import ctypes
import math
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from support.disk.files import InputError, one_line

# --- Memory, compiled programs, provenance ------------------------------------------------------


def prepare_machine() -> None:
    """The settings that every program makes before it uses JAX. All numbers are of 32 bits, whatever
    JAX_ENABLE_X64 asks of other programs, so that a run and its models do not depend on it."""
    jax.config.update("jax_enable_x64", False)
    ignore_absent_tpu()
    keep_compiled()
    keep_memory()


def ignore_absent_tpu() -> None:
    """Hides libtpu from JAX where there is no TPU: it would be asked all the same, and write a page about
    what it does not find. Where JAX finds a TPU, or was told what to use, `jax_platforms` is set; a chip that
    it does not know has a device file."""
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not jax.config.jax_platforms and not devices:
        os.environ.pop("TPU_LIBRARY_PATH", None)  # libtpu itself sets it when it is imported
        sys.modules["libtpu"] = None  # another import of it fails


def keep_compiled() -> None:
    """Keeps compiled programs on disk, so that a second start is fast: in JAX_COMPILATION_CACHE_DIR,
    or else in the user's cache, in a folder per machine, since a program is compiled for one CPU. A user
    without a home in which to write has neither."""
    if not jax.config.jax_compilation_cache_dir:
        with suppress(OSError, RuntimeError):
            folder = Path.home() / ".cache" / "jax" / platform.node()
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Keeps the memory of freed arrays in this process (on Linux with glibc; elsewhere nothing changes).

    On a CPU, XLA asks for the memory of all intermediate values at each call, and frees it at the end.
    glibc returns such large blocks to the system, which must then find and clear every page again;
    for a large network, that took as long as the work. glibc can keep only what the main thread
    asked for, so programs must run there. Source: mallopt(3).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def provenance() -> dict[str, str]:
    """A record of what ran: hardware, versions, commit (with a note if tracked code has changed since) and
    date. Every result contains one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ":/*.py")
        commit = git("rev-parse", "HEAD") + (" (changed)" if changed else "")
    except OSError:
        commit = ""
    devices = jax.devices()
    return {
        "commit": commit or "unknown",
        "devices": f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})",
        "jax": jax.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# --- Devices ------------------------------------------------------------------------------------


def kind_of_device() -> str:
    """What JAX computes on: cpu, gpu or tpu. Raises InputError if it was told to use what is not there."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the second one if a plugin is not installed
        raise InputError(
            f"JAX_PLATFORMS={jax.config.jax_platforms}: JAX finds none here ({one_line(error)}); leave the "
            "variable out, or install JAX for this device"
        ) from error


def make_mesh(layout: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (by default all) on two axes. A batch is split over `data`; the second axis of its images
    and feature maps is split over `space`, and XLA exchanges the borders. (Slices along the first axis may be
    computed as a batch, which XLA could not split by example and by slice.) `layout` is written
    data=4,space=2; if it is empty, all devices are on `data`. Raises InputError if it does not fit."""
    count = len(jax.devices() if devices is None else devices)
    if not re.fullmatch(r"(data=[1-9]\d*(,space=[1-9]\d*)?)?", layout):
        raise InputError(f"--mesh {layout} is not like data=4,space=2")
    axes = dict(part.split("=") for part in (layout or f"data={count}").split(","))
    shape = (int(axes["data"]), int(axes.get("space", 1)))
    if math.prod(shape) != count:
        raise InputError(f"--mesh {layout} is for {math.prod(shape)} devices, but there are {count}")
    return jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto,) * 2, devices=devices)


class Shardings(NamedTuple):
    """How devices share arrays: images and masks, arrays with an entry per example, what each has whole."""

    per_voxel: NamedSharding
    per_example: NamedSharding
    replicated: NamedSharding


def shardings(mesh: Mesh) -> Shardings:
    """The shardings over the devices of `mesh`."""
    specs = PartitionSpec("data", None, "space"), PartitionSpec("data"), PartitionSpec()
    return Shardings(*(NamedSharding(mesh, spec) for spec in specs))


def rows_of_this_host(per_example: NamedSharding, batch_size: int) -> list[int]:
    """Which rows of a batch this process has to read for its own devices."""
    parts = per_example.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(batch_size)[part]})


def spread(arrays: Sequence, mesh: Mesh | None) -> Sequence:
    """Images, and arrays with one entry per example, which every host has whole, placed on the
    devices of `mesh`. Without a mesh they are returned unchanged."""
    if mesh is None:
        return arrays
    both = zip(arrays, shardings(mesh), strict=False)
    return [jax.make_array_from_callback(whole.shape, s, whole.__getitem__) for whole, s in both]


def gathered(array: jax.Array) -> np.ndarray:
    """An array as a whole, even where every host has only a part of it."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


# --- Hosts --------------------------------------------------------------------------------------


def join_hosts(hosts: str) -> None:
    """Makes this process one of several that train together, each on its own devices and with its own part
    of every batch. Raises InputError."""
    try:
        if hosts == "auto":
            jax.distributed.initialize()
        elif hosts:
            address, count, number = hosts.split(",")
            jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=30)
        if hosts:
            sys.excepthook = end_with_traceback
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--hosts {hosts}: {one_line(error)}; give ADDRESS:PORT,COUNT,NUMBER") from error


def is_first_host() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


@contextmanager
def first_host_first() -> Iterator[None]:
    """Lets the first process run the block, and then all others."""
    if not is_first_host():
        multihost_utils.sync_global_devices("first host")
    try:
        yield
    finally:  # also after an InputError, so that the others come to the same one
        if is_first_host():
            multihost_utils.sync_global_devices("first host")
        multihost_utils.sync_global_devices(
            "all hosts"
        )  # if the first one left now, JAX would end the others


def of_all_hosts(value: int) -> list[int]:
    """The values of all processes, known to each of them."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.asarray(value)).reshape(-1).tolist()


def check_hosts_agree(value: object, otherwise: str) -> None:
    """Raises InputError, which says `otherwise`, unless `value`, as text, is the same on all hosts."""
    if len(set(of_all_hosts(int(hashlib.sha256(str(value).encode()).hexdigest()[:7], 16)))) > 1:
        raise InputError(otherwise)


def end_with_traceback(*error: object) -> None:
    """Ends this process after an error that nothing has caught."""
    sys.__excepthook__(*error)
    exit_this_host(1)


def exit_this_host(status: int) -> None:
    """Ends this process. One of several hosts must not exit in the usual way, since JAX would then
    wait for hosts that are waiting for this one."""
    if jax.distributed.is_initialized():  # asks for no device, which may be what is missing
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
