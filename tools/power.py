"""How well distances see what is wrong with samples: by how many deviations of no difference each damage stands out.

    DUMO_DATA=... python tools/power.py [--sizes 300 1000 3000] [--draws 24]

Real images of CIFAR-10's training rows, as they are or damaged, against its 10,000 test rows, which the features have
not seen either; classes in turn. Of each distance: its mean and deviation between real rows, and (mean of the damaged -
that mean) / deviation.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, pad

from dumo.data import Images
from dumo.encoders.classifier import PIECE, cifar10
from dumo.evaluation.distance import Moments, frechet_distance, kernel_distance, mean_sd, mmd2
from dumo.io.picture import from_uint8, to_uint8

ROWS, CLASSES, CAT = 20_000, 10, 3  # of the training rows, that samples are drawn from
Draw = Callable[[int, Generator], Tensor]  # features of n samples


def read(split: str, rows: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], and their classes."""
    root = str(Path(os.environ["DUMO_DATA"]) / "cifar10")
    return Images(root=root, side=32, crop="none", split=split, memory=0).found().originals().rows(slice(0, rows))


def features(x: Tensor) -> Tensor:
    """Of images as a file holds them."""
    with torch.no_grad():
        return torch.cat([cifar10.features(from_uint8(to_uint8(part))) for part in x.split(PIECE)]).double()


def in_turn(c: Tensor, n: int, g: Generator) -> Tensor:
    """n random rows whose classes come in turn, none twice."""
    rows = torch.empty(n, dtype=torch.long)
    for k in range(CLASSES):
        mine, of_class = torch.arange(k, n, CLASSES), (c == k).nonzero().flatten()
        rows[mine] = of_class[torch.randperm(len(of_class), generator=g)[: len(mine)]]
    return rows


def damages(x: Tensor, c: Tensor) -> dict[str, Draw]:
    """Ways to draw samples that are not quite real, the first of them real."""
    f, g = features(x), torch.Generator().manual_seed(0)
    soft = avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    seen = {f"noise of {s}": features((x + s * torch.randn(x.shape, generator=g)).clamp(-1, 1)) for s in (0.04, 0.08)}
    seen |= {f"blurred by {w:.0%}": features((1 - w) * x + w * soft) for w in (0.1, 0.2)}

    def lost(n: int, g: Generator) -> Tensor:
        rows, others = in_turn(c, n, g), (c != CAT).nonzero().flatten()
        gone = (c[rows] == CAT) & (torch.rand(n, generator=g) < 0.3)
        rows[gone] = others[torch.randint(len(others), (int(gone.sum()),), generator=g)]
        return f[rows]

    def plain(known: Tensor) -> Draw:
        return lambda n, g: known[in_turn(c, n, g)]

    made = {"": plain(f), **{name: plain(known) for name, known in seen.items()}, "0.3 of the cats lost": lost}
    return made | {"each row twice": lambda n, g: f[in_turn(c, n // 2, g).repeat(2)]}


def main() -> None:
    """A table for each size."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[300, 1000, 3000])
    options.add_argument("--draws", type=int, default=24)
    asked, real = options.parse_args(), features(read("test", 10_000)[0])
    ways = damages(*read("train", ROWS))
    width = [torch.pdist(real[:1000]).median().item()]
    moments = Moments.of(real)
    by: dict[str, Callable[[Tensor], float]] = {
        "Fréchet": lambda x: frechet_distance(Moments.of(x), moments),
        "cubic kernel": lambda x: kernel_distance(x, real),
        "Gaussian kernel": lambda x: mmd2(x, real, width),
    }
    for n in asked.sizes:
        print(f"\n| {n} samples | {' | '.join(ways)[3:]} | no difference | seconds |\n|{'---|' * (len(ways) + 2)}")
        for name, distance in by.items():
            begun, g = time.monotonic(), torch.Generator().manual_seed(n)
            found = {way: mean_sd([distance(draw(n, g)) for _ in range(asked.draws)]) for way, draw in ways.items()}
            (null, sd), each = found.pop(""), (time.monotonic() - begun) / asked.draws / len(ways)
            cells = [f"{(mean - null) / sd:.1f}" for mean, _ in found.values()]
            print(f"| {name} | {' | '.join(cells)} | {null:.3g} ± {sd:.2g} | {each:.2f} |", flush=True)


if __name__ == "__main__":
    main()
