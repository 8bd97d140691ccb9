"""Images of classes in one or a few passes of a net with its code: a pipeline, which diffusers opens and calls.

This file lies in an exported model, and dumo need not be installed there. dumo keeps it in export/shipped;
export/standalone.py copies it, and writes the arguments of `DumoPipeline` to model_index.json.
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
    """Each pass of the net takes x_t from a time t to the next one, s. By the solver that the run was sampled by:

    - restart: u jumps to the image, and fresh noise leads to s;
    - hop: u jumps to s;
    - hermite: u and v together lead to s along a parabola;
    - euler: v leads to s along a line.
    """

    _optional_components = ["vae"]  # noqa: RUF012, as diffusers has it

    def __init__(
        self,
        net: Any,  # noqa: ANN401
        vae: Any = None,  # noqa: ANN401
        solver: str = "restart",
        m: float = 0.5,
        start: float = 1.0,
        shift: float | list[float] = 0.0,
        scale: float | list[float] = 1.0,
    ) -> None:
        """The first pass is at time `start`; of restart and hermite, the second of two is at `m`.

        The net learned (latent - shift) scale.
        """
        super().__init__()
        self.register_modules(net=net, vae=vae)
        self.register_to_config(solver=solver, m=m, start=start, shift=shift, scale=scale)

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

        The generator draws the noise that is not given: `latents` (b, channels, side, side) at the start, and for
        solver restart one of the same shape in `noises` before each later pass. `output_type` is pil, np or pt, or
        latent for what the net makes, in float32.
        """
        net = self.net
        n = num_inference_steps
        device = self._execution_device
        c = torch.as_tensor(class_labels, device=device).reshape(-1)
        shape = (len(c), net.config.channels, net.config.side, net.config.side)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()
        times = [x.new_full((len(c), 1, 1, 1), t) for t in self.times(n)]
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
