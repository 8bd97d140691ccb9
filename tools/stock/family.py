"""Every family's stock pipeline, made of a tiny model's folder, and told what dumo's net is told: a row of texts.

Samples are images of digits, (1, 8, 8), in the place of latents, so a packed model's tokens have 4 numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
from torch import Tensor

from dumo.nets.dualized import packed, unpacked
from dumo.nets.family import FAMILIES
from transformers_tiny import TINY, L, Tiny

GRID, PIXELS, CLASSES = (4, 4), 64, 10  # of patches; eight to a latent's side
Given = dict[str, Any]
Way = Callable[[Tensor], Tensor]
NAMES = {"mask": "prompt_attention_mask", "pooled": "pooled_prompt_embeds"}
SAME: Way = lambda x: x  # noqa: E731
TOKENS: Way = lambda x: packed(x, GRID, 2)  # noqa: E731
IMAGE: Way = lambda x: unpacked(x, GRID, 2)  # noqa: E731


@dataclass(frozen=True)
class Row:
    """A family: a tiny model by name, how its pipeline takes and gives samples, and the names of what it is told."""

    tiny: str
    into: Way = SAME
    back: Way = SAME
    names: tuple[tuple[str, str], ...] = ()  # those that are not in NAMES
    lists: bool = False  # it takes captions as lists, without padding
    more: tuple[tuple[str, Any], ...] = ()  # arguments that it cannot do without
    negative: bool = True  # it is guided without a negative prompt's asking

    @property
    def model(self) -> Tiny:
        """The tiny model, for digits."""
        tiny = TINY[self.tiny]
        channels = {"in_channels": 4 if FAMILIES[tiny.kind].packed else 1}
        channels |= {"out_channels": 1} if "out_channels" in tiny.config else {}
        return replace(tiny, config={**tiny.config, **channels})

    def told(self, texts: dict[str, Tensor], c: int) -> Given:
        """The arguments for row c of a table of texts."""
        if self.lists:
            return {"prompt_embeds": [texts["tokens"][c][texts["mask"][c]]]}
        found: Given = {"prompt_embeds": texts["tokens"][c : c + 1]}
        for name in ("mask", "pooled"):
            if name in texts:
                found[dict(self.names).get(name, NAMES[name])] = texts[name][c : c + 1]
        return found

    def against(self, texts: dict[str, Tensor]) -> Given:
        """The arguments for what is guided away from: no text."""
        masks = {name: value for name, value in self.more if "mask" in name}
        found = {f"negative_{name}": value for name, value in (self.told(texts, CLASSES) | masks).items()}
        return {"negative_prompt": None, **found}


FLUX_LIKE: Given = {"into": TOKENS, "back": IMAGE}
ROWS: dict[str, Row] = {
    "SD3": Row("sd3"),
    "Flux": Row("flux-guided", **FLUX_LIKE, negative=False),
    "Flux2": Row(
        "flux2", into=lambda x: TOKENS(x).transpose(1, 2).reshape(1, 4, *GRID), back=IMAGE, negative=False,
    ),
    "Chroma": Row("chroma", **FLUX_LIKE),
    "SANA": Row("sana", more=(("use_resolution_binning", False),)),
    "Qwen-Image": Row("qwen", **FLUX_LIKE, names=(("mask", "prompt_embeds_mask"),), negative=False),
    "Z-Image": Row("z-image", lists=True),
    "Lumina2": Row("lumina2"),
    "AuraFlow": Row("auraflow", more=(("prompt_attention_mask", torch.ones(1, L)),)),
    "CogView4": Row("cogview4"),
    "PRX": Row("prx", more=(("use_resolution_binning", False),)),
    "Wan": Row("wan", into=lambda x: x.unsqueeze(2), back=lambda x: x.squeeze(2), more=(("num_frames", 1),)),
}  # fmt: skip


def save_texts(row: Row, file: Path) -> dict[str, Tensor]:
    """Texts of CLASSES classes and of none, of several lengths where the family is told a mask; written to `file`."""
    family, config, g = FAMILIES[row.model.kind], row.model.config, torch.Generator().manual_seed(3)
    texts = {"tokens": torch.randn(CLASSES + 1, L, config[family.text], generator=g)}
    if family.masked:
        texts["mask"] = torch.arange(L) < 1 + torch.arange(CLASSES + 1)[:, None] % L
    if family.pooled:
        texts["pooled"] = torch.randn(CLASSES + 1, config[family.pooled], generator=g)
    safetensors.torch.save_file(texts, file)
    return texts


@contextmanager
def recorded(back: Way) -> Iterator[list[Tensor]]:
    """Inside, the noise that the stock scheduler draws, as dumo's samples."""
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

    drawn, draw = list[Tensor](), module.randn_tensor

    def drawing(*shape: object, **how: object) -> Tensor:
        noise = draw(*shape, **how)
        drawn.append(back(noise))
        return noise

    with patch.object(module, "randn_tensor", drawing):
        yield drawn
