"""A file per data set. Its name is the data set's name, and what it says of it is its RECIPE.

A new data set is one more file here and a preset in train.py.
"""

import importlib
import pkgutil

from support.recipe import Recipe


def find() -> dict[str, Recipe]:
    """What the files of this folder say. One's own images (folder.py) have no recipe: their cases, classes
    and spacing are found, not known."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "folder"]
    return {name: importlib.import_module(f"recipes.{name}").RECIPE for name in names}


RECIPES = find()
