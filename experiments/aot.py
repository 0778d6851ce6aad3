"""Does a training step fit a TPU, and how long would it take? Answered without one, by compiling for it:

    pip install libtpu
    python experiments/aot.py --topology v3:2x2 --dataset amos_ct --strategy rec_xT

takes every option of train.py; no data is needed. Topologies: v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1,
v6e:2x4 and what else libtpu knows. Prints whether it fits, the memory of a core by kind, the work of a
step, and the time that the chip's published peaks allow at best: a bound, not a promise.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# libtpu looks for a machine to belong to, unless it is told; JAX itself stays on the CPU.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
               "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip

import equinox as eqx
import jax
import jax.numpy as jnp
from bench import case_shapes
from jax.experimental import topologies
from jax.sharding import Mesh

import train
from data import Batch, InputError

# Per device as JAX counts them (cores in v3 and v4): bfloat16 TFLOP/s and GB/s, Google's published peaks.
PEAKS = {
    "TPU v3": (61.5, 450), "TPU v4": (137.5, 614), "TPU v5 lite": (197, 819), "TPU v5": (459, 2765),
    "TPU v6 lite": (918, 1640),
}  # fmt: skip


def lower(config: train.Config, mesh: Mesh) -> tuple[jax.stages.Lowered, train.TrainState]:
    """The train step of `train.py`, not yet compiled, and the shapes of its state."""
    canvas, image_channels, classes = case_shapes(config)
    _, rows, whole = train.shardings(mesh)

    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    n, dims = config.batch_size, len(canvas)
    batch = Batch(
        jax.ShapeDtypeStruct((n, *canvas, image_channels), jnp.float32),
        jax.ShapeDtypeStruct((n, *canvas), jnp.uint8),
        jax.ShapeDtypeStruct((n, dims), jnp.int32), jax.ShapeDtypeStruct((n, dims), jnp.float32),
    )  # fmt: skip
    state = eqx.filter_eval_shape(train.make_state, config, image_channels, classes)
    step = train.make_train_step(config, classes, mesh)
    return step.lower(placed(batch, rows), placed(state, whole)), state


def size(tree) -> float:
    """GiB of the arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v3:2x2")
    args, more = parser.parse_known_args()
    config, _ = train.parse_config(["--dtype", "bfloat16", "--convolutions", "native", *more])
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    except Exception as error:  # whatever libtpu, or its absence, raises
        raise InputError(f"--topology {args.topology}: {error}; is libtpu installed?") from error
    mesh = train.make_mesh(config, topology.devices)
    kind = topology.devices[0].device_kind
    lowered, state = lower(config, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(state.model))
    print(
        f"{config.dataset}, {config.strategy}, {parameters:,} parameters, patch {config.patch_shape}, batch "
        f"{config.batch_size} on {len(topology.devices)} x {kind}, "
        f"blocks of {config.remat} levels recomputed", flush=True,
    )  # fmt: skip
    start = time.time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # "Used 20G of 15G hbm", or "(temporaries: 16G) exceeds available HBM (15G)".
        needs = re.search(r"([\d.]+\w)(?: of |\) exceeds available HBM \()([\d.]+\w)(?: hbm|\))", str(error))
        if not needs:
            raise
        print(f"does NOT fit: needs {needs[1]} of {needs[2]} per core; try --remat 1 or a smaller batch")
        sys.exit(1)
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    print(f"fits (compiled in {time.time() - start:.0f} s); GiB per core:")
    used = {
        "parameters": size(state.model), "optimizer": size(state.opt_state),
        "batch and state": memory.argument_size_in_bytes / 2**30,
        "temporaries": memory.temp_size_in_bytes / 2**30,
        "code": memory.generated_code_size_in_bytes / 2**30,
    }  # fmt: skip
    for name, gib in used.items():
        print(f"    {name:18s}{gib:8.3f}")
    dtypes = re.findall(r"= (\w+)\[[^=]*? convolution\(", text)
    collectives = re.findall(r" (all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\(", text)
    for names, what in ((dtypes, "convolutions and products (what they give)"), (collectives, "collectives")):
        print(f"{what}: " + ", ".join(f"{names.count(n)} x {n}" for n in sorted(set(names))))
    flops, moved = cost["flops"], cost["bytes accessed"]
    print(f"per core and step: {flops / 1e12:.3f} TFLOP, {moved / 1e9:.1f} GB moved")
    if kind in PEAKS:
        peak, bandwidth = PEAKS[kind]
        times = (flops / peak / 1e9, moved / bandwidth / 1e6)
        print(
            f"at best {max(times):.1f} ms per step ({times[0]:.1f} for the work, {times[1]:.1f} to move it)"
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
