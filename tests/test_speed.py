"""experiments/speed.py: the table of times."""

from types import SimpleNamespace

import speed

import train


def test_the_table_shows_medians_without_the_first_turn(capsys):
    """A step of 4 samples and 2 s."""
    seconds = iter([9.0, 1.5, 2.0, 7.0])
    timed = SimpleNamespace(name="step", temporaries=3 * 2**20, times=[], run=lambda: next(seconds))
    config = train.parse_config(["--dataset", "phantom_us", "--batch-size", "4"])[0]
    speed.show(config, [timed], 3)
    step = capsys.readouterr().out.splitlines()[-1]
    assert step.split() == ["step", "2000.0", "1750.0", "-", "4500.0", "2.00", "3.0", "MiB"]
