"""Train the network that tilepipe ships: ``python workflows/demo_network/train.py``.

Synthetic nuclei are made as they are needed; nothing is downloaded. Shape suffixes: ``B`` patch,
``C`` channel, ``Y X`` voxels.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from tilepipe.checkpoint import save_checkpoint
from tilepipe.geometry import Region, mirror
from tilepipe.overlay import dice, write_overlay
from tilepipe.synthetic import nuclei
from tilepipe.unet import UNet

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARCHITECTURE: dict[str, Any] = {"ndim": 2, "in_channels": 1, "classes": 2, "base": 8, "depth": 4}
BORDER = 44
"""What the network loses on each side: sizes 92 + 8k become 4 + 8k."""
PATCH = 164
IMAGE = (1024, 1024)
TRAINING_SEEDS = 1_000_000
"""Images of training have this seed and higher; the demo and the check have lower ones."""
HELD_OUT = 7


def mirrored(region: Region, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the voxels of ``region`` of the mirrored image, and which of them are nucleus."""
    places = [mirror(a, b, n) for a, b, n in zip(region.start, region.stop, IMAGE, strict=True)]
    need = Region(
        tuple(int(place.min()) for place in places), tuple(int(place.max()) + 1 for place in places)
    )
    image, truth = nuclei(need, shape=IMAGE, seed=seed)
    at = np.ix_(*(place - start for place, start in zip(places, need.start, strict=True)))
    return image[at], truth[at] > 0


def as_input(image: NDArray[np.uint8]) -> torch.Tensor:
    """Return patches ``B Y X`` as the network takes them, ``B C Y X`` in 0:1."""
    image_BCYX = torch.from_numpy(image).unsqueeze(1).float() / 255
    return image_BCYX.contiguous(memory_format=torch.channels_last)


def batch(size: int, chance: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``size`` patches of mirrored images, and the classes of their middle."""
    images, truths = [], []
    for _ in range(size):
        start = tuple(chance.randrange(n - PATCH + 1) for n in IMAGE)
        answer = Region(start, tuple(a + PATCH for a in start))
        seed = TRAINING_SEEDS + chance.randrange(TRAINING_SEEDS)
        image, truth = mirrored(answer.grow((BORDER, BORDER), (BORDER, BORDER)), seed)
        images.append(image)
        truths.append(truth[BORDER:-BORDER, BORDER:-BORDER])
    return as_input(np.stack(images)), torch.from_numpy(np.stack(truths)).long()


def check(network: UNet, picture: Path | None) -> float:
    """Return the Dice coefficient on a whole mirrored image that training has not seen."""
    after = BORDER + 4  # sizes that the network accepts are 92 + 8k; the surplus is dropped
    image, truth = mirrored(Region.whole(IMAGE).grow((BORDER, BORDER), (after, after)), HELD_OUT)
    network.eval()
    with torch.inference_mode():
        logits_BCYX = network(as_input(image[None]))
    network.train()
    found = logits_BCYX[0, :, : IMAGE[0], : IMAGE[1]].argmax(dim=0).numpy()
    inside = tuple(slice(BORDER, BORDER + n) for n in IMAGE)
    if picture is not None:
        corner = (slice(0, 512), slice(0, 512))
        write_overlay(picture, image[inside][corner], found[corner], truth[inside][corner])
    return dice(found, truth[inside])


def main() -> None:
    """Train, check, save."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log = logging.getLogger("demo_network")
    default = Path(__file__).parents[2] / "tilepipe" / "networks" / "nuclei-2d.pt"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--picture", type=Path, help="PNG of the check: image, overlay")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    chance = random.Random(options.seed)
    network = UNet(**ARCHITECTURE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.1
    )
    begun = time.perf_counter()
    for step in range(1, options.steps + 1):
        image_BCYX, truth_BYX = batch(options.batch, chance)
        loss = functional.cross_entropy(network(image_BCYX), truth_BYX)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.info(
                "step %d  loss %.4f  held-out dice %.4f  %.0f s",
                step,
                loss.item(),
                check(network, None),
                time.perf_counter() - begun,
            )
    measured = check(network, options.picture)
    save_checkpoint(
        options.output,
        network,
        architecture=ARCHITECTURE,
        normalize="scale:0.00392156862745098,0",
        labels=["background", "nucleus"],
        provenance={
            "recipe": "workflows/demo_network/train.py",
            "data": f"tilepipe.synthetic, seeds from {TRAINING_SEEDS}",
            "torch": str(torch.__version__),
            "seed": options.seed,
            "steps": options.steps,
            "batch": options.batch,
            "held_out_dice": round(measured, 4),
        },
    )
    log.info("held-out dice %.4f; wrote %s", measured, options.output)


if __name__ == "__main__":
    main()
