"""Where a line belongs: every import of the project goes downwards, and none stands inside a function."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent.parent
# A file imports from floors below its own, and from support/, which is below all of them.
FLOORS = [
    {"support"},
    {"diffusion", "unet"},
    {"strategies", "data"},
    {"settings", "recipes"},
    {"evaluate"},
    {"train", "prepare", "predict"},
    {"report"},
    {"experiments"},
]
SAME_FLOOR = {"support", "experiments"}  # whose files may import one another, but not in a circle


def sources():
    """The text of every file of the project that is no test, by its path."""
    patterns = ("*.py", "recipes/*.py", "experiments/*.py", "support/**/*.py")
    paths = (path for pattern in patterns for path in sorted(HERE.glob(pattern)))
    return {str(path.relative_to(HERE)): path.read_text() for path in paths}


def module(path):
    return path.removesuffix(".py").removesuffix("/__init__").removeprefix("experiments/").replace("/", ".")


def imports(path, text, modules):
    """The modules of the project that a file imports, each with its line and whether it is at the top."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        for name in set(names) & modules - {module(path)}:
            yield name, node.lineno, node in tree.body


def test_imports_go_downwards():
    """And a file loads what it needs at once, so that a circle would be an error of the first import."""
    files, found = sources(), []
    modules = {module(path): path for path in files}
    floors = {top: number for number, names in enumerate(FLOORS) for top in names}
    levels = {name: floors[path.partition("/")[0].removesuffix(".py")] for name, path in modules.items()}
    for path, text in files.items():
        here = levels[module(path)]
        for name, line, at_top in imports(path, text, set(modules)):
            same = levels[name] == here and FLOORS[here] & SAME_FLOOR
            if levels[name] >= here and not same:
                found.append(f"{path}:{line} imports {modules[name]}, which is not below it")
            if not at_top:
                found.append(f"{path}:{line} imports {modules[name]} inside a function or a block")
    assert found == []


def test_parts_of_scipy_load_when_they_are_used():
    """As `scipy.stats.wilcoxon`: imported at the top, they take a quarter of the time of every --help."""
    parts = re.compile(r"^(from scipy|import scipy\.).*", re.M)
    assert [(path, parts.findall(text)) for path, text in sources().items() if parts.search(text)] == []
