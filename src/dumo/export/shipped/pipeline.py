"""Images of classes or texts in one or a few passes of a net with its code: a pipeline of diffusers.

This file lies in an exported model, and dumo need not be installed there. dumo keeps it in export/shipped;
export/standalone.py copies it, and writes the arguments of `DumoPipeline` to model_index.json.

Users call the pipeline, and `encode_prompt` where they keep the embeddings of prompts. The order of a call's events:

1. `_condition` reads class labels, or encodes prompts.
2. Each pass takes the samples from its time to the next, by the run's solver (`_step`). Time 1 is noise, 0 the data.
3. `_images` decodes the samples.

Letters, as in dumo:

    x     samples (b, channels, side, side); at time t on the way from noise to data
    t, s  the time of a pass and of the next, (b, 1, 1, 1) with the same number for all rows; s is 0 after the last
    v     the velocity dx/dt at t
    u     the mean velocity from t down to s, so that x - (t - s) u is x at s; where no s is given, s = 0
    c     what the samples are of: labels (b,), or a `Text`
"""

from collections.abc import Sequence
from math import log2
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

# Of b texts: embeddings of their tokens (b, l, d), which of them are tokens (b, l), and pooled embeddings (b, p)
Text = tuple[Tensor, Tensor | None, Tensor | None]
logger = logging.get_logger(__name__)


class DumoPipeline(DiffusionPipeline):
    """Each pass of the net takes x from a time t to the next one, s, by the solver that the run was sampled by:

    - restart: u leads to the data, and fresh noise back to s;
    - hop: u leads to s;
    - hermite: u and v together lead to s along a parabola;
    - euler: v leads to s along a line.

    Some nets read labels of classes, others texts, through a text encoder of transformers.
    """

    model_cpu_offload_seq = "text_encoder->net->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder"]  # noqa: RUF012, as diffusers has it

    def __init__(
        self,
        net: Any,  # noqa: ANN401
        vae: Any = None,  # noqa: ANN401
        tokenizer: Any = None,  # noqa: ANN401
        text_encoder: Any = None,  # noqa: ANN401
        solver: str = "restart",
        m: float = 0.5,
        start: float = 1.0,
        shift: float | list[float] = 0.0,
        scale: float | list[float] = 1.0,
        text_length: int = 0,
        template: str = "{}",
        skip: int = 0,
        layer: int = -1,
        padding: str = "max_length",
        masked: bool = True,
        encoder_precision: str = "fp32",
        embeddings_dtype: str = "float32",
    ) -> None:
        """Take the parts and settings of an exported folder; diffusers passes them from model_index.json.

        net: a net of dumo, with its code.
        vae: decodes latents; None: the net makes images.
        tokenizer, text_encoder: of transformers; None: the net reads class labels, or embeddings that are given.
        solver: restart, hop, hermite or euler.
        m: of restart and hermite, the time of the second of two passes.
        start: the time of the first pass.
        shift, scale: the net learned (latent - shift) scale; numbers, or one for each channel.
        text_length: how many tokens of a prompt the net reads at most; 0: it reads class labels.
        template: what the encoder reads, in which {} stands for the prompt.
        skip: how many tokens of the template stand before the prompt. The net does not get them.
        layer: the index of the encoder's hidden states that the net gets; -1: those of the last layer.
        padding: of the tokenizer: max_length, or longest.
        masked: whether padding is hidden from encoder and net.
        encoder_precision: bf16 runs the encoder under autocast; fp32: in the precision of its weights.
        embeddings_dtype: to which the embeddings are rounded, as those were from which the net learned.
        """
        super().__init__()
        self.register_modules(net=net, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder)
        self.register_to_config(
            solver=solver,
            m=m,
            start=start,
            shift=shift,
            scale=scale,
            text_length=text_length,
            template=template,
            skip=skip,
            layer=layer,
            padding=padding,
            masked=masked,
            encoder_precision=encoder_precision,
            embeddings_dtype=embeddings_dtype,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | None = None,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noises: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one image per label, or per prompt where the net reads texts.

        class_labels: of the images; the number of classes stands for no label.
        num_inference_steps: how many passes of the net make an image.
        generator: draws the noise that is not given.
        latents: the noise (b, channels, side, side) at the start.
        noises: for solver restart, further noise of that shape, one before each later pass.
        output_type: pil, np or pt; or latent, for what the net makes, in float32.
        return_dict: whether the images are returned in an object; else in a tuple.
        prompt: one text or several; "" stands for no caption.
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds: what `encode_prompt` returns, instead of a prompt.

        Raises ValueError for another condition than the net reads.
        """
        n = num_inference_steps
        device = self._execution_device
        net_config = self.net.config
        c = self._condition(class_labels, prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        b = len(c) if isinstance(c, Tensor) else len(c[0])
        shape = (b, net_config.channels, net_config.side, net_config.side)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()
        times = [x.new_full((b, 1, 1, 1), t) for t in self._times(n)]
        for k in range(n):
            s = times[k + 1]
            is_last = k == n - 1
            x = self._step(x, times[k], s, c, is_last=is_last)
            if self.config["solver"] == "restart" and not is_last:
                z = noises[k].to(x) if noises else randn_tensor(shape, generator=generator, device=device)
                x = s * z + (1 - s) * x
        images: Any = x if output_type == "latent" else self._images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(
        self,
        class_labels: int | list[int] | None,
        prompt: str | list[str] | None,
        embeddings: Tensor | None,
        mask: Tensor | None,
        pooled: Tensor | None,
    ) -> Tensor | Text:
        """The labels (b,), or the text of the prompts or embeddings. Raises ValueError as `__call__`."""
        device = self._execution_device
        if not self.config["text_length"]:
            if class_labels is None or prompt is not None or embeddings is not None:
                raise ValueError("this net reads labels of classes, not texts: give class_labels, and no prompt")
            return torch.as_tensor(class_labels, device=device).reshape(-1)
        if class_labels is not None:
            raise ValueError("this net reads texts, not labels of classes: give prompt=, by its name")
        if prompt is not None and embeddings is None:
            return self.encode_prompt(prompt)
        if prompt is None and embeddings is not None:
            mask = None if mask is None else mask.to(device).bool()
            pooled = None if pooled is None else pooled.to(device)
            return embeddings.to(device), mask, pooled
        raise ValueError("give a prompt, or prompt_embeds instead")  # none or both are given

    def _step(self, x: Tensor, t: Tensor, s: Tensor, c: Tensor | Text, *, is_last: bool) -> Tensor:
        """One pass of the net: x at s, from x at t. For solver restart, it is x at 0, which `__call__` noises again."""
        net = self.net
        match self.config["solver"]:
            case "restart":
                (u,) = net(x, t.flatten(), c, ["u"])
                return x - t * u
            case "hop":
                (u,) = net(x, t.flatten(), c, ["u"], s.flatten())
                return x - (t - s) * u
            case "hermite":
                v, u = net(x, t.flatten(), c, ["v", "u"])
                x_0 = x - t * u
                if is_last:
                    return x_0
                u = (x - x_0) / t  # rounded as dumo does, so that images are dumo's to the bit
                return x - (t - s) * v + (t - s) ** 2 / t * (v - u)
            case "euler":
                (v,) = net(x, t.flatten(), c, ["v"])
                return x - (t - s) * v
            case other:
                raise ValueError(f"solver is '{other}': set restart, hop, hermite or euler in model_index.json")

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> Text:
        """Return what the net reads of b prompts: `prompt_embeds`, `prompt_attention_mask`, `pooled_prompt_embeds`.

        These are the embeddings of tokens (b, l, d), a mask (b, l) that is False on padding, and pooled embeddings of
        whole prompts (b, p). The mask is None where padding is read too, and the last where the net takes none. A
        prompt that is too long is cut, and a warning says so.

        Raises ValueError where there is no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("there is no text encoder: open this folder with tokenizer= and text_encoder=")
        settings = self.config
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        texts = [settings["template"].replace("{}", text.strip()) for text in prompts]

        # ids of tokens
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        max_tokens = settings["text_length"] + settings["skip"]
        for text, ids in zip(prompts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > max_tokens:
                logger.warning(f"'{text}' has {len(ids)} tokens, and is cut behind {max_tokens}")
        batch = self.tokenizer(
            texts,
            truncation=True,
            max_length=max_tokens,
            padding=settings["padding"],
            padding_side="right",
            return_tensors="pt",
        )
        mask = batch["attention_mask"].to(device)
        mask_argument = {"attention_mask": mask} if settings["masked"] else {}

        # the states of one layer of the encoder
        is_last_layer = settings["layer"] == -1
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["encoder_precision"] == "bf16"):
            output = self.text_encoder(
                input_ids=batch["input_ids"].to(device), output_hidden_states=not is_last_layer, **mask_argument
            )
        states = output.last_hidden_state if is_last_layer else output.hidden_states[settings["layer"]]
        states = self._rounded(states[:, settings["skip"] :])
        pooled = None
        if self.net.config.pooled_width:
            projected = getattr(output, "text_embeds", None)  # of CLIP with a projection
            pooled = self._rounded(output.pooler_output if projected is None else projected)
        if not settings["masked"]:
            return states, None, pooled

        # padded to text_length
        mask = mask[:, settings["skip"] :].bool()
        num_missing = settings["text_length"] - mask.shape[1]
        states = F.pad(states * mask[..., None], (0, 0, 0, num_missing))
        return states, F.pad(mask, (0, num_missing)), pooled

    def _rounded(self, x: Tensor) -> Tensor:
        """Embeddings of texts, rounded to the type in which those were stored that the net learned from; in float32."""
        return x.to(getattr(torch, self.config["embeddings_dtype"])).float()

    def _times(self, n: int) -> list[float]:
        """The times at which n passes begin, and 0, where the last one ends."""
        start = self.config["start"]
        m = self.config["m"]
        if self.config["solver"] not in ("restart", "hermite"):
            return [start * ((n - k) / n) for k in range(n + 1)]
        # whenever the passes that are left halve, from n to n - k, the time is multiplied by m / start
        times = [start * (m / start) ** log2(n / (n - k)) for k in range(n)]
        return [*times, 0.0]

    def _images(self, x: Tensor, output_type: str) -> Any:  # noqa: ANN401, as diffusers gives them
        """Decode what the net made, x (b, channels, side, side), to images of `output_type`: pil, np or pt."""
        shift = torch.tensor(self.config["shift"], device=x.device)
        scale = torch.tensor(self.config["scale"], device=x.device)
        x = x / scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        return VaeImageProcessor().postprocess(x, output_type=output_type)
