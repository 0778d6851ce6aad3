"""Where a line belongs: every import of the project goes downwards, and none stands inside a function."""

import ast
import graphlib
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
    folders = (HERE, *(HERE / name for name in ("support", "recipes", "experiments")))
    folders += tuple(path for path in sorted((HERE / "support").iterdir()) if path.is_dir())
    paths = (path for folder in folders for path in sorted(folder.glob("*.py")))
    return {str(path.relative_to(HERE)): path.read_text() for path in paths}


def module(path):
    return path.removesuffix(".py").removesuffix("/__init__").removeprefix("experiments/").replace("/", ".")


def floor(name):
    top = name.partition(".")[0]
    return next(n for n, names in enumerate(FLOORS) if top in names)


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


def wrong(files):
    """A line for every import that goes upwards or sideways, stands inside a function, or closes a circle."""
    modules = {module(path): path for path in files}
    top = len(FLOORS) - 1
    levels = {name: top if "experiments/" in path else floor(name) for name, path in modules.items()}
    found, graph = [], {}
    for path, text in files.items():
        own = module(path)
        for name, line, at_top in imports(path, text, set(modules)):
            graph.setdefault(own, set()).add(name)
            same = levels[name] == levels[own] and FLOORS[levels[own]] & SAME_FLOOR
            if levels[name] >= levels[own] and not same:
                found.append(f"{path}:{line} imports {modules[name]}, which is not below it")
            if not at_top:
                found.append(f"{path}:{line} imports {modules[name]} inside a function or a block")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_go_downwards():
    assert wrong(sources()) == []


def test_parts_of_scipy_load_when_they_are_used():
    """As `scipy.stats.wilcoxon`: imported at the top, they take a quarter of the time of every --help."""
    parts = re.compile(r"^(from scipy|import scipy\.).*", re.M)
    assert [(path, parts.findall(text)) for path, text in sources().items() if parts.search(text)] == []


def test_the_top_level_is_the_story():
    folders = {path.partition("/")[0] for path in sources() if "/" in path}
    assert {path for path in sources() if "/" not in path} == {
        f"{name}.py" for names in FLOORS for name in names if name not in folders
    }
