"""Images of classes in one or a few passes of a DumoDiT: a pipeline, which diffusers opens and calls.

This file lies in an exported model, and dumo need not be installed there: it needs torch and diffusers alone. dumo
keeps it in export/shipped; export/standalone.py copies it, and writes the arguments of `DumoPipeline` to
model_index.json.
"""

from collections.abc import Sequence
from math import log2
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class DumoPipeline(DiffusionPipeline):
    """With head u each pass jumps to the image, and fresh noise is added before the next. With v: Euler steps."""

    _optional_components = ["vae"]  # noqa: RUF012, as diffusers has it

    def __init__(
        self,
        transformer: Any,  # noqa: ANN401
        vae: Any = None,  # noqa: ANN401
        head: str = "u",
        m: float = 0.5,
        start: float = 1.0,
        shift: float | list[float] = 0.0,
        scale: float | list[float] = 1.0,
    ) -> None:
        """The first pass is at time `start`, and the second of two at `m`. The net learned (latent - shift) scale."""
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(head=head, m=m, start=start, shift=shift, scale=scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noises: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one image per label; for none, the label is the number of classes.

        The generator draws the noise that is not given: `latents` (b, channels, side, side) at the start, and one of
        the same shape in `noises` before each later pass. `output_type` is pil, np or pt, or latent for what the net
        makes, in float32.
        """
        net = self.transformer
        n = num_inference_steps
        device = self._execution_device
        c = torch.as_tensor(class_labels, device=device).reshape(-1)
        shape = (len(c), net.config.channels, net.config.side, net.config.side)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()
        times = [x.new_full((len(c), 1, 1, 1), t) for t in self.times(n)]
        for k, t in enumerate(times[:n]):
            if self.config["head"] == "v":
                x = x - (t - times[k + 1]) * net(x, t.flatten(), c, "v")
                continue
            if k:
                z = noises[k - 1].to(x) if noises else randn_tensor(shape, generator=generator, device=device)
                x = t * z + (1 - t) * x
            x = x - t * net(x, t.flatten(), c, self.config["head"])
        images: Any = x if output_type == "latent" else self.images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def times(self, n: int) -> list[float]:
        """The times at which n passes begin; for Euler steps also the time at which the last one ends."""
        start = self.config["start"]
        m = self.config["m"]
        if self.config["head"] == "v":
            return [start * ((n - k) / n) for k in range(n + 1)]
        return [start * (m / start) ** log2(n / (n - k)) for k in range(n)]

    def images(self, x: Tensor, output_type: str) -> Any:  # noqa: ANN401, as diffusers gives them
        """Decode what the net made, x (b, channels, side, side), to images as `output_type` says."""
        shift = torch.tensor(self.config["shift"], device=x.device)
        scale = torch.tensor(self.config["scale"], device=x.device)
        x = x / scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        return VaeImageProcessor().postprocess(x, output_type=output_type)
