"""The benchmark of the training step: that the bare work is the net's, and that its shares and table are right."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness, training_step
from benchmarks.training_step import bare_work, shares
from fastcifar.nets import ARCHS, Arch, build_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import readme_tables

TINY = Arch(blocks=((4,), (6,), (4,), (4,)), hidden=(8,))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHS, "tiny", TINY)


def test_the_bare_work_is_what_autograd_does() -> None:
    torch.manual_seed(0)
    model = build_model("tiny", num_classes=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    torch.manual_seed(1)
    works = bare_work(model, images)
    torch.manual_seed(1)
    gradients = [torch.randn_like(output) for _, output in seen]
    assert len(works) == len(layers) == 6
    for layer, work, (given, output), gradient in zip(layers, works, seen, gradients, strict=True):
        found = work()
        bias = layer.bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else layer.bias
        torch.testing.assert_close(found[0], output - bias)
        if given is images:
            assert found[1] is None
            (expected,) = torch.autograd.grad(output, layer.weight, gradient, retain_graph=True)
        else:
            wanted, expected = torch.autograd.grad(output, (given, layer.weight), gradient, retain_graph=True)
            torch.testing.assert_close(found[1], wanted)
        torch.testing.assert_close(found[2], expected)
        if given.dim() == 4:
            assert found[0] is not None
            assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_the_bare_work_is_done_in_the_type_of_the_step() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        works = bare_work(build_model("tiny", num_classes=3), torch.randn(2, 3, 32, 32))
    found = [part for work in works for part in work() if part is not None]
    assert len(found) == 3 * 6 - 1
    assert {part.dtype for part in found} == {torch.bfloat16}


def test_layers_that_our_own_operations_stand_for_are_found() -> None:
    model = build_model("fast", num_classes=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert len(bare_work(model, torch.randn(2, 3, 20, 20).to(memory_format=torch.channels_last))) == 8
    assert model.fused


def test_weights_that_stay_are_left_out() -> None:
    model = build_model("tiny", num_classes=3)
    next(model.parameters()).requires_grad_(False)
    works = bare_work(model, torch.randn(2, 3, 32, 32))
    assert [[part is not None for part in work()] for work in works[:2]] == [[True, False, False], [True, True, True]]


def test_shares_are_taken_round_by_round() -> None:
    rounds = {
        "step": [100.0, 50.0],
        "same batch": [101.0, 51.0],
        "bare": [125.0, 50.0],
        "reduced": [202.0, 153.0],
        "batches": [1e5, 1e4],
    }
    found = shares({name: {"rounds": values} for name, values in rounds.items()})
    assert found["input"]["rounds"] == pytest.approx([0.01, 0.02])
    assert found["batches"]["rounds"] == pytest.approx([0.001, 0.005])
    assert found["of bare"]["rounds"] == pytest.approx([0.8, 1.0])
    assert found["reduced"]["rounds"] == pytest.approx([2.0, 3.0])


def test_it_runs_and_its_table_shows_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(training_step, "BATCH_SIZES", (4,))
    monkeypatch.setattr(training_step, "noise", lambda count, side: some_images(8, side))
    for wrong in (["--only", "tiny"], ["--only", "tniy", "--out", "x"]):  # the full table is not to be cut or emptied
        with pytest.raises(SystemExit, match="2"):
            training_step.main(wrong)
    training_step.main(["--only", "tiny", "--seconds", "0.001", "--repeats", "2", "--out", "some"])
    (tmp_path / "some.json").rename(tmp_path / "training_step.json")
    content: dict[str, Any] = json.loads((tmp_path / "training_step.json").read_text())
    entry, other = content["results"]
    assert (entry["arch"], entry["batch_size"]) == (other["arch"], other["batch_size"]) == ("tiny", 4)
    assert [entry["precision"], other["precision"]] == ["float32", "bfloat16"]
    results = [*entry["raced"].values(), *other["raced"].values()]
    assert all(math.isfinite(result["median"]) and result["median"] > 0 for result in results)
    text = "\n".join(readme_tables.markers("training-step"))
    made = readme_tables.with_tables(text)
    row = next(line for line in made.splitlines() if line.startswith("| tiny, 4, float32 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == readme_tables.measured(entry["raced"]["step"])
    assert cells[5] == f"{readme_tables.measured(entry['shares']['of bare'], unit=0.01, digits=1)} %"
    assert "times faster at 20x20" in made


def some_images(count: int, side: int) -> Any:
    return torch.randint(0, 255, (count, side, side, 3), dtype=torch.uint8).numpy()
