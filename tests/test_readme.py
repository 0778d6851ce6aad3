"""The code of the README's first screens is the project's: its statements are those of the sources, and its
training trains."""

import inspect
import re
from pathlib import Path

import strategies
import train

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_the_statements_of_recycling_are_those_of_the_source():
    """With their labels; (4e) is the statement of the training step."""
    source = inspect.cleandoc(inspect.getsource(strategies.recycle_x_T).split('"""')[2])
    *shown, loss = BLOCKS[0].splitlines()
    assert shown == source.replace("return denoise", "denoised = denoise").splitlines()
    assert [line[-4:] for line in [*shown, loss]][-5:] == ["(4a)", "(4b)", "(4c)", "(4d)", "(4e)"]
    assert loss.removesuffix("  # (4e)") in inspect.getsource(train)


def test_the_training_of_the_readme_trains():
    """As written, for fewer steps."""
    [code] = [block for block in BLOCKS if "optax" in block]
    assert "range(300)" in code and 15 <= len(re.findall(r"^(?!from|import).+", code, re.M)) <= 25
    losses = []
    shown = {"print": lambda step, loss: losses.append(float(loss))}
    exec(compile(code.replace("range(300)", "range(20)"), "README.md", "exec"), shown)
    assert len(losses) == 20 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
