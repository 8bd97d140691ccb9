"""Texts that a frozen encoder embeds: rows of a cache, on the device or read pass by pass, with prompts behind them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import encoders
from dumo.encoders import textcache
from dumo.encoders.pipeline_folder import Pipeline
from dumo.encoders.textcache import fill_cache
from dumo.encoders.transformers_text import EncoderModel, TextEncoder
from dumo.nets.text_rows import CachedStore, Rows
from dumo.nets.text_spec import EmbeddedTexts, EncoderTexts, PipelineTexts
from dumo.nets.textblock import TextEmbedder
from dumo.types import UserError
from pipelines import save

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', of its own code
CAPTIONS = ("a red car", "a blue car", "cat")
NEW = ["a photo of a red cat", "seven"]


def fill(spec: EmbeddedTexts, captions: Sequence[str] = CAPTIONS) -> None:
    """Encode captions."""
    fill_cache(spec.cache_root / spec.find_identity(), [*captions, ""], spec.reader_spec)


def loaded(spec: EmbeddedTexts, captions: Sequence[str] = CAPTIONS, count: int = 3, **fields: object) -> Rows:
    """The module, with its rows."""
    spec = spec.model_copy(update=fields)
    rows = spec.build(count)
    spec.load(rows, captions)
    return rows


def encoder_texts(place: Path, **fields: Any) -> EncoderTexts:  # noqa: ANN401
    """Texts by a tiny encoder, whose cache is empty."""
    encoder = TextEncoder(source=str(encoders.t5(place / "t5")), length=24, **fields)
    return EncoderTexts(root=str(place / "texts"), encoder=encoder, width=encoders.WIDTH)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EncoderTexts:
    """Texts whose captions are encoded, in two shards."""
    spec = encoder_texts(tmp_path_factory.mktemp("texts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textcache, "SHARD_ROWS", 2)
        fill(spec)
    return spec


def test_rows_on_the_device_and_on_disk_are_the_same_before_and_after_prompts(spec: EncoderTexts) -> None:
    c = torch.tensor([2, 0, 3, 3, 1])
    held, looked_up = loaded(spec), loaded(spec, memory=0.0)
    assert held.tokens is not None
    assert looked_up.tokens is None
    before = held(c)
    for one, other in zip(before, looked_up(c), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert held.lengths(c) == looked_up.lengths(c)
    assert held.lengths_differ == looked_up.lengths_differ
    assert held.append(NEW) == looked_up.append(NEW) == len(CAPTIONS) + 1
    for one, old in zip(held(c), before, strict=True):
        assert one is old is None or torch.equal(one, old)
    behind = torch.tensor([5, 0, 4])
    for one, other in zip(held(behind), looked_up(behind), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_rows_are_those_of_their_captions_in_whatever_order_they_were_encoded(spec: EncoderTexts) -> None:
    turned = loaded(spec, CAPTIONS[::-1])
    for one, other in zip(loaded(spec)(torch.arange(4)), turned(torch.tensor([2, 1, 0, 3])), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_what_the_cache_lacks_is_encoded_when_it_is_read(spec: EncoderTexts) -> None:
    """As in sampling, where nothing is written."""
    captions = ("a red car", "a dog", "cat")
    rows = loaded(spec, captions)
    assert rows.tokens is None
    tokens, mask, _ = rows(torch.arange(4))
    wanted, wanted_mask, _ = loaded(spec)(torch.tensor([0, 0, 2, 3]))
    assert mask is not None
    assert wanted_mask is not None
    for i, same in enumerate((True, False, True, True)):
        assert torch.equal(tokens[i][mask[i]], wanted[i][wanted_mask[i]]) == same


def test_without_the_captions_prompts_are_read_and_numbers_refused(spec: EncoderTexts) -> None:
    """As a run that was copied without its data."""
    rows = loaded(spec, ())
    first = rows.append(["cat"])
    tokens, _, _ = rows(torch.tensor([first, 3]))
    assert torch.allclose(tokens[1], loaded(spec)(torch.tensor([3]))[0][0])
    with pytest.raises(UserError, match="captions are not on this machine"):
        rows(torch.tensor([0]))


def test_the_layer_of_tokens_starts_as_xavier_draws_it(spec: EncoderTexts) -> None:
    token = TextEmbedder(spec.build(len(CAPTIONS)), 256).token
    assert token.weight.std().item() == pytest.approx((2 / (encoders.WIDTH + 256)) ** 0.5, rel=0.1)
    assert not token.bias.any()


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_prompts_that_are_forgotten_leave_the_others_as_they_are(spec: EncoderTexts, memory: float) -> None:
    texts = loaded(spec, memory=memory)
    texts.forget(1)
    first = texts.append(["seven", *NEW])
    texts.prompts = {"red": first + 1, "seven": first, "last": first + 2}
    before = texts(torch.tensor([0, 3, first, first + 2]))
    texts.forget(2)
    assert texts.prompts == {"seven": first, "last": first + 1}
    after = texts(torch.tensor([0, 3, first, first + 1]))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(IndexError):
        texts(torch.tensor([first + 2]))


def test_a_caption_as_a_prompt_is_the_row_that_it_has(spec: EncoderTexts) -> None:
    texts = loaded(spec)
    first = texts.append(CAPTIONS)
    tokens, mask, _ = texts(torch.arange(first + 3))
    assert mask is not None
    assert torch.equal(mask[first:], mask[:3])
    assert torch.allclose(tokens[first:], tokens[:3], atol=1e-3)  # the batch moves the last bits of half precision


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_rows_follow_the_net_in_type_and_are_in_no_checkpoint(spec: EncoderTexts, memory: float) -> None:
    net = nn.Sequential(loaded(spec, memory=memory)).double()
    assert not net.state_dict()
    assert net(torch.tensor([1]))[0].dtype == torch.float64


def test_a_net_is_outlined_without_any_file(spec: EncoderTexts) -> None:
    nowhere = spec.model_copy(update={"root": "nowhere"})
    with torch.device("meta"):
        texts = nowhere.build(100)
    assert (texts.width, texts.pooled_width, texts.has_mask) == (encoders.WIDTH, 0, True)
    assert texts(torch.zeros(2, dtype=torch.long, device="meta"))[0].shape == (2, 24, encoders.WIDTH)


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_a_shard_that_was_overwritten_is_refused(tmp_path: Path, memory: float) -> None:
    """On the device or on disk; before that a net can be copied."""
    spec = encoder_texts(tmp_path)
    fill(spec)
    copy.deepcopy(loaded(spec, memory=memory))
    (shard,) = tmp_path.rglob("shard-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match=r"shard-00000\.safetensors has changed \(different SHA-256\)"):
        loaded(spec, memory=memory)


def test_an_encoder_that_is_not_the_runs_is_refused_once_it_is_needed(spec: EncoderTexts, tmp_path: Path) -> None:
    other = spec.encoder.model_copy(update={"source": str(encoders.t5(tmp_path / "other", seed=1))})
    begun = spec.model_copy(update={"identity": spec.find_identity()})
    texts = loaded(begun, encoder=other)  # its rows are those of the run's encoder
    assert torch.equal(texts(torch.arange(4))[0], loaded(spec)(torch.arange(4))[0])
    with pytest.raises(UserError, match=r"is not t5-.*, with which the run was trained"):
        texts.append(NEW)


def test_widths_that_are_not_the_encoders_are_refused(spec: EncoderTexts) -> None:
    with pytest.raises(UserError, match=r"set net\.texts\.width=16"):
        loaded(spec, width=8)
    with pytest.raises(ValueError, match="set both, or neither"):
        EncoderTexts(encoder=spec.encoder, width=8, pooled=4)


@pytest.mark.parametrize("memory", [4, 0], ids=["on the device", "on the disk"])
def test_prompts_are_encoded_some_at_a_time_by_an_encoder_that_stays_open(
    memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = encoder_texts(tmp_path, dtype="float32")
    fill(spec)
    rows = loaded(spec, memory=memory)
    batch_sizes: list[int] = []
    open_encoder = TextEncoder.open

    def open_counted(spec: TextEncoder, device: torch.device | str = "cpu") -> EncoderModel:
        opened = open_encoder(spec, device)

        def count(module: torch.nn.Module, args: object, inputs: dict[str, Any]) -> None:
            batch_sizes.append(len(inputs["input_ids"]))

        opened.model.register_forward_pre_hook(count, with_kwargs=True)
        batch_sizes.append(0)
        return opened

    monkeypatch.setattr(TextEncoder, "open", open_counted)
    prompts = [f"{n} red cats" for n in range(100)]
    first = rows.append(prompts)
    assert batch_sizes == [0, 32, 32, 32, 4]
    again = [copy.deepcopy(rows).append([prompts[0]]), *(rows.append([prompt]) for prompt in prompts[::33])]
    assert batch_sizes[5:] == [1] * 5  # without opening it again
    for number, prompt_number in zip(range(first, first + 100, 33), again[1:], strict=True):
        torch.testing.assert_close(rows(torch.tensor([number]))[0], rows(torch.tensor([prompt_number]))[0])


# --- captions that would be too large for a cache, by the encoders of a pipeline


def pipeline_texts(name: str, place: Path) -> PipelineTexts:
    """The texts of a pipeline."""
    pipeline = Pipeline(source=str(save(name, place / name))).with_facts()
    return PipelineTexts(root=str(place / "texts"), dtype="float32").within(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD3", "Chroma", "Z-Image"])
def test_rows_that_are_encoded_in_training_are_those_of_a_cache_whatever_surrounds_the_call(
    name: str, tmp_path: Path
) -> None:
    spec = pipeline_texts(name, tmp_path)
    live = loaded(spec, budget=0)
    fill(spec)
    cached = loaded(spec)
    assert cached.tokens is not None
    c = torch.tensor([3, 0, 1, 2, 0])
    wanted = [cached(c[i : i + 1]) for i in range(len(c))]
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        tokens, mask, pooled = live(c)
    for i, (text, there, whole) in enumerate(wanted):
        n = tokens.shape[1]
        assert torch.equal(tokens[i], text[0][:n])
        assert not text[0][n:].any()
        assert (mask is None) == (there is None)
        assert mask is None or (there is not None and torch.equal(mask[i], there[0][:n]))
        assert pooled is None or (whole is not None and torch.equal(pooled[i], whole[0]))
    if name == "Z-Image":  # which reads captions by their lengths
        assert live.lengths(c) == cached.lengths(c) == tuple(map(len, (text[0][there[0]] for text, there, _ in wanted)))


def test_few_rows_are_kept_and_prompts_come_and_go(tmp_path: Path) -> None:
    spec = pipeline_texts("SD3", tmp_path)
    live = loaded(spec, budget=0)
    fill(spec)
    cached = loaded(spec)
    assert isinstance(live.store, CachedStore)
    live.store.reader.num_kept = 2
    for texts in (live, cached):
        first = texts.append(["a cat", "a bird", "a cow"])
        texts.prompts = {"a cat": first, "a bird": first + 1, "a cow": first + 2}
        texts.forget(2)
    assert live.prompts == cached.prompts == {"a bird": 4, "a cow": 5}
    c = torch.tensor([5, 4, 0, 1])
    assert torch.equal(live(c)[0], cached(c)[0])
    assert [*live.store.reader.kept_rows] == [*CAPTIONS[:2]]


def test_a_pipelines_encoders_that_are_others_are_refused(tmp_path: Path) -> None:
    spec = pipeline_texts("SD3", tmp_path)
    begun = loaded(spec.model_copy(update={"identity": spec.find_identity(), "budget": 0}))
    (tmp_path / "SD3" / "tokenizer_3" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="is not StableDiffusion3Pipeline-"):
        begun(torch.tensor([0]))
