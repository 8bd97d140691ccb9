"""Diffusion Transformer (Peebles & Xie 2023): patches, adaLN-zero blocks, one output layer per head (paper, Sec. 3.3).

The trunk is DiT's; each further head costs one more output layer with its own modulation: 2.7 M of XL/2's 675 M.
The options, all off, are those of later transformers, as LightningDiT (Yao et al. 2025) joins them.

`late` is Decoupled MeanFlow's (Lee et al. 2025, arXiv 2510.24474): so many blocks read x_t at t, and those after them
make of that the step to r. One embedding serves both times, so at r = t the net is one of a velocity alone, and may
begin as a trained one.
"""

from collections.abc import Callable, Sequence
from operator import not_
from typing import Any, Literal

from pydantic import Field, model_serializer
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.bound import BLOCKS, CHANNELS, FACTOR, PIXELS
from dumo.nets.block import Block, Mlp, Sizes, Stream
from dumo.nets.embed import Own, Scalars, grid_waves, label_table
from dumo.nets.head import Gauges, block_of
from dumo.nets.magnitude import Magnitude, Preserving, Unit, shorten
from dumo.nets.norm import Norm, modulated, normalize
from dumo.nets.precondition import Precondition, framed
from dumo.nets.reading import TextEmbedder, Way, blocks
from dumo.nets.rotary import turns
from dumo.nets.skip import Joined, joined, skips, through
from dumo.nets.text import Text
from dumo.types import Array, Cond, Heads, Needs, Sample, Spec, Time, UserError

PUBLISHED = {  # DiT's
    "precondition": "none",
    "norm": "layer",
    "qk_norm": False,
    "mlp": "gelu",
    "position": "waves",
    "skips": False,
    "magnitude": "free",
    "late": None,
}
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # DiT, Tab. 1


class DiT(Spec):
    """A DiT by its sizes. XL/2 is patch 2, width 1152, depth 28, attention 16, as it is; `size` names the others."""

    kind: Literal["dit"] = "dit"
    patch: int = Field(default=2, ge=1, le=PIXELS)
    width: int = Field(default=1152, ge=4, le=CHANNELS, multiple_of=4)
    depth: int = Field(default=28, ge=1, le=BLOCKS)
    attention: int = Field(default=16, ge=1, le=CHANNELS)  # attention heads
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)  # times enter raw (UCGM)
    precondition: Precondition = "none"  # of what goes into the layers and comes out of them; linear path only
    norm: Norm = "layer"  # before attention, perceptron and heads
    qk_norm: bool = False  # queries and keys to mean square 1, by weights of their own (Dehghani et al. 2023)
    mlp: Mlp = "gelu"  # swiglu: gated (Shazeer 2020), of as many parameters
    position: Literal["waves", "rope"] = "waves"  # added to the tokens, or turning queries and keys
    skips: bool = Field(default=False, exclude_if=not_)  # from a block to the one opposite it (`dumo.nets.skip`)
    # preserved: what enters and leaves a layer of the blocks has mean square 1 (`dumo.nets.magnitude`)
    magnitude: Magnitude = Field(default="free", exclude_if=lambda magnitude: magnitude == "free")
    # the blocks after this many, and the heads, are told r in the place of t; None: all of them both, as a sum
    late: int | None = Field(default=None, ge=1, le=BLOCKS, exclude_if=lambda late: late is None)
    aux_time: bool = False  # a second embedding of time, where the objective has but one: of the gap to r = 0
    texts: Text | None = None  # what the captions of the data are to the net; None: a class has a learned label
    text: Way = "cross"  # how blocks read texts: by attention of its own, or joint with the image's
    checkpoint: bool = False  # keep each block's input alone, and compute the rest again in the backward pass

    @classmethod
    def size(cls, name: str, **others: Any) -> "DiT":  # noqa: ANN401, any field
        """S, B, L or XL of DiT's Tab. 1, with `others` among the fields: `DiT.size("B", patch=4)`."""
        if name not in SIZES:
            raise UserError(f"there is no DiT of size '{name}': it is one of {', '.join(SIZES)}")
        return cls(**dict(zip(("width", "depth", "attention"), SIZES[name], strict=True)), **others)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Transformer":
        """A net with the inputs, heads and gauges of `needs` for square images of `shape`; 0 classes: no label.

        Raises UserError where the sizes do not fit one another or the images.
        """
        if len(shape) != 3 or shape[1] != shape[2]:
            raise UserError(f"net 'dit' takes square images, not samples of shape {shape}: use net.kind mlp")
        if shape[1] % self.patch:
            raise UserError(f"net.patch {self.patch} does not divide the image side {shape[1]}")
        if self.width % self.attention:
            raise UserError(f"net.attention {self.attention} does not divide net.width {self.width}")
        if self.position == "rope" and (size := self.width // self.attention) % 4:
            raise UserError(
                f"net.position rope needs attention heads of a multiple of 4 numbers, not net.width / net.attention = "
                f"{size}: change one of them, or use net.position=waves"
            )
        if self.skips and not skips(self.depth):
            raise UserError(
                f"net.skips needs net.depth of at least 3, not {self.depth}: make it deeper, or use net.skips=false"
            )
        if self.late is not None and ("r" not in needs.inputs or self.late >= self.depth):
            raise UserError(
                f"net.late {self.late} is after how many blocks the others are told r: set it below net.depth = "
                f"{self.depth}, with an objective that tells all heads r, such as meanflow, or set net.late=null"
            )
        if self.magnitude == "preserved" and self.texts:
            raise UserError(
                "net.magnitude preserved has no blocks that read texts: use net.magnitude=free, or net.texts=null"
            )
        return Transformer(self, needs, shape, classes)

    @model_serializer(mode="wrap")
    def _told(self, tell: Callable[["DiT"], dict[str, Any]]) -> dict[str, Any]:
        """How texts are read where there are some."""
        tree = tell(self)
        return tree if self.texts else {name: value for name, value in tree.items() if name not in ("texts", "text")}


class Head(nn.Module):
    """An output layer: modulated norm, then linear, zero at the start."""

    def __init__(self, width: int, out: int, norm: Norm = "layer") -> None:
        """From `width` to `out` numbers per token."""
        super().__init__()
        self.norm: Norm = norm
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, out)

    @property
    def silent(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return self.modulation, self.out

    def forward(self, h: Array, e: Array) -> Array:
        """h (b, tokens, width), e (b, width), already through its SiLU; returns (b, tokens, out)."""
        shift, scale = self.modulation(e).unsqueeze(1).chunk(2, -1)
        return self.out(modulated(h, self.norm, shift, scale))


class Transformer(nn.Module):
    """The net of a `DiT` spec."""

    positions: Tensor  # of waves
    cos: Tensor  # of rope
    sin: Tensor

    def __init__(self, spec: DiT, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `DiT.build`."""
        super().__init__()
        width, (channels, side, _) = spec.width, shape
        self.patch, self.grid = spec.patch, side // spec.patch
        self.embed = nn.Linear(channels * spec.patch**2, width)
        self.precondition: Precondition = spec.precondition
        self.preserved = spec.magnitude == "preserved"
        self.rope = spec.position == "rope"
        if self.rope:
            for name, table in zip(("cos", "sin"), turns(self.grid, width // spec.attention), strict=True):
                self.register_buffer(name, table, persistent=False)
        else:
            self.register_buffer("positions", grid_waves(self.grid, width))
        self.late = spec.late
        one = tuple(name for name in needs.shared if self.late is None or name != "r")
        self.scalars = Scalars(one, width, spec.time_scale, aux=spec.aux_time and self.late is None)
        self.own = Own(needs, width, spec.time_scale)
        self.text = TextEmbedder(spec.texts.build(classes), width, spec.text) if spec.texts else None
        self.label = label_table(classes, width) if classes and not self.text else None
        self.blocks = nn.ModuleList(self._blocks(spec))
        self.heads = nn.ModuleDict({name: Head(width, channels * spec.patch**2, spec.norm) for name in needs.heads})
        self.gauges = Gauges(needs, width, spec.time_scale) if needs.gauges else None
        self.inside = block_of(needs, spec.depth)
        self.gradient_checkpointing = spec.checkpoint
        self._initialize()

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x, then the gauges, in the order of the needs, and what is inside."""
        shared, own = self.own(**inputs)
        x, out = framed(self.precondition, x, shared["t"])
        h: Array = self.embed(self._patches(x))
        places = (self.cos, self.sin) if self.rope else ()
        h = h if self.rope else h + self.positions
        h = normalize(h, "rms") if self.preserved else h
        more: tuple[Array | None, ...] = ()
        vector: Array | None = None
        if self.text is not None:
            h, vector, more = self.text(h, c)
        elif self.label is not None:
            vector = self.label(c)
        told = [s if vector is None else s + vector for s in self._times(shared)]
        e, last = [F.silu(s) for s in told], told[-1]
        blocks, lean, then = [*self.blocks], self.gradient_checkpointing, (self.late, e[-1])
        h, inside = through(blocks, h, e[0], *more, *places, lean=lean, shown=self.inside, then=then)
        own = {k: F.silu(last + own[k]) if k in own else e[-1] for k in self.heads}
        heads = (out(self._image(head(h, own[k]))) for k, head in self.heads.items())
        return *heads, *(self.gauges(**shared) if self.gauges else ()), *inside

    def _times(self, shared: dict[str, Time]) -> tuple[Array, ...]:
        """The condition of times and knobs; with `late` that of the last blocks, too, in which r stands for t."""
        if self.late is None:
            return (self.scalars(**shared),)
        first = {name: number for name, number in shared.items() if name != "r"}
        return self.scalars(**first), self.scalars(**first | {"t": shared["r"]})

    def after_step(self) -> None:
        """Where magnitudes are preserved, make rows as long as they are used. Training calls it after each update."""
        if self.preserved:
            shorten(self)

    def _blocks(self, spec: DiT) -> Sequence[nn.Module]:
        sizes = Sizes(spec.width, spec.attention, spec.norm, spec.qk_norm, spec.mlp)
        plain, linear = (Preserving, Unit) if self.preserved else (Block, nn.Linear)
        made = (
            blocks(spec.text, spec.depth, sizes, self.grid**2)
            if self.text
            else [plain(sizes) for _ in range(spec.depth)]
        )
        return joined(made, linear, spec.width) if spec.skips else made

    def _patches(self, x: Array) -> Array:
        """(b, ch, side, side) -> (b, tokens, ch p p)."""
        b, ch, g, p = x.shape[0], x.shape[1], self.grid, self.patch
        return x.reshape(b, ch, g, p, g, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _image(self, y: Array) -> Array:
        """(b, tokens, ch p p) -> (b, ch, side, side)."""
        b, g, p = y.shape[0], self.grid, self.patch
        return y.view(b, g, g, -1, p, p).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _initialize(self) -> None:
        """DiT's: Xavier for every linear layer of the trunk; modulations and heads zero, and skips not there."""
        for layer in (self.embed, *(m for m in self.blocks.modules() if isinstance(m, nn.Linear))):
            nn.init.xavier_uniform_(layer.weight)
            if not isinstance(layer, Unit):
                nn.init.zeros_(layer.bias)
        modules = (*self.blocks.modules(), *self.heads.modules())
        for layer in (layer for m in modules if isinstance(m, Stream | Head) for layer in m.silent):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in (block for block in self.blocks if isinstance(block, Joined)):
            block.start()
        self.after_step()
