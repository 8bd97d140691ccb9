"""What the name of an image protocol fixes."""

from typing import Literal, NamedTuple

Name = Literal["adm-imagenet256-50k", "adm-imagenet512-50k", "cifar10-train50k", "folder"]

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
TRAIN = 1_281_167  # images of ImageNet-1k's training set, of which ADM's moments are


class Standard(NamedTuple):
    """What a name fixes; None where the data decides."""

    samples: int
    size: int | None  # pixels a side
    classes: int | None
    real: int | None  # images of the reference
    subset: int  # rows per subset of the kernel distance
    url: str | None = None  # of ADM's file, which then is the reference; None: images are


STANDARDS: dict[Name, Standard] = {
    "adm-imagenet256-50k": Standard(50_000, 256, 1000, 10_000, 1000, f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    "adm-imagenet512-50k": Standard(50_000, 512, 1000, 10_000, 1000, f"{ADM}/512/VIRTUAL_imagenet512.npz"),
    "cifar10-train50k": Standard(50_000, 32, 10, 50_000, 1000),
    "folder": Standard(10_000, None, None, None, 100),
}
