"""Does a training step fit a TPU or a GPU, and how long would it take? Answered without one, by compiling:

    pip install libtpu
    python experiments/aot.py --topology v3:2x2 --dataset amos_ct --strategy rec_xT
    pip install "jax[cuda13]"
    python experiments/aot.py --topology h100 --dataset amos_ct --strategy rec_xT

takes every option of train.py and needs no data. Topologies: v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1,
v6e:2x4 and others that libtpu knows, and one h100. It prints whether the step fits and the memory of a core:
batch and state, temporaries and code together. Of a TPU it also prints how many cycles the compiler expects,
an estimate that no chip has confirmed, and how many of them only copy. On a GPU, the compiler chooses between
ways to compute by timing them; without one it takes those that it deems best, which may need other memory.

    for strategy in no_diff diff rec_xT; do
        timeout 900 python experiments/aot.py --dataset amos_ct --strategy $strategy --csv docs/fits.csv
    done

adds a row per strategy to docs/fits.csv.
"""

import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# Unless told, libtpu looks for its machine, and JAX's plugin for a GPU; JAX itself stays on the CPU.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
               "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "CUDA_VISIBLE_DEVICES": "-1",
               "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # fmt: skip

import equinox as eqx
import jax
from jax.experimental import topologies
from speed import case_of, made_up_batch

import train
from support.disk.command_line import Parser
from support.disk.files import InputError, program, replace_file
from support.machine.devices import make_mesh, provenance, shardings
from support.results.scores import as_text

COLUMNS = ("topology", "dataset", "strategy", "fits", "GiB per core", "million cycles", "copies %",
           "compiled in s", "commit")  # fmt: skip

# What the compiler asks a GPU about itself.
GPUS = {
    "h100": """
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info { major: 9 minor: 12 }
        runtime_version { major: 13 minor: 0 patch: 0 }
        gpu_device_info {
            cuda_compute_capability { major: 9 }
            core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
            device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
            threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
            registers_per_block_limit: 65536 registers_per_core_limit: 65536
            shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
            shared_memory_per_core: 233472
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }
    """
}

# --- Cycles -------------------------------------------------------------------------------------

COPIES = {"copy", "transpose", "bitcast", "reshape", "parameter", "tuple", "copy-start", "copy-done"}


def computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of an optimised program, the main one under the name ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"(?:(ENTRY) )?(%[\w.-]+) .*\{$", line):
            lines = found.setdefault(head[1] or head[2], [])
        elif " = " in line:
            lines.append(line)
    return found


def copies(lines: list[str]) -> bool:
    """Whether instructions only move what there is."""
    # The first word before a bracket that is not part of a type.
    codes = {re.search(r"[\])}] ([a-z][\w-]*)\(", line.partition(" = ")[2])[1] for line in lines}
    return codes <= COPIES


def cycles_of(text: str) -> tuple[int, int]:
    """How many cycles the compiler expects of an optimised program, and how many of them copy. A loop counts
    as often as it runs, if the program says how often that is, and else once."""
    parts, found = computations(text), {"all": 0, "copies": 0}

    def times(condition: str) -> int:
        """How often a loop runs that counts from 0: the only whole number in its condition."""
        numbers = set(re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(parts.get(condition, []))))
        return int(numbers.pop()) if len(numbers) == 1 else 1

    def add(part: str, count: int) -> None:
        for line in parts[part]:
            if loop := re.search(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)", line):
                add(loop[2], count * times(loop[1]))
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                inner = re.search(r"calls=(%[\w.-]+)", line)
                found["all"] += int(cycles[1]) * count
                if copies(parts[inner[1]] if inner else [line]):
                    found["copies"] += int(cycles[1]) * count

    add("ENTRY", 1)
    return found["all"], found["copies"]


# --- One step -----------------------------------------------------------------------------------


def devices_of(name: str) -> list[jax.Device]:
    """The devices of a topology, none of which is there. Raises InputError."""
    if name in GPUS:
        given, needs = {"platform": "cuda", "topology": "1x1x1", "target_config": GPUS[name]}, "jax[cuda13]"
    else:
        given, needs = {"platform": "tpu", "topology_name": name}, "libtpu"
    try:
        return topologies.get_topology_desc(**given).devices
    except Exception as error:  # whatever the compiler, or its absence, raises
        raise InputError(f"--topology {name}: {error}; is {needs} installed?") from error


def lower(config: train.Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The train step of `train.py`, not yet compiled."""
    case = case_of(config)
    _, per_example, replicated = shardings(mesh)
    batch = jax.eval_shape(lambda: made_up_batch(case, config.batch_size))
    state = eqx.filter_eval_shape(train.make_state, config, case.image_channels, case.classes)

    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    step = train.make_train_step(config, state.network, mesh)
    return step.lower(placed(batch, per_example), placed(state, replicated))


def fit(topology_name: str, config: train.Config) -> dict[str, str]:
    """Whether the step fits, and what it needs, in a row's words. Raises InputError."""
    devices = devices_of(topology_name)
    train.check(config)
    lowered, start = lower(config, make_mesh(config.mesh, devices)), time.time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # "Used 20G of 15G hbm", or "(temporaries: 16G) exceeds available HBM (15G)".
        needs = re.search(r"([\d.]+\w)(?: of |\) exceeds available HBM \()[\d.]+\w(?: hbm|\))", str(error))
        if not needs:
            raise
        return {"fits": "no", "GiB per core": needs[1].removesuffix("G")}
    memory = compiled.memory_analysis()
    needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if topology_name in GPUS:  # whose compiler does not refuse a program that is too large
        there = re.search(r"device_memory_size: (\d+)", GPUS[topology_name])[1]
        if needs > int(there):
            return {"fits": "no", "GiB per core": f"{needs / 2**30:.2f}"}
    row = {"fits": "yes", "GiB per core": f"{(needs + memory.generated_code_size_in_bytes) / 2**30:.2f}"}
    cycles, copying = cycles_of(compiled.as_text())
    if cycles:  # as of a TPU's program
        row |= {"million cycles": f"{cycles / 1e6:.1f}", "copies %": f"{100 * copying / cycles:.0f}"}
    return row | {"compiled in s": f"{time.time() - start:.0f}"}


# --- The program --------------------------------------------------------------------------------


def add_row(path: Path, row: dict[str, str]) -> None:
    """Adds a row to a CSV file, which may be new. Raises InputError if it cannot be written."""
    table = path.read_text() if path.exists() else ",".join(COLUMNS) + "\n"
    cells = [row.get(name, "") for name in COLUMNS]
    replace_file(path, f"{table}{','.join(cells)}\n".encode())


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--topology", default="v3:2x2", help="The chips to compile for. Default: v3:2x2.")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="Add a row to this table of what fits.")
    args, more = parser.parse_known_args()
    with program():
        way = "native" if args.topology in GPUS else "tpu"
        config, _ = train.parse_config(["--dtype", "bfloat16", "--convolutions", way, *more])
        row = {"topology": args.topology, "dataset": config.dataset, "strategy": config.strategy}
        row |= fit(args.topology, config) | {"commit": provenance()["commit"][:10]}
        print(as_text([list(row), list(row.values())]))
        if args.csv:
            add_row(args.csv, row)
        if row["fits"] == "no":
            sys.exit("try --remat 1, --accumulate 4 or a smaller batch")


if __name__ == "__main__":
    main()
