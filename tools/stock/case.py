"""A tiny run of a family, trained two steps and exported by the command line; sampled by dumo and by its pipeline."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.export.stock import STOCKS, Stock, at
from dumo.flow.generate import carried
from dumo.flow.solver import Restart
from dumo.run.folder import RunFolder, open_run
from e2e.shell import call, sets
from stock.family import PIXELS, ROWS, Given, Row, recorded, save_texts

RESTART, C = Restart(m=0.5), 3  # the row of the table of texts that is sampled
LORA = "net.lora={rank: 4}"
QUICK = {"Chroma", "Z-Image"}  # without low-pass: the first has none, and the other's takes long to fit


@dataclass(frozen=True)
class Case:
    """A family's run in `folder`, with the model that it began with in `source`, exported to `out`."""

    row: Row
    folder: Path
    texts: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, folder: Path, *fields: str, to: str = "diffusers") -> "Case":
        """Train and export; `fields` are set beside what every run here has."""
        row, source = ROWS[name], folder / "source"
        row.model.model().save_pretrained(source)
        case = cls(row, folder, save_texts(row, folder / "texts.safetensors"))
        told = [f"net.source={source}", "net.kind=diffusers"]
        if "net.texts=null" not in fields:
            told += ["net.texts.kind=file", f"net.texts.source={folder / 'texts.safetensors'}"]
        told += ["net.guidance=3.5"] * bool(row.model.config.get("guidance_embeds", row.tiny == "flux2"))
        told += ["net.lowpass=null"] * (name in QUICK)
        steps = ["train.steps=2", "train.batch=4", "train.schedule.warmup=0"]
        for words in (
            ("train", "digits", "--out", folder / "run", *sets(*told, *steps, *fields)),
            ("export", folder / "run", folder / "out", "--to", to),
        ):
            done = call(*words)
            assert done.code == 0, done
        return case

    @cached_property
    def opened(self) -> RunFolder:
        """The run."""
        return open_run(str(self.folder / "run"), device="cpu")

    @property
    def stock(self) -> Stock:
        """How its pipeline is called."""
        return STOCKS[self.row.model.kind]

    @property
    def z(self) -> Tensor:
        """The noise that both begin with, (1, 1, 8, 8)."""
        return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))

    def dumo(self, noises: list[Tensor], passes: int) -> Tensor:
        """What dumo's Restart makes of z, then these noises."""
        drawn = [self.z, *noises]
        return carried(
            self.opened.sampler.reads, self.opened.run.path, RESTART, torch.tensor([C]), passes, lambda k: drawn[k]
        )[1]

    def pipeline(self, **parts: Any) -> Any:  # noqa: ANN401, a pipeline of diffusers
        """The stock pipeline of the folder that was exported; of what is given here, another part."""
        import diffusers

        kind = getattr(diffusers, self.stock.pipeline)
        none = {name: None for name in kind._get_signature_keys(kind)[0] if name not in ("transformer", "scheduler")}
        if parts.keys() >= {"transformer", "scheduler"}:
            pipe = kind(**none | parts)
        else:
            pipe = kind.from_pretrained(self.folder / "out", trust_remote_code=True, **none | parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def tuned(self) -> Any:  # noqa: ANN401, a pipeline of diffusers
        """The stock pipeline of the untouched model, with the LoRA that was exported."""
        import diffusers

        model = getattr(diffusers, self.row.model.kind).from_pretrained(self.folder / "source")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder / "out" / "scheduler")
        pipe = self.pipeline(transformer=model, scheduler=scheduler)
        pipe.load_lora_weights(str(self.folder / "out"))
        return pipe

    def made(
        self,
        pipe: Any,  # noqa: ANN401, a pipeline of diffusers
        told: Given,
        *,
        negative: bool = False,
        seed: int = 7,
    ) -> tuple[Tensor, list[Tensor]]:
        """What a pipeline makes of z, told this beside its text, and the noises that it drew."""
        told = {**self.row.told(self.texts, C), **dict(self.row.more), **told}
        told |= self.row.against(self.texts) if negative else {}
        torch.manual_seed(seed)
        with recorded(self.row.back) as drawn:
            out = pipe(
                **told,
                latents=self.row.into(self.z), height=PIXELS, width=PIXELS, output_type="latent", return_dict=False,
            )[0]  # fmt: skip
        return self.row.back(out), drawn

    def arguments(self, passes: int) -> Given:
        """How a pipeline is told so many passes."""
        return self.stock.arguments(at(RESTART, passes), embedded=getattr(self.opened.run.net, "guidance", None))

    def seeded(self, pipe: Any) -> bool:  # noqa: ANN401
        """Whether the pipeline's generator draws the noise between passes, whatever torch's own would."""

        def told() -> Given:
            return {**self.arguments(2), "generator": torch.Generator().manual_seed(0)}

        return torch.equal(self.made(pipe, told(), seed=1)[0], self.made(pipe, told(), seed=2)[0])

    def off(self, pipe: Any, passes: int) -> float:  # noqa: ANN401
        """The largest difference between the pipeline's image and dumo's."""
        image, noises = self.made(pipe, self.arguments(passes))
        return float((image - self.dumo(noises, passes)).abs().max())
