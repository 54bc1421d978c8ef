"""Laws of the paper's network and of its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import tilepipe
from tilepipe.errors import BadRequest
from tilepipe.unet import UNet, save_checkpoint

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SHIPPED = Path(tilepipe.__file__).parent / "networks" / "nuclei-2d.pt"


def answered(network: UNet, *size: int, channels: int = 1) -> tuple[int, ...]:
    """Return the shape of the answer without computing it."""
    network = network.to("meta")
    return tuple(network(torch.empty(1, channels, *size, device="meta")).shape)


def test_the_paper_network_maps_572_to_388_with_23_convolutions():
    with torch.device("meta"):
        network = UNet()
    assert answered(network, 572, 572) == (1, 2, 388, 388)
    assert sum(isinstance(layer, CONVOLUTIONS) for layer in network.modules()) == 23
    # Counted by hand from figure 1 of the paper.
    assert sum(weights.numel() for weights in network.parameters()) == 31_030_658


@pytest.mark.parametrize("k", [0, 1, 5, 63])
def test_the_paper_network_maps_188_plus_16k_to_4_plus_16k(k: int):
    with torch.device("meta"):
        network = UNet(base=2)
    assert answered(network, 188 + 16 * k, 188) == (1, 2, 4 + 16 * k, 4)


def test_3d_maps_132_to_44():
    # The 3D U-Net (arXiv:1606.06650) is 132 x 132 x 116 to 44 x 44 x 28.
    with torch.device("meta"):
        network = UNet(ndim=3, base=2, depth=4, classes=3, in_channels=2)
    assert answered(network, 116, 132, 132, channels=2) == (1, 3, 28, 44, 44)


def test_anisotropic_kernels_and_pools():
    with torch.device("meta"):
        network = UNet(
            ndim=3, base=2, depth=3, kernels=[[1, 3, 3], 3, [3, 3, 3]], pools=[[1, 2, 2], 2]
        )
    # Along z: 0, 4 at level 1, 4 below it (of twice the voxels), 4 at level 1 again, 0.
    assert answered(network, 24, 60, 60) == (1, 2, 24 - 4 - 8 - 4, 20, 20)


@pytest.mark.parametrize("ndim", [2, 3])
def test_same_padding_keeps_sizes_that_divide(ndim: int):
    network = UNet(ndim=ndim, base=2, depth=3, padding="same", batch_norm=True, dropout=0.5)
    assert network(torch.zeros(2, 1, *(8, 12, 16)[:ndim])).shape[2:] == (8, 12, 16)[:ndim]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        network(torch.zeros(2, 1, *(10,) * ndim))


def test_valid_answers_do_not_depend_on_the_window():
    torch.manual_seed(0)
    network = UNet(base=2, depth=3).double()
    image = torch.rand(1, 1, 84, 84, dtype=torch.float64)
    with torch.no_grad():
        whole, shifted = network(image), network(image[..., 8:, 4:])
    torch.testing.assert_close(shifted, whole[..., 8:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_he_initialisation(ndim: int):
    torch.manual_seed(0)
    network = UNet(ndim=ndim, base=16, depth=3)
    checked = 0
    for layer in network.modules():
        if not isinstance(layer, CONVOLUTIONS):
            continue
        up = isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d)
        inputs = layer.in_channels * (1 if up else math.prod(layer.kernel_size))
        assert not layer.bias.any()
        if layer.weight.numel() >= 1000:
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / inputs), rel=0.1)
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"depth": 5}, (1020, 5020)),
        ({"ndim": 3, "depth": 3, "pools": [[1, 2, 2], 2]}, (60, 1004, 5004)),
        ({"padding": "same", "batch_norm": True, "dropout": 0.2, "depth": 3}, (100_000, 80_000)),
    ],
)
def test_exports_on_meta_at_any_size(options: dict, size: tuple[int, ...]):
    with torch.device("meta"):
        network = UNet(base=2, **options).eval()
        program = torch.export.export(network, (torch.empty(1, 1, *size),))
    out = program.graph.output_node().args[0][0].meta["val"]
    assert out.shape == network(torch.empty(1, 1, *size, device="meta")).shape


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ndim": 4}, "ndim (=4)"),
        ({"padding": "mirror"}, "padding (='mirror')"),
        ({"depth": 0}, "depth (=0)"),
        ({"classes": 0}, "classes (=0)"),
        ({"kernels": [3, 3]}, "kernels (=[3, 3])"),
        ({"pools": [[2, 2, 2], 2, 2, 2]}, "pools (="),
        ({"padding": "same", "kernels": [3, 3, 3, 3, 2]}, "kernels (="),
        ({"dropout": 1}, "dropout (=1)"),
    ],
)
def test_refuses_what_is_no_network(options: dict, named: str):
    with pytest.raises(BadRequest) as refusal:
        UNet(base=1, **options)
    assert str(refusal.value).startswith(named)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_builds_the_network_again(tmp_path: Path):
    architecture = {"ndim": 3, "base": 2, "depth": 2, "pools": [[1, 2, 2]], "classes": 3}
    network, path = UNet(**architecture), tmp_path / "network.pt"
    options = {"normalize": "zscore", "provenance": {"seed": 1}}
    with pytest.raises(BadRequest, match="labels"):
        save_checkpoint(path, network, architecture=architecture, labels=["a"], **options)
    assert not any(tmp_path.iterdir())
    for _ in range(2):  # the second replaces the first
        save_checkpoint(path, network, architecture=architecture, labels=["a", "b", "c"], **options)
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt"]

    content = torch.load(path, weights_only=True)
    assert content["tilepipe"] == 1
    assert content["labels"] == ["a", "b", "c"]
    assert content["normalize"] == "zscore"
    assert content["provenance"] == {"seed": 1}
    assert content["architecture"].pop("name") == "unet"
    again = UNet(**content["architecture"])
    again.load_state_dict(content["weights"])
    image = torch.rand(1, 1, 14, 20, 20)
    assert torch.equal(network(image), again(image))


def test_the_shipped_network_finds_nuclei():
    from tilepipe.geometry import Region
    from tilepipe.overlay import dice
    from tilepipe.synthetic import nuclei

    assert SHIPPED.stat().st_size < 2_000_000
    content = torch.load(SHIPPED, weights_only=True)
    assert content["architecture"].pop("name") == "unet"
    assert content["labels"] == ["background", "nucleus"]
    network = UNet(**content["architecture"]).eval()
    network.load_state_dict(content["weights"])
    image, truth = nuclei(Region((0, 0), (588, 588)), shape=(588, 588), seed=3)
    assert content["normalize"].startswith("scale:")
    scale, offset = map(float, content["normalize"].removeprefix("scale:").split(","))
    with torch.inference_mode():
        logits = network(torch.from_numpy(image)[None, None].float() * scale + offset)
    found = logits[0].argmax(dim=0).numpy()
    assert dice(found, truth[44:-44, 44:-44]) > 0.95
