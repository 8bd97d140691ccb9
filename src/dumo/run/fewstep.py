"""The few-step run under adapters for a subject: what it trained is part of the net, frozen (`net.lora.subject`)."""

from functools import partial

from torch import nn

from dumo.nets import Pretrained
from dumo.run.config.spec import Run
from dumo.run.config.tree import Tree
from dumo.run.folder import SAME, RunFolder, lay_in, open_run, require_net
from dumo.training import frozen, manifest
from dumo.training.deferred import Deferred
from dumo.types import UserError

OWN = ("net.lora.subject:", "net.lora.frozen:", "net.texts.identity:")  # fields that are of the subject's run alone


def of(run: Tree) -> RunFolder:
    """The few-step run, its weights not read yet.

    Raises UserError where it is none, has another net, or other weights than when the subject's run began.
    """
    start = run.start
    assert start, "a run without one has no subject"
    source = open_run(start.source, device="cpu", fill=False)
    require_net(source.run, start, run.net, run.path, (*SAME, *OWN))
    if start.sha256 not in (None, source.sha256):
        raise UserError(
            f"start.source: {start.source} has other weights ({source.weights}) than when this run began: put back "
            "its checkpoint of then, or begin a new run in another folder"
        )
    return source


def lay(run: Tree, net: nn.Module, made: Deferred) -> None:
    """Let a net have what the few-step run trained; it is read when the net is made.

    Raises UserError as `of`, and where that run has other heads, or tuned other weights than the net has.
    """
    source = of(run)
    found, own = frozen.trained(source.net), net.state_dict()
    heads = {name for name in own if name.startswith(("heads.", "gap."))}
    if alien := sorted(heads ^ {name for name in found if name.startswith(("heads.", "gap."))}):
        raise UserError(
            f"start: {source.folder} and this run differ in {alien[0]}: take the objective of that run, "
            f"objective.kind={source.run.objective.kind}"
        )
    lay_in(net, made, {name: partial(source.made.made, x) for name, x in found.items()})
    there, here = source.run.net, run.net
    assert isinstance(there, Pretrained)
    assert isinstance(here, Pretrained)
    if there.lora and here.lora and there.lora.frozen == here.lora.frozen:
        now = frozen.digest(net, made.made, without=found)
        frozen.require(now, manifest.read(source.checkpoint).frozen, source.folder)


def digest(run: Run) -> str:
    """The SHA-256 of the few-step run's weights."""
    return of(run).sha256
