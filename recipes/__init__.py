"""One file per data set, with the data set's name; the file's RECIPE describes it.

A new data set needs one more file here and a preset in settings.py.
"""

import importlib
import pkgutil
from collections.abc import Sequence

from data import normalise
from recipes import folder
from support.disk.files import InputError
from support.raw.phantoms import PHANTOMS
from support.raw.recipe import Recipe


def find() -> dict[str, Recipe]:
    """The recipes of this folder by name. Your own images (folder.py) have none, because their
    cases, classes and spacing are found, not known."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "folder"]
    return {name: importlib.import_module(f"recipes.{name}").RECIPE for name in names}


RECIPES = find()
MADE_UP = Recipe(lambda volume, _: volume._replace(image=normalise(volume.image)), predictable=False)


def recipe_of(dataset: str, spacing: Sequence[float] = (), channel_names: Sequence[str] = ()) -> Recipe:
    """How images of a data set are found, prepared and post-processed, whichever kind of data set it is:
    described in a file here, made up, or a folder, whose spacing and channels a model remembers. Raises
    InputError if it is none of them."""
    kind, _, _ = dataset.partition(":")
    if kind == "folder":
        return folder.recipe(spacing, channel_names)
    if found := RECIPES.get(kind, MADE_UP if kind in PHANTOMS else None):
        return found
    raise InputError(f"needs recipes/{kind}.py, by which its images were prepared; add that file")
