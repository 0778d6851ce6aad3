"""One file per data set, with the data set's name; the file's RECIPE describes it.

A new data set needs one more file here and a preset in train.py.
"""

import importlib
import pkgutil

from support.raw.recipe import Recipe


def find() -> dict[str, Recipe]:
    """The recipes of this folder by name. Your own images (folder.py) have none, because their
    cases, classes and spacing are found, not known."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "folder"]
    return {name: importlib.import_module(f"recipes.{name}").RECIPE for name in names}


RECIPES = find()
