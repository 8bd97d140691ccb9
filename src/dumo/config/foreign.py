"""Names that other trainers give to what dumo has under another name, or in another unit.

`ours` answers a field of a run. Names that are
merely spelt otherwise for `dumo.config.suggestion`. Imports no torch.
"""

from dumo.runtime.door import option, settings

_ROWS = "images of a step, of all ranks together"
_STEPS = "steps: epochs times images over train.batch"
# Where data.kind is latents, data.root is the folder that dumo encode writes, and images have a part of their own.
_ROOT = "or data.images.root in a recipe of latents"
_PIXELS = "pixels; or data.images.side in a recipe of latents"
# What other trainers (diffusers, accelerate, lightning, EDM, torchtitan) call it: what to write here, and its unit.
FOREIGN: dict[str, tuple[str, str]] = {
    "adam_beta1": ("train.optimizer.betas", "[beta1, beta2]"),
    "adam_beta2": ("train.optimizer.betas", "[beta1, beta2]"),
    "adam_epsilon": ("train.optimizer.eps", ""),
    "adam_weight_decay": ("train.optimizer.weight_decay", ""),
    "allow_tf32": ("train.precision=tf32", ""),
    "arch": ("net.kind", ""),
    "batch_size": ("train.batch", _ROWS),
    "cfg_scale": ("sample.guide.scale", "1 is none"),
    "center_crop": ("data.crop", "adm, bicubic or none; or data.images.crop in a recipe of latents"),
    "checkpointing_steps": ("train.save_every", "steps"),
    "checkpoints_total_limit": ("train.keep", ""),
    "data_dir": ("data.root", _ROOT),
    "data_path": ("data.root", _ROOT),
    "dataset": ("data.root", f"and data.kind=images; {_ROOT}"),
    "dataset_name": ("data.root", f"a folder or file on this machine; {_ROOT}"),
    "ema_decay": ("train.ema", "[{decay: 0.9999}]"),
    "epochs": ("train.steps", _STEPS),
    "grad_clip": ("train.clip", "the norm of all gradients"),
    "gradient_accumulation_steps": ("train.micro_batch", "rows of a pass, not a number of passes"),
    "gradient_checkpointing": ("net.checkpoint", ""),
    "gradient_clip_val": ("train.clip", "the norm of all gradients"),
    "guidance_scale": ("sample.guide.scale", "1 is none"),
    "image_size": ("data.side", _PIXELS),
    "img_resolution": ("data.side", _PIXELS),
    "learning_rate": ("train.optimizer.lr", "of a step, however many images it has"),
    "lora_rank": ("net.lora.rank", ""),
    "lr": ("train.optimizer.lr", "of a step, however many images it has"),
    "lr_scheduler": ("train.schedule.kind", "constant, cosine or wsd"),
    "lr_warmup_steps": ("train.schedule.warmup", "steps"),
    "max_grad_norm": ("train.clip", "the norm of all gradients"),
    "max_steps": ("train.steps", "of the optimizer"),
    "max_train_steps": ("train.steps", "of the optimizer"),
    "mixed_precision": ("train.precision", "bf16, tf32 or fp32"),
    "num_epochs": ("train.steps", _STEPS),
    "num_inference_steps": ("sample.nfe", "a list: passes through the net"),
    "num_train_epochs": ("train.steps", _STEPS),
    "output_dir": ("out", "of dumo train: the run's folder"),
    "per_device_train_batch_size": ("train.batch", _ROWS),
    "pretrained_model_name_or_path": ("pipeline", "with net.kind=diffusers"),
    "random_flip": ("data.flip", "or data.images.flip in a recipe of latents"),
    "rank": ("net.lora.rank", ""),
    "resolution": ("data.side", _PIXELS),
    "resume_from_checkpoint": ("the same command again", "which goes on where it stopped"),
    "steps": ("train.steps", "of the optimizer"),
    "train_batch_size": ("train.batch", _ROWS),
    "train_data_dir": ("data.root", _ROOT),
    "use_8bit_adam": ("train.optimizer.kind", "adamw8bit"),
    "use_ema": ("train.ema", "[{decay: 0.9999}]"),
    "warmup_steps": ("train.schedule.warmup", "steps"),
    "weight_decay": ("train.optimizer.weight_decay", ""),
}


def ours(name: str, *, as_option: bool = False) -> str | None:
    """What to write for a field of another trainer; None for a name that none has.

    `as_option`: what to give a command, or a function of Python, instead of a field in a file.
    """
    key = foreign_key(name)
    if key not in FOREIGN:
        return None
    field, unit = FOREIGN[key]
    if field == "out":
        field = option("out")
    elif as_option and "." in field:
        field = settings(field if "=" in field else f"{field}=...")
    return foreign_hint(field, unit)


def foreign_key(name: str) -> str:
    """A name as the tables of foreign names have it: without dashes before it, with underscores between its words."""
    return name.lower().lstrip("-").replace("-", "_")


def foreign_hint(what: str, unit: str = "") -> str:
    """The hint that names what to write, and its unit, if it has one."""
    return f"here it is {what} ({unit})" if unit else f"here it is {what}"
