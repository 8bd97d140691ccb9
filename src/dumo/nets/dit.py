"""Diffusion Transformer (Peebles & Xie 2023): patches, adaLN-zero blocks, one output layer per head (paper, Sec. 3.3).

The trunk is DiT's; each additional head is an output layer with its own modulation: 2.7 M of XL/2's 675 M parameters.

`DiT` is the spec, `DiT.size` returns the published sizes, and `DiT.build` creates the module, a `Transformer`. Its
forward pass:

1. Scale the image (`dumo.nets.precondition`), split it into patches and embed them: h, one token per patch.
2. Add positions to h, or compute rotary tables for the attention of every block.
3. Sum the embeddings of times, knobs and class or text. Its SiLU is the condition of all layers.
4. Run the blocks (`dumo.nets.block`). In training, some tokens may skip some blocks (`dumo.nets.route`).
5. Compute an image from h for each head.

With `late`, as in Decoupled MeanFlow (Lee et al. 2025, arXiv 2510.24474), the first blocks get the time t, and the late
blocks and the heads get r instead. Both times use one embedding, so at r = t the network is a velocity model, and can
be initialized from one.

The names of a `Transformer`'s modules and buffers are the keys in checkpoints, so renaming them breaks runs.
`dumo.nets.dit_convert` converts published weights.
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

# Width, depth and attention heads (DiT, Tab. 1).
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class DiT(Spec):
    """The sizes and options of a DiT, by default those of XL/2. `DiT.size` returns other published sizes."""

    kind: Literal["dit"] = "dit"
    # Attributes of every network spec: DiT has no augmentation inputs and no adapters.
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None

    # The side of a patch, the channels of a token, and the numbers of blocks and attention heads.
    patch: int = Field(default=2, ge=1, le=PIXELS)
    width: int = Field(default=1152, ge=4, le=CHANNELS, multiple_of=4)
    depth: int = Field(default=28, ge=1, le=BLOCKS)
    attention: int = Field(default=16, ge=1, le=CHANNELS)

    # By default, times are not scaled (UCGM).
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)
    # Scaling of the inputs and outputs of the layers; linear path only.
    precondition: Precondition = "none"

    # RMS norms, query and key norms, SwiGLU and rotary positions, as LightningDiT.
    modern: bool = False
    # Query and key norms without the rest of `modern`, as SD3, for long texts.
    qk_norm: bool = False
    # With "preserved", inputs and outputs of a block's layers have mean square 1.
    magnitude: Magnitude = Field(default="free", exclude_if=lambda magnitude: magnitude == "free")

    # Blocks after this many, and the heads, get r instead of t. None gives all blocks the sum of both embeddings.
    late: int | None = Field(default=None, ge=1, le=BLOCKS, exclude_if=lambda late: late is None)
    # Token routing in training: some tokens skip the middle blocks. None disables it.
    route: Route | None = Field(default=None, exclude_if=lambda route: route is None)
    # The embeddings of the data's captions. None uses a learned embedding of the class.
    texts: Text | None = Field(default=None, exclude_if=lambda texts: texts is None)

    # Activation checkpointing of blocks.
    checkpoint: Checkpointing = Field(default=False, json_schema_extra=QUIET)

    @classmethod
    def size(cls, name: str, **fields: Any) -> "DiT":  # noqa: ANN401, any field
        """Return the DiT of size S, B, L or XL (DiT, Tab. 1), with other fields as given: `DiT.size("B", patch=4)`.

        Raises UserError for another name.
        """
        if name not in SIZES:
            raise UserError(f"unknown DiT size '{name}': use one of {', '.join(SIZES)}")
        width, depth, attention = SIZES[name]
        return cls(width=width, depth=depth, attention=attention, **fields)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Transformer":
        """Create the network with the inputs, heads and gauges of `needs` for images (channels, side, side).

        With 0 classes it has no label. Raises UserError if sizes are not compatible.
        """
        side = side_of(shape, self.kind)
        if side % self.patch:
            raise UserError(f"net.patch = {self.patch} must divide the image side {side}: change it")
        if self.width % self.attention:
            raise UserError(f"net.attention = {self.attention} must divide net.width = {self.width}: change one")
        head_width = self.width // self.attention
        if self.modern and head_width % 4:
            raise UserError(
                f"net.modern needs a net.width / net.attention that is a multiple of 4, got {head_width}: change "
                "one, or set net.modern=false"
            )
        if self.late is not None and ("r" not in needs.inputs or self.late >= self.depth):
            raise UserError(
                f"net.late = {self.late} must be less than net.depth = {self.depth}, and all heads of the objective "
                "must have the input r: change net.late, use objective meanflow, or set net.late=null"
            )
        if self.magnitude == "preserved" and self.texts:
            raise UserError("net.magnitude=preserved does not support texts: set net.magnitude=free, or net.texts=null")
        return Transformer(self, needs, shape, classes)


class DiTHead(nn.Module):
    """The output layer of one head: a modulated norm and a linear layer, initialized to output zeros."""

    def __init__(self, width: int, out: int, *, rms: bool) -> None:
        """Map `width` channels per token to `out`, with an RMS norm if `rms`, and otherwise a layer norm."""
        super().__init__()
        self.rms = rms
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """The layers that are initialized to zero."""
        return self.modulation, self.out

    def forward(self, h: Array, condition: Array) -> Array:
        """Take h (b, tokens, width) and the condition (b, width), and return (b, tokens, out)."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        return self.out(normalize_and_modulate(h, shift, scale, rms=self.rms))


class Transformer(nn.Module):
    """The network of a `DiT` spec.

    Its buffers are the positions of the grid that it was built for: either `positions` (tokens, width), which are added
    to the tokens, or the rotary tables `cos` and `sin` (tokens, size / 2).
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, spec: DiT, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `DiT.build`."""
        super().__init__()
        width = spec.width
        channels, side, _ = shape
        patch_dim = channels * spec.patch**2
        self.patch = spec.patch
        self.grid = side // spec.patch
        self.precondition: Precondition = spec.precondition
        self.preserved = spec.magnitude == "preserved"
        self.has_late_blocks = spec.late is not None
        self.first_late_block = spec.depth if spec.late is None else spec.late

        # Build the embedding of patches, and their positions.
        self.embed = nn.Linear(patch_dim, width)
        self.rotary = spec.modern
        self.position_width = width // spec.attention if self.rotary else width
        position_tables = self._make_position_tables(self.grid, self.grid)
        for name, table in zip(self._position_buffers, position_tables, strict=True):
            self.register_buffer(name, table, persistent=not self.rotary)

        # Build the embeddings of times, knobs and conditions. With late blocks, r uses the embedding of t.
        embedded_names = needs.shared
        if self.has_late_blocks:
            embedded_names = tuple(name for name in needs.shared if name != "r")
        self.scalars = Scalars(embedded_names, width, spec.time_scale)
        self.own = HeadEmbeddings(needs, width, spec.time_scale)
        self.text: nn.Module | None = None
        block_class = MagnitudePreservingBlock if self.preserved else Block
        if spec.texts:
            self.text = TextEmbedder(spec.texts.build(classes), width)
            block_class = TextBlock
        self.label = label_table(classes, width) if classes and not self.text else None

        # Build blocks and heads.
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

        c and each of the inputs that the needs name are (b,). Raises TypeError for other inputs.
        """
        shared_inputs, head_embeddings = self.own(**inputs)

        # Embed the patches and their positions. Rotary tables are inputs of every block.
        x, to_output = apply_precondition(self.precondition, x, shared_inputs["t"])
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        h: Array = self.embed(self._cut_patches(x, grid))
        position_tables = self._position_tables(grid, x.device)
        block_tables: tuple[Tensor, ...] = ()
        if self.rotary:
            block_tables = position_tables
        else:
            h = h + position_tables[0]
        if self.preserved:
            h = normalize(h, rms=True)

        # Compute the condition from times, knobs, and a class or text.
        text_inputs: tuple[Array | None, ...] = ()
        class_or_text_embedding: Array | None = None
        if self.text is not None:
            class_or_text_embedding, text_tokens, text_mask = self.text(c)
            text_inputs = (text_tokens, text_mask)
        elif self.label is not None:
            class_or_text_embedding = self.label(c)
        embedding, late_embedding = self._embed_condition(shared_inputs, class_or_text_embedding)
        condition = F.silu(embedding)
        late_condition = F.silu(late_embedding) if self.has_late_blocks else condition

        # Run the blocks.
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

        # Compute the heads.
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
        """Sum the embeddings of times, knobs and class or text, for the first blocks and for late blocks and heads.

        Both sums are (b, width). With late blocks, the first contains t and not r, and the second r instead of t;
        otherwise they are equal.
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
        """Normalize rows to length 1 if magnitudes are preserved. Training calls this after each update."""
        if self.preserved:
            normalize_rows(self)

    @property
    def _position_buffers(self) -> tuple[str, ...]:
        """The names of the position buffers."""
        return ("cos", "sin") if self.rotary else ("positions",)

    def _position_tables(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Return the position tables of a grid, (tokens, channels) each: the buffers, or new ones for another grid."""
        if grid == (self.grid, self.grid):
            return tuple(self.get_buffer(name) for name in self._position_buffers)
        return self._make_position_tables(*grid, device)

    def _make_position_tables(self, rows: int, columns: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """Compute the cosines and sines of rotary positions, or one table of waves, (tokens, channels) each."""
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
        """Initialize as DiT: Xavier for linear layers of the trunk, zero for modulations and heads."""
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
