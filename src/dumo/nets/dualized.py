"""A flow transformer of diffusers as a net of dumo: x_t, t and c in, velocities and flow maps out.

The model is its own class still, and the parts that are exchanged have the names and shapes of the old ones: its last
layer (`dumo.nets.twin`), its time embedder (`dumo.nets.lowpass`), layers with adapters (`dumo.nets.adapter`).
"""

import copy
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dumo.nets import adapter, lowpass, twin
from dumo.nets.adapter import Lora
from dumo.nets.embed import check
from dumo.nets.family import Config, Family, Told
from dumo.nets.lowpass import Fit, Slow
from dumo.nets.text import Texts
from dumo.nets.twin import Head, Norms, Outs, exchanged, heads_of, put, tell
from dumo.types import Array, Cond, Heads, Sample, Time, UserError


class Dualized(nn.Module):
    """The net of a `Pretrained` spec: `heads` by name, and `model`, which holds all else.

    Parameters that are not trained require no gradients. `fits` says how the low-pass of each time embedder went: it is
    cut when the net is made, and `refit` before its first step, for weights that are loaded replace it.
    """

    model: Any  # of diffusers

    def __init__(
        self,
        model: nn.Module,
        row: Family,
        texts: Texts,
        heads: Sequence[str],
        patch: int,
        *,
        guidance: float | None = None,
        lora: Lora | None = None,
        limit: float | None = None,
        own_norm: bool = False,
    ) -> None:
        """Takes the model over; every head is a copy of its last layer. `limit` is of the low-pass; None: none.

        Raises UserError as `adapter.adapt`.
        """
        super().__init__()
        self.model, self.row, self.texts, self.patch, self.guidance = model, row, texts, patch, guidance
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # it would draw from torch's global generator
        self.tables = {
            name: tables for name, layer in model.named_modules() if name and (tables := twin.unsaved(layer))
        }
        idle, embedders = self._idle(), self._embedders()
        parts = [row.last, *embedders, *([row.norm] if own_norm else [])]  # trained in full, also beside adapters
        self.paths = tuple(parts) if lora else ()
        if lora:
            adapter.adapt(model, lora, self.blocks, idle, parts)
        self.old = nn.ModuleList(copy.deepcopy(model.get_submodule(path)) for path in self.paths).requires_grad_(False)
        for name, p in model.named_parameters():
            if name.startswith(tuple(idle)):
                p.requires_grad_(False)
        self.heads = nn.ModuleDict({name: self._head(own_norm) for name in heads})
        tell(model, row.told, len(heads) * self.channels)
        self.fits: tuple[Fit, ...] = ()
        if limit is not None:
            cut = (model.get_submodule(path).requires_grad_(True) for path in embedders)
            self.fits = tuple(lowpass.cut(embedder, row.turn(self.config), limit) for embedder in cut)
        if row.reads:
            model.get_submodule(row.reads).register_forward_pre_hook(readable)
        norms = [head.norm for head in self._heads if head.norm is not None]
        put(model, row.last, self._outs([head.out for head in self._heads], own=own_norm))
        if norms:
            put(model, row.norm, Norms(norms))

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x (b, c, h, w), at t (b,), for rows c (b,) of the table of conditions."""
        check(("t",), inputs)
        told = self._told(x, c, inputs["t"])
        with self._exactly(told):
            out = self.model(**self.row.call(told), return_dict=False)[0]
        if self.row.packed:
            out = unpacked(out, told.grid, self.patch)
        heads = heads_of(out, len(self.heads))
        return tuple(-head for head in heads) if self.row.backward else heads

    def refit(self) -> None:
        """Move the embedders of time, whose quick waves are cut, to the curves that they had. Takes seconds."""
        turn, get = self.row.turn(self.config), self.model.get_submodule
        paths = self._embedders() if self.fits else []
        self.fits = tuple(lowpass.refit(get(path), turn, fit) for path, fit in zip(paths, self.fits, strict=True))

    @property
    def config(self) -> Config:
        """The model's, as its config.json has it."""
        return self.model.config

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled and sharded piece by piece, in order: the members of the model's own lists."""
        return [block for part in self.model.children() if isinstance(part, nn.ModuleList) for block in part]

    @contextmanager
    def base(self) -> Generator["Dualized", None, None]:
        """Inside, every head gives what the model gave before it was tuned. Raises UserError without adapters."""
        if not self.old:
            raise UserError(
                "net.lora is null, so the model that it was is gone once it trains: set net.lora.rank=64, or take "
                "another teacher, teacher.kind=run"
            )
        old = dict(zip(self.paths, self.old, strict=True))
        now = {path: self.model.get_submodule(path) for path in old}
        old[self.row.last] = self._outs([old[self.row.last]] * len(self.heads), own=False)
        with adapter.off(self.model):
            for path, part in old.items():
                put(self.model, path, part)
            try:
                yield self
            finally:
                for path, part in now.items():
                    put(self.model, path, part)

    def stock(self, head: str, *, merged: bool = False) -> Any:  # noqa: ANN401, a model of diffusers
        """The model with one head in the place of its last layer, of its own class and shapes; weights are shared.

        `merged`: adapters are added to the layers beside them, in a copy. Raises KeyError for a head that is not there.
        """
        mine = self.heads[head]
        assert isinstance(mine, Head)
        parts: dict[str, nn.Module] = {self.row.last: mine.out}
        parts |= {} if mine.norm is None else {self.row.norm: mine.norm}
        parts |= {path: twin.saved(self.model.get_submodule(path), tables) for path, tables in self.tables.items()}
        slow = ((name, layer) for name, layer in self.model.named_modules() if isinstance(layer, Slow))
        model = exchanged(self.model, parts | {name: layer.plain() for name, layer in slow})
        tell(model, self.row.told, self.channels)
        if merged:
            model = copy.deepcopy(model)
            adapter.merge(model)
        return model

    @property
    def _heads(self) -> list[Head]:
        return [head for head in self.heads.values() if isinstance(head, Head)]

    def _head(self, own_norm: bool) -> Head:
        get = self.model.get_submodule
        return Head(get(self.row.last), get(self.row.norm) if own_norm else None)

    def _outs(self, layers: Sequence[nn.Module], *, own: bool) -> Outs:
        return Outs(layers, self.channels if self.row.channels_last else None, own)

    @property
    def channels(self) -> int:
        """Of a sample."""
        return self._heads[0].out.out_features // self.patch**2

    def _told(self, x: Sample, c: Cond, t: Time) -> Told:
        """What a pass is told, as the model counts and packs it."""
        row, config = self.row, self.config
        tokens, mask, pooled = self.texts(c)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        time, clock = 1 - t if row.backward else t, row.clock(config)
        w = None if self.guidance is None else self.guidance * row.guidance_scale(config)
        return Told(
            x=packed(x, grid, self.patch) if row.packed else x,
            time=time if clock == 1 else clock * time,
            tokens=tokens,
            mask=mask,
            pooled=pooled,
            guidance=None if w is None else tokens.new_full((len(tokens),), w),
            grid=grid,
            lengths=tuple(self.texts.lengths[i] for i in c.tolist()) if row.apart and self.texts.lengths else None,
        )

    @contextmanager
    def _exactly(self, told: Told) -> Generator[None, None, None]:
        """Inside, the time embedder gets its numbers as they are: in bf16 the model would round t to 8 bits."""
        if not self.row.exact:
            yield
            return
        given = (told.time,) if told.guidance is None else (told.time, told.guidance)
        scale = self.row.exact_scale
        numbers = tuple(n if scale == 1 else scale * n for n in given)
        part: nn.Module = self.model.get_submodule(self.row.exact)
        handle = part.register_forward_pre_hook(lambda _, args: (*numbers, *args[len(numbers) :]))
        try:
            yield
        finally:
            handle.remove()

    def _idle(self) -> list[str]:
        """The paths of the layers that move nothing."""
        if not self.row.idle:
            return []
        pattern = re.compile(self.row.idle.replace("LAST", str(self.config["num_layers"] - 1)))
        return [name for name, _ in self.model.named_modules() if pattern.fullmatch(name)]

    def _embedders(self) -> list[str]:
        """The paths of the perceptrons that embed time."""
        end = self.row.embedder
        return [name for name, _ in self.model.named_modules() if end and f".{name}".endswith(f".{end}")]


def readable(_: nn.Module, args: tuple[Array, Tensor]) -> tuple[Array, Tensor]:
    """On the meta device, where a mask has no numbers, one of which all tokens are there."""
    x, mask = args
    return x, torch.ones(mask.shape, dtype=torch.long, device="cpu") if mask.is_meta else mask


def packed(x: Sample, grid: tuple[int, int], p: int) -> Array:
    """(b, c, h, w) -> (b, n, c p p), patches row by row, as the pipelines pack."""
    b, c, (rows, columns) = x.shape[0], x.shape[1], grid
    return x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)


def unpacked(y: Array, grid: tuple[int, int], p: int) -> Array:
    """The inverse of `packed`."""
    b, (rows, columns) = y.shape[0], grid
    return y.reshape(b, rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, rows * p, columns * p)
