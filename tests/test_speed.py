"""experiments/speed.py: the work of a program, and the table of times."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import speed

import train


class Uncounted:
    """A lowered program of a device for which XLA counts no work before it compiles, as of a GPU."""

    def __init__(self, lowered):
        self.compile, self.cost_analysis = lowered.compile, lambda: None


@pytest.mark.parametrize("device", [lambda lowered: lowered, Uncounted], ids=["counted", "uncounted"])
def test_a_matrix_product_of_size_n_is_2_n_cubed_operations(device):
    a = jnp.ones((64, 64))
    lowered = device(jax.jit(jnp.dot).lower(a, a))
    timed = speed.Timed("product", lowered, lambda dot, _: dot(a, a), turns=3)
    assert timed.flops == 3 * 2 * 64**3


def test_the_table_shows_medians_and_shares_of_the_product_without_the_first_turn(capsys):
    """A product of 100 GFLOP/s beside a step of 4 samples, 60 GFLOP and 2 s: 30 GFLOP/s."""

    def timed(name, flops, *seconds):
        turns = iter(seconds)
        return SimpleNamespace(
            name=name, flops=flops, temporaries=3 * 2**20, times=[], run=lambda: next(turns)
        )

    config = train.parse_config(["--dataset", "phantom_us", "--batch-size", "4"])[0]
    programs = [timed("product", 1e11, 9.0, 1.0, 1.0, 1.0), timed("step", 6e10, 9.0, 1.5, 2.0, 7.0)]
    speed.show(config, programs, 3)
    *_, product, step = capsys.readouterr().out.splitlines()
    assert product.split()[-3:] == ["%", "3.0", "MiB"] and "100.0 %" in product
    assert step.split() == ["step", "2000.0", "1750.0", "-", "4500.0", "2.00", "60.00", "30.0", "30.0", "%",
                            "3.0", "MiB"]  # fmt: skip
