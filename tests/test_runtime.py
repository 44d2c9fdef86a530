import pytest
import torch

from fastcifar import runtime
from fastcifar.config import TrainConfig
from fastcifar.errors import ConfigError


def reason(config: TrainConfig, what: str) -> str:
    return dict(runtime.choose(config).reasons)[what]


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})


@pytest.mark.usefixtures("no_bfloat16")
def test_amp_never_makes_a_plain_cpu_slower() -> None:
    config = TrainConfig(device="cpu", amp=True)
    assert runtime.choose(config).precision == torch.float32
    assert "no bfloat16 units" in reason(config, "precision")


def test_amp_uses_a_cpus_bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    chosen = runtime.choose(TrainConfig(device="cpu", amp=True))
    assert chosen.precision == torch.bfloat16
    assert not chosen.scale_gradients


@pytest.mark.usefixtures("no_bfloat16")
def test_amp_dtype_forces() -> None:
    chosen = runtime.choose(TrainConfig(device="cpu", amp=True, amp_dtype="float16"))
    assert chosen.precision == torch.float16
    assert chosen.scale_gradients
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_amp_on_cuda_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen, why = runtime._precision(TrainConfig(amp=True), torch.device("cuda"))
    assert chosen == precision
    assert f"sm_{capability[0]}{capability[1]}" in why
    assert not runtime._compile(TrainConfig(), torch.device("cuda"))[0]
    assert runtime._compile(TrainConfig(compile="on"), torch.device("cuda"))[0]


def test_without_amp_everything_is_float32() -> None:
    assert runtime.choose(TrainConfig(device="cpu")).precision == torch.float32
    assert "channels-last" in reason(TrainConfig(device="cpu"), "layout")
    assert reason(TrainConfig(device="cpu", compile="on"), "compile").startswith("on")
    assert not runtime.choose(TrainConfig(device="cpu")).compile


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta", "nonsense:x"])
def test_an_unusable_device_is_said(device: str) -> None:
    with pytest.raises(ConfigError, match=r"device .* cannot be used here .* try .cpu.") as caught:
        runtime.choose(TrainConfig(device=device))
    assert "\n" not in str(caught.value)


def test_of_an_unknown_kind_of_device_no_list_is_given() -> None:
    with pytest.raises(ConfigError) as caught:
        runtime.find_device("gpu")
    assert str(caught.value) == "device 'gpu' cannot be used here (no kind of device has that name): try 'cpu'"
    with pytest.raises(ConfigError, match=r"^device '3.5' cannot be used here \("):
        runtime.find_device(3.5)  # type: ignore[arg-type]


def test_environment_names_versions_and_hardware() -> None:
    found = runtime.environment()
    assert found["torch"] == torch.__version__
    assert {"fastcifar", "python", "numpy", "cpu", "cores", "threads", "system", "gpus"} <= found.keys()
