"""Eight simulated devices, and every jaxtyping signature of the project checked by beartype: shapes
in signatures are tests. Compiling is most of the suite's time, so it is kept cheap, and what several
tests compile is compiled once, whichever process runs them (and over several runs, if
JAX_COMPILATION_CACHE_DIR names a folder)."""

import os
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook
from matplotlib.figure import Figure

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers and their subprocesses inherit it
    CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
STORY = ["diffusion", "unet", "strategies", "data", "evaluate", "train", "prepare", "predict", "report"]
install_import_hook([*STORY, "support", "recipes"], "beartype.beartype")

import made  # noqa: E402  (after the hook)

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
import unet  # noqa: E402
from support.machine import cpu_convolution  # noqa: E402
from support.machine.devices import keep_memory  # noqa: E402

keep_memory()
cpu_convolution.SMALL.clear()  # what is kept cheap above would be optimised after all


# The files that take longest. They are begun first, so that no process works on one of them alone at the end.
DEAR = ["test_train", "test_unet", "test_step", "test_report", "test_change", "test_faults", "test_data"]


def pytest_configure(config):
    config.option.loadscopereorder = False  # the order of xdist would be by the number of tests


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(DEAR)}
    items.sort(key=lambda item: order.get(item.path.stem, len(DEAR)))


class Mixed(eqx.Module):
    """`--network Mixed` of the tests: the least that depends on all that a network is given. It stands where
    the network does not matter, since it takes a moment to compile."""

    mix: jax.Array
    told: jax.Array
    classes: int = eqx.field(static=True)
    noisy_mask: bool = eqx.field(static=True)
    self_condition: bool = eqx.field(static=True)

    def __init__(self, *, image_channels, classes, noisy_mask, self_condition, key, **_):
        size = image_channels + classes * (noisy_mask + self_condition)
        self.mix, self.told = jax.random.normal(key, (2, size, classes)), jnp.ones(classes).at[0].set(-1)
        self.classes, self.noisy_mask, self.self_condition = classes, noisy_mask, self_condition

    def __call__(self, image, t=None, x_t=None, x_0_hat=None):
        given = [x for x in (image, x_t, x_0_hat if self.self_condition else None) if x is not None]
        x = jnp.concatenate(given, -1)
        x = x @ self.mix[0] + (x - jnp.roll(x, 1, 0)) @ self.mix[1]
        return x if t is None else x + self.told * jnp.sqrt(t / 1001)

    def compiler_options(self, patch_shape):
        return {}


unet.NETWORKS["Mixed"] = Mixed


@pytest.fixture(scope="session")
def save_run():
    """Makes an untrained run of `Mixed`, or of a tiny U-Net, for a data set that is on disk or made up."""

    def save(folder, dataset, data_dir, strategy="no_diff", **settings):
        words = {"strategy": strategy, "dataset": dataset, "data_dir": str(data_dir), "run_dir": str(folder)}
        small = {"channels": (4,), "strides": (), "transformer": False, "time_dim": 8, "dtype": "float32"}
        small |= {"network": "Mixed", "convolutions": "cpu"}
        small["translation"] = (1,) * len(settings["patch_shape"])
        config = train.Config(**small | settings | words)
        found = data.open_dataset(dataset, data_dir, config.phantom_shape)
        state = train.make_state(config, found.image_channels, len(found.class_names))
        evaluate.save(folder / "best", state.network, train.model_facts(config, found, {}))
        return folder

    return save


@pytest.fixture(autouse=True)
def same_random_numbers(request):
    """A test draws the same numbers, whichever process runs it and after which others."""
    for module in (made, request.module):
        if hasattr(module, "RNG"):
            module.RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """What is written where nobody said is written there."""
    monkeypatch.chdir(tmp_path)


# Pictures are made, but not drawn, which would take long, except in tests whose subject they are; those of a
# validation are not even made (as they are by the runs in test_change.py and test_faults.py).
DRAWN = {"test_show_counts_and_draws", "test_table_1_is_numpys", "test_a_slice_saved_as_a_volume"}
draw, Figure.savefig = Figure.savefig, lambda _, file, **__: file.write(b"\x89PNG")
train.panels = lambda *_, **__: Figure()


@pytest.fixture(autouse=True)
def some_pictures_are_drawn(request, monkeypatch):
    if request.node.originalname in DRAWN:
        monkeypatch.setattr(Figure, "savefig", draw)
