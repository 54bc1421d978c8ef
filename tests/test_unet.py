"""Laws of the paper's network and of its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import tilepipe
from tilepipe.errors import BadRequest
from tilepipe.models.checkpoint import save_checkpoint
from tilepipe.models.model import wrap
from tilepipe.models.spec import find_profile
from tilepipe.models.unet import Gate, UNet

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


VARIANTS = [{}, {"attention": True}, {"residual": True}, {"attention": True, "residual": True}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_valid_answers_do_not_depend_on_the_window(variant: dict):
    torch.manual_seed(0)
    network = UNet(base=2, depth=3, **variant).double()
    image = torch.rand(1, 1, 84, 84, dtype=torch.float64)
    with torch.no_grad():
        whole, shifted = network(image), network(image[..., 8:, 4:])
    torch.testing.assert_close(shifted, whole[..., 8:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_variants_keep_sizes_and_context(variant: dict, ndim: int, padding: str):
    options = {"ndim": ndim, "base": 2, "depth": 3, "padding": padding}
    plain, changed = (find_profile(wrap(UNet(**options, **more))) for more in ({}, variant))
    assert (plain.shrink, plain.context.step) == (changed.shrink, changed.context.step)
    if padding == "valid":
        assert plain.context == changed.context
        assert plain.smallest == changed.smallest


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
def test_variants_have_the_weights_that_their_layers_say(ndim: int, batch_norm: bool):
    base, depth, read = 4, 3, 2
    options = {"ndim": ndim, "base": base, "depth": depth, "in_channels": read}
    options["batch_norm"] = batch_norm
    count = {
        tuple(variant): sum(w.numel() for w in UNet(**options, **variant).parameters())
        for variant in VARIANTS
    }
    channels = [base * 2**level for level in range(depth)]
    # Per skip: W_x, W_g with its bias, psi with its bias; half of the skip's channels between.
    gates = sum(c // 2 * c + c // 2 * (2 * c + 1) + c // 2 + 1 for c in channels[:-1])
    # 1x1 where channels change, which they do in every block: down from half, up from twice.
    inputs = [
        (read, base),
        *((c // 2, c) for c in channels[1:]),
        *((2 * c, c) for c in channels[:-1]),
    ]
    shortcuts = sum(a * c + c * (2 if batch_norm else 1) for a, c in inputs)
    assert count["attention",] == count[()] + gates
    assert count["residual",] == count[()] + shortcuts
    assert count["attention", "residual"] == count[()] + gates + shortcuts


def test_a_residual_block_of_like_channels_has_an_identity():
    network = UNet(base=4, depth=2, in_channels=4, residual=True)
    assert isinstance(network.down[0].shortcut, nn.Identity)
    assert isinstance(network.down[1].shortcut, nn.Sequential)


def test_a_residual_block_adds_the_middle_of_what_it_reads():
    network = UNet(base=3, depth=1, in_channels=3, residual=True, kernels=[[2, 5]])
    for weight in network.down[0].parameters():
        nn.init.zeros_(weight)
    image = torch.randn(1, 3, 9, 20)
    assert torch.equal(network.down[0](image), image[..., 1:-1, 4:-4].relu())


@pytest.mark.parametrize("smooth", [False, True])
def test_a_gate_weighs_each_voxel_by_the_coarse_one_over_it(smooth: bool):
    """The paper's formula, voxel by voxel."""
    torch.manual_seed(0)
    gate = Gate(4, 6, (1, 3), smooth=smooth).double()
    skip = torch.randn(1, 4, 5, 12, dtype=torch.float64)
    coarse = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    w_x, w_g, psi = (layer.weight[:, :, 0, 0] for layer in (gate.skip, gate.coarse, gate.psi))
    kept = torch.empty(1, 1, 5, 4, dtype=torch.float64)
    for y in range(5):
        for x in range(4):
            both = w_x @ skip[0, :, y, 3 * x] + w_g @ coarse[0, :, y, x] + gate.coarse.bias
            kept[0, 0, y, x] = torch.sigmoid(psi @ both.relu() + gate.psi.bias)
    if smooth:
        place = ((torch.arange(12, dtype=torch.float64) + 0.5) / 3 - 0.5).clamp(0, 3)
        low = place.floor().long()
        high = (low + 1).clamp(max=3)
        kept = torch.lerp(kept[..., low], kept[..., high], place - low)
    else:
        kept = kept.repeat_interleave(3, dim=3)
    torch.testing.assert_close(gate(skip, coarse), skip * kept, rtol=0, atol=1e-12)


def test_gates_of_few_channels_have_one_between():
    assert UNet(base=1, depth=2, attention=True).gate[0].psi.in_channels == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_he_initialisation(ndim: int, variant: dict):
    torch.manual_seed(0)
    network = UNet(ndim=ndim, base=16, depth=4 - ndim // 3, in_channels=3, **variant)
    checked = 0
    for layer in network.modules():
        if not isinstance(layer, CONVOLUTIONS):
            continue
        up = isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d)
        inputs = layer.in_channels * (1 if up else math.prod(layer.kernel_size))
        assert layer.bias is None or not layer.bias.any()
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
        ({"attention": True, "residual": True, "depth": 3}, (1004, 5004)),
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
    from tilepipe.volumes.overlay import dice
    from tilepipe.volumes.synthetic import nuclei

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
