"""Tiny text encoders with random weights, in folders as transformers saves them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dumo.runtime.random import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WIDTH = 16
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "blue", "car", "photo", "of", "cat"]
TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": 8,
    "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def t5(folder: Path, seed: int = 0) -> Path:
    """A T5 of bytes, with its tokenizer."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=259, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return saved(T5EncoderModel, config, ByT5Tokenizer(extra_ids=0), folder, seed)


def clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP whose whole text is projected to 8 numbers, with a tokenizer of words, as pipelines lay them out."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words().save_pretrained(folder / "tokenizer")
    return saved(CLIPTextModelWithProjection, CLIPTextConfig(**TEXT), None, folder / "text_encoder", seed)


def clip_of_both(folder: Path, seed: int = 0, **text: int) -> Path:
    """A CLIP of texts and of images of 8 pixels a side, with a tokenizer of words; `text`: of its texts."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**TEXT, **text},
        vision_config={**vision, "image_size": 8, "patch_size": 4, "projection_dim": 8}, projection_dim=8,
    )  # fmt: skip
    return saved(CLIPModel, config, words(), folder, seed)


def clip_as_published(folder: Path) -> Path:
    """The same with CLIP's own processor, as its folders have it: letters, `</w>` where a word ends, one end token."""
    from transformers import CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{one}</w>" for one in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    tokens = CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [("r", "e"), ("re", "d</w>")])
    last = len(vocabulary) - 1
    clip_of_both(folder, vocab_size=last + 1, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last)
    sides = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPProcessor(CLIPImageProcessorPil(**sides, image_mean=[0.4, 0.5, 0.6]), tokens).save_pretrained(folder)
    return folder


def dinov2(folder: Path, seed: int = 0, side: int = 224) -> Path:
    """A DINOv2 of patches of 56 pixels, that was trained on images of this side."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = Dinov2Config(**sizes, image_size=side, patch_size=56, initializer_range=0.2)
    return saved(Dinov2Model, config, None, folder, seed)


def words() -> "PreTrainedTokenizerFast":
    """A tokenizer of some words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def saved(kind: type, config: object, tokenizer: object, folder: Path, seed: int) -> Path:
    """A model of these sizes, drawn by its seed, in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(stream(seed, "encoder").initial_seed())
        kind(config).save_pretrained(folder)  # type: ignore[attr-defined]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
