"""A model of diffusers as a net of dumo: x_t, t and c in, velocities and flow maps out.

The model keeps its class. The parts that are exchanged keep their names and shapes: its last layer (`dumo.nets.twin`),
its time embedder (`dumo.nets.lowpass`), layers with adapters (`dumo.nets.adapter`).
"""

import copy
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

from dumo.io.deferred import Deferred
from dumo.nets import adapter, lowpass, twin
from dumo.nets.adapter import Lora
from dumo.nets.embed import check
from dumo.nets.family import TURN, UNET, Config, Family, Inputs, packed, unpacked
from dumo.nets.gap import Fixed, GapEmbedder, fixed
from dumo.nets.lowpass import Fit, Slow
from dumo.nets.route import Route, standing
from dumo.nets.rows import Texts
from dumo.nets.twin import HeadLayer, Outs, exchanged, heads_of, put, set_channels
from dumo.nets.vp import DiffusionToVelocity
from dumo.runtime import dist
from dumo.types import Array, Cond, Heads, Sample, Time, UserError


class Dualized(nn.Module):
    """The net of a `Pretrained` spec: `heads` by name, `gap` where it has two times, and `model`, which holds all else.

    Parameters that are not trained require no gradients. `fits` reports the low-pass of each time embedder: it is cut
    when the net is made, and refit (`refit`) before the first step, because loaded weights replace it.
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
        frame: DiffusionToVelocity | None = None,
        gap: bool = False,
        route: Route | None = None,
    ) -> None:
        """Takes the model over; every head is a copy of its last layer. `limit` is the low-pass's; None: none.

        `frame` is that of a model of a diffusion. With `gap` it takes r, too: the model has an embedder of time.

        Raises UserError as `adapter.adapt` and `Route.note`.
        """
        super().__init__()
        self.model, self.row, self.texts, self.patch, self.guidance = model, row, texts, patch, guidance
        self.frame, self.route = frame, route
        if route:
            route.note(self.blocks)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # it would draw from torch's global generator
        self.tables = {
            name: tables for name, layer in model.named_modules() if name and (tables := twin.unsaved(layer))
        }
        idle, embedders = self._idle(), self._embedders()
        parts = [row.last, *embedders]  # trained in full, also with adapters
        self.paths = tuple(parts) if lora else ()
        if lora:
            adapter.adapt(model, lora, self.blocks, idle, parts)
        self.old = nn.ModuleList(copy.deepcopy(model.get_submodule(path)) for path in self.paths).requires_grad_(False)
        for name, p in model.named_parameters():
            if name.startswith(tuple(idle)):
                p.requires_grad_(False)
        last: Any = model.get_submodule(row.last)
        self.heads = nn.ModuleDict({name: HeadLayer(last) for name in heads})
        set_channels(model, row.out_channels, len(heads) * self.channels)
        self.fits: tuple[Fit, ...] = ()
        if limit is not None:
            cut = (model.get_submodule(path).requires_grad_(True) for path in embedders)
            self.fits = tuple(lowpass.cut(embedder, row.turn(self.config), limit) for embedder in cut)
        self.names = ("t", "r") if gap else ("t",)
        self.timed = embedders[0] if gap else ""  # the path of the embedder that the gap is added to
        self.gap = GapEmbedder(self._embedder, row.turn(self.config)) if gap else None
        if row.reads:
            model.get_submodule(row.reads).register_forward_pre_hook(readable)
        put(model, row.last, self._outs([head.out for head in self._heads]))
        self.has_subject = bool(lora and lora.subject)
        if self.has_subject:  # all else is the few-step run's, its time embedder, too
            self.fits = ()
            for name, p in self.named_parameters():
                p.requires_grad_(f".{adapter.SUBJECT}." in name)

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x (b, c, h, w), at t (b,), and r, for rows c (b,) of the texts."""
        check(self.names, inputs)
        times = tuple(inputs[name] for name in self.names)
        if self.row.alone and self.texts.several:
            places = [min(i, len(c) - 1) for i in range(dist.calls(self, len(c)))]  # those beyond are cut off
            rows = (self._heads_of(*(part[i : i + 1] for part in (x, c, *times))) for i in places)
            return tuple(torch.cat(head)[: len(c)] for head in zip(*rows, strict=True))
        return self._heads_of(x, c, *times)

    def _heads_of(self, x: Sample, c: Cond, t: Time, r: Time | None = None) -> Heads:
        """The heads of rows that may share a pass."""
        x_in, time, velocity = self.frame(x, t) if self.frame else self._timed(x, t)
        given = self._inputs(x_in, c, time)
        with self._exactly(given), self._apart(t, r):
            out = self._passing(given)(**self.row.call(given), return_dict=False)[0]
        if given.source is not None:
            out = out[:, : given.x.shape[1]]
        if self.row.packed:
            out = unpacked(out, given.grid, self.patch)
        heads = heads_of(out, len(self.heads))
        if self.frame:  # a learned variance is cut off
            heads = tuple(head[:, : x.shape[1]] for head in heads)
        return tuple(velocity(head) for head in heads)

    def _passing(self, given: Inputs) -> Any:  # noqa: ANN401, of diffusers
        """The model in this pass: where it routes in training, with its blocks so."""
        n = prod(given.grid) + (0 if given.source is None else given.source.shape[1])
        split = self.route.split(len(given.tokens), n) if self.route and self.training else None
        if split is None:
            return self.model
        return exchanged(self.model, standing(self.model, split))

    def _timed(self, x: Sample, t: Time) -> tuple[Sample, Array, Callable[[Array], Array]]:
        """What a model of a flow gets of x and t, and how its output is read."""
        time, clock = 1 - t if self.row.backward else t, self.row.clock(self.config)
        return x, time if clock == 1 else clock * time, (lambda out: -out) if self.row.backward else (lambda out: out)

    def refit(self, weights: Deferred | None = None) -> None:
        """Fit the time embedders, whose quick waves are cut, to their old curves. Takes seconds.

        `weights` makes theirs, if they are not made yet.
        """
        turn, get = self.row.turn(self.config), self.model.get_submodule
        paths = self._embedders() if self.fits else []
        for path in paths:
            _ = weights and weights.fill(get(path))
        self.fits = tuple(lowpass.refit(get(path), turn, fit) for path, fit in zip(paths, self.fits, strict=True))
        if self.gap and paths:
            _ = weights and weights.fill(self.gap)
            self.gap.follow(get(paths[0]))

    @property
    def config(self) -> Config:
        """The model's config.json."""
        return self.model.config

    @property
    def most(self) -> int | None:
        """How many patches along an axis it has positions for; None: as many as there are."""
        config, kind = self.config, type(self.model).__name__
        if axes := config.get("axes_lens"):  # of text, rows and columns
            return min(axes[1:])
        held = config.get("pos_embed_max_size") if kind.startswith(("SD3", "AuraFlow")) else None  # CogView4 reads none
        return isqrt(held) if held and kind.startswith("AuraFlow") else held

    @property
    def blocks(self) -> list[nn.Module]:
        """The members of the model's own lists, and the middle of a UNet: they are sharded one by one."""
        parts = [*self.model.children(), nn.ModuleList(filter(None, [getattr(self.model, "mid_block", None)]))]
        return [block for part in parts if isinstance(part, nn.ModuleList) for block in part]

    @property
    def regions(self) -> list[nn.Module]:
        """What is compiled one by one: blocks; those of a UNet are too deep to trace, so the transformers in them."""
        inner = self.model._repeated_blocks if type(self.model).__name__ == UNET else ()  # diffusers' own choice
        return [part for part in self.model.modules() if type(part).__name__ in inner] or self.blocks

    @contextmanager
    def base(self) -> Generator["Dualized", None, None]:
        """Inside, every head gives the output of the untuned model, for any r. Raises UserError without adapters.

        With adapters on top of a few-step run's, the net is that run's, head by head.
        """
        if not self.old:
            raise UserError(
                "net.lora is null, so the untuned model is gone once training starts: set net.lora.rank=64, or take "
                "another teacher, teacher.kind=run"
            )
        if self.has_subject:
            with adapter.without_subject(self.model):
                yield self
            return
        old = dict(zip(self.paths, self.old, strict=True))
        now, gap = {path: self.model.get_submodule(path) for path in old}, self.gap
        old[self.row.last] = self._outs([old[self.row.last]] * len(self.heads))
        with adapter.off(self.model):
            for path, part in old.items():
                put(self.model, path, part)
            self.gap = None
            try:
                yield self
            finally:
                self.gap = gap
                for path, part in now.items():
                    put(self.model, path, part)

    def stock(self, head: str, *, merged: bool = False, last: nn.Linear | None = None) -> Any:  # noqa: ANN401, of diffusers
        """The model with one head as its last layer, of its own class and shapes; weights are shared.

        `merged`: adapters are added to their layers, in a copy, in float32. `last`: that of the embedder of time, which
        has the gap's. Raises KeyError for an unknown head.
        """
        own = self.heads[head]
        assert isinstance(own, HeadLayer)
        parts: dict[str, nn.Module] = {self.row.last: own.out}
        parts |= {path: twin.saved(self.model.get_submodule(path), tables) for path, tables in self.tables.items()}
        slow = ((name, layer) for name, layer in self.model.named_modules() if isinstance(layer, Slow))
        parts |= {name: layer.plain() for name, layer in slow}
        model = exchanged(self.model, parts | ({self.last_of_time: last} if last else {}))
        set_channels(model, self.row.out_channels, self.channels)
        if merged:
            single = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True), False) for p in model.parameters()}
            model = copy.deepcopy(model, single)  # a copy in bf16 first would be memory for nothing
            adapter.merge(model)
        return model

    @torch.no_grad()
    def fixed(self, t: Time, r: Time, stock: Tensor, dtype: torch.dtype = torch.float32) -> Fixed:
        """The embedding of passes from t to r, (k,) each, by the model alone at its own times `stock`, (k,).

        Raises UserError as `dumo.nets.gap.fixed`.
        """
        assert self.gap is not None
        embedder = self._embedder
        own = self.frame.clock(self.frame.schedule.last * t) if self.frame else self._timed(t, t)[1]
        wanted = copy.deepcopy(embedder).double()(self._waves(own).double()) + self.gap(t - r).double()
        return fixed(embedder, self._waves(stock), wanted, dtype)

    @torch.no_grad()
    def rest(self) -> nn.Linear:
        """The embedder's last layer for r = t, a velocity, at every t: its bias takes up G(0).

        Raises UserError where there is no bias.
        """
        assert self.gap is not None
        last = copy.deepcopy(lowpass.layers(self._embedder)[2])
        bias = twin.bias_or_none(last)
        if bias is None:
            raise UserError(
                f"the embedding of time of a {type(self.model).__name__} has no bias, which would hold that of r = t: "
                "take --head u, if that was taught, or sample by dumo sample"
            )
        last.bias = nn.Parameter(bias + self.gap(bias.new_zeros(1))[0], False)
        return last

    def own_time(self, thousandths: Tensor) -> Tensor:
        """The model's own times, (k,), of a scheduler's, as its pipeline tells it."""
        if self.row.backward:
            return (TURN - thousandths) / TURN
        return thousandths / (TURN / self.row.clock(self.config))

    def _waves(self, time: Tensor) -> Tensor:
        """What the embedder of time reads at the model's own times (k,), as the model computes it, (k, waves)."""
        return torch.cat([self._wave(s) for s in time[:, None]])

    def _wave(self, time: Tensor) -> Tensor:
        """Of one time (1,): the model is stopped there, so what else it reads is zeros."""
        row, channels, like = self.row, self.config["in_channels"], self._heads[0].out.weight
        side = 2 * self.patch
        x = like.new_zeros((1, 4, channels) if row.packed else (1, channels, side, side))
        w, texts = None if self.guidance is None else self.guidance * row.guidance_scale(self.config), self.texts
        given = Inputs(
            x=x,
            time=time,
            tokens=like.new_zeros(1, 1, texts.width),
            mask=torch.ones(1, 1, dtype=torch.bool) if texts.masked else None,
            pooled=like.new_zeros(1, texts.pooled_width) if texts.pooled_width else None,
            guidance=None if w is None else like.new_full((1,), w),
            grid=(2, 2),
            lengths=(1,) if row.apart else None,
            source=x if row.edits else None,
        )

        def stop(_: nn.Module, args: tuple[object, ...]) -> None:
            raise Reached(args[0])

        handle = self._embedder.register_forward_pre_hook(stop)
        try:
            with self._exactly(given):
                self.model(**row.call(given), return_dict=False)
        except Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise AssertionError("no pass without an embedding of time")

    @property
    def last_of_time(self) -> str:
        """The path of the last layer of the embedder of time."""
        return f"{self.timed}.{[name for name, m in self._embedder.named_modules() if isinstance(m, nn.Linear)][-1]}"

    @property
    def _embedder(self) -> nn.Module:
        """The embedder of time that the gap is added to."""
        return self.model.get_submodule(self.timed)

    @property
    def _heads(self) -> list[HeadLayer]:
        return [head for head in self.heads.values() if isinstance(head, HeadLayer)]

    def _outs(self, layers: Sequence[nn.Module]) -> Outs:
        return Outs(layers, self.channels if self.row.channels_last else None)

    @property
    def channels(self) -> int:
        """The channels of a head: those of a sample, and of a variance where one was learned."""
        return self._heads[0].channels // self.patch**2

    def _inputs(self, x: Sample, c: Cond, time: Array) -> Inputs:
        """The inputs of a pass in the model's own layout, and at its own time."""
        row, config = self.row, self.config
        (tokens, mask, pooled), source = self.texts(c), self.texts.sources(c)
        lengths = self.texts.lengths(c) if row.alone or row.apart else None
        if row.alone and lengths and mask is not None:  # all rows here have as many tokens
            tokens, mask = tokens[:, : lengths[0]], None
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        w = None if self.guidance is None else self.guidance * row.guidance_scale(config)
        return Inputs(
            x=packed(x, grid, self.patch) if row.packed else x,
            time=time,
            tokens=tokens,
            mask=mask,
            pooled=pooled,
            guidance=None if w is None else tokens.new_full((len(tokens),), w),
            grid=grid,
            lengths=lengths if row.apart else None,
            source=None if source is None else packed(source, grid, self.patch),
        )

    @contextmanager
    def _exactly(self, given: Inputs) -> Generator[None, None, None]:
        """Inside, the time embedder gets unrounded numbers: in bf16 the model would round t to 8 bits."""
        if not self.row.exact:
            yield
            return
        exact = (given.time,) if given.guidance is None else (given.time, given.guidance)
        scale = self.row.exact_scale
        numbers = tuple(n if scale == 1 else scale * n for n in exact)
        part: nn.Module = self.model.get_submodule(self.row.exact)
        handle = part.register_forward_pre_hook(lambda _, args: (*numbers, *args[len(numbers) :]))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _apart(self, t: Time, r: Time | None) -> Generator[None, None, None]:
        """Inside, the embedding of t - r is added to the model's own of t."""
        if r is None or self.gap is None:
            yield
            return
        more = self.gap(t - r)
        handle = self._embedder.register_forward_hook(lambda _, args, out: out + more.to(out.dtype))
        try:
            yield
        finally:
            handle.remove()

    def _idle(self) -> list[str]:
        """The paths of the layers that do not reach the output."""
        if not self.row.idle:
            return []
        pattern = re.compile(self.row.idle.replace("LAST", str(self.config["num_layers"] - 1)))
        return [name for name, _ in self.model.named_modules() if pattern.fullmatch(name)]

    def _embedders(self) -> list[str]:
        """The paths of the perceptrons that embed time."""
        end = self.row.embedder
        return [name for name, _ in self.model.named_modules() if end and f".{name}".endswith(f".{end}")]


class Reached(Exception):  # noqa: N818, no error
    """A pass has come to a part that reads the argument."""


def readable(_: nn.Module, args: tuple[Array, Tensor]) -> tuple[Array, Tensor]:
    """On the meta device, where a mask has no numbers: one that keeps all tokens."""
    x, mask = args
    return x, torch.ones(mask.shape, dtype=torch.long, device="cpu") if mask.is_meta else mask
