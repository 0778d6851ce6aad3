"""Eight simulated devices, and every jaxtyping signature of the project checked by beartype: shapes
in signatures are tests. Compiling is most of the suite's time, so it is kept cheap, and what several
tests compile is compiled once."""

import tempfile

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
install_import_hook(
    ["diffusion", "strategies", "unet", "data", "evaluate", "train", "prepare"], "beartype.beartype"
)
