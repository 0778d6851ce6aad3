"""What is in a model file? A line with a checksum, a line of JSON (`ModelFacts`), and the network's arrays.

evaluate.py loads, saves and uses models; this is the file alone, and what it may not hold.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax

from support.command_line import MOST_NUMBERS, check_settings
from support.cpu_convolution import way_here
from support.files import InputError, one_line, read_signed, tuples, write_signed

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a model file holds besides the weights: all that prediction needs, and a record of the
    training."""

    network: Annotated[str, "Which of unet.NETWORKS it is."]
    arguments: Annotated[dict, "What the network is made from."]
    schedule: Annotated[str, "The noise schedule in training."]
    train_timesteps: Annotated[int, "The number of noise levels in training.", 1]
    prediction: Annotated[Literal["x_0", "eps"], "What the network predicts."]
    sampler: Annotated[str, "The sampler of validation."]
    sampling_steps: Annotated[int, "The number of sampling steps in validation.", 1]
    patch_shape: Annotated[tuple[int, ...], "Voxels that the network sees at once.", 1]
    class_names: Annotated[tuple[str, ...], "The names of the classes, background first."]
    image_channels: Annotated[int, "The number of channels of an image.", 1]
    unit: Annotated[Literal["mm", "pixel"], "The unit of lengths."]
    spacing: Annotated[tuple[float, ...], "The spacing of prepared images, where all have the same."]
    dataset: Annotated[str, "The data set, whose recipe prepares an image."]
    source: Annotated[str, "Where the data set came from."]
    cases: Annotated[str, "The data set's fingerprint."]
    step: Annotated[int, "The number of training steps.", 1]
    dice: Annotated[float, "Dice on the validation cases, last sampling step."]
    provenance: Annotated[dict, "Hardware, versions, commit, date."]
    config: Annotated[dict, "All settings of the training, for the record."]
    channel_names: Annotated[tuple[str, ...], "The names of an image's channels, where they have any."] = ()


def save(path: Path, network: eqx.Module, facts: ModelFacts) -> None:
    """Writes a model file: the facts about the network, then its arrays."""
    arrays = io.BytesIO()
    eqx.tree_serialise_leaves(arrays, network)
    write_signed(path, {"model": FORMAT_VERSION, **dataclasses.asdict(facts)}, arrays.getvalue())


def read_facts(path: Path) -> tuple[ModelFacts, bytes]:
    """What a model file says, and its arrays. Raises InputError where it is missing, damaged, or of another
    version of this code."""
    header, arrays = read_signed(path)
    if header.pop("model", None) != FORMAT_VERSION:
        what = "not a model file of this version of the code"
        raise InputError(f"{path}: {what}; give a run's best or final, or train it again")
    try:
        facts = ModelFacts(**{name: tuples(value) for name, value in header.items()})
        check_settings(facts)
        return facts, arrays
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise _another_version(path, error) from error


def read_network(
    path: Path, facts: ModelFacts, arrays: bytes, networks: dict[str, Callable[..., eqx.Module]]
) -> eqx.Module:
    """The network of a file, one of `networks`. Raises InputError where the arrays are of another one, or
    where the facts do not agree with it."""
    try:
        arguments = {name: tuples(value) for name, value in facts.arguments.items()}
        if any(isinstance(value, tuple) and len(value) > MOST_NUMBERS for value in arguments.values()):
            raise ValueError(f"its network has more than {MOST_NUMBERS} levels")
        if "convolutions" in arguments:
            arguments["convolutions"] = way_here(arguments["convolutions"])
        like = eqx.filter_eval_shape(networks[facts.network], **arguments, key=jax.random.key(0))
        network = eqx.tree_deserialise_leaves(io.BytesIO(arrays), like)
    except Exception as error:  # arrays that belong to other arguments can fail anywhere
        raise _another_version(path, error) from error
    dims = len(facts.patch_shape)
    agrees = (
        dims in (2, 3) and len(facts.class_names) == network.classes
        and facts.patch_shape == arguments.get("patch_shape", facts.patch_shape)
        and len(facts.spacing) == (dims if facts.dataset.startswith("folder:") else 0)
        and len(facts.channel_names) in (0, facts.image_channels)
        and {"phantom_shape", "data_dir", "seed"} <= facts.config.keys()
        and isinstance(facts.config["data_dir"], str)
        and isinstance(facts.config["phantom_shape"], list)
        and all(type(n) is int for n in facts.config["phantom_shape"])
    )  # fmt: skip
    if not agrees:
        raise InputError(f"{path}: its facts do not agree with its network; train it again")
    return network


def _another_version(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: not a model file of this version of the code ({one_line(error)}); train it again"
    )
