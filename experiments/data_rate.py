"""How many patches does a core read, or augment, in a second? Made-up samples of the paper's sizes, with the
paper's patches and batches (train.PRESETS), in files as prepare.py writes them.

    python experiments/data_rate.py

needs 1 GB of disk in the folder for temporary files, and 4 GB of memory. Prints the best of 3 repeats, per
second of one core (process time: what else runs on the machine hardly matters); the files are in the
system's cache.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

import data
import train

SHAPES = {  # the samples' (§5.2), channels last, and how many are written
    "muscle_us": (480, 512, 1, 64), "amos_ct": (192, 128, 128, 1, 8), "prostate_mr": (256, 256, 48, 1, 8),
    "brats_mr": (179, 219, 155, 4, 4),
}  # fmt: skip


def write(path: Path, shape: tuple[int, ...], count: int) -> None:
    """`count` samples of noise."""
    rng, facts = np.random.default_rng(0), {"source": "MADE UP", "preprocessing": "", "unit": "mm"}
    with data.DatasetWriter(path, name=path.stem, class_names=["background", "x"], **facts) as writer:
        for i in range(count):
            image = rng.standard_normal(shape, np.float32)
            label = (image[..., 0] > 1).astype(np.uint8)
            writer.add("train", data.Sample(image, label, (1.0,) * label.ndim, f"case{i}", np.eye(4)))


def rate(function: Callable[[], object], patches: int) -> float:
    """Patches per second of process time of a call that makes `patches`, the best of 3."""
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return patches / min(times)


def measure(name: str, shape: tuple[int, ...], count: int, folder: Path) -> str:
    """A data set's row of the table."""
    config, _ = train.parse_config(["--dataset", name])
    size = config.batch_size
    write(folder / f"{name}.h5", shape, count)
    dataset = data.open_dataset(name, folder, ())
    limits = {key: getattr(config, key) for key in ("rotation", "scaling", "translation")}
    augment = jax.jit(partial(data.augment, patch_shape=config.patch_shape, **limits))

    read = rate(lambda: data.make_batch(dataset, 0, 0, size), size)
    batch, keys = data.make_batch(dataset, 0, 0, size), jax.random.split(jax.random.key(0), size)
    jax.block_until_ready(augment(batch, keys))  # compiles
    augmented = rate(lambda: jax.block_until_ready(augment(batch, keys)), size)
    patch = " x ".join(map(str, config.patch_shape))
    return f"{name:14}{patch:18}{size:5}{read:12.1f}{augmented:16.1f}"


def main() -> None:
    print(f"{'data set':14}{'patch':18}{'batch':>5}{'read / s':>12}{'augmented / s':>16}")
    for name, (*shape, count) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, tuple(shape), count, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
