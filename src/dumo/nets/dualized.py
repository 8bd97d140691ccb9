"""A model of diffusers as a net of dumo: x_t, t and c in, velocities and flow maps out.

The model keeps its class. `Dualized` exchanges some of its parts, which keep their names and shapes: the last layer
(`dumo.nets.heads`), the time embedder (`dumo.nets.lowpass`), and layers with adapters (`dumo.nets.lora`).

The order of events:

1. `Dualized(...)` exchanges the parts, once.
2. `refit` adapts the time embedder, after weights are loaded and before the first step.
3. `forward` is a pass: it puts x_t and t in the model's own layout and unit (`Inputs`), calls the model with the
   arguments that its `Family` makes of them, and cuts the output of its last layer into heads.
4. `base` is the untuned model as a teacher, and `fake_score` the model with the adapters of a fake score.
5. For an export, `single_head_model` is the model with one head; `fit_fixed_times`, `velocity_time_layer` and
   `model_times` serve nets of two times.

Sharding, compiling and checks read `blocks`, `regions` and `max_patches`. The names of a `Dualized`'s modules are those
in checkpoints, so a rename of `model`, `texts`, `old`, `heads` or `gap` breaks runs, as does one of `negative_time`.

An objective with negative times (FACM, TwinFlow) reads the model at -t, which it never saw. The embedder of time then
gets |t|, and a trained vector is added to its output on these rows, zero at the start (our choice; TwinFlow's code
passes -t to the embedder). So a pass at -t begins as one at t.
"""

import copy
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from dumo.nets import lowpass
from dumo.nets.embed import require_inputs
from dumo.nets.family import Config, Family, Inputs, is_unet, pack_latents, unpack_latents
from dumo.nets.gap import FixedTimes, GapEmbedder, fit_fixed_times
from dumo.nets.heads import (
    HeadLayer,
    JoinedHeads,
    bias_or_none,
    drop_from_state,
    set_channels,
    split_into_heads,
    with_buffers_in_state,
    with_submodules,
)
from dumo.nets.lora import FAKE, FEW_STEP, SUBJECT, Lora, adapt, merge, with_adapters
from dumo.nets.lowpass import LowpassFit, MaskedLinear
from dumo.nets.text_rows import Texts
from dumo.nets.vp import DiffusionToVelocity
from dumo.runtime import dist
from dumo.types import Array, Cond, Heads, Rows, Sample, Time, UserError


class Dualized(nn.Module):
    """The net of a `Pretrained` spec: `heads` by name, `gap` where it has two times, and `model`, which holds all else.

    Parameters that are not trained require no gradients. `lowpass_fits` reports the low-pass of each time embedder.
    """

    model: Any  # of diffusers

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        texts: Texts,
        heads: Sequence[str],
        patch: int,
        *,
        guidance: float | None = None,
        lora: Lora | None = None,
        lowpass_limit: float | None = None,
        diffusion: DiffusionToVelocity | None = None,
        gap: bool = False,
        signed: bool = False,
        fake_score: bool = False,
    ) -> None:
        """Take over the model, which is changed in place. Every head begins as a copy of its last layer.

        - `patch`: the side of a patch
        - `guidance`: the number that a distilled model embeds; None: the model embeds none
        - `lowpass_limit`: in rad per unit of t, quicker waves of time are cut; None: none are
        - `diffusion`: turns the output of a model of a diffusion into a velocity; None: the model learned a velocity
        - `gap`: whether the net takes r, too, for which the model must have an embedder of time
        - `signed`: whether times may be negative, for which, too, the model must have an embedder of time
        - `fake_score`: whether the net has adapters of a fake score, too; then only adapters are trained

        Raises UserError as `lora.adapt`.
        """
        super().__init__()
        self.model = model
        self.family = family
        self.texts = texts
        self.patch = patch
        self.guidance = guidance
        self.diffusion = diffusion
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # it would draw from torch's global generator
        self.unsaved_buffers = _drop_buffers_from_state(model)

        # adapters, with copies of the layers that are trained in full
        unused_layers = self._unused_layers()
        embedder_paths = time_embedder_paths(model, family)
        trained_paths = [family.last_layer, *embedder_paths]
        self.trained_paths = tuple(trained_paths) if lora else ()
        if lora:
            adapt(model, lora, self.blocks, unused_layers, trained_paths, fake_score=fake_score)
        originals = [copy.deepcopy(model.get_submodule(path)) for path in self.trained_paths]
        self.old = nn.ModuleList(originals).requires_grad_(False)  # the untuned layers at `trained_paths`
        for name, p in model.named_parameters():
            if name.startswith(tuple(unused_layers)):
                p.requires_grad_(False)

        # heads
        last_layer: Any = model.get_submodule(family.last_layer)
        self.heads = nn.ModuleDict({name: HeadLayer(last_layer) for name in heads})
        set_channels(model, family.out_channels, len(heads) * self.channels)

        # time
        max_frequency = family.max_frequency(self.config)
        self.lowpass_fits = self._cut_quick_waves(embedder_paths, max_frequency, lowpass_limit)
        self.time_names = ("t", "r") if gap else ("t",)
        # The embedder of time that the embeddings of the gap and of negative times are added to.
        self.time_path = embedder_paths[0] if embedder_paths else ""
        self.gap = GapEmbedder(self._time_embedder, max_frequency) if gap else None
        self.negative_time = self._zero_time_embedding() if signed else None

        if family.mask_reader:
            model.get_submodule(family.mask_reader).register_forward_pre_hook(_with_readable_mask)
        model.set_submodule(family.last_layer, self._join([head.out for head in self._heads]))

        # A LoRA holds products alone (`dumo.export.lora`), so the biases of layers that are trained in full stay fixed.
        if lora:
            trained_in_full: list[nn.Module] = [*self._heads, *map(model.get_submodule, embedder_paths)]
            for layer in trained_in_full:
                for name, p in layer.named_parameters():
                    if name.endswith("bias"):
                        p.requires_grad_(False)
        # A layer that is trained in full would be trained by the fake score, too, and change the samples.
        if fake_score:
            self.heads.requires_grad_(False)
        self.has_subject = bool(lora and lora.subject)
        if self.has_subject:  # all else is the few-step run's, its time embedder, too
            self.lowpass_fits = ()
            for name, p in self.named_parameters():
                p.requires_grad_(f".{SUBJECT}." in name)

    def _cut_quick_waves(
        self, embedder_paths: Sequence[str], max_frequency: float, limit: float | None
    ) -> tuple[LowpassFit, ...]:
        """Cut the waves of time above `limit` in each embedder, which is then trained; None: none are cut."""
        if limit is None:
            return ()
        fits: list[LowpassFit] = []
        for path in embedder_paths:
            embedder = self.model.get_submodule(path).requires_grad_(True)
            fits.append(lowpass.cut(embedder, max_frequency, limit))
        return tuple(fits)

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x (b, channels, h, w), for rows c (b,) of the texts.

        The inputs are times, (b,) each: t, and r if there is a gap. Raises TypeError for other inputs.
        """
        require_inputs(self.time_names, inputs)
        times = [inputs[name] for name in self.time_names]
        goes_row_by_row = self.family.one_by_one and self.texts.lengths_differ
        if not goes_row_by_row:
            return self._predict(x, c, *times)
        heads_by_row: list[Heads] = []
        for i in range(dist.num_synced_calls(self, len(c))):  # another rank may have more rows
            first = min(i, len(c) - 1)
            row = slice(first, first + 1)
            heads_by_row.append(self._predict(x[row], c[row], *(time[row] for time in times)))
        # repeats of the last row are cut off
        return tuple(torch.cat(rows)[: len(c)] for rows in zip(*heads_by_row, strict=True))

    def refit(self) -> None:
        """Fit the time embedders, whose quick waves are cut, to the curves that they had before. Takes seconds."""
        if not self.lowpass_fits:
            return
        embedders = [self.model.get_submodule(path) for path in time_embedder_paths(self.model, self.family)]
        max_frequency = self.family.max_frequency(self.config)
        fits: list[LowpassFit] = []
        for embedder, fit in zip(embedders, self.lowpass_fits, strict=True):
            fits.append(lowpass.refit(embedder, max_frequency, fit))
        self.lowpass_fits = tuple(fits)
        if self.gap:
            self.gap.copy_first_layer(embedders[0])

    @property
    def config(self) -> Config:
        """The model's config.json."""
        return self.model.config

    @property
    def channels(self) -> int:
        """The number of channels of a head: those of a sample, and of a variance where the model learned one."""
        return self._heads[0].channels // self.patch**2

    @property
    def max_patches(self) -> int | None:
        """The number of patches along an axis that the model has positions for; None: there is no limit."""
        axes = self.config.get("axes_lens")  # of text, rows and columns
        if axes:
            return min(axes[1:])
        kind = type(self.model).__name__
        if not kind.startswith(("SD3", "AuraFlow")):  # CogView4 has the key, and reads none
            return None
        size = self.config.get("pos_embed_max_size")
        if size and kind.startswith("AuraFlow"):  # of all patches of a square
            return isqrt(size)
        return size

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are sharded one by one: those in the model's own lists, and the middle of a UNet."""
        blocks: list[nn.Module] = []
        for part in self.model.children():
            if isinstance(part, nn.ModuleList):
                blocks.extend(part)
        middle = getattr(self.model, "mid_block", None)
        if middle is not None:
            blocks.append(middle)
        return blocks

    @property
    def is_unet(self) -> bool:
        """Whether the model is a UNet."""
        return is_unet(self.config)

    @property
    def regions(self) -> list[nn.Module]:
        """The modules that are compiled one by one: the blocks, or the transformers in a UNet's blocks.

        A UNet's blocks are too deep to trace.
        """
        if not self.is_unet:
            return self.blocks
        compiled_classes = self.model._repeated_blocks  # the names of the classes that diffusers' own compiling takes
        transformers = [part for part in self.model.modules() if type(part).__name__ in compiled_classes]
        return transformers or self.blocks

    @contextmanager
    def base(self) -> Generator["Dualized", None, None]:
        """Inside, every head gives the output of the untuned model, for any r.

        A net with adapters of a subject on top of a few-step run gives the outputs of that run, head by head. Raises
        UserError where the net has no adapters.
        """
        if not self.old:
            raise UserError(
                "teacher.kind=base needs net.lora, because full fine-tuning overwrites the base weights: set "
                "net.lora.rank=64, or teacher.kind=run"
            )
        if self.has_subject:
            with with_adapters(self.model, FEW_STEP):
                yield self
            return
        originals: dict[str, nn.Module] = dict(zip(self.trained_paths, self.old, strict=True))
        original_last = originals[self.family.last_layer]
        originals[self.family.last_layer] = self._join([original_last] * len(self.heads))
        trained = {path: self.model.get_submodule(path) for path in originals}
        gap = self.gap
        with with_adapters(self.model):
            for path, part in originals.items():
                self.model.set_submodule(path, part)
            self.gap = None
            try:
                yield self
            finally:
                self.gap = gap
                for path, part in trained.items():
                    self.model.set_submodule(path, part)

    @contextmanager
    def fake_score(self) -> Generator[None, None, None]:
        """Inside, the adapters of the fake score add to a pass, in place of the trained model's."""
        with with_adapters(self.model, FAKE):
            yield

    @property
    def fake_score_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapters of the fake score."""
        return [p for name, p in self.named_parameters() if f".{FAKE}." in name]

    def single_head_model(self, head: str, *, merged: bool = False, time_layer: nn.Linear | None = None) -> Any:  # noqa: ANN401, of diffusers
        """Return the model with one head as its last layer. Its class and shapes are diffusers'; weights are shared.

        With `merged` it is a copy in float32, with adapters added to their layers. `time_layer`, if given, replaces the
        last layer of the embedder of time, and contains the gap's embedding (`fit_fixed_times`, `velocity_time_layer`).
        Raises KeyError for an unknown head.
        """
        head_layer = self.heads[head]
        assert isinstance(head_layer, HeadLayer)
        parts: dict[str, nn.Module] = {self.family.last_layer: head_layer.out}
        for path, names in self.unsaved_buffers.items():
            parts[path] = with_buffers_in_state(self.model.get_submodule(path), names)
        for path, layer in self.model.named_modules():
            if isinstance(layer, MaskedLinear):
                parts[path] = layer.plain()
        if time_layer is not None:
            parts[self._time_layer_path] = time_layer
        model = with_submodules(self.model, parts)
        set_channels(model, self.family.out_channels, self.channels)
        if merged:
            # deepcopy takes these copies for its own: one in bf16 first would be memory for nothing
            copies: dict[int, nn.Parameter] = {}
            for p in model.parameters():
                copies[id(p)] = nn.Parameter(p.detach().to(torch.float32, copy=True), False)
            model = copy.deepcopy(model, copies)
            merge(model)
        return model

    @torch.no_grad()
    def fit_fixed_times(self, t: Time, r: Time, model_times: Tensor, dtype: torch.dtype = torch.float32) -> FixedTimes:
        """Fit the last layer of the embedder of time to passes from t to r, (k,) each.

        With it the model alone has, at its own times `model_times` (k,), the embedding that this net has at t and r.
        Weights are for `dtype`. Raises UserError as `gap.fit_fixed_times`.
        """
        assert self.gap is not None
        embedder = self._time_embedder
        time = (
            self.diffusion.time_to_index(self.diffusion.schedule.last_time * t)
            if self.diffusion
            else self._model_time(t)
        )
        time_embedding = copy.deepcopy(embedder).double()(self._waves(time).double())
        gap_embedding = self.gap(t - r).double()
        return fit_fixed_times(embedder, self._waves(model_times), time_embedding + gap_embedding, dtype)

    @torch.no_grad()
    def velocity_time_layer(self) -> nn.Linear:
        """Return the last layer of the embedder of time for r = t, a velocity, at every t.

        The gap's embedding is then the same for all t, and is added to the bias. Raises UserError where there is none.
        """
        assert self.gap is not None
        _, _, last = lowpass.linear_layers(self._time_embedder)
        layer = copy.deepcopy(last)
        bias = bias_or_none(layer)
        if bias is None:
            raise UserError(
                f"the time embedder of {type(self.model).__name__} has no bias to absorb the embedding of r = t: export "
                "with --head u if u was trained, or use dumo sample"
            )
        layer.bias = nn.Parameter(bias + self.gap(bias.new_zeros(1))[0], False)
        return layer

    def model_times(self, scheduler_times: Tensor) -> Tensor:
        """Convert a scheduler's times (k,), from 0 to 1000, to the model's own unit, with the pipeline's operations."""
        if self.family.has_reversed_time:
            return (1000.0 - scheduler_times) / 1000.0
        return scheduler_times / (1000.0 / self.family.time_scale(self.config))

    def _predict(self, x: Sample, c: Cond, t: Time, r: Time | None = None) -> Heads:
        """Return the heads, shaped like x (b, channels, h, w), of rows that may share a pass of the model."""
        is_negative = None
        if self.negative_time is not None:
            is_negative = t < 0
            t = torch.where(is_negative, -t, t)
            r = None if r is None else torch.where(is_negative, -r, r)
        if self.diffusion:
            x_in, time, to_velocity = self.diffusion(x, t)
        else:
            x_in = x
            time = self._model_time(t)
            to_velocity = self._to_velocity
        inputs = self._inputs(x_in, c, time)
        with self._with_unrounded_time(inputs), self._with_added_embeddings(t, r, is_negative):
            out = self.model(**self.family.arguments(inputs), return_dict=False)[0]
        if inputs.source is not None:  # its tokens are the last
            out = out[:, : inputs.x.shape[1]]
        if self.family.takes_packed_latents:
            out = unpack_latents(out, inputs.grid, self.patch)
        heads = split_into_heads(out, len(self.heads))
        if self.diffusion:  # a learned variance is cut off
            heads = tuple(head[:, : x.shape[1]] for head in heads)
        return tuple(to_velocity(head) for head in heads)

    def _model_time(self, t: Time) -> Array:
        """Return t (b,) in the unit of a model that learned a flow. A few families count time from the noise."""
        if self.family.has_reversed_time:
            t = 1 - t
        scale = self.family.time_scale(self.config)
        return t if scale == 1 else scale * t

    def _to_velocity(self, out: Array) -> Array:
        """Return the velocity noise - data, from the output of a model that learned a flow."""
        return -out if self.family.has_reversed_time else out

    def _waves(self, time: Tensor) -> Tensor:
        """Return what the embedder of time reads, (k, waves), at the model's own times (k,). The model computes it."""
        return torch.cat([self._waves_at(one_time) for one_time in time.split(1)])

    def _waves_at(self, time: Tensor) -> Tensor:
        """Return the waves (1, waves) at one time (1,): run the model on zeros, up to its embedder of time."""
        inputs = self._zeros_at(time)

        def stop(_: nn.Module, args: tuple[object, ...]) -> None:
            raise _EmbedderReached(args[0])

        handle = self._time_embedder.register_forward_pre_hook(stop)
        try:
            with self._with_unrounded_time(inputs):
                self.model(**self.family.arguments(inputs), return_dict=False)
        except _EmbedderReached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise AssertionError("no pass without an embedding of time")

    def _zeros_at(self, time: Tensor) -> Inputs:
        """Make the inputs of one row of 2 x 2 patches and one token: zeros but for the model's own time (1,)."""
        family = self.family
        texts = self.texts
        weight = self._heads[0].out.weight  # whose device and type the inputs have
        channels = self.config["in_channels"]
        if family.takes_packed_latents:
            x = weight.new_zeros(1, 4, channels)
        else:
            x = weight.new_zeros(1, channels, 2 * self.patch, 2 * self.patch)
        tokens = weight.new_zeros(1, 1, texts.width)
        return Inputs(
            x=x,
            time=time,
            tokens=tokens,
            mask=torch.ones(1, 1, dtype=torch.bool) if texts.has_mask else None,
            pooled=weight.new_zeros(1, texts.pooled_width) if texts.pooled_width else None,
            guidance=self._guidance(tokens),
            grid=(2, 2),
            lengths=(1,) if family.takes_lists else None,
            source=x if family.edits_images else None,
        )

    @property
    def _time_layer_path(self) -> str:
        """The path of the last layer of the embedder of time."""
        linear_names = [name for name, layer in self._time_embedder.named_modules() if isinstance(layer, nn.Linear)]
        return f"{self.time_path}.{linear_names[-1]}"

    @property
    def _time_embedder(self) -> nn.Module:
        """The embedder of time at `time_path`."""
        return self.model.get_submodule(self.time_path)

    def _zero_time_embedding(self) -> nn.Parameter:
        """Return a vector of zeros (width,) that can be added to an embedding of time."""
        _, _, last = lowpass.linear_layers(self._time_embedder)
        return nn.Parameter(last.weight.new_zeros(last.out_features))

    @property
    def _heads(self) -> list[HeadLayer]:
        """The layers of `heads`, in their order."""
        return [head for head in self.heads.values() if isinstance(head, HeadLayer)]

    def _join(self, layers: Sequence[nn.Module]) -> JoinedHeads:
        """Make one layer of the last layers of all heads, for the place of the model's last layer."""
        return JoinedHeads(layers, self.channels if self.family.channels_last else None)

    def _inputs(self, x: Sample, c: Cond, time: Array) -> Inputs:
        """Put x (b, channels, h, w), the texts of c (b,) and the model's own time (b,) in the model's layout."""
        family = self.family
        tokens, mask, pooled = self.texts(c)
        source = self.texts.sources(c)
        lengths: tuple[int, ...] | None = None
        if family.one_by_one or family.takes_lists:
            lengths = self.texts.lengths(c)
        if family.one_by_one and lengths and mask is not None:  # all rows here have as many tokens
            tokens = tokens[:, : lengths[0]]
            mask = None
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        return Inputs(
            x=pack_latents(x, grid, self.patch) if family.takes_packed_latents else x,
            time=time,
            tokens=tokens,
            mask=mask,
            pooled=pooled,
            guidance=self._guidance(tokens),
            grid=grid,
            lengths=lengths if family.takes_lists else None,
            source=None if source is None else pack_latents(source, grid, self.patch),
        )

    def _guidance(self, tokens: Tensor) -> Tensor | None:
        """Return the guidance that a distilled model embeds, (b,), in its own unit; None: it embeds none."""
        if self.guidance is None:
            return None
        return tokens.new_full((len(tokens),), self.guidance * self.family.guidance_scale(self.config))

    @contextmanager
    def _with_unrounded_time(self, inputs: Inputs) -> Generator[None, None, None]:
        """Inside, the part of the model that takes time and guidance gets them unrounded, by a hook.

        In bf16 the model would round t to 8 bits before.
        """
        if not self.family.time_part:
            yield
            return
        unrounded = [inputs.time]
        if inputs.guidance is not None:
            unrounded.append(inputs.guidance)
        scale = self.family.time_part_scale
        if scale != 1:
            unrounded = [scale * number for number in unrounded]
        part: nn.Module = self.model.get_submodule(self.family.time_part)
        handle = part.register_forward_pre_hook(lambda _, args: (*unrounded, *args[len(unrounded) :]))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _with_added_embeddings(self, t: Time, r: Time | None, is_negative: Rows | None) -> Generator[None, None, None]:
        """Inside, the embedding of t - r, and of rows at negative times, is added to the model's own of t."""
        embeddings: list[Array] = []
        if self.gap is not None and r is not None:
            embeddings.append(self.gap(t - r))
        if self.negative_time is not None and is_negative is not None:
            embeddings.append(is_negative[:, None] * self.negative_time)
        if not embeddings:
            yield
            return
        added = sum(embeddings[1:], start=embeddings[0])

        def add(_: nn.Module, args: object, out: Tensor) -> Array:
            return out + added.to(out.dtype)

        handle = self._time_embedder.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _unused_layers(self) -> list[str]:
        """Return the paths of the layers that have no effect on the output."""
        if not self.family.unused_layers:
            return []
        last_block = str(self.config["num_layers"] - 1)
        pattern = re.compile(self.family.unused_layers.replace("LAST", last_block))
        return [path for path, _ in self.model.named_modules() if pattern.fullmatch(path)]


def time_embedder_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the paths of a model's perceptrons that embed time."""
    path_end = family.time_embedder
    if not path_end:
        return []
    return [path for path, _ in model.named_modules() if f".{path}".endswith(f".{path_end}")]


def _drop_buffers_from_state(model: nn.Module) -> dict[str, list[str]]:
    """Take the fixed buffers of all layers out of the model's state dict. Returns their names by the layer's path.

    Those of the model itself are left out of the result.
    """
    names_by_path: dict[str, list[str]] = {}
    for path, layer in model.named_modules():
        names = drop_from_state(layer)
        if path and names:
            names_by_path[path] = names
    return names_by_path


class _EmbedderReached(Exception):  # noqa: N818, no error
    """Stops a pass of `_waves_at` where the model calls its embedder of time. The argument is what that reads."""


def _with_readable_mask(_: nn.Module, args: tuple[Array, Tensor]) -> tuple[Array, Tensor]:
    """Replace a mask on the meta device, which has no values, by one that keeps all tokens. A hook before a module."""
    x, mask = args
    if mask.is_meta:
        mask = torch.ones(mask.shape, dtype=torch.long, device="cpu")
    return x, mask
