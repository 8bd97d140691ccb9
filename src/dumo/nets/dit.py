"""Diffusion Transformer (Peebles & Xie 2023): patches, adaLN-zero blocks, one output layer per head (paper, Sec. 3.3).

The trunk is DiT's; each further head costs one more output layer with its own modulation: 2.7 M of XL/2's 675 M.

`late` is Decoupled MeanFlow's (Lee et al. 2025, arXiv 2510.24474): the first blocks read x_t at time t, and the blocks
after them turn that into the step to r. One embedding serves both times, so at r = t the net is one of a velocity
alone, and can start as a trained one.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_serializer
from torch import Tensor, cat, device, equal, nn
from torch.nn import functional as F

from dumo.nets.block import (
    Block,
    BlockSizes,
    Lean,
    Magnitude,
    Preserving,
    Stream,
    Unit,
    make_lean,
    modulated,
    normalize,
    run_lean,
    shorten,
)
from dumo.nets.embed import Gauges, HeadEmbeddings, Scalars, grid_waves, label_table, side_of, turns
from dumo.nets.precondition import Precondition, framed
from dumo.nets.route import Route, run_blocks
from dumo.nets.textblock import Cross, TextEmbedder
from dumo.nets.textfamily import Text
from dumo.runtime.bound import BLOCKS, CHANNELS, FACTOR, PIXELS
from dumo.types import QUIET, Array, Cond, Heads, Needs, Sample, Spec, Time, UserError

# fields of DiT's own nets
PUBLISHED = {"precondition": "none", "modern": False, "qk_norm": False, "magnitude": "free", "late": None}
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # DiT, Tab. 1


class DiT(Spec):
    """A DiT by its sizes. The defaults are XL/2: patch 2, width 1152, depth 28, attention 16; `size` names others."""

    kind: Literal["dit"] = "dit"
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None
    patch: int = Field(default=2, ge=1, le=PIXELS)
    width: int = Field(default=1152, ge=4, le=CHANNELS, multiple_of=4)
    depth: int = Field(default=28, ge=1, le=BLOCKS)
    attention: int = Field(default=16, ge=1, le=CHANNELS)  # attention heads
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)  # times enter raw (UCGM)
    precondition: Precondition = "none"  # of the layers' input and output; linear path only
    modern: bool = False  # RMS norms, query and key norms, SwiGLU, rotary positions: LightningDiT (`dumo.nets.block`)
    qk_norm: bool = False  # query and key norms alone, as SD3: for long texts
    # preserved: inputs and outputs of a block's layers have mean square 1 (`dumo.nets.block`)
    magnitude: Magnitude = Field(default="free", exclude_if=lambda magnitude: magnitude == "free")
    # the blocks after this many, and the heads, get r for t; None: all of them get both, as a sum
    late: int | None = Field(default=None, ge=1, le=BLOCKS, exclude_if=lambda late: late is None)
    # some tokens skip the middle blocks in training; None: none
    route: Route | None = Field(default=None, exclude_if=lambda route: route is None)
    texts: Text | None = None  # the embeddings of the data's captions; None: a class has a learned label
    # Keep each block's input alone, and compute the rest again in the backward pass.
    checkpoint: Lean = Field(default=False, json_schema_extra=QUIET)

    @classmethod
    def size(cls, name: str, **others: Any) -> "DiT":  # noqa: ANN401, any field
        """S, B, L or XL of DiT's Tab. 1, with `others` among the fields: `DiT.size("B", patch=4)`."""
        if name not in SIZES:
            raise UserError(f"there is no DiT of size '{name}': it is one of {', '.join(SIZES)}")
        width, depth, attention = SIZES[name]
        return cls(width=width, depth=depth, attention=attention, **others)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Transformer":
        """A net with the inputs, heads and gauges of `needs` for square images of `shape`; 0 classes: no label.

        Raises UserError where the sizes do not fit one another or the images.
        """
        side = side_of(shape, self.kind)
        if side % self.patch:
            raise UserError(f"net.patch {self.patch} does not divide the image side {side}")
        if self.width % self.attention:
            raise UserError(f"net.attention {self.attention} does not divide net.width {self.width}")
        head_width = self.width // self.attention
        if self.modern and head_width % 4:
            raise UserError(
                "net.modern needs attention heads of a multiple of 4 numbers, not net.width / net.attention = "
                f"{head_width}: change one of them, or use net.modern=false"
            )
        if self.late is not None and ("r" not in needs.inputs or self.late >= self.depth):
            raise UserError(
                f"net.late {self.late} is after how many blocks the others get r: set it below net.depth = "
                f"{self.depth}, with an objective whose heads all read r, such as meanflow, or set net.late=null"
            )
        if self.magnitude == "preserved" and self.texts:
            raise UserError(
                "net.magnitude preserved has no blocks that read texts: use net.magnitude=free, or net.texts=null"
            )
        return Transformer(self, needs, shape, classes)

    @model_serializer(mode="wrap")
    def _serialized(self, serialize: Callable[["DiT"], dict[str, Any]]) -> dict[str, Any]:
        """Without `texts` where there are none."""
        fields = serialize(self)
        if not self.texts:
            fields.pop("texts", None)
        return fields


class DiTHead(nn.Module):
    """An output layer: modulated norm, then linear, zero at the start."""

    def __init__(self, width: int, out: int, *, rms: bool = False) -> None:
        """From `width` to `out` numbers per token; `rms`: which norm."""
        super().__init__()
        self.rms = rms
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return self.modulation, self.out

    def forward(self, h: Array, e: Array) -> Array:
        """h (b, tokens, width), e (b, width), already through its SiLU; returns (b, tokens, out)."""
        shift, scale = self.modulation(e).unsqueeze(1).chunk(2, -1)
        return self.out(modulated(h, shift, scale, rms=self.rms))


class Transformer(nn.Module):
    """The net of a `DiT` spec."""

    positions: Tensor  # waves, added to the tokens
    cos: Tensor  # rotary positions
    sin: Tensor

    def __init__(self, spec: DiT, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `DiT.build`."""
        super().__init__()
        width = spec.width
        channels, side, _ = shape
        patch_numbers = channels * spec.patch**2
        self.patch = spec.patch
        self.grid = side // spec.patch
        self.precondition: Precondition = spec.precondition
        self.preserved = spec.magnitude == "preserved"
        self.late = spec.late

        # patches and their positions
        self.embed = nn.Linear(patch_numbers, width)
        self.rotary = spec.modern
        self.position_width = width // spec.attention if self.rotary else width
        position_tables = self._make_positions(self.grid, self.grid)
        for name, table in zip(self.position_buffers, position_tables, strict=True):
            self.register_buffer(name, table, persistent=not self.rotary)

        # times, knobs and conditions
        summed = tuple(name for name in needs.shared if self.late is None or name != "r")
        self.scalars = Scalars(summed, width, spec.time_scale)
        self.own = HeadEmbeddings(needs, width, spec.time_scale)
        self.text = TextEmbedder(spec.texts.build(classes), width) if spec.texts else None
        self.label = label_table(classes, width) if classes and not self.text else None

        # blocks and heads
        if self.text:
            block_class = Cross
        elif self.preserved:
            block_class = Preserving
        else:
            block_class = Block
        sizes = BlockSizes(width, spec.attention, spec.modern, spec.qk_norm)
        self.blocks = nn.ModuleList(block_class(sizes) for _ in range(spec.depth))
        self.heads = nn.ModuleDict({name: DiTHead(width, patch_numbers, rms=spec.modern) for name in needs.heads})
        self.gauges = Gauges(needs, width, spec.time_scale) if needs.gauges else None
        self.gradient_checkpointing = bool(spec.checkpoint)
        make_lean(self.blocks, spec.checkpoint)
        self.route = spec.route
        if self.route:
            self.route.note(self.blocks)
        self._initialize()

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x, then the gauges, in the order of the needs."""
        shared, own = self.own(**inputs)
        x, to_output = framed(self.precondition, x, shared["t"])
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        h: Array = self.embed(self._patches(x, grid))
        places = self._positions(grid, x.device)
        if not self.rotary:  # rotary ones turn queries and keys
            h = h + places[0]
            places = ()
        if self.preserved:
            h = normalize(h, rms=True)
        text: tuple[Array | None, ...] = ()
        vector: Array | None = None
        if self.text is not None:
            vector, y, mask = self.text(c)
            text = (y, mask)
        elif self.label is not None:
            vector = self.label(c)
        conditions = [s if vector is None else s + vector for s in self._times(shared)]
        e = [F.silu(condition) for condition in conditions]  # of the first blocks, and with `late` of the others

        def step(i: int, block: nn.Module, h: Array, *places: Array) -> Array:
            condition = e[0] if self.late is None or i < self.late else e[-1]
            return run_lean(block, h, condition, *text, *places)

        split = self.route.split(*h.shape[:2]) if self.route and self.training else None
        h = run_blocks(self.blocks, h, places, step, split)
        outputs: list[Array] = []
        for name, head in self.heads.items():
            condition = F.silu(conditions[-1] + own[name]) if name in own else e[-1]
            outputs.append(to_output(self._image(head(h, condition), grid)))
        if self.gauges:
            outputs += self.gauges(**shared)
        return tuple(outputs)

    def _times(self, shared: dict[str, Time]) -> tuple[Array, ...]:
        """The embedding of times and knobs; with `late` also that of the last blocks, where r replaces t."""
        if self.late is None:
            return (self.scalars(**shared),)
        first = {name: number for name, number in shared.items() if name != "r"}
        return self.scalars(**first), self.scalars(**first | {"t": shared["r"]})

    def after_step(self) -> None:
        """Where magnitudes are preserved, scale rows back to length 1. Training calls it after each update."""
        if self.preserved:
            shorten(self)

    @property
    def position_buffers(self) -> tuple[str, ...]:
        """The buffers that hold positions on the grid that the net was built for."""
        return ("cos", "sin") if self.rotary else ("positions",)

    def _positions(self, grid: tuple[int, int], device: device) -> tuple[Tensor, ...]:
        """The positions on a grid, (tokens, numbers) each: those that are held, or of images in buckets its own."""
        if grid == (self.grid, self.grid):
            return tuple(self.get_buffer(name) for name in self.position_buffers)
        return self._make_positions(*grid, device)

    def _make_positions(self, rows: int, columns: int, device: device | None = None) -> tuple[Tensor, ...]:
        if self.rotary:
            return turns(rows, columns, self.position_width, device)
        return (grid_waves(rows, columns, self.position_width, device),)

    def _patches(self, x: Array, grid: tuple[int, int]) -> Array:
        """(b, ch, height, width) -> (b, tokens, ch p p)."""
        b, ch = x.shape[:2]
        rows, columns = grid
        p = self.patch
        return x.reshape(b, ch, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _image(self, y: Array, grid: tuple[int, int]) -> Array:
        """(b, tokens, ch p p) -> (b, ch, height, width)."""
        rows, columns = grid
        p = self.patch
        return y.view(y.shape[0], rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _initialize(self) -> None:
        """DiT's: Xavier for every linear layer of the trunk; modulations and heads zero."""
        for layer in (self.embed, *(m for m in self.blocks.modules() if isinstance(m, nn.Linear))):
            nn.init.xavier_uniform_(layer.weight)
            if not isinstance(layer, Unit):
                nn.init.zeros_(layer.bias)
        for module in (*self.blocks.modules(), *self.heads.modules()):
            if isinstance(module, Stream | DiTHead):
                for layer in module.zero_layers:
                    nn.init.zeros_(layer.weight)
                    nn.init.zeros_(layer.bias)
        self.after_step()


NAMES = {  # of facebookresearch/DiT and willisma/SiT, models.py
    r"x_embedder\.proj\.": "embed.",
    r"pos_embed$": "positions",
    r"t_embedder\.mlp\.": "scalars.embedders.t.",
    r"y_embedder\.embedding_table\.": "label.",
    r"blocks\.(\d+)\.adaLN_modulation\.1\.": r"blocks.\1.modulation.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"blocks.\1.qkv.",
    r"blocks\.(\d+)\.attn\.proj\.": r"blocks.\1.out.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"blocks.\1.up.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"blocks.\1.down.",
    r"final_layer\.adaLN_modulation\.1\.": "heads.v.modulation.",
    r"final_layer\.linear\.": "heads.v.out.",
}
DIFFUSERS = {  # names of its DiTTransformer2DModel, to the authors'
    r"pos_embed\.proj\.": "x_embedder.proj.",
    r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.": "y_embedder.",
    r"transformer_blocks\.(\d+)\.norm1\.linear\.": r"blocks.\1.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.attn1\.qkv\.": r"blocks.\1.attn.qkv.",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.": r"blocks.\1.attn.proj.",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"blocks.\1.mlp.fc1.",
    r"transformer_blocks\.(\d+)\.ff\.net\.2\.": r"blocks.\1.mlp.fc2.",
    r"proj_out_1\.": "final_layer.adaLN_modulation.1.",
    r"proj_out_2\.": "final_layer.linear.",
}
UNUSED = "projectors."  # of REPA: for its training loss alone


def our_name(name: str, names: Mapping[str, str] = NAMES) -> str | None:
    """Our name for a published one; None: our net has no such layer."""
    for pattern, ours in names.items():
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return None


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights under our names; those of layers that our net lacks are left out."""
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = our_name(name, names)
        if ours is not None:
            state[ours] = tensor
    return state


def of_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DiT as diffusers saves it, under its authors' names. Every block holds embeddings there, equal to the first's.

    Raises UserError where they differ.
    """
    for name, tensor in weights.items():
        name_in_first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
        if not equal(tensor, weights[name_in_first]):
            raise UserError(f"start.source: {name} is not {name_in_first}, and a DiT embeds once: take another one")
    fused = dict(weights)
    for query_name in weights:
        if ".attn1.to_q." in query_name:
            parts = [fused.pop(query_name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
            fused[query_name.replace("to_q", "qkv")] = cat(parts)
    return renamed(fused, DIFFUSERS)


def converted(weights: Mapping[str, Tensor], net: Transformer) -> dict[str, Tensor]:
    """The weights of a published SiT (Ma et al. 2024) or DiT under our names, for a net of time scale 1.

    From names that `our_name` knows. The trunks are the same function: patches, sinusoids, order of queries, keys and
    values, modulations. The weights absorb three differences:

    - SiT counts time from noise to data, s = 1 - t, and outputs dx/ds, so v(x_t, t) = -F(x_t, 1 - t). The sign goes
      into the last layer, and the time into the first layer of its embedding, by
      cos w(1 - t) = cos w cos wt + sin w sin wt,  sin w(1 - t) = sin w cos wt - cos w sin wt.
      REPA (Yu et al. 2025), whose files have the same names, counts time as we do.
    - The outputs of a patch have the order row, column, channel; here it is channel, row, column.
    - A learned sigma is the second half of the output channels; SiT's own forward pass drops it, and so do we.
    """
    state = renamed(weights, NAMES)
    state["embed.weight"] = state["embed.weight"].flatten(1)
    if "positions" in state:
        state["positions"] = state["positions"].squeeze(0)
    else:
        state["positions"] = net.positions  # fixed sinusoids
    channels = net.embed.in_features // net.patch**2
    for name in ("heads.v.out.weight", "heads.v.out.bias"):
        rows = state[name].unflatten(0, (net.patch, net.patch, -1))[:, :, :channels].movedim(2, 0).flatten(0, 2)
        state[name] = -rows
    first = "scalars.embedders.t.0.weight"
    of_cos, of_sin = state[first].double().chunk(2, 1)
    w = net.scalars.frequencies.double().to(of_cos.device)
    cos = w.cos()
    sin = w.sin()
    state[first] = cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], 1).to(state[first])
    return state
