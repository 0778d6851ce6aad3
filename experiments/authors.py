"""How fast is a step compared with the authors' public code, with the same shapes, in the same process?

    git clone https://github.com/mathpluscode/ImgX-DiffSeg
    pip install flax chex omegaconf hydra-core SimpleITK pandas opencv-python-headless
    python experiments/authors.py ImgX-DiffSeg --dataset muscle_us --batch-size 1

takes every option of train.py. "Theirs" is their network (with 8 heads and rematerialised, as in their
settings; without dropout), their loss step and our optimizer, without augmentation and history of losses;
ours is the whole step. They take turns, in the same precision (--dtype, which their network has, too).
speed.py step --help explains the columns.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from speed import Timed, case_of, matrix_product, sampling, show, training

import train
from support.command_line import check_counts, described
from support.files import InputError, program
from support.machine import ignore_absent_tpu, keep_memory

DIFFUSION = {
    "num_timesteps_beta": 1001, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "model_out_type": "x_start", "model_var_type": "fixed_small", "classes_are_exclusive": True,
}  # fmt: skip
LOSS = {"dice": 1.0, "cross_entropy": 20.0, "focal": 0.0, "mse": 0.0, "vlb": 0.0}


class Builder:
    """A stand-in for the class that their data sets extend; the data sets are not used here."""

    def __init_subclass__(cls, **options: object) -> None:
        pass


class Theirs:
    """Their network and what their loss step needs, for the shapes of a `train.Config`."""

    def __init__(self, config: train.Config):
        from imgx.datasets.dataset_info import OneHotLabeledDatasetInfo
        from imgx.model import Unet

        self.config = config
        shape, (_, channels, classes) = config.patch_shape, case_of(config)
        names = tuple(f"class {n}" for n in range(1, classes))
        self.info = OneHotLabeledDatasetInfo(
            "made up", Path(), (1.0,) * len(shape), shape, channels, names, classes_are_exclusive=True
        )
        self.network = Unet(
            num_spatial_dims=len(shape), out_channels=classes, num_channels=config.channels, num_heads=8,
            patch_size=config.strides[0], scale_factor=config.strides[-1], remat=True,
            dtype=jnp.dtype(config.dtype),
        )  # fmt: skip
        rng, n = np.random.default_rng(0), config.batch_size
        self.image = jnp.asarray(rng.random((n, *shape, channels), np.float32))
        self.label = jnp.asarray(rng.integers(0, classes, (n, *shape)))
        self.mask = jnp.zeros((n, *shape, classes))
        arguments = self.inputs(jnp.zeros(n))
        self.parameters = self.network.init(jax.random.key(0), False, *arguments)["params"]

    def inputs(self, t):
        return (self.image,) if self.config.strategy == "no_diff" else (self.image, self.mask, t)

    def loss(self, parameters, key, counts, squares):
        from flax.struct import dataclass
        from imgx.diffusion.time_sampler import TimeSampler
        from imgx.loss.segmentation import segmentation_loss
        from imgx.task.diffusion_segmentation.diffusion_step import get_diffusion_loss_step
        from imgx.task.diffusion_segmentation.gaussian_diffusion import DDPMSegmentationSampler
        from imgx.task.diffusion_segmentation.recycling_step import get_recycling_loss_step

        if self.config.strategy == "no_diff":
            logits = self.network.apply({"params": parameters}, True, self.image)
            return segmentation_loss(logits, self.label, self.info, LOSS)[0].mean()

        @dataclass
        class State:
            loss_count_hist: jax.Array
            loss_sq_hist: jax.Array

            def apply_fn(_, *arguments, **options):
                return self.network.apply(*arguments, **options)

        common = {
            "train_state": State(counts, squares), "dataset_info": self.info, "loss_config": LOSS,
            "diffusion_model": DDPMSegmentationSampler.create(num_timesteps=1001, **DIFFUSION),
            "time_sampler": TimeSampler(num_timesteps=1001, uniform_time_sampling=False),
        }  # fmt: skip
        if self.config.strategy == "diff":
            step = get_diffusion_loss_step(**common)
        else:
            step = get_recycling_loss_step(**common, prev_step="max", reverse_step=False)
        return step(parameters, {"image": self.image, "label": self.label}, key)[0]

    def training(self) -> Timed:
        optimizer, _ = train.make_optimizer(self.config)

        def step(carry):
            parameters, state, number = carry
            key = jax.random.fold_in(jax.random.key(0), number)
            counts, squares = jnp.zeros(1001, jnp.int32), jnp.zeros(1001)
            gradient = jax.grad(self.loss)(parameters, key, counts, squares)
            updates, state = optimizer.update(gradient, state, parameters)
            return optax.apply_updates(parameters, updates), state, number + 1

        carry = self.parameters, optimizer.init(self.parameters), jnp.zeros((), jnp.int32)
        lowered = jax.jit(step, donate_argnums=0).lower(carry)
        carry = jax.tree.map(jnp.copy, carry)
        return Timed(f"theirs: train {self.config.strategy}", lowered, lambda c, x: c(x), carry)

    def sampling(self) -> Timed:
        from imgx.task.diffusion_segmentation.gaussian_diffusion import DDPMSegmentationSampler

        K = self.config.sampling_steps
        model = DDPMSegmentationSampler.create(num_timesteps=K, **DIFFUSION)

        def run(parameters, key):
            x_t, masks = jax.random.normal(key, self.mask.shape), []
            for k in reversed(range(K)):
                rows = jnp.full(len(x_t), k)
                out = self.network.apply(
                    {"params": parameters}, False, self.image, model.x_to_mask(x_t), model.t_index_to_t(rows)
                )
                x_t, x_0_hat = model.sample(jax.random.fold_in(key, k), out, x_t, rows)
                masks.append(x_0_hat)
            return masks

        arguments = self.parameters, jax.random.key(0)
        lowered = jax.jit(run).lower(*arguments)
        return Timed(f"theirs: sample ddpm, K = {K}", lowered, lambda run, _: run(*arguments))


def prepare(repository: Path) -> None:
    """Makes their code importable. Raises InputError where it is missing."""
    if not (repository / "imgx").is_dir():
        raise InputError(f"{repository}: not the authors' code; clone it first (see --help)")
    sys.path.insert(0, str(repository))
    # Any import of their code imports their data sets, which need TensorFlow; a stand-in does not.
    sys.modules["tensorflow_datasets"] = stand_in = mock.MagicMock()
    stand_in.core.GeneratorBasedBuilder = Builder
    # They name the arguments of jnp.where, which JAX no longer allows.
    where = jnp.where
    jnp.where = lambda *given, **named: where(*given, *named.values())


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, **described(__doc__))
    parser.add_argument("repository", type=Path, help="The folder of their code.")
    names = "no_diff,diff,rec_xT"
    parser.add_argument("--strategies", default=names, help="Which of these three. Default: all of them.")
    parser.add_argument("--repeats", type=int, default=5, help="How often each program is run. Default: 5.")
    args, more = parser.parse_known_args()
    check_counts(parser, args, repeats=1)
    names = args.strategies.split(",")
    if unknown := set(names) - {"no_diff", "diff", "rec_xT"}:
        parser.error(f"--strategies: {', '.join(unknown)} is not one of no_diff, diff, rec_xT")
    ignore_absent_tpu()
    keep_memory()
    with program():
        prepare(args.repository)
        configs = [train.parse_config([*more, "--strategy", name])[0] for name in names]
        case, programs = case_of(configs[0]), [matrix_product(configs[0].dtype)]
        for config in configs:
            programs += [training(config, case), Theirs(config).training()]
        if config.strategy != "no_diff":
            programs += [sampling(config, case, "ddpm"), Theirs(config).sampling()]
        show(configs[0], programs, args.repeats, more)


if __name__ == "__main__":
    main()
