import pytest
import torch
from torch import nn

from fastcifar.errors import ConfigError
from fastcifar.nets import ARCHS, FastArch, FastNet, build_model, check_image_size, count_parameters


@pytest.mark.parametrize(("name", "parameters"), [("big", 5_655_498), ("small", 1_816_714)])
def test_parameter_counts_are_the_reports(name: str, parameters: int) -> None:
    assert count_parameters(build_model(name, num_classes=10)) == parameters


@pytest.mark.parametrize(("name", "convolutions", "hidden"), [("big", 8, 4), ("small", 4, 1)])
def test_relu_then_a_batchnorm_of_its_own(name: str, convolutions: int, hidden: int) -> None:
    layers = [m for m in build_model(name, num_classes=10).modules() if not list(m.children())]
    weighted = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(weighted) == convolutions + hidden + 1
    for i in weighted[:-1]:
        assert isinstance(layers[i + 1], nn.ReLU)
        assert isinstance(layers[i + 2], nn.BatchNorm2d if isinstance(layers[i], nn.Conv2d) else nn.BatchNorm1d)
    assert weighted[-1] == len(layers) - 1  # raw logits: nothing follows
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert len(norms) == len({id(layer) for layer in norms}) == convolutions + hidden
    for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    pools = [layer for layer in layers if isinstance(layer, nn.MaxPool2d)]
    assert [(p.kernel_size, p.stride, p.padding) for p in pools] == [(3, 2, 1)] * 4


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("side", [17, 20, 32])
def test_every_side_from_17_to_32_fits(side: int, name: str) -> None:
    check_image_size(side, side)
    model = build_model(name, num_classes=7, in_channels=1).eval()
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 7)


def test_the_fast_net() -> None:
    arch = FastArch(patterns=12, widths=(20, 30))
    model = FastNet(arch, num_classes=10, in_channels=3)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [
        *[(3, 12, (2, 2)), (12, 20, (3, 3)), (20, 20, (3, 3)), (20, 30, (3, 3)), (30, 30, (3, 3))]
    ]
    assert [c.bias is not None for c in convolutions] == [True, False, False, False, False]
    # all that is trained: the first layer, 3x3 filters, a shift for each of their channels, the head
    filters = 9 * (12 * 20 + 20 * 20 + 20 * 30 + 30 * 30)
    assert count_parameters(model) == 12 * 12 + 12 + filters + 2 * (20 + 30) + 10 * 30
    # the sides seen by the convolutions: 16 becomes 15, 7, 7, 3, 3
    sides: list[int] = []
    for layer in (*convolutions, model.classifier):
        layer.register_forward_hook(lambda layer, inputs, output: sides.append(output.shape[-1]))
    model(torch.zeros(2, 3, 16, 16))
    assert sides == [15, 15, 7, 7, 3, 10]


def test_the_fast_nets_convolutions_begin_as_the_identity() -> None:
    model = FastNet(FastArch(patterns=4, widths=(6, 3)), num_classes=2)
    images = torch.rand(2, 4, 8, 8)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
        images = conv(seen := images[:, : conv.in_channels])
        same = min(conv.in_channels, conv.out_channels)
        assert torch.allclose(images[:, :same], seen[:, :same], atol=1e-6)


def test_what_cannot_be_built_is_said() -> None:
    with pytest.raises(ConfigError, match="unknown arch 'huge': choose from big, fast, small"):
        build_model("huge", num_classes=10)
    with pytest.raises(ConfigError, match="must be positive, got 0 and 3"):
        build_model("big", num_classes=0)
    for side in (16, 33):
        with pytest.raises(ConfigError, match="17 to 32 pixels"):
            check_image_size(32, side)
