"""What can be tested of `tools/gpu_check` without a CUDA device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcifar.kernels.cpu import CpuKernel
from fastcifar.kernels.eager import EagerKernel
from fastcifar.kernels.plan import check_plan

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu_parts  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "gpu_check"), "--output", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OUT": ""})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "gpu_check: there is no CUDA device here, and all it checks needs one\n"
    assert not any(tmp_path.iterdir())


def test_the_steps_can_be_imported_and_are_all_there():
    pytest.importorskip("triton")
    import gpu_steps

    assert {"equality", "graph", "bandwidth", "tests"} <= gpu_steps.steps("digits").keys()


def test_a_step_that_fails_is_recorded_and_the_rest_runs(tmp_path, capsys):
    path, copy = tmp_path / "new" / "result.json", tmp_path / "copy.json"

    def fail():
        assert list(json.loads(path.read_text())["steps"]) == ["first"]  # written after each step
        raise RuntimeError("no such luck")

    steps = {"first": lambda: {"a": 1}, "second": fail, "third": lambda: 2}
    assert not gpu_parts.run_guarded(steps, [path, copy], seconds=60, device="none")
    content = json.loads(path.read_text())
    assert content["device"] == "none"
    assert content["steps"]["first"]["result"] == {"a": 1}
    assert "RuntimeError: no such luck" in content["steps"]["second"]["error"]
    assert "in fail" in content["steps"]["second"]["error"]
    assert content["steps"]["third"]["ok"]
    assert copy.read_text() == path.read_text()
    assert capsys.readouterr().out.splitlines() == ["ok     first", "FAILED second", "ok     third"]
    assert gpu_parts.run_guarded({"first": steps["first"]}, [path], seconds=60)


def test_no_step_begins_too_late(tmp_path):
    assert not gpu_parts.run_guarded({"late": lambda: 1}, [tmp_path / "r.json"], seconds=-1)
    assert json.loads((tmp_path / "r.json").read_text())["steps"]["late"]["error"] == "not begun: -1 s had passed"


def test_the_options_vary_and_fit():
    sets = list(gpu_parts.option_sets(24))
    assert sets == list(gpu_parts.option_sets(24))
    for name in ("order", "dtype", "flip", "padding", "channels_last", "seed"):
        assert len({options[name] for _, options in sets}) > 1
    assert len({(shape, options["order"]) for shape, options in sets}) > 12
    for shape, options in sets:
        check_plan(gpu_parts.make_plan(shape, 200, **options), (200, *shape), 200)


def test_bits_are_compared():
    shape, options = next(gpu_parts.option_sets(1))
    images, labels = gpu_parts.noise(20, shape)
    plan = gpu_parts.make_plan(shape, 20, **options)
    call = {"epoch": 1, "start": 0, "size": 15, "capacity": 16}
    here = CpuKernel(images, labels, plan)(**call)
    there = EagerKernel(torch.from_numpy(images), torch.from_numpy(labels), plan)(**call)
    assert gpu_parts.same_bits(here, there)
    for wrong in (
        (there[0].double().to(there[0].dtype).flip(0), there[1]),
        (there[0], there[1] + 1),
        (there[0][:15], there[1][:15]),
        (there[0].float() if there[0].dtype != torch.float32 else there[0].half(), there[1]),
        (
            there[0].contiguous() if plan.channels_last else there[0].contiguous(memory_format=torch.channels_last),
            there[1],
        ),
    ):
        assert not gpu_parts.same_bits(here, wrong)
    zero = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    assert not gpu_parts.same_bits(zero, (-zero[0], zero[1]))


def test_bytes_and_launches():
    assert gpu_parts.bytes_moved((32, 32, 3), 512, "float32") == 512 * (3072 + 4 * 3072 + 16)
    assert gpu_parts.bytes_moved((32, 32, 3), 1, "bfloat16") == 3 * 3072 + 16
    assert gpu_parts.launches_for(10**12) == 4
    assert gpu_parts.launches_for(10**8) == 60
    assert gpu_parts.launches_for(10) == 400


def test_the_images_are_the_same_each_time():
    for a, b in zip(gpu_parts.noise(3, (4, 5, 2)), gpu_parts.noise(3, (4, 5, 2)), strict=True):
        assert np.array_equal(a, b)
