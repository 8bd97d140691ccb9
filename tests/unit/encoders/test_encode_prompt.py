"""Rows of text against their oracle: what the transformer of the stock `__call__` receives, to the bit."""

import copy
import inspect
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dumo.encoders.encode_prompt import PromptReaderSpec, encode_prompt_arguments
from dumo.encoders.pipeline_folder import TRANSFORMER, Pipeline
from dumo.encoders.textcache import StoredRow, fill_cache, find_rows, open_tables
from dumo.export.stock import PIPELINE_BY_CLASS, PIPELINE_BY_MODEL
from dumo.nets.family import FAMILIES, VARIANTS, find_family
from dumo.nets.text_spec import PipelineTexts
from dumo.types import UserError
from pipelines import PIPELINES, SIDE, save
from tiers import tiered

pytestmark = [  # diffusers', of its own code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* captions are cut:UserWarning"),  # LONG
]
SHORT, LONG = (
    "a red fox in the snow",
    "a long story of a fox, " * 60,
)  # more tokens, bytes here, than any pipeline reads
QUICK = ("SD3", "SANA", "Qwen-Image", "Z-Image")
SOME = tiered(PIPELINES, now=QUICK[:1], ci=QUICK)
Received = dict[str, Tensor]  # tokens (l, d), without those that a mask hides; pooled (p,)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pipelines are."""
    return tmp_path_factory.mktemp("pipelines")


def saved(place: Path, name: str) -> Pipeline:
    """A tiny pipeline, saved once."""
    return Pipeline(source=str(place / name if (place / name).exists() else save(name, place / name)))


def texts(pipeline: Pipeline, root: Path) -> PipelineTexts:
    """The texts of a run with this pipeline."""
    return PipelineTexts(root=str(root), dtype="float32").within(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_rows_are_what_the_stock_transformer_receives(name: str, place: Path, tmp_path: Path) -> None:
    pipeline = saved(place, name)
    spec = texts(pipeline, tmp_path / "texts")
    captions = [SHORT, LONG, "a dog"]
    fill_cache(tmp_path / "texts", [*captions, ""], spec.reader_spec)
    (table,) = open_tables(tmp_path / "texts")
    rows = [row_of(table.row(k), spec) for k in find_rows([table], [*captions, ""])[:, 1].tolist()]
    assert not torch.equal(rows[0]["tokens"], rows[2]["tokens"])
    stock = Stock(pipeline)
    for text, row in zip(captions, rows, strict=False):
        assert_same(row, stock.unguided(text))
    found = stock.guided(SHORT)
    assert any(same(rows[0], one) for one in found), "the prompt's own"
    assert any(same(rows[-1], one) for one in found), "that of no prompt"
    assert max(len(row["tokens"]) for row in rows) <= spec.family.max_text_tokens


def row_of(row: StoredRow, spec: PipelineTexts) -> Received:
    """A row of the cache."""
    if spec.family.adds_mask:
        return {"tokens": row["tokens"], "mask": row["mask"].float()}
    return row


def same(a: Received, b: Received) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)


def assert_same(mine: Received, theirs: Received) -> None:
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].shape == theirs[key].shape
        assert torch.equal(mine[key], theirs[key]), float((mine[key] - theirs[key]).abs().max())


class Stock:
    """The stock pipeline of a folder, and what its transformer receives."""

    def __init__(self, pipeline: Pipeline) -> None:
        from diffusers import DiffusionPipeline, LCMScheduler

        self.pipe: Any = DiffusionPipeline.from_pretrained(pipeline.folder)
        if pipeline.class_name == "PixArtAlphaPipeline":  # in one step it fails with its own
            self.pipe.scheduler = LCMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        config = pipeline.config(TRANSFORMER)
        self.family = find_family(config, pipeline.class_name)
        self.stock = PIPELINE_BY_CLASS.get(pipeline.class_name) or PIPELINE_BY_MODEL[config["_class_name"]]
        self.model: Any = getattr(self.pipe, pipeline.model_part)

    def unguided(self, text: str) -> Received:
        """Of a pass without guidance."""
        off = {self.stock.guide_argument: self.stock.unguided_scale} if self.stock.guide_argument else {}
        (found,) = self.calls(text, **off)
        return found

    def guided(self, text: str) -> list[Received]:
        """Of a guided pass, with the defaults of the pipeline; where it is not guided, of one for no text."""
        if self.stock.guide_argument is None:
            return [*self.calls(text), *self.calls("")]
        return [
            *self.calls(
                text,
                **{self.stock.guide_argument: 4.0},
                **{"negative_prompt": ""} if self.stock.cfg_needs_negative_prompt else {},
            )
        ]

    def calls(self, text: str, **more: Any) -> Iterator[Received]:  # noqa: ANN401
        """What comes with each row of each pass."""
        passes, forward = list[dict[str, Any]](), self.model.forward
        takes = inspect.signature(forward)

        def recorded(*args: Any, **given: Any) -> Any:  # noqa: ANN401
            passes.append(dict(takes.bind(*args, **given).arguments))
            return forward(*args, **given)

        self.model.forward = recorded
        words = {"num_frames": 1} if "num_frames" in inspect.signature(self.pipe.__call__).parameters else {}
        words |= {word.split("=")[0]: False for word in self.stock.extra_arguments if word.endswith("False")}
        self.pipe(prompt=text, height=SIDE, width=SIDE, num_inference_steps=1, **words, **more)
        self.model.forward = forward
        for one in passes:
            yield from self.rows(one)

    def rows(self, given: dict[str, Any]) -> Iterator[Received]:
        """The rows of a pass."""
        tokens = given.get("encoder_hidden_states", given.get("cap_feats"))
        names = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
        mask = next((given[name] for name in names if given.get(name) is not None), None)
        for i, row in enumerate(tokens):
            if self.family.adds_mask:
                assert mask is not None
                yield {"tokens": row, "mask": mask[i][: len(row)]}
                continue
            found = {"tokens": row if mask is None else row[mask[i].bool()[: len(row)]]}
            pooled = given.get("pooled_projections", (given.get("added_cond_kwargs") or {}).get("text_embeds"))
            yield found | ({} if pooled is None else {"pooled": pooled[i]})


def test_the_defaults_are_those_of_the_call() -> None:
    """encode_prompt has others of its own."""
    import diffusers

    assert encode_prompt_arguments(diffusers.QwenImagePipeline)["max_sequence_length"] == 512
    assert (
        inspect.signature(diffusers.QwenImagePipeline.encode_prompt).parameters["max_sequence_length"].default == 1024
    )
    assert encode_prompt_arguments(diffusers.WanPipeline)["max_sequence_length"] == 512
    assert "Enhanced prompt" in encode_prompt_arguments(diffusers.SanaPipeline)["complex_human_instruction"][0]


@pytest.mark.parametrize("row", [*FAMILIES.values(), *VARIANTS], ids=lambda row: row.pipeline)
def test_a_family_says_how_many_tokens_its_pipeline_reads_at_most(row: Any) -> None:  # noqa: ANN401
    import diffusers

    kind = getattr(diffusers, row.pipeline)
    most = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    if most is not None:
        assert row.max_text_tokens == most.default + 77 * (kind is diffusers.StableDiffusion3Pipeline)


@pytest.mark.parametrize("name", SOME)
def test_a_family_says_the_size_of_its_pipelines_image(name: str, place: Path) -> None:
    pipeline = saved(place, name)
    pipe, config = Stock(pipeline).pipe, pipeline.config(TRANSFORMER)
    if name == "SANA":  # whose default is brought to the bins of its config
        config = config | {"sample_size": 32}
    given = inspect.signature(pipe.__call__).parameters["height"].default
    latents = getattr(pipe, "default_sample_size", None) or config.get("sample_size", 128)
    made = pipe.get_default_resolution() if name == "PRX" else given or latents * pipe.vae_scale_factor
    assert find_family(config, pipeline.class_name).default_side(config) == (0 if name == "Wan" else made)


def test_a_caption_does_not_depend_on_its_neighbours(place: Path) -> None:
    """Z-Image writes into the list that it is given, CogView4 pads to the longest of it."""
    read = texts(saved(place, "Z-Image"), place).reader_spec.open()
    words = [SHORT, "a dog"]
    both = read(words)
    alone = read(words[:1])
    assert words == [SHORT, "a dog"]
    assert torch.equal(both.tokens[0][both.mask[0]], alone.tokens[0])


@pytest.mark.slow
def test_weights_of_the_model_and_its_autoencoder_are_not_needed(place: Path, tmp_path: Path) -> None:
    import shutil

    pipeline = saved(place, "SD3")
    alone = Pipeline(source=str(shutil.copytree(pipeline.folder, tmp_path / "sd3")))
    shutil.rmtree(tmp_path / "sd3" / "vae")
    (tmp_path / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    spec: PromptReaderSpec = texts(alone, tmp_path / "texts").reader_spec
    assert torch.equal(
        spec.open()([SHORT]).tokens, texts(pipeline, tmp_path / "texts").reader_spec.open()([SHORT]).tokens
    )
    shutil.rmtree(tmp_path / "sd3" / "text_encoder_3")
    with pytest.raises(UserError, match=r"has no text_encoder_3: set pipeline.without=\[text_encoder_3\]"):
        spec.open()
    with pytest.raises(UserError, match="has no text_encoder_3"):
        alone.require_text_files()  # before images are encoded


def test_a_change_of_an_encoder_changes_the_hash(place: Path, tmp_path: Path) -> None:
    import shutil

    pipeline = saved(place, "SD3")
    copied = Pipeline(source=str(shutil.copytree(pipeline.folder, tmp_path / "sd3")))
    before = copy.copy(copied.texts_hash())
    assert before == pipeline.texts_hash()
    (tmp_path / "sd3" / "tokenizer_2" / "tokenizer_config.json").write_text("{}")
    assert copied.texts_hash() != before


def test_texts_that_all_tokenizers_cut_are_counted_and_nothing_else_is_shown(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = texts(saved(place, "SD3"), tmp_path / "texts")
    shown = io.StringIO()
    monkeypatch.setattr(logging.getLogger("diffusers").handlers[0], "stream", shown)
    middle = "a fox, " * 20  # more than CLIP reads, less than T5
    with pytest.warns(UserWarning, match="captions are cut") as warned:
        fill_cache(tmp_path / "texts" / spec.find_identity(), [SHORT, middle, LONG, ""], spec.reader_spec)
    cuts = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert cuts == ["1 captions are cut where the pipeline cuts texts: write shorter ones"]
    assert shown.getvalue() == ""
    built = spec.build(3)
    spec.load(built, [SHORT, middle, LONG])
    with pytest.warns(UserWarning, match=r"'a long story.*': cut where the pipeline cuts texts$"):
        built.append([LONG])


@pytest.mark.parametrize(
    ("part", "library", "class_name"),
    [
        ("text_encoder", "transformers", "NoSuchModel"),
        ("text_encoder_3", "transformers", "AutoModel"),
        ("tokenizer", "transformers", "AutoTokenizer"),
        ("scheduler", "diffusers", "NoSuchScheduler"),
    ],
)
def test_a_part_of_an_unknown_class_is_refused(
    place: Path, tmp_path: Path, part: str, library: str, class_name: str
) -> None:
    """An Auto class would take code that the part's own config names."""
    folder = Path(shutil.copytree(saved(place, "SD3").source, tmp_path / "changed"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: [library, class_name]}))
    family = FAMILIES["SD3Transformer2DModel"]
    spec = PromptReaderSpec(source=str(folder), pipeline=family.pipeline, encodes=family.encodes, dtype="float32")
    with pytest.raises(UserError, match=f"{part} of .* has the class {class_name}"):
        spec.open()
