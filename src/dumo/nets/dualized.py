"""Wrap a diffusers model as a dumo network, which maps x_t, times and conditions to velocities and flow maps.

The model keeps its class. `Dualized` replaces some of its modules, which keep their names and shapes: the last layer
(`dumo.nets.heads`), the time embedder (`dumo.nets.lowpass`), and layers with adapters (`dumo.nets.lora`).

The order of events:

1. `Dualized(...)` replaces the modules, once.
2. `refit` fits the time embedder, after weights are loaded and before the first step.
3. `forward` converts x_t and t to the model's own layout and unit (`Inputs`), calls the model with the arguments of its
   `Family`, and splits the output of its last layer into heads.
4. `base` evaluates the untuned model as a teacher, and `fake_score` the model with the adapters of a fake score.
5. For an export, `single_head_model` returns the model with one head; `fit_fixed_times`, `velocity_time_layer` and
   `model_times` are for nets with two times.

Sharding, compiling and checks use `blocks`, `regions` and `max_patches`. Checkpoints contain the names of modules and
parameters, so renaming `model`, `texts`, `old`, `heads`, `gap` or `negative_time` makes existing runs unreadable.

At negative times (FACM, TwinFlow) the time embedder receives |t|, and a trained vector, initially zero, is added to its
output (our choice; TwinFlow's code passes -t to the embedder). A pass at -t is therefore initially the same as at t.
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
    """The net of a `Pretrained` spec: a diffusers `model`, `heads` by name, and a `gap` embedder if it has two times.

    Parameters that are not trained require no gradients. `lowpass_fits` reports the low-pass fit of each time embedder.
    """

    model: Any

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
        """Wrap the model and modify it in place. Every head is initialized as a copy of its last layer.

        - `patch`: the side of a patch.
        - `guidance`: the guidance scale that a distilled model embeds. None means that it embeds none.
        - `lowpass_limit`: the highest frequency of the time embedding in rad per unit of t. None disables the low-pass.
        - `diffusion`: converts the output of a diffusion model to a velocity. None means that it predicts a velocity.
        - `gap`: whether the net also takes r. This requires a time embedder.
        - `signed`: whether times may be negative. This requires a time embedder.
        - `fake_score`: whether the net also has adapters of a fake score. Then only adapters are trained.

        Raises UserError if adapters need a package that is missing (`lora.adapt`).
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
                # Dropout would draw from torch's global generator.
                layer.p = 0.0
        self.unsaved_buffers = _drop_buffers_from_state(model)

        # Add adapters. Copy the layers that are trained in full, so that `base` can restore them.
        unused_layers = self._unused_layers()
        embedder_paths = time_embedder_paths(model, family)
        trained_paths = [family.last_layer, *embedder_paths]
        self.trained_paths = tuple(trained_paths) if lora else ()
        if lora:
            adapt(model, lora, self.blocks, unused_layers, trained_paths, fake_score=fake_score)
        originals = [copy.deepcopy(model.get_submodule(path)) for path in self.trained_paths]
        self.old = nn.ModuleList(originals).requires_grad_(False)
        for name, p in model.named_parameters():
            if name.startswith(tuple(unused_layers)):
                p.requires_grad_(False)

        # Make the heads.
        last_layer: Any = model.get_submodule(family.last_layer)
        self.heads = nn.ModuleDict({name: HeadLayer(last_layer) for name in heads})
        set_channels(model, family.out_channels, len(heads) * self.channels)

        # Limit the frequencies of the time embedding, and add the embeddings of the gap and of negative times.
        max_frequency = family.max_frequency(self.config)
        self.lowpass_fits = self._apply_lowpass(embedder_paths, max_frequency, lowpass_limit)
        self.time_names = ("t", "r") if gap else ("t",)
        # The embeddings of the gap and of negative times are added to the output of this embedder.
        self.time_path = embedder_paths[0] if embedder_paths else ""
        self.gap = GapEmbedder(self._time_embedder, max_frequency) if gap else None
        self.negative_time = self._zero_time_embedding() if signed else None

        if family.mask_reader:
            model.get_submodule(family.mask_reader).register_forward_pre_hook(_with_readable_mask)
        model.set_submodule(family.last_layer, self._join([head.out for head in self._heads]))

        # A LoRA file stores only low-rank products (`dumo.export.lora`), so freeze the biases of fully trained layers.
        if lora:
            trained_in_full: list[nn.Module] = [*self._heads, *map(model.get_submodule, embedder_paths)]
            for layer in trained_in_full:
                for name, p in layer.named_parameters():
                    if name.endswith("bias"):
                        p.requires_grad_(False)
        # The fake score would also train the heads, which would change the samples.
        if fake_score:
            self.heads.requires_grad_(False)
        self.has_subject = bool(lora and lora.subject)
        # Everything but the subject's adapters belongs to the few-step run, including the time embedder.
        if self.has_subject:
            self.lowpass_fits = ()
            for name, p in self.named_parameters():
                p.requires_grad_(f".{SUBJECT}." in name)

    def _apply_lowpass(
        self, embedder_paths: Sequence[str], max_frequency: float, limit: float | None
    ) -> tuple[LowpassFit, ...]:
        """Remove frequencies above `limit` from each time embedder, and train it. If None, do nothing."""
        if limit is None:
            return ()
        fits: list[LowpassFit] = []
        for path in embedder_paths:
            embedder = self.model.get_submodule(path).requires_grad_(True)
            fits.append(lowpass.cut(embedder, max_frequency, limit))
        return tuple(fits)

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, each shaped like x (b, channels, h, w), for the numbers c (b,) of the texts.

        The inputs are times, (b,) each: t, and r if there is a gap. Raises TypeError for other inputs.
        """
        require_inputs(self.time_names, inputs)
        times = [inputs[name] for name in self.time_names]
        goes_row_by_row = self.family.one_by_one and self.texts.lengths_differ
        if not goes_row_by_row:
            return self._predict(x, c, *times)
        heads_by_row: list[Heads] = []
        # If another rank has more rows, repeat the last row, so that all ranks make the same number of passes.
        for i in range(dist.num_synced_calls(self, len(c))):
            first = min(i, len(c) - 1)
            row = slice(first, first + 1)
            heads_by_row.append(self._predict(x[row], c[row], *(time[row] for time in times)))
        return tuple(torch.cat(rows)[: len(c)] for rows in zip(*heads_by_row, strict=True))

    def refit(self) -> None:
        """Fit the time embedders after the low-pass to their outputs before it. Takes seconds."""
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
        """The number of channels of a head: those of a sample, and of a learned variance if there is one."""
        return self._heads[0].channels // self.patch**2

    @property
    def max_patches(self) -> int | None:
        """The number of patches along an axis for which the model has positions. None means no limit."""
        # The lengths of the axes of text, rows and columns.
        axes = self.config.get("axes_lens")
        if axes:
            return min(axes[1:])
        kind = type(self.model).__name__
        # CogView4 has the key of position tables but does not use it.
        if not kind.startswith(("SD3", "AuraFlow")):
            return None
        size = self.config.get("pos_embed_max_size")
        # AuraFlow's key counts all patches of a square.
        if size and kind.startswith("AuraFlow"):
            return isqrt(size)
        return size

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are sharded separately: those in the model's module lists, and the mid block of a UNet."""
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
        """The modules that are compiled separately: the blocks, or the transformers in a UNet's blocks.

        Entire UNet blocks are too deep to trace.
        """
        if not self.is_unet:
            return self.blocks
        # diffusers lists here the class names that its own regional compilation compiles.
        compiled_classes = self.model._repeated_blocks
        transformers = [part for part in self.model.modules() if type(part).__name__ in compiled_classes]
        return transformers or self.blocks

    @contextmanager
    def base(self) -> Generator["Dualized", None, None]:
        """Within the context, every head returns the output of the untuned model, independent of r.

        If a subject's adapters are trained on top of a few-step run, the heads return the outputs of that run. Raises
        UserError if the net has no adapters.
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
        """Within the context, the adapters of the fake score are active instead of the trained model's."""
        with with_adapters(self.model, FAKE):
            yield

    @property
    def fake_score_parameters(self) -> list[nn.Parameter]:
        """The parameters of the fake score's adapters."""
        return [p for name, p in self.named_parameters() if f".{FAKE}." in name]

    def single_head_model(self, head: str, *, merged: bool = False, time_layer: nn.Linear | None = None) -> Any:  # noqa: ANN401, a diffusers model
        """Return a model of the diffusers class and shapes, with one head as its last layer. It shares the weights.

        With `merged`, return a float32 copy with the adapters merged into their layers. `time_layer`, if given,
        replaces the last layer of the time embedder and contains the gap's embedding (`fit_fixed_times`,
        `velocity_time_layer`). Raises KeyError for an unknown head.
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
            # deepcopy uses these float32 copies instead of copying the parameters in bf16 first, which saves memory.
            copies: dict[int, nn.Parameter] = {}
            for p in model.parameters():
                copies[id(p)] = nn.Parameter(p.detach().to(torch.float32, copy=True), False)
            model = copy.deepcopy(model, copies)
            merge(model)
        return model

    @torch.no_grad()
    def fit_fixed_times(self, t: Time, r: Time, model_times: Tensor, dtype: torch.dtype = torch.float32) -> FixedTimes:
        """Fit the last layer of the time embedder to passes from t to r, (k,) each.

        With this layer, the model alone has at its own times `model_times` (k,) the embedding that this net has at t
        and r. The fit is for weights that are rounded to `dtype`. Raises UserError if its error is too large.
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
        """Return the last layer of the time embedder for velocities, with r = t at every t.

        The gap's embedding is then the same for all t, and is added to the bias. Raises UserError if there is no bias.
        """
        assert self.gap is not None
        _, _, last = lowpass.linear_layers(self._time_embedder)
        layer = copy.deepcopy(last)
        bias = bias_or_none(layer)
        if bias is None:
            raise UserError(
                f"the time embedder of {type(self.model).__name__} has no bias to absorb the embedding of r = t: "
                "export with --head u if u was trained, or use dumo sample"
            )
        layer.bias = nn.Parameter(bias + self.gap(bias.new_zeros(1))[0], False)
        return layer

    def model_times(self, scheduler_times: Tensor) -> Tensor:
        """Convert a scheduler's times (k,), 0 to 1000, to the model's own unit, rounding as the pipeline does."""
        if self.family.has_reversed_time:
            return (1000.0 - scheduler_times) / 1000.0
        return scheduler_times / (1000.0 / self.family.time_scale(self.config))

    def _predict(self, x: Sample, c: Cond, t: Time, r: Time | None = None) -> Heads:
        """Return the heads, each shaped like x (b, channels, h, w), in one pass of the model."""
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
        # The tokens of a source image come last.
        if inputs.source is not None:
            out = out[:, : inputs.x.shape[1]]
        if self.family.takes_packed_latents:
            out = unpack_latents(out, inputs.grid, self.patch)
        heads = split_into_heads(out, len(self.heads))
        # Drop a learned variance.
        if self.diffusion:
            heads = tuple(head[:, : x.shape[1]] for head in heads)
        return tuple(to_velocity(head) for head in heads)

    def _model_time(self, t: Time) -> Array:
        """Return t (b,) in the unit of a flow-matching model. In a few families, time 0 is the noise."""
        if self.family.has_reversed_time:
            t = 1 - t
        scale = self.family.time_scale(self.config)
        return t if scale == 1 else scale * t

    def _to_velocity(self, out: Array) -> Array:
        """Return the velocity, noise - data, given the output of a flow-matching model."""
        return -out if self.family.has_reversed_time else out

    def _waves(self, time: Tensor) -> Tensor:
        """Return the input of the time embedder, (k, waves), at the model's own times (k,). The model computes it."""
        return torch.cat([self._waves_at(one_time) for one_time in time.split(1)])

    def _waves_at(self, time: Tensor) -> Tensor:
        """Return the waves (1, waves) at one time (1,): run the model on zeros up to its time embedder."""
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
        raise AssertionError("the model did not call its time embedder")

    def _zeros_at(self, time: Tensor) -> Inputs:
        """Make one row of inputs with 2 x 2 patches and one token, all zero except for the model's own time (1,)."""
        family = self.family
        texts = self.texts
        # The inputs get the device and dtype of this weight.
        weight = self._heads[0].out.weight
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
        """The path of the last layer of the time embedder."""
        linear_names = [name for name, layer in self._time_embedder.named_modules() if isinstance(layer, nn.Linear)]
        return f"{self.time_path}.{linear_names[-1]}"

    @property
    def _time_embedder(self) -> nn.Module:
        """The time embedder at `time_path`."""
        return self.model.get_submodule(self.time_path)

    def _zero_time_embedding(self) -> nn.Parameter:
        """Return a vector of zeros (width,) to be added to a time embedding."""
        _, _, last = lowpass.linear_layers(self._time_embedder)
        return nn.Parameter(last.weight.new_zeros(last.out_features))

    @property
    def _heads(self) -> list[HeadLayer]:
        """The layers of `heads` in order."""
        return [head for head in self.heads.values() if isinstance(head, HeadLayer)]

    def _join(self, layers: Sequence[nn.Module]) -> JoinedHeads:
        """Join the last layers of all heads into one that replaces the model's last layer."""
        return JoinedHeads(layers, self.channels if self.family.channels_last else None)

    def _inputs(self, x: Sample, c: Cond, time: Array) -> Inputs:
        """Convert x (b, channels, h, w), the texts of c (b,) and the model's own time (b,) to the model's layout."""
        family = self.family
        tokens, mask, pooled = self.texts(c)
        source = self.texts.sources(c)
        lengths: tuple[int, ...] | None = None
        if family.one_by_one or family.takes_lists:
            lengths = self.texts.lengths(c)
        # All rows of this pass have the same number of tokens, so no mask is needed.
        if family.one_by_one and lengths and mask is not None:
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
        """Return the guidance scale that a distilled model embeds, (b,), in its own unit, or None if it embeds none."""
        if self.guidance is None:
            return None
        return tokens.new_full((len(tokens),), self.guidance * self.family.guidance_scale(self.config))

    @contextmanager
    def _with_unrounded_time(self, inputs: Inputs) -> Generator[None, None, None]:
        """Within the context, a hook passes unrounded time and guidance to the module that embeds them.

        A bf16 model would first round t to 8 bits.
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
        """Within the context, add the embeddings of t - r and of negative times to the model's own embedding of t."""
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
    """Return the paths of a model's time embedders."""
    path_end = family.time_embedder
    if not path_end:
        return []
    return [path for path, _ in model.named_modules() if f".{path}".endswith(f".{path_end}")]


def _drop_buffers_from_state(model: nn.Module) -> dict[str, list[str]]:
    """Remove the fixed buffers of all layers from the model's state dict. Return their names by the layer's path.

    Buffers of the model itself are removed, but not returned.
    """
    names_by_path: dict[str, list[str]] = {}
    for path, layer in model.named_modules():
        names = drop_from_state(layer)
        if path and names:
            names_by_path[path] = names
    return names_by_path


class _EmbedderReached(Exception):  # noqa: N818, not an error
    """Stops the pass of `_waves_at` when the model calls its time embedder. The argument is the embedder's input."""


def _with_readable_mask(_: nn.Module, args: tuple[Array, Tensor]) -> tuple[Array, Tensor]:
    """Replace a mask on the meta device, which has no values, by one that keeps all tokens, in a forward pre-hook."""
    x, mask = args
    if mask.is_meta:
        mask = torch.ones(mask.shape, dtype=torch.long, device="cpu")
    return x, mask
