"""Eight simulated devices, and every jaxtyping signature of the project checked by beartype: shapes
in signatures are tests."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
install_import_hook(
    ["diffusion", "strategies", "unet", "data", "evaluate", "train", "prepare"], "beartype.beartype"
)
