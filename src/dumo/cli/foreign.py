"""Options and commands that other programs have: what to type here.

`our_option` answers an option of a command, `near_option` one that is spelt nearly so, `our_command` a command. Fields
of a run that other trainers name otherwise are in `dumo.config.foreign`. Imports no torch.
"""

from collections.abc import Collection
from difflib import get_close_matches

from dumo.config.foreign import FOREIGN, foreign_hint, foreign_key, ours

# By command, what other programs call its options: what to type here, and its unit.
FOREIGN_OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "train": {
        "config": ("dumo train FILE", "a YAML file, without an option"),
        "data": ("dumo train FOLDER", "of images, without an option"),
        "fp16": ("--set train.precision=bf16", ""),
        "bf16": ("--set train.precision=bf16", ""),
        "gpu": ("--device cuda", "with several GPUs torchrun --nproc-per-node N -m dumo train"),
        "gpus": ("torchrun --nproc-per-node N -m dumo train", "the ranks share every batch; one GPU needs no option"),
        "devices": ("torchrun --nproc-per-node N -m dumo train", "the ranks share every batch"),
        "nproc_per_node": ("torchrun --nproc-per-node N -m dumo train", "the ranks share every batch"),
        "name": ("--out", "the run's folder"),
        "outdir": ("--out", "the run's folder"),
        "output": ("--out", "the run's folder"),
        "resume": ("the same command again", "which goes on where it stopped; or dumo train RUN"),
        "wandb": ("--track wandb", ""),
    },
    "sample": {
        "batch_size": ("--count", "how many samples; they are made in batches that fit"),
        "cfg": ("--set sample.guide.scale=...", "1 is none"),
        "checkpoint": ("--weights", "a safetensors file; without it the first average of the run's last checkpoint"),
        "ckpt": ("--weights", "a safetensors file; without it the first average of the run's last checkpoint"),
        "class": ("--labels", "by name or number, e.g. 3,5"),
        "class_labels": ("--labels", "by name or number, e.g. 3,5"),
        "classes": ("--labels", "by name or number, e.g. 3,5"),
        "model": ("dumo sample RUN", "a run's folder, without an option"),
        "n": ("--count", "how many samples"),
        "n_samples": ("--count", "how many samples"),
        "num_images": ("--count", "how many samples"),
        "num_images_per_prompt": ("--count", "how many samples"),
        "num_inference_steps": ("--nfe", "passes through the net, e.g. 4, or 1,2,4"),
        "num_samples": ("--count", "how many samples"),
        "num_steps": ("--nfe", "passes through the net, e.g. 4, or 1,2,4"),
        "outdir": ("--out", "a folder"),
        "output": ("--out", "a folder"),
        "output_dir": ("--out", "a folder"),
        "resolution": ("--size", "of a run on buckets; others have one size"),
        "sampler": ("--solver", "euler, heun, restart, hop or hermite"),
        "scheduler": ("--solver", "euler, heun, restart, hop or hermite"),
        "steps": ("--nfe", "passes through the net, e.g. 4, or 1,2,4"),
    },
    "evaluate": {
        "metrics": ("dumo evaluate RUN", "by all metrics of the run's protocol; --all prints them"),
        "num_samples": ("--set evaluate.protocol.samples=...", ""),
        "real": ("--against", "with --images"),
        "steps": ("--nfe", "passes through the net, e.g. 1,2"),
    },
    "demo": {"share": ("an ssh tunnel, which dumo demo prints", "the page is for this machine alone")},
    "export": {"format": ("--to", "diffusers, lora, comfyui or safetensors"), "output": ("dumo export RUN OUT", "")},
}
_DEVICES = {  # of every command that has a device
    "cpu": ("--device cpu", ""),
    "cuda": ("--device cuda", ""),
    "gpu": ("--device cuda", "without it the GPU is taken where there is one"),
}
# Values of --device in other programs: what to type here.
FOREIGN_DEVICES = {"gpu": "cuda", "metal": "mps", "nvidia": "cuda", "tpu": "xla"}
# Commands of other programs: what to type here.
FOREIGN_COMMANDS = {
    "benchmark": "dumo bench",
    "check": "dumo doctor",
    "convert": "dumo export",
    "datasets": "dumo data",
    "download": "dumo data, which says how to get each",
    "eval": "dumo evaluate",
    "finetune": "dumo train",
    "fit": "dumo train",
    "generate": "dumo sample",
    "help": "dumo --help",
    "infer": "dumo sample",
    "inference": "dumo sample",
    "info": "dumo show",
    "init": "dumo show digits --yaml > my.yaml",
    "list": "dumo recipes",
    "ls": "dumo recipes",
    "metrics": "dumo evaluate",
    "models": "dumo recipes",
    "new": "dumo show digits --yaml > my.yaml",
    "plan": "dumo dry",
    "push": "dumo export RUN OUT --push OWNER/NAME",
    "resume": "dumo train RUN",
    "run": "dumo train",
    "serve": "dumo demo",
    "test": "dumo evaluate",
    "tune": "dumo train",
    "ui": "dumo demo",
    "version": "dumo --version",
    "-v": "dumo --version",
    "-V": "dumo --version",
}


def our_option(command: str, name: str, own_options: Collection[str]) -> str | None:
    """What to type for an option of another program, which begins with -; None where no program is known to have it.

    `own_options` are the command's. With --set an option may be a field, and with --device it may be a device.
    """
    key = foreign_key(name)
    options = FOREIGN_OPTIONS.get(command, {})
    if key in options:
        return foreign_hint(*options[key])
    if key in _DEVICES and "--device" in own_options:
        return foreign_hint(*_DEVICES[key])
    if "--set" not in own_options:
        return None
    return ours(name, as_option=True) if key in FOREIGN else None


def near_option(command: str, name: str, own_options: Collection[str]) -> str | None:
    """As `our_option`, for an option whose name is near to one that `our_option` knows."""
    foreign_names = [*FOREIGN_OPTIONS.get(command, {})]
    if "--device" in own_options:
        foreign_names += _DEVICES
    if "--set" in own_options:
        foreign_names += FOREIGN
    near_names = get_close_matches(foreign_key(name), foreign_names, n=1, cutoff=0.8)
    return our_option(command, near_names[0], own_options) if near_names else None


def our_command(name: str) -> str | None:
    """What to type for a command, or an option without one, of another program; None where none is known to have it."""
    command = FOREIGN_COMMANDS.get(name) or FOREIGN_COMMANDS.get(name.lower())
    return command and f"here it is {command}"
