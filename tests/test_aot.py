"""experiments/aot.py: the estimates in a compiled program, and the table of what fits."""

import os
from pathlib import Path
from unittest import mock

with mock.patch.dict(os.environ):  # which aot.py prepares for the compilers of devices that are not there
    import aot

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'  # of the compiler of a TPU
PROGRAM = f"""HloModule jit_train_step

%fused_computation.1 (param_0: f32[8,8]) -> f32[8,8] {{
  %param_0 = f32[8,8]{{1,0:T(8,128)}} parameter(0)
  ROOT %convolution.3 = f32[8,8]{{1,0:T(8,128)}} convolution(%param_0, %param_0), dim_labels=bf_io->bf
}}

%body.4 (arg: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %multiply.7 = f32[8,8]{{1,0:T(8,128)}} multiply(%arg, %arg), {CYCLES % 30}
}}

%cond.5 (arg.1: (s32[], f32[8,8])) -> pred[] {{
  %constant.8 = s32[]{{:T(256)}} constant(7)
}}

ENTRY %main.6 (p: f32[8,8]) -> f32[8] {{
  %fusion.1 = f32[8,8]{{1,0:T(8,128)}} fusion(%p), calls=%fused_computation.1, {CYCLES % 1000}
  %copy.1 = f32[8,8]{{0,1:T(8,128)}} copy(%fusion.1), {CYCLES % 200}
  %while.1 = (s32[]{{:T(256)}}, f32[8,8]{{1,0:T(8,128)}}) while(%copy.1), condition=%cond.5, body=%body.4
}}
"""


def test_cycles_add_up_and_copies_are_told_apart():
    """Seven times around the loop."""
    assert aot.cycles_of(PROGRAM) == (1000 + 200 + 7 * 30, 200)


def test_rows_are_added_to_the_table(tmp_path):
    for dataset, fits in (("amos_ct", "no"), ("muscle_us", "yes")):
        aot.add_row(tmp_path / "fits.csv", {"topology": "v3:2x2", "dataset": dataset, "fits": fits})
    head, *rows = (tmp_path / "fits.csv").read_text().splitlines()
    there = Path(__file__).parent.parent / "docs" / "fits.csv"
    assert head == there.read_text().splitlines()[0]
    assert rows == ["v3:2x2,amos_ct,,no,,,,,", "v3:2x2,muscle_us,,yes,,,,,"]
