"""Build a run's net with weights: random, from its own folder, from another run, or from a published file.

For sampling and evaluation, `load_run` reads a run's folder. For training, `build_deferred` builds the net at step 0
and leaves pipeline weights in their files until they are needed (`dumo.io.deferred`); `init_from` also loads the
weights that `start` names. `build` builds the net at step 0 with all weights; `init_on_device` does the same without
checking the free memory.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.config import trust
from dumo.config.code import require_same_code
from dumo.config.difference import Difference, differences
from dumo.config.load import run_of
from dumo.config.place import RUN_FILE, require_run_folder
from dumo.config.spec import Run
from dumo.config.teacher_spec import Start
from dumo.data import Images
from dumo.flow.path import FlowPath
from dumo.flow.precision import to_float32
from dumo.io.deferred import Loaders, load_parameters
from dumo.io.tensor_files import compare, header, load_checked
from dumo.io.yaml import yaml_text
from dumo.nets import Net, Pretrained
from dumo.run.data import recorded_facts
from dumo.run.folder import RunFolder
from dumo.run.net import deferred_net, meta_net, require_room
from dumo.run.trained import TrainedRun
from dumo.runtime import shell_path
from dumo.runtime.device import choose_device
from dumo.training import frozen
from dumo.training.checkpoint import (
    FIX,
    STATE_FILE,
    Checkpoint,
    step_of,
)
from dumo.training.settings import Train
from dumo.types import Spec, UserError

# Weights that depend on the objective, so a net trained with another objective may lack them.
_OPTIONAL_PREFIXES = ("heads.", "gauges.", "scalars.", "own.", "gap.", "negative_time")
# Head weights, which a subject's run must share with its few-step run.
_HEAD_PREFIXES = ("heads.", "gap.", "negative_time")
# Net fields that do not change the function it computes.
_SAME_FUNCTION_FIELDS = ("net.checkpoint", "net.dropout", "net.route", "net.route.share", "net.texts.drop")
# Net fields in which a subject's run may differ from its few-step run.
_SUBJECT_FIELDS = ("net.lora.subject", "net.lora.frozen", "net.texts.identity")


def load_run(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    device: str = "auto",
    reads_weights: bool = True,
) -> TrainedRun:
    """Load a run for sampling or evaluation from its folder, or by name from dumo's bundled runs or the Hub.

    `weights` is a file or a part of a checkpoint, and defaults to the sampled weights of the newest checkpoint. If a
    concurrent training replaces that checkpoint while it is read, the new one is loaded. With `reads_weights=False`,
    files are checked but trained weights are not loaded. Raise UserError if `source` is not a run's folder, or if it
    has no whole checkpoint and `weights` is None.
    """
    from dumo.run import read_only

    folder = read_only.find(source)
    require_run_folder(source, folder)
    output = read_only.output_folder(source)
    trust.accept(overrides)
    run_folder = RunFolder(folder)
    assert run_folder.text, "a run's folder has a run.yaml"
    run = run_of(run_folder.text, overrides)
    require_same_code(run, run.resolved, folder)
    if overrides:
        _require_trained(run_folder, run)
    while True:
        steps_before = run_folder.checkpoints.steps()
        try:
            trained = _open_weights(run, run_folder, weights, choose_device(device), reads_weights=reads_weights)
            own_output = None if output == folder else output
            return replace(
                trained,
                overrides=tuple(overrides),
                own_output=own_output,
                lasting_name=read_only.lasting_name(source),
            )
        except (UserError, OSError):
            # Retry if a concurrent training has replaced the checkpoint.
            if run_folder.checkpoints.steps() == steps_before:
                raise


def _require_trained(run_folder: RunFolder, run: Run) -> None:
    """Raise UserError if an override changes a field that is fixed by training, or `data` points to other images."""
    trained_run = run_folder.run
    assert trained_run, "a run's folder has a run.yaml"
    differing_fields = [str(difference) for difference in differences(trained_run, run) if not difference.is_free]
    if differing_fields:
        raise UserError(
            f"{run_folder.path} is already trained, so these fields cannot be changed here:\n  "
            + "\n  ".join(differing_fields)
        )
    if run.data != trained_run.data:
        _require_trained_images(run_folder, run)


def require_trained_images(trained: TrainedRun) -> None:
    """Raise UserError if the images of a pixel-space run have other names or sizes than in training.

    Images that are not on this machine, and images of read-only runs, are not checked.
    """
    images = trained.spec.data
    if isinstance(images, Images) and images.is_here and not trained.is_only_read:
        _require_trained_images(trained.run_folder, trained.spec)


def _require_trained_images(run_folder: RunFolder, run: Run) -> None:
    """Raise UserError if the data are images with another fingerprint than the folder records."""
    if not isinstance(run.data, Images):
        return
    # Open the images without decoding them.
    undecoded = run.data.model_copy(update={"memory": 0.0, "buckets": None})
    facts = recorded_facts(run_folder.run) if run_folder.run else None
    trained_fingerprint = facts.fingerprint if facts else None
    fingerprint = undecoded.open().fingerprint()
    if trained_fingerprint not in (None, fingerprint):
        raise UserError(
            f"data.root: {run.data.root} has other images than {run_folder.path} was trained on (fingerprint "
            f"{fingerprint}, and {trained_fingerprint} in {RUN_FILE}): restore those images, or set data.root to "
            "their path"
        )


def _open_weights(
    run: Run, run_folder: RunFolder, weights: str | None, device: torch.device, *, reads_weights: bool
) -> TrainedRun:
    """Load a run with the weights of its newest checkpoint or export, or of the file `weights`."""
    # Find the weights file.
    folder = run_folder.path
    sampled = sampled_part(run.train)
    last = run_folder.checkpoints.latest({sampled} if weights is None else ())
    listed_sha256: str | None = None
    if weights is None and last is None:
        if run_folder.exported_weights is None:
            raise UserError(f"{folder} has no checkpoint: train it (dumo train {shell_path(folder)}), or use --weights")
        file = run_folder.exported_weights
        file_name = file.name
        run_folder.require_own_weights(run, file)
    elif weights is None:
        assert last
        file = last.path / sampled
        file_name = str(file.relative_to(folder))
        listed_sha256 = last.sha256(sampled)
        run_folder.require_same_config(run, last)
    else:
        file = Path(weights)
        # A file inside a part of a checkpoint may hold only one rank's shard, so load the whole part.
        if (file.parent.parent / STATE_FILE).is_file():
            file = file.parent
        file_name = str(file)
        is_part = (file.parent / STATE_FILE).is_file()
        fault = Checkpoint.read(file.parent).find_fault({RUN_FILE, file.name}) if is_part else None
        if fault:
            raise UserError(f"{fault}: use other weights")
        run_folder.require_own_weights(run, file)

    # Load the weights, and compare the frozen ones with the digest in the checkpoint.
    if reads_weights:
        net = load_net(run, file, device)
        frozen_digest = frozen.digest(net)
    else:
        # Only the digest of frozen weights needs their values.
        net, loaders = meta_net(run), {}
        if frozen.frozen_weights(net):
            net, loaders = deferred_net(run)
        _require_fit(file, net)
        frozen_digest = frozen.digest(net, loaders)
    last_step = 0
    if last:
        frozen.require(frozen_digest, last.facts.frozen, folder)
        last_step = last.facts.step
    elif frozen_digest is not None:
        raise UserError(
            f"{folder} has no checkpoint, which records the frozen weights of {file}: restore "
            f"{run_folder.checkpoints.folder}"
        )
    step = last_step if weights is None and last else step_of(file, last_step)
    return TrainedRun(
        spec=run,
        run_folder=run_folder,
        net=net,
        step=step,
        weights=file_name,
        file=file,
        checkpoint=last,
        listed_sha256=listed_sha256,
        given_weights=weights,
    )


def sampled_part(train: Train) -> str:
    """Return the part of a checkpoint used for sampling: the first average, or the net if there are no averages."""
    return f"ema-{train.ema[0].key}" if train.ema else "net"


def load_net(run: Run, file: Path, device: torch.device) -> nn.Module:
    """Build a run's net on a device, with trained weights from a file or a part of a checkpoint.

    Raise UserError if the weights do not match the net.
    """
    require_room(run, device)
    net, loaders = build_deferred(run)
    _require_fit(file, net)
    loaders = _take_weights(net, loaders, load_checked(file))
    return load_parameters(net, loaders, device).to(device).eval()


def _require_fit(file: Path, net: nn.Module) -> None:
    """Raise UserError unless a file contains exactly the trained weights of a net."""
    # Weights trained in 16 bits are sampled in float32.
    file_weights = {name: to_float32(x) for name, x in header(file).items()}
    compare(file, file_weights, frozen.trained_state_dict(net), "the run", FIX)


@torch.no_grad()
def _take_weights(net: nn.Module, loaders: Loaders, tensors: Mapping[str, Tensor]) -> Loaders:
    """Copy tensors into a net by name. Return loaders that copy the parameters on the meta device later."""
    taken: dict[str, Callable[[], Tensor]] = dict(loaders)
    weights = net.state_dict()
    for name, x in tensors.items():
        if name in loaders:
            taken[name] = partial(to_float32(x).to, weights[name].dtype, copy=True)
        else:
            weights[name].copy_(x)
    return taken


def build(run: Run, device: torch.device | str = "cpu") -> nn.Module:
    """Build the net at step 0, with weights that depend on the run's seed but not on the device.

    Raise UserError if the net does not fit into the device's memory.
    """
    require_room(run, device)
    return init_on_device(run, device)


def init_on_device(run: Run, device: torch.device | str) -> nn.Module:
    """Build the net as `build` does, without checking the device's memory."""
    net, loaders = build_deferred(run)
    return load_parameters(net, loaders, device).to(device)


def build_deferred(run: Run) -> tuple[nn.Module, Loaders]:
    """Build the net at step 0 on the CPU.

    Return it and the loaders of its pipeline weights, which stay on the meta device. Nets without a pipeline have all
    weights and no loaders.
    """
    net, loaders = deferred_net(run)
    if run.has_subject:
        loaders = _load_few_step_run(run, net, loaders)
    return net, loaders


def few_step_run(run: Run) -> TrainedRun:
    """Open the few-step run that a subject's adapters are trained on, without its weights.

    Raise UserError if it has another net, or if its weights have changed since the subject's run began.
    """
    start = run.start
    assert start, "a run without one has no subject"
    source = load_run(start.source, device="cpu", reads_weights=False)
    _require_net(source.spec, start, run.net, run.path, (*_SAME_FUNCTION_FIELDS, *_SUBJECT_FIELDS))
    if start.sha256 not in (None, source.sha256):
        raise UserError(
            f"start.source: {start.source} has other weights ({source.weights}) than when this run was started: "
            "restore that checkpoint, or start a new run in another folder"
        )
    return source


def _load_few_step_run(run: Run, net: nn.Module, loaders: Loaders) -> Loaders:
    """Load the trained weights of the few-step run into a net (`net.lora.subject`).

    Return the loaders of parameters on the meta device. Raise UserError if the runs differ in heads or frozen weights.
    """
    source = few_step_run(run)
    source_weights = frozen.trained_state_dict(source.net)
    heads = {name for name in net.state_dict() if name.startswith(_HEAD_PREFIXES)}
    source_heads = {name for name in source.net.state_dict() if name.startswith(_HEAD_PREFIXES)}
    differing_heads = sorted(heads ^ source_heads)
    if differing_heads:
        raise UserError(
            f"start: {source.run_folder.path} and this run differ in {differing_heads[0]}: use the objective of that "
            f"run, objective.kind={source.spec.objective.kind}"
        )
    loaders = _take_weights(net, loaders, load_checked(source.file))
    source_spec = source.spec.net
    spec = run.net
    assert isinstance(source_spec, Pretrained)
    assert isinstance(spec, Pretrained)
    if source_spec.lora and spec.lora and source_spec.lora.frozen == spec.lora.frozen:
        assert source.checkpoint, "it was opened with its checkpoint's weights"
        frozen_digest = frozen.digest(net, loaders, without=source_weights)
        frozen.require(frozen_digest, source.checkpoint.facts.frozen, source.run_folder.path)
    return loaders


def init_from(run: Run, start: Start) -> tuple[nn.Module, Loaders]:
    """Build a run's net with the weights of `start`, matched by name; `start.heads` maps heads to source heads.

    Return the net and the loaders of parameters on the meta device. Heads, gauges and input embeddings that the source
    lacks keep their initialization. Raise UserError if other weights are missing or differ in shape, or if the source
    has another net or path, so that the same weights would compute another function.
    """
    net, loaders = build_deferred(run)
    if start.kind == "run":
        source_weights = _open_source_weights(start, run, net, loaders)
    else:
        from dumo.run import published

        source_weights = published.read(start, run.net, run.path, net)
    _require_source_heads(start, source_weights)

    # Match the weights by name and shape.
    frozen_names = frozen.frozen_weights(net).keys() & loaders.keys()
    weights = {name: x for name, x in net.state_dict().items() if name not in frozen_names}
    taken: dict[str, Tensor] = {}
    mismatches: list[str] = []
    for name, weight in weights.items():
        source_weight = source_weights.get(_source_name(name, start.heads))
        if source_weight is not None and source_weight.shape == weight.shape:
            taken[name] = source_weight
        elif not name.startswith(_OPTIONAL_PREFIXES):
            mismatches.append(f"{start.source} has no {name} of shape {tuple(weight.shape)}")
    for name in source_weights:
        if name not in weights and not name.startswith(_OPTIONAL_PREFIXES):
            mismatches.append(f"this one has no {name}")
    if mismatches:
        raise UserError(
            f"start: the networks differ, {mismatches[0]}: use a run with the same data shape and number of classes, "
            "or set start=null"
        )
    return net, _take_weights(net, loaders, taken)


def _require_source_heads(start: Start, source_weights: Mapping[str, Tensor]) -> None:
    """Raise UserError if `start.heads` names a head that the source does not have."""
    source_heads = dict.fromkeys(name.split(".")[1] for name in source_weights if name.startswith("heads."))
    for source_head in start.heads.values():
        if any(name.startswith(f"heads.{source_head}.") for name in source_weights):
            continue
        raise UserError(
            f"start.heads: {start.source} has no head '{source_head}'; its heads: {', '.join(source_heads) or 'none'}"
        )


def _source_name(name: str, heads: Mapping[str, str]) -> str:
    """Return the name of a weight in the source. `heads` is `start.heads`."""
    for head, source_head in heads.items():
        prefix = f"heads.{head}."
        if name.startswith(prefix):
            return f"heads.{source_head}." + name.removeprefix(prefix)
    return name


def _open_source_weights(start: Start, run: Run, net: nn.Module, loaders: Loaders) -> dict[str, Tensor]:
    """Read the weights of another run, except for the frozen pipeline weights, which both runs share.

    Raise UserError if that run has another net, path or frozen weights.
    """
    source = load_run(start.source, device="cpu", reads_weights=False)
    _require_net(source.spec, start, run.net, run.path, _SAME_FUNCTION_FIELDS)
    if isinstance(run.net, Pretrained) and source.checkpoint:
        frozen.require(frozen.digest(net, loaders), source.checkpoint.facts.frozen, source.run_folder.path)
    weights = {name: x for name, x in source.net.state_dict().items() if not x.is_meta}
    return weights | load_checked(source.file)


def _require_net(source: Run, start: Start, net: Net, path: FlowPath, free_fields: tuple[str, ...]) -> None:
    """Raise UserError if the net or path of a run differs in fields other than `free_fields`."""
    # Without input r, net.late has no effect.
    if "r" not in source.objective.needs.names:
        free_fields = (*free_fields, "net.late")
    all_differences = [*_part_differences("net", source.net, net), *_part_differences("path", source.path, path)]
    mismatches = [difference for difference in all_differences if difference.field not in free_fields]
    if mismatches:
        lines = "; ".join(map(str, mismatches))
        # Another kind of net or path cannot be fixed by setting fields.
        if any(difference.field in ("net", "path") for difference in mismatches):
            fix = "use a run of the same kind"
        else:
            fields = shlex.join(f"{difference.field}={yaml_text(difference.was)}" for difference in mismatches)
            fix = f"set {fields}"
        raise UserError(f"start: {start.source} has another net or path ({lines}): {fix}, or set start=null")


def _part_differences(part_name: str, was: Spec, now: Spec) -> list[Difference]:
    """Return the differing fields of two specs (`net` or `path`), or one difference if their kinds differ."""
    if type(was) is type(now):
        return [difference for difference in differences(was, now, f"{part_name}.") if not difference.is_free]
    return [Difference(part_name, was.model_dump(mode="json"), now.model_dump(mode="json"))]
