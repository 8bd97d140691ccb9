"""This run as a diffusers pipeline: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`.

dumo must be installed. It opens the folder at the first call, on a GPU if there is one, and makes the images.
"""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

import dumo


class DumoPipeline(DiffusionPipeline):
    """Makes images of classes or prompts in one or a few passes of the network, with the run's own solver."""

    def __init__(self) -> None:
        """Load nothing yet: diffusers tells a pipeline where it was loaded from only after it was made."""
        super().__init__()
        self._run: Any = None

    @property
    def run(self) -> Any:  # noqa: ANN401, a class that dumo does not export
        """The run as `dumo.load` opens it, for everything that a pipeline has no argument for."""
        if self._run is None:
            self._run = dumo.load(self.config["_name_or_path"])
        return self._run

    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt: str | list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one image per class label or prompt; if neither is given, one image of the first class.

        class_labels: classes, by number or by name.
        num_inference_steps: the number of network evaluations per image; None uses the run's own.
        generator: draws the seed; None uses the run's own seed.
        output_type: "pil", "np" or "pt"; the latter two in [0, 1].
        return_dict: return the images in an object; if False, in a tuple.
        prompt: texts, for a run that was trained on captions.
        """
        images: Any = self.run.sample(
            labels=class_labels,
            prompts=prompt,
            count=1 if class_labels is None and prompt is None else None,
            nfe=num_inference_steps,
            generator=generator,
            output=output_type,
        )
        if output_type == "pt":
            images = (images + 1) / 2
        return ImagePipelineOutput(images=images) if return_dict else (images,)
