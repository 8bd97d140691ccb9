"""How well distances see what is wrong with samples: by how many deviations of no difference each fault stands out.

    DUMO_DATA=... python tools/power.py [--draws 16] > tools/power.json
    python tools/power.py --unbiased 200    # of digits: splits, the mean of each kernel distance, and its deviation

Real images that play samples, as they are or with a fault, classes in turn, against other real images: of CIFAR-10
training rows against its test rows, of digits some against half of the others, the rest being those trained on. The
folder of photos is 500 of CIFAR-10's test rows, against which fewer training rows than that are judged.
Of each distance and size: mean and deviation between real rows, and (mean of the faulty - that mean) / deviation. Where
a size leaves fewer than four disjoint draws, both are those of a smaller one, times the sum of 1/n and 1/m as it falls.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, pad

from dumo.data import Digits, Images
from dumo.encoders.classifier import PIECE, cifar10, digits
from dumo.evaluation.distance import (
    Moments,
    class_mmd,
    class_mmd_deviation,
    frechet_distance,
    gaussian_mmd,
    kernel_distance,
    mean_sd,
    mmd2,
    mmd_deviation,
    two_sample_auc,
)
from dumo.evaluation.neighbours import nearest
from dumo.evaluation.photos import WIDTH
from dumo.evaluation.protocol import parts
from dumo.evaluation.shipped import WIDTH_DIGITS, _grey
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import stream

Rows = tuple[Tensor, Tensor]  # features and classes
FEW = 4  # disjoint draws, at least
MMD = "Gaussian kernel by class (`mmd`)"
CLASS_MMD = "the same within each class (`class_mmd`)"
QUICK = ("Fréchet", "Fréchet, extrapolated", MMD, CLASS_MMD, "`accuracy`")
LABELS = "every label one class on"
BEFORE = 3000  # real rows that fewer samples than all of these are compared with
FOLDER = 500  # photos
SVM = 1000  # rows: a machine's time grows as their square


@dataclass(frozen=True)
class Draw:
    """Samples, real rows to compare them with, and rows that were trained on: features and classes."""

    x: Tensor
    c: Tensor
    y: Tensor
    d: Tensor
    trained: Tensor


@dataclass(frozen=True)
class Case:
    """Data: features of its images by fault, "" none, and their classes; a reference of its own, or parts of these."""

    fakes: dict[str, Tensor]
    c: Tensor
    real: Rows | None
    width: float
    classify: Callable[[Tensor], Tensor]  # of features
    sizes: tuple[int, ...]

    def draws(self, fault: str, n: int, count: int) -> Iterator[Draw]:
        """Samples with this fault, `count` times."""
        g, plain = torch.Generator().manual_seed(n), self.fakes[""]
        for _ in range(count):
            rows = in_turn(self.c, n, g)
            rest = torch.ones(len(self.c), dtype=torch.bool)
            rest[rows] = False
            others = in_turn(self.c[rest], int(rest.sum()), g)
            others = rest.nonzero()[:, 0][others]
            half = others[: len(others) // 2]
            y, d = self.real or (plain[half], self.c[half])
            y, d = (y[:BEFORE], d[:BEFORE]) if n < len(y) else (y, d)
            seen = others if self.real else others[len(half) :]
            seen = seen if len(seen) else rows  # all of them are samples
            f, c = self.fakes.get(fault, plain)[rows], self.c[rows].clone()
            if fault == "one label in 50 wrong":
                c[::50] = (c[::50] + 1) % 10
            elif fault == LABELS:
                c = (c + 1) % 10
            elif fault == "each row twice":
                f, c = f[: n // 2].repeat(2, 1), c[: n // 2].repeat(2)
            elif fault == "a fifth are copies":
                copies = seen[: n // 5]
                f, c = torch.cat([f[n // 5 :], plain[copies]]), torch.cat([c[n // 5 :], self.c[copies]])
            yield Draw(f, c, y, d, plain[seen])


def in_turn(c: Tensor, n: int, g: Generator) -> Tensor:
    """n random rows, none twice, of each class its share, in any order."""
    order = torch.randperm(len(c), generator=g)
    order = order[c[order].argsort(stable=True)]
    return order[(torch.arange(n) * len(c)) // n][torch.randperm(n, generator=g)]


def faulty(x: Tensor, c: Tensor, features: Callable[[Tensor], Tensor], noise: float, blur: float) -> dict[str, Tensor]:
    """The features of images with faults of these sizes."""
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    soft = avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    far = torch.empty(len(x))
    for k in range(10):
        far[c == k] = (x[c == k] - x[c == k].mean(0)).flatten(1).norm(dim=1).argsort().argsort() / (c == k).sum()
    usual = torch.arange(len(x))
    for k in range(10):  # the farthest tenth of a class is replaced by others of it
        lost, kept = ((c == k) & (far > 0.9)).nonzero()[:, 0], ((c == k) & (far <= 0.9)).nonzero()[:, 0]
        usual[lost] = kept[torch.arange(len(lost)) * len(kept) // len(lost)]
    plain = features(x)
    return {
        "": plain,
        f"noise of {noise}": features(x + noise * z),
        f"blurred by {blur:.0%}": features((1 - blur) * x + blur * soft),
        "a tenth of each class lost": plain[usual],
    }


def cifar() -> Case:
    """In the features of the classifier, images as a file holds them."""

    def read(split: str) -> Rows:
        root = str(Path(os.environ["DUMO_DATA"]) / "cifar10")
        album = Images(root=root, side=32, crop="none", split=split, memory=0).found().originals()
        return album.rows(slice(0, len(album)))

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([cifar10.features(from_uint8(to_uint8(part.clamp(-1, 1)))) for part in x.split(PIECE)])

    x, c = read("train")
    y, d = read("test")
    x, y = (from_uint8(one) if one.dtype == torch.uint8 else one for one in (x, y))
    fakes = faulty(x, c, features, 0.04, 0.1)
    return Case(fakes, c, (features(y), d), WIDTH, cifar10.classify, (300, 1000, 3000, 10_000, 50_000))


def photos(case: Case) -> Case:
    """A folder of 500 photos, of CIFAR-10."""
    assert case.real is not None
    x, c = case.real
    return replace(case, real=(x[:FOLDER], c[:FOLDER]), sizes=(300,))


def of_digits() -> Case:
    """In the features of the classifier, digits as a file holds them."""
    x, c = Digits().originals().reference(0, 0)
    fakes = faulty(x, c, lambda x: digits.features(_grey(x)), 0.1, 0.1)
    return Case(fakes, c, None, WIDTH_DIGITS, digits.classify, (300, 600))


def extrapolated(x: Tensor, y: Tensor) -> float:
    """FD at infinitely many samples and real rows: a line through the distances of halves and of all (ours)."""
    whole = frechet_distance(Moments.of(x), Moments.of(y))
    halves = [frechet_distance(Moments.of(a), Moments.of(b)) for a in (x[::2], x[1::2]) for b in (y[::2], y[1::2])]
    return 2 * whole - sum(halves) / 4


def distances(case: Case) -> dict[str, Callable[[Draw], float]]:
    """All candidates, lower being better."""
    width, classify = case.width, case.classify
    return {
        "Fréchet": lambda of: frechet_distance(Moments.of(of.x), Moments.of(of.y)),
        "Fréchet, extrapolated": lambda of: extrapolated(of.x, of.y),
        "cubic kernel (KID)": lambda of: kernel_distance(of.x, of.y),
        "Gaussian kernel": lambda of: 1000 * mmd2(of.x, of.y, [width]),
        MMD: lambda of: gaussian_mmd(of.x, of.y, width, of.c, of.d).value,
        CLASS_MMD: lambda of: class_mmd(of.x, of.y, width, of.c, of.d).value,
        "support vector machine (AUC)": lambda of: two_sample_auc(of.y[:SVM], of.x[:SVM], stream("auc", len(of.x))),
        "`accuracy`": lambda of: -(classify(of.x) == of.c).double().mean().item(),
        "`nearest`": lambda of: -nearest(of.trained, of.x)[0].mean().item(),
    }


def study(name: str, case: Case, count: int) -> Iterator[dict[str, Any]]:
    """A row per size and distance."""
    faults = [*case.fakes, "each row twice", "a fifth are copies", "one label in 50 wrong", LABELS]
    known: dict[str, tuple[float, float, int]] = {}
    for n in case.sizes:
        disjoint = len(case.c) // n if case.real else count
        times = min(count, disjoint) if disjoint >= FEW else 1
        real = next(case.draws("", n, 1))
        m = len(real.y)
        for kind, distance in distances(case).items():
            few = kind == "Fréchet, extrapolated" and n < 2.5 * real.x.shape[1]
            if few or (kind[0] == "s" and n > 3000) or (n > 10_000 and kind not in QUICK):  # hours
                continue
            begun = time.process_time()
            found = {fault: [distance(one) for one in case.draws(fault, n, times)] for fault in faults}
            seconds = (time.process_time() - begun) / times / len(faults)
            if times > 1:
                mean, sd = mean_sd(found[""])
                known[kind] = mean, sd, n
            else:
                mean, sd, before = known[kind]
                scale = (1 / n + 1 / m) / (1 / before + 1 / m)
                mean, sd = (mean, sd * (before / n) ** 0.5) if kind == "`accuracy`" else (mean * scale, sd * scale)
            power = {f: (sum(v) / len(v) - mean) / sd for f, v in found.items() if f}
            row = {"data": name, "samples": n, "distance": kind, "mean": mean, "sd": sd, "power": power}
            if kind == MMD:
                row["sd_known"] = mmd_deviation(n, real.y, case.width, real.d)
            elif kind == CLASS_MMD:
                row["sd_known"] = class_mmd_deviation(real.c, real.y, case.width, real.d)
            if "sd_known" in row:
                row["none"] = found[""][0]
            print(row, file=sys.stderr, flush=True)
            yield row | {"seconds": seconds, "draws": times}


def unbiased(splits: int) -> dict[str, Any]:
    """Of random thirds of the digits with all classes: the mean of each kernel distance over splits, and its deviation.

    `z` is the mean over its standard error, `ratio` what deviation is predicted over the one that is seen.
    """
    case = of_digits()
    x = case.fakes[""]
    values: dict[str, list[float]] = {"mmd": [], "class_mmd": []}
    known: dict[str, list[float]] = {"mmd": [], "class_mmd": []}
    for i in range(splits):
        some, others, _ = parts(case.c, 3, torch.Generator().manual_seed(i))
        c, d = case.c[some], case.c[others]
        values["mmd"].append(gaussian_mmd(x[some], x[others], case.width, c, d).value)
        values["class_mmd"].append(class_mmd(x[some], x[others], case.width, c, d).value)
        known["mmd"].append(mmd_deviation(len(some), x[others], case.width, d))
        known["class_mmd"].append(class_mmd_deviation(c, x[others], case.width, d))
    found: dict[str, Any] = {"splits": splits}
    for name, distances in values.items():
        mean, sd = mean_sd(distances)
        predicted = (sum(one**2 for one in known[name]) / splits) ** 0.5
        found[name] = {"mean": mean, "sd": sd, "z": mean / sd * splits**0.5, "ratio": predicted / sd}
    return found


def main() -> None:
    """Everything, as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--draws", type=int, default=12)
    options.add_argument("--unbiased", type=int, metavar="SPLITS", help="of digits alone, in a minute")
    given = options.parse_args()
    if given.unbiased:
        print(json.dumps(unbiased(given.unbiased)))
        return
    of_cifar = cifar()
    cases = {"digits": of_digits(), "CIFAR-10": of_cifar, "photos": photos(of_cifar)}
    rows = [row for name, case in cases.items() for row in study(name, case, given.draws)]
    print(json.dumps({"draws": given.draws, "rows": rows, "unbiased": unbiased(200)}))


if __name__ == "__main__":
    main()
