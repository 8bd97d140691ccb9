"""Images of classes or texts in one or a few passes of a net with its code: a pipeline of diffusers.

This file lies in an exported model, and dumo need not be installed there. dumo keeps it in export/shipped;
export/standalone.py copies it, and writes the arguments of `DumoPipeline` to model_index.json.
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

Text = tuple[Tensor, Tensor | None, Tensor | None]  # embeddings (b, l, d), mask (b, l), and of all words (b, p)
logger = logging.get_logger(__name__)


class DumoPipeline(DiffusionPipeline):
    """Each pass of the net takes x_t from a time t to the next one, s. By the solver that the run was sampled by:

    - restart: u jumps to the image, and fresh noise leads to s;
    - hop: u jumps to s;
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
        """The first pass is at time `start`; of restart and hermite, the second of two is at `m`.

        The net learned (latent - shift) scale. Where it reads texts, it gets the states of the encoder's `layer` for
        `text_length` words of a prompt in `template`, behind the first `skip`; what is longer is cut. `masked`: without
        padding. They are rounded to `embeddings_dtype`.
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

        For no label, it is the number of classes; for no caption, the prompt is "". Instead of a prompt its embeddings
        may be given, as `encode_prompt` returns them. Raises ValueError for another condition than the net reads.

        The generator draws the noise that is not given: `latents` (b, channels, side, side) at the start, and for
        solver restart one of the same shape in `noises` before each later pass. `output_type` is pil, np or pt, or
        latent for what the net makes, in float32.
        """
        net = self.net
        n = num_inference_steps
        device = self._execution_device
        c: Tensor | Text
        if not self.config["text_length"]:
            if class_labels is None or prompt is not None or prompt_embeds is not None:
                raise ValueError("this net reads labels of classes, not texts: give class_labels, and no prompt")
            c = torch.as_tensor(class_labels, device=device).reshape(-1)
            b = len(c)
        elif class_labels is not None:
            raise ValueError("this net reads texts, not labels of classes: give prompt=, by its name")
        else:
            c = self.text(prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
            b = len(c[0])
        shape = (b, net.config.channels, net.config.side, net.config.side)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()
        times = [x.new_full((b, 1, 1, 1), t) for t in self.times(n)]
        for k in range(n):
            t = times[k]
            s = times[k + 1]
            match self.config["solver"]:
                case "restart":
                    (u,) = net(x, t.flatten(), c, ["u"])
                    x = x - t * u
                    if k < n - 1:
                        z = noises[k].to(x) if noises else randn_tensor(shape, generator=generator, device=device)
                        x = s * z + (1 - s) * x
                case "hop":
                    (u,) = net(x, t.flatten(), c, ["u"], s.flatten())
                    x = x - (t - s) * u
                case "hermite":
                    v, u = net(x, t.flatten(), c, ["v", "u"])
                    image = x - t * u
                    x = x - (t - s) * v + (t - s) ** 2 / t * (v - (x - image) / t) if k < n - 1 else image
                case _:
                    (v,) = net(x, t.flatten(), c, ["v"])
                    x = x - (t - s) * v
        images: Any = x if output_type == "latent" else self.images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def text(
        self, prompt: str | list[str] | None, embeddings: Tensor | None, mask: Tensor | None, pooled: Tensor | None
    ) -> Text:
        """Return what the net reads, of prompts or as it is given. Raises ValueError unless one of both is given."""
        if prompt is not None and embeddings is None:
            return self.encode_prompt(prompt)
        if prompt is None and embeddings is not None:
            device = self._execution_device
            mask = None if mask is None else mask.to(device).bool()
            pooled = None if pooled is None else pooled.to(device)
            return embeddings.to(device), mask, pooled
        raise ValueError("give a prompt, or prompt_embeds instead")

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> Text:
        """Return what the net reads of prompts: embeddings (b, l, d), which of them there are, (b, l), and of each
        prompt as a whole, (b, p). The last two are None where the net takes none.

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
        longest = settings["text_length"] + settings["skip"]
        for text, ids in zip(prompts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > longest:
                logger.warning(f"'{text}' has {len(ids)} tokens, and is cut behind {longest}")
        batch = self.tokenizer(
            texts,
            truncation=True,
            max_length=longest,
            padding=settings["padding"],
            padding_side="right",
            return_tensors="pt",
        )
        mask = batch["attention_mask"].to(device)
        read = {"attention_mask": mask} if settings["masked"] else {}

        # the states of one layer of the encoder
        is_last_layer = settings["layer"] == -1
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["encoder_precision"] == "bf16"):
            output = self.text_encoder(
                input_ids=batch["input_ids"].to(device), output_hidden_states=not is_last_layer, **read
            )
        states = output.last_hidden_state if is_last_layer else output.hidden_states[settings["layer"]]
        states = self.rounded(states[:, settings["skip"] :])
        pooled = None
        if self.net.config.pooled_width:
            of_all_words = getattr(output, "text_embeds", None)
            pooled = self.rounded(output.pooler_output if of_all_words is None else of_all_words)
        if not settings["masked"]:
            return states, None, pooled
        mask = mask[:, settings["skip"] :].bool()
        room = settings["text_length"] - mask.shape[1]
        return F.pad(states * mask[..., None], (0, 0, 0, room)), F.pad(mask, (0, room)), pooled

    def rounded(self, x: Tensor) -> Tensor:
        """Round embeddings of texts as those were stored that the net learned from; the result is in float32."""
        return x.to(getattr(torch, self.config["embeddings_dtype"])).float()

    def times(self, n: int) -> list[float]:
        """The times at which n passes begin, and 0, where the last one ends."""
        start = self.config["start"]
        m = self.config["m"]
        if self.config["solver"] in ("restart", "hermite"):
            return [*(start * (m / start) ** log2(n / (n - k)) for k in range(n)), 0.0]
        return [start * ((n - k) / n) for k in range(n + 1)]

    def images(self, x: Tensor, output_type: str) -> Any:  # noqa: ANN401, as diffusers gives them
        """Decode what the net made, x (b, channels, side, side), to images as `output_type` says."""
        shift = torch.tensor(self.config["shift"], device=x.device)
        scale = torch.tensor(self.config["scale"], device=x.device)
        x = x / scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        return VaeImageProcessor().postprocess(x, output_type=output_type)
