"""A file per data set. Its name is the data set's name, and what it says of it is its RECIPE.

A new data set is one more file here and a preset in train.py.
"""

import importlib
import pkgutil

from support.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.name: importlib.import_module(f"recipes.{module.name}").RECIPE
    for module in pkgutil.iter_modules(__path__)
    if module.name != "folder"  # one's own images: its cases, classes and spacing are found, not known
}
