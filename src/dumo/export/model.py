"""What of a run is exported: one head's model, of the class that its source had."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dumo.export.stock import STOCKS, Stock, restart
from dumo.flow.path import Linear
from dumo.flow.solver import Restart
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.pretrained import read_config
from dumo.run.folder import RunFolder
from dumo.types import UserError

INDEX = "model_index.json"  # of a pipeline
Head = Literal["u", "v"]


def forms(spec: Pretrained) -> list[str]:
    """What a run of this net can be exported to, so that stock pipelines take it; else a file of its weights."""
    stock = stock_of(read_config(spec.source)[1]["_class_name"], spec)
    if stock is None:
        return ["safetensors"]
    return ["diffusers", *["lora"] * (spec.lora is not None and stock.lora)]


def stock_of(kind: str, spec: Pretrained) -> Stock | None:
    """The pipeline that runs a class of model, as its net is called; None where no stock pipeline does."""
    # of SANA the distilled ones alone are told a guidance number, and their pipeline has another path
    return None if kind == "SanaTransformer2DModel" and spec.guidance is not None else STOCKS.get(kind)


@dataclass(frozen=True)
class Exported:
    """A run, and which head of it: u jumps to the data, v is the velocity of a flow."""

    opened: RunFolder
    spec: Pretrained
    net: Dualized
    head: Head

    @property
    def kind(self) -> str:
        """The model's class."""
        return self.net.config["_class_name"]

    @property
    def stock(self) -> Stock | None:
        """The pipeline that runs it; None where no stock pipeline does."""
        return stock_of(self.kind, self.spec)

    @property
    def solver(self) -> Restart:
        """The run's own jumps; those of the default where it samples by v. Raises UserError as `restart`."""
        return restart(self.opened.run.sample.solver)

    @property
    def source(self) -> Path | None:
        """The folder of the whole pipeline that the model came from; None where it came alone."""
        folder = read_config(self.spec.source)[0]
        return folder.parent if folder and (folder.parent / INDEX).is_file() else None

    @property
    def codes(self) -> dict[str, Tensor]:
        """What stands for the classes in the place of texts; {} where it was tuned on texts."""
        texts = self.net.texts
        return {} if self.spec.texts else {name: rows.contiguous() for name, rows in texts.named_buffers()}

    def model(self, dtype: str = "float32") -> Any:  # noqa: ANN401, a model of diffusers
        """The model, its adapters added to the layers beside them, without the name of a folder of this machine."""
        model = self.net.stock(self.head, merged=self.spec.lora is not None)
        model.register_to_config(_name_or_path="")
        return model if dtype == "float32" else cast(model, getattr(torch, dtype))


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another precision; the model stays as it is."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in model.parameters()}
    memo |= {id(b): b.to(dtype) if b.is_floating_point() else b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def chosen(opened: RunFolder, head: str | None = None) -> Exported:
    """A run's head; None: u where it was taught.

    Raises UserError where there is none such, or the run's net or path is one that no stock program knows.
    """
    run, net = opened.run, opened.net
    if not isinstance(run.net, Pretrained) or not isinstance(net, Dualized):
        raise UserError(
            f"{opened.folder} trains net '{run.net.kind}', for which others have no class: dumo exports nets of kind "
            f"diffusers, and of kind dit --to diffusers. Its weights are the safetensors file {opened.weights}"
        )
    has = run.objective.needs.heads
    found = head or ("u" if "u" in has else "v")
    if found not in has:
        raise UserError(f"--head {found}: objective '{run.objective.kind}' has {', '.join(has)}: take one of them")
    if not isinstance(run.path, Linear) or run.path.sd != 1:
        raise UserError(
            f"{opened.folder}: stock schedulers know the path x_t = (1 - t) x + t z alone, and this run's is "
            f"{run.path.kind} with sd {run.path.sd:g}: train with path.kind=linear and path.sd=1"
        )
    return Exported(opened, run.net, net, "u" if found == "u" else "v")
