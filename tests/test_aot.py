"""experiments/aot.py: the estimates in a compiled program, and the table of what fits."""

import json
import os
import subprocess
from unittest import mock

import pytest

with mock.patch.dict(os.environ):  # which aot.py prepares for the compilers of devices that are not there
    import aot

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


def test_cycles_are_counted_by_kind_and_add_up(capsys):
    found = aot.cycles_of(PROGRAM)
    # Seven times around the loop.
    assert found == {"convolution": 1000, "copy": 200, "other": 7 * 30, "reduction": 50}
    million = aot.Counter({kind: cycles * 10**6 for kind, cycles in found.items()})
    assert aot.show_cycles(million, 940) == {"million cycles": "1460.0", "copies %": "14"}
    first, *kinds = capsys.readouterr().out.splitlines()
    assert "1460.0 million cycles, 1553.2 ms at 940 MHz (not a measurement)" in first
    assert [line.split() for line in kinds[:2]] == [["convolution", "1000.0", "(68", "%)"],
                                                    ["other", "210.0", "(14", "%)"]]  # fmt: skip


SAID = {
    "muscle_us": {"fits": "yes", "GiB per core": "4.99", "compiled in s": "156", "copies %": "2"},
    "amos_ct": {"fits": "no", "GiB per core": "15.56"},
    "prostate_mr": None,
}


def test_the_table_of_what_fits_resumes(monkeypatch, tmp_path):
    asked = []

    def run(command, **settings):
        dataset = command[command.index("--dataset") + 1]
        asked.append(dataset)
        if SAID[dataset] is None:
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        said = f"fits or not\n{json.dumps(SAID[dataset])}\n"
        return subprocess.CompletedProcess(command, dataset == "amos_ct", said, "")

    monkeypatch.setattr(aot.subprocess, "run", run)
    monkeypatch.setattr(aot, "provenance", lambda: {"commit": "0123456789abc"})
    path, keys = tmp_path / "fits.csv", [("v3:2x2", dataset, "diff", "") for dataset in SAID]
    aot.write_table(path, keys[:1], 9)
    aot.write_table(path, keys, 9)
    assert asked == list(SAID)
    aot.write_table(path, keys, 9)
    assert asked[3:] == ["prostate_mr"]  # it was not known; perhaps it is now
    assert path.read_text().splitlines() == [
        ",".join(aot.COLUMNS),
        "v3:2x2,amos_ct,diff,,no,15.56,,,,0123456789",
        "v3:2x2,muscle_us,diff,,yes,4.99,,2,156,0123456789",
        "v3:2x2,prostate_mr,diff,,not known after 9 s,,,,,0123456789",
    ]


def test_a_step_that_cannot_be_compiled_is_said(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 2, "", "error: is libtpu installed?\n")
    monkeypatch.setattr(aot.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(aot.InputError, match="--dataset amos_ct --strategy diff: error: is libtpu"):
        aot.write_table(tmp_path / "fits.csv", [("v9", "amos_ct", "diff", "")], 9)
    assert not list(tmp_path.iterdir())
