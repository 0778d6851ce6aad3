"""One file per data set, with the data set's name; the file's RECIPE describes it.

A new data set needs one more file here and a preset in settings.py.
"""

import importlib
import pkgutil
from collections.abc import Sequence

from data import normalise
from support.disk.files import InputError
from support.raw.phantoms import PHANTOMS
from support.raw.recipe import Recipe


MODULES = {
    module.name: importlib.import_module(f"recipes.{module.name}")
    for module in pkgutil.iter_modules(__path__)
}
# Your own images have none, because their cases, classes and spacing are found, not known.
RECIPES: dict[str, Recipe] = {name: module.RECIPE for name, module in MODULES.items() if name != "folder"}
MADE_UP = Recipe(None, lambda volume, _: volume._replace(image=normalise(volume.image)))


def recipe_of(name: str, spacing: Sequence[float] = ()) -> Recipe:
    """What is particular to a data set of any kind; `spacing` is that with which folder:NAME was built.
    Raises InputError if there is no such data set here."""
    kind = name.partition(":")[0]
    if kind == "folder":
        return MODULES["folder"].recipe(spacing)
    if kind in PHANTOMS:
        return MADE_UP
    if kind not in RECIPES:
        raise InputError(f"needs recipes/{kind}.py, by which its images were prepared; add that file")
    return RECIPES[kind]
