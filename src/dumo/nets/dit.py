"""Diffusion Transformer (Peebles & Xie 2023): patches, adaLN-zero blocks, one output layer per head (paper, Sec. 3.3).

The trunk is DiT's; each further head costs one more output layer with its own modulation: 2.7 M of XL/2's 675 M.

`DiT` is the spec, and `DiT.size` gives the published sizes by name. `DiT.build` makes the module, a `Transformer`. The
order of events in a pass (`Transformer.forward`):

1. The image is scaled (`dumo.nets.precondition`), cut into patches and embedded: h, one token per patch.
2. Positions are added to h, or are rotary tables for the attention of every block.
3. Times, knobs and the class or text are summed to an embedding. What layers read is its SiLU, the condition.
4. The blocks (`dumo.nets.block`) change h. Some tokens may skip some of them in training (`dumo.nets.route`).
5. Each head makes an image of h.

With `late`, as in Decoupled MeanFlow (Lee et al. 2025, arXiv 2510.24474), the first blocks read x_t at time t. The late
blocks and the heads read r in its place, and turn that into the step to r. One embedding serves both times, so at r = t
the net computes a velocity alone, and can start from a trained one.

The names of a `Transformer`'s modules and buffers are those in checkpoints, so a rename breaks runs. Published weights
are converted in `dumo.nets.dit_convert`.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.nets.block import Block, BlockSizes, Stream, normalize, normalize_and_modulate
from dumo.nets.checkpointing import Checkpointing, mark_recomputed, run_as_marked
from dumo.nets.embed import Gauges, HeadEmbeddings, Scalars, grid_waves, label_table, rotary_tables, side_of
from dumo.nets.magnitude import Magnitude, MagnitudePreservingBlock, UnitRowLinear, normalize_rows
from dumo.nets.precondition import Precondition, apply_precondition
from dumo.nets.route import Route
from dumo.nets.text_spec import Text
from dumo.nets.textblock import TextBlock, TextEmbedder
from dumo.runtime.limits import BLOCKS, CHANNELS, FACTOR, PIXELS
from dumo.types import QUIET, Array, Cond, Heads, Needs, Sample, Spec, Time, UserError

# width, depth and attention heads (DiT, Tab. 1)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class DiT(Spec):
    """The sizes and options of a DiT. The defaults are those of XL/2; `DiT.size` gives others by name."""

    kind: Literal["dit"] = "dit"
    # Callers ask every net's spec for these two. A DiT reads no numbers of an augmentation, and takes no adapters.
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None

    # sizes
    patch: int = Field(default=2, ge=1, le=PIXELS)  # side of a patch
    width: int = Field(default=1152, ge=4, le=CHANNELS, multiple_of=4)  # numbers of a token
    depth: int = Field(default=28, ge=1, le=BLOCKS)  # number of blocks
    attention: int = Field(default=16, ge=1, le=CHANNELS)  # number of attention heads

    # inputs and outputs
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)  # times enter raw (UCGM)
    precondition: Precondition = "none"  # scales what layers read and give; linear path only

    # layers of a block (`dumo.nets.block`)
    modern: bool = False  # RMS norms, query and key norms, SwiGLU, rotary positions: LightningDiT
    qk_norm: bool = False  # query and key norms alone, as SD3: for long texts
    # preserved: inputs and outputs of a block's layers have mean square 1
    magnitude: Magnitude = Field(default="free", exclude_if=lambda magnitude: magnitude == "free")

    # The blocks after this many are late: they and the heads read r in place of t. None: all blocks read both, summed.
    late: int | None = Field(default=None, ge=1, le=BLOCKS, exclude_if=lambda late: late is None)
    # Some tokens skip the middle blocks in training. None: all tokens go through all blocks.
    route: Route | None = Field(default=None, exclude_if=lambda route: route is None)
    # The embeddings of the data's captions. None: a class has a learned label.
    texts: Text | None = Field(default=None, exclude_if=lambda texts: texts is None)

    # Activation checkpointing: a block keeps its input alone, and computes the rest again in the backward pass.
    checkpoint: Checkpointing = Field(default=False, json_schema_extra=QUIET)

    @classmethod
    def size(cls, name: str, **fields: Any) -> "DiT":  # noqa: ANN401, any field
        """Return the DiT of size S, B, L or XL (DiT, Tab. 1), with other fields as given: `DiT.size("B", patch=4)`.

        Raises UserError for another name.
        """
        if name not in SIZES:
            raise UserError(f"there is no DiT of size '{name}': it is one of {', '.join(SIZES)}")
        width, depth, attention = SIZES[name]
        return cls(width=width, depth=depth, attention=attention, **fields)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Transformer":
        """Make a net with the inputs, heads and gauges of `needs` for square images of `shape`, (channels, side, side).

        With 0 classes it reads no label. Raises UserError where the sizes do not fit one another or the images.
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


class DiTHead(nn.Module):
    """The output layer of one head: a modulated norm, then a linear layer. It gives zeros at the start."""

    def __init__(self, width: int, out: int, *, rms: bool) -> None:
        """Map `width` numbers per token to `out`. The norm is an RMS norm with `rms`, else a layer norm."""
        super().__init__()
        self.rms = rms
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return self.modulation, self.out

    def forward(self, h: Array, condition: Array) -> Array:
        """Take h (b, tokens, width) and the condition (b, width), and return (b, tokens, out)."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        return self.out(normalize_and_modulate(h, shift, scale, rms=self.rms))


class Transformer(nn.Module):
    """The net of a `DiT` spec."""

    # buffers, for the grid that the net was built for: `positions`, or both of the others
    positions: Tensor  # (tokens, width), added to the tokens
    cos: Tensor  # (tokens, size of an attention head / 2), rotary
    sin: Tensor

    def __init__(self, spec: DiT, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `DiT.build`."""
        super().__init__()
        width = spec.width
        channels, side, _ = shape
        patch_dim = channels * spec.patch**2  # numbers of a patch
        self.patch = spec.patch
        self.grid = side // spec.patch
        self.precondition: Precondition = spec.precondition
        self.preserved = spec.magnitude == "preserved"
        self.has_late_blocks = spec.late is not None
        self.first_late_block = spec.depth if spec.late is None else spec.late

        # patches and their positions
        self.embed = nn.Linear(patch_dim, width)
        self.rotary = spec.modern
        self.position_width = width // spec.attention if self.rotary else width
        position_tables = self._make_position_tables(self.grid, self.grid)
        for name, table in zip(self._position_buffers, position_tables, strict=True):
            self.register_buffer(name, table, persistent=not self.rotary)

        # times, knobs and conditions
        embedded_names = needs.shared
        if self.has_late_blocks:  # r goes through the embedding of t
            embedded_names = tuple(name for name in needs.shared if name != "r")
        self.scalars = Scalars(embedded_names, width, spec.time_scale)
        self.own = HeadEmbeddings(needs, width, spec.time_scale)
        self.text: nn.Module | None = None
        block_class = MagnitudePreservingBlock if self.preserved else Block
        if spec.texts:
            self.text = TextEmbedder(spec.texts.build(classes), width)
            block_class = TextBlock
        self.label = label_table(classes, width) if classes and not self.text else None

        # blocks and heads
        block_sizes = BlockSizes(width, spec.attention, modern=spec.modern, qk_norm=spec.qk_norm)
        self.blocks = nn.ModuleList(block_class(block_sizes) for _ in range(spec.depth))
        self.heads = nn.ModuleDict({name: DiTHead(width, patch_dim, rms=spec.modern) for name in needs.heads})
        self.gauges = Gauges(needs, width, spec.time_scale) if needs.gauges else None
        self.gradient_checkpointing = bool(spec.checkpoint)
        mark_recomputed(self.blocks, spec.checkpoint)
        self.route = spec.route
        if self.route:
            self.route.mark_blocks(self.blocks)
        self._initialize()

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x (b, channels, height, width), then the gauges, (b,), in the needs' order.

        c is (b,), and so is each of the inputs that the needs name. Raises TypeError for other inputs.
        """
        shared_inputs, head_embeddings = self.own(**inputs)

        # tokens and their positions
        x, to_output = apply_precondition(self.precondition, x, shared_inputs["t"])
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        h: Array = self.embed(self._cut_patches(x, grid))
        position_tables = self._position_tables(grid, x.device)
        block_tables: tuple[Tensor, ...] = ()
        if self.rotary:
            block_tables = position_tables  # they turn the queries and keys of every block
        else:
            h = h + position_tables[0]
        if self.preserved:
            h = normalize(h, rms=True)

        # the condition: of times, knobs, and a class or text
        text_inputs: tuple[Array | None, ...] = ()  # of every block
        class_or_text_embedding: Array | None = None
        if self.text is not None:
            class_or_text_embedding, text_tokens, text_mask = self.text(c)
            text_inputs = (text_tokens, text_mask)
        elif self.label is not None:
            class_or_text_embedding = self.label(c)
        embedding, late_embedding = self._embed_condition(shared_inputs, class_or_text_embedding)
        condition = F.silu(embedding)
        late_condition = F.silu(late_embedding) if self.has_late_blocks else condition

        # blocks
        def run_block(i: int, block: nn.Module, h: Array, *tables: Array) -> Array:
            block_condition = condition if i < self.first_late_block else late_condition
            return run_as_marked(block, h, block_condition, *text_inputs, *tables)

        split = None
        if self.route and self.training:
            split = self.route.draw_split(*h.shape[:2])
        if split:
            h = split.run_blocks(self.blocks, h, block_tables, run_block)
        else:
            for i, block in enumerate(self.blocks):
                h = run_block(i, block, h, *block_tables)

        # heads
        outputs: list[Array] = []
        for name, head in self.heads.items():
            head_condition = late_condition
            if name in head_embeddings:
                head_condition = F.silu(late_embedding + head_embeddings[name])
            outputs.append(to_output(self._join_patches(head(h, head_condition), grid)))
        if self.gauges:
            outputs += self.gauges(**shared_inputs)
        return tuple(outputs)

    def _embed_condition(
        self, shared_inputs: dict[str, Time], class_or_text_embedding: Array | None
    ) -> tuple[Array, Array]:
        """Sum the embeddings of times, knobs and class or text: for the first blocks, and for late blocks and heads.

        Both sums are (b, width). Without late blocks they are one tensor. Else the first is of t and not of r, and the
        second is of r in place of t.
        """
        if not self.has_late_blocks:
            embedding = self.scalars(**shared_inputs)
            if class_or_text_embedding is not None:
                embedding = embedding + class_or_text_embedding
            return embedding, embedding
        early_inputs = {name: number for name, number in shared_inputs.items() if name != "r"}
        late_inputs = early_inputs | {"t": shared_inputs["r"]}
        embedding = self.scalars(**early_inputs)
        late_embedding = self.scalars(**late_inputs)
        if class_or_text_embedding is not None:
            embedding = embedding + class_or_text_embedding
            late_embedding = late_embedding + class_or_text_embedding
        return embedding, late_embedding

    def normalize_weights(self) -> None:
        """Scale rows back to length 1, where magnitudes are preserved. Training calls this after each update."""
        if self.preserved:
            normalize_rows(self)

    @property
    def _position_buffers(self) -> tuple[str, ...]:
        """The names of the buffers with the positions of the grid that the net was built for."""
        return ("cos", "sin") if self.rotary else ("positions",)

    def _position_tables(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Return the position tables of a grid, (tokens, numbers) each: the buffers, or new ones for another grid.

        Images in buckets have grids of several shapes.
        """
        if grid == (self.grid, self.grid):
            return tuple(self.get_buffer(name) for name in self._position_buffers)
        return self._make_position_tables(*grid, device)

    def _make_position_tables(self, rows: int, columns: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """Make the cosines and sines of rotary positions, or one table of waves, of (tokens, numbers) each."""
        if self.rotary:
            return rotary_tables(rows, columns, self.position_width, device)
        return (grid_waves(rows, columns, self.position_width, device),)

    def _cut_patches(self, x: Array, grid: tuple[int, int]) -> Array:
        """Cut images (b, ch, height, width) into patches of p x p, (b, tokens, ch p p)."""
        b, ch = x.shape[:2]
        rows, columns = grid
        p = self.patch
        return x.reshape(b, ch, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _join_patches(self, y: Array, grid: tuple[int, int]) -> Array:
        """Join patches (b, tokens, ch p p) to images (b, ch, height, width)."""
        rows, columns = grid
        p = self.patch
        return y.view(y.shape[0], rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _initialize(self) -> None:
        """Initialize as DiT does: Xavier for every linear layer of the trunk, zero for modulations and heads."""
        trunk_layers = [self.embed]
        trunk_layers += [layer for layer in self.blocks.modules() if isinstance(layer, nn.Linear)]
        for layer in trunk_layers:
            nn.init.xavier_uniform_(layer.weight)
            if not isinstance(layer, UnitRowLinear):
                nn.init.zeros_(layer.bias)
        for module in (*self.blocks.modules(), *self.heads.modules()):
            if isinstance(module, Stream | DiTHead):
                for layer in module.zero_layers:
                    nn.init.zeros_(layer.weight)
                    nn.init.zeros_(layer.bias)
        self.normalize_weights()
