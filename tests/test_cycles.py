"""experiments/cycles.py and fits.py: what they read out of a program, and out of what aot.py says of it."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import cycles as c
import fits

PROGRAM = """HloModule jit_train_step

%fused_computation.1 (param_0: f32[8,8]) -> f32[8,8] {
  %param_0 = f32[8,8]{1,0:T(8,128)} parameter(0)
  ROOT %convolution.3 = f32[8,8]{1,0:T(8,128)} convolution(%param_0, %param_0), dim_labels=bf_io->bf
}

%fused_computation.2 (param_0.1: f32[8,8]) -> f32[8] {
  %param_0.1 = f32[8,8]{1,0:T(8,128)} parameter(0)
  ROOT %reduce.1 = f32[8]{0:T(256)} reduce(%param_0.1, %constant.9), dimensions={1}, to_apply=%add
}

%body.4 (arg: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %arg = (s32[]{:T(256)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %multiply.7 = f32[8,8]{1,0:T(8,128)} multiply(%arg, %arg), metadata={op_name="jit(train_step)/gradient/while/body/mul"}, backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %tuple.2 = (s32[]{:T(256)}, f32[8,8]{1,0:T(8,128)}) tuple(%arg, %multiply.7)
}

%cond.5 (arg.1: (s32[], f32[8,8])) -> pred[] {
  %arg.1 = (s32[]{:T(256)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %constant.8 = s32[]{:T(256)} constant(7)
  ROOT %lt = pred[]{:T(1024)} compare(%arg.1, %constant.8), direction=LT
}

ENTRY %main.6 (p: f32[8,8]) -> f32[8] {
  %p = f32[8,8]{1,0:T(8,128)} parameter(0)
  %fusion.1 = f32[8,8]{1,0:T(8,128)} fusion(%p), kind=kOutput, calls=%fused_computation.1, metadata={op_name="jit(train_step)/gradient/transpose(jvp(vmap()))/conv"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %copy.1 = f32[8,8]{0,1:T(8,128)} copy(%fusion.1), metadata={op_name="jit(train_step)/augment/vmap()/copy"}, backend_config={"window_config":{"estimated_cycles":"200"}}
  %while.1 = (s32[]{:T(256)}, f32[8,8]{1,0:T(8,128)}) while(%copy.1), condition=%cond.5, body=%body.4
  ROOT %fusion.2 = f32[8]{0:T(256)} fusion(%while.1), kind=kLoop, calls=%fused_computation.2, metadata={op_name="jit(train_step)/update/reduce_sum"}, backend_config={"window_config":{"estimated_cycles":"50"}}
}
"""  # noqa: E501


def test_operations_have_cycles_kinds_and_phases():
    assert {(one.name, one.cycles, one.kind, one.phase) for one in c.operations(PROGRAM)} == {
        ("%fusion.1", 1000, "convolution", "backward"),
        ("%copy.1", 200, "copy", "augmentation"),
        ("%multiply.7", 7 * 30, "other", "forward"),  # seven times around the loop
        ("%fusion.2", 50, "reduction", "update"),
    }


def test_what_is_shown_adds_up(capsys):
    c.show_cycles(c.operations(PROGRAM * 1), 940)
    shown = capsys.readouterr().out
    assert "0.0 million cycles, 0.0 ms at 940 MHz" in shown
    assert "convolution 0.0 (68 %)" in shown and "copy 0.0 (14 %)" in shown
    c.show_cycles([one._replace(cycles=one.cycles * 10**6) for one in c.operations(PROGRAM)], 940)
    shown = capsys.readouterr().out
    assert "1460.0 million cycles, 1553.2 ms at 940 MHz (not a measurement)" in shown
    assert shown.index("%fusion.1") < shown.index("%multiply.7") < shown.index("%copy.1")


SAID = {
    "muscle_us": """fits (compiled in 156 s); GiB per core:
    parameters           0.050
    optimizer            0.099
    batch and state      0.166
    temporaries          4.617
    code                 0.205
the compiler's estimate of a step: 396.9 million cycles, 422.3 ms at 940 MHz (not a measurement)
by kind, million cycles: convolution 338.0 (85 %), other 38.0 (10 %), reduction 12.5 (3 %), copy 8.4 (2 %)
""",
    "amos_ct": "does NOT fit: needs 15.56G of 15.48G per core; try --remat 1 or a smaller batch\n",
}


def test_the_table_of_what_fits_resumes(monkeypatch, tmp_path, capsys):
    asked = []

    def run(command, **settings):
        dataset = command[command.index("--dataset") + 1]
        asked.append(dataset)
        if dataset == "brats_mr":
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        return subprocess.CompletedProcess(command, dataset == "amos_ct", SAID[dataset], "")

    monkeypatch.setattr(fits, "HERE", tmp_path)
    monkeypatch.setattr(fits.subprocess, "run", run)
    monkeypatch.setattr(fits, "provenance", lambda: {"commit": "0123456789abc"})
    monkeypatch.setattr(fits, "ignore_absent_tpu", lambda: None)
    words = ["fits.py", "--topologies", "v3:2x2", "--strategies", "diff", "--limit", "9"]
    monkeypatch.setattr(sys, "argv", [*words, "--datasets", "muscle_us"])
    fits.main()
    monkeypatch.setattr(sys, "argv", [*words, "--datasets", "muscle_us,amos_ct,brats_mr"])
    fits.main()
    assert asked == ["muscle_us", "amos_ct", "brats_mr"]
    fits.main()
    assert asked[3:] == ["brats_mr"]  # it was not known; perhaps it is now
    rows = [
        "| v3:2x2 | amos_ct | diff |  | no | 15.56 |  |  |  | 0123456789 |",
        "| v3:2x2 | brats_mr | diff |  | not known after 9 s |  |  |  |  | 0123456789 |",
        "| v3:2x2 | muscle_us | diff |  | yes | 4.99 | 396.9 | 2 | 156 | 0123456789 |",
    ]
    assert capsys.readouterr().out.splitlines()[-4:-1] == rows
    assert (tmp_path / "docs" / "fits.md").read_text().splitlines()[-3:] == rows
