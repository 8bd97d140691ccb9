"""What the first ten minutes on one GPU must settle, in order of value.

    python tools/gpu.py                     all parts that are not done yet, in runs/gpu/results.json
    python tools/gpu.py kernel memory       these parts, again
    python tools/gpu.py --list              the parts, with their limits of seconds
    python tools/gpu.py --smoke             everything tiny, on a CPU: whether the parts run

A part is a function that takes a `Setting` and yields rows; `PARTS`, near the end, lists them in order of value. The
order of events:

1. `main` goes through the parts, and skips those that are done on this device.
2. `run_part` starts this file again for one part, in a process of its own with a limit of seconds: so a part that
   crashes or hangs does not end the others.
3. In that process `make_part` writes each row to a file as it comes.
4. Back in `main`, the rows go into results.json and are printed as a table.

It runs in a clone with nothing installed but torch, numpy, safetensors, pyarrow and what `import dumo` needs; int8 also
needs diffusers, peft and bitsandbytes, commands bitsandbytes. Parts import what they need when they run: a library that
is missing fails one part alone.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SRC = Path(__file__).resolve().parent.parent / "src"
sys.path.insert(0, str(SRC))  # parts import this tree's dumo, whatever is installed

if TYPE_CHECKING:
    from dumo.config.spec import Run

# Values by column: those of results.json and of the tables. "... off" is a relative error, "F" one forward pass.
Row = dict[str, Any]

LATENTS = (4, 32, 32)  # of ImageNet at 256 pixels, by SD-VAE
BATCH = 64  # rows of a pass of XL/2, as the recipes have them
TINY_NET = ["net.width=32", "net.depth=2", "net.attention=2"]
# Weights and moments in few bits, as recipe qwen-image has them.
IN_16_BITS = ["train.optimizer.kind=adamw8bit", "train.weights=bfloat16", "train.precision=bf16", "train.ema=[]"]
TINY_LATENTS = (4, 8, 8)
TINY_BATCH = 4
KERNELS: dict[str, SDPBackend | None] = {  # of attention, by the names that rows have
    "torch's choice": None,
    "math": SDPBackend.MATH,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
LOGIT_STDS = (1.0, 10.0)  # standard deviations of attention's scores: fresh nets, and late in training
TOTAL_SECONDS = 600.0  # of all parts together
SAVING_SECONDS = 30.0  # before its limit, in which a training saves a checkpoint and ends by itself: ours


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how large."""

    device: torch.device
    smoke: bool  # everything tiny
    seconds: float = TOTAL_SECONDS  # after which the part's process is ended

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a latent image, without the batch."""
        return TINY_LATENTS if self.smoke else LATENTS

    @property
    def batch(self) -> int:
        """The rows of a pass."""
        return TINY_BATCH if self.smoke else BATCH

    @property
    def compile(self) -> str:
        """The value of train.compile in parts that compile; "blocks" takes a minute on a CPU."""
        return "none" if self.smoke else "blocks"

    @property
    def rounds(self) -> int:
        """How often a piece of work is timed."""
        return 1 if self.smoke else 5

    def fields(self, *fields: str) -> list[str]:
        """Fields to set in a recipe: these, and in a smoke run those of a tiny net, too."""
        return [*fields, *TINY_NET] if self.smoke else [*fields]


@dataclass(frozen=True)
class Part:
    """A question to the GPU."""

    seconds: int  # after which its process is ended
    question: str
    rows: Callable[[Setting], Iterator[Row]]


# ----------------------------------------------------------------------------------------------- what several parts use


def _load_run(recipe: str, fields: list[str]) -> "Run":
    """A recipe's run with these fields set, and with what the disk says of it."""
    from dumo.config.load import load
    from dumo.run.resolve import resolve

    return resolve(load(recipe, fields))


def _relative_error(value: Tensor, exact: Tensor) -> float:
    """The l2 norm of the error over that of the exact value."""
    return float((value.to(exact) - exact).norm() / exact.norm())


def _median_seconds(work: Callable[[], object], setting: Setting) -> float:
    """The median time of a piece of work over `setting.rounds`, after some to warm up."""
    from dumo.runtime.stopwatch import Stopwatch

    return Stopwatch(setting.device).time_rounds([work], setting.rounds).median().item()


def _attention_backend(backend: SDPBackend | None) -> AbstractContextManager[object]:
    """A context in which torch takes this kernel for attention; None leaves the choice to torch."""
    return nullcontext() if backend is None else sdpa_kernel(backend)


def _dtype_name(dtype: torch.dtype) -> str:
    """For rows, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _set_options(fields: list[str]) -> list[str]:
    """The options of a `dumo` command that set these fields."""
    return [f"--set={field}" for field in fields]


# ------------------------------------------------------------------------------------ the kernel of attention's tangent


def attention_kernel(setting: Setting) -> Iterator[Row]:
    """Attention's tangent against float64, and its time over that of attention itself."""
    shapes = {  # batch, heads, tokens, width of a head
        "DiT-XL/2": (16, 16, 256, 72),
        "SD 3, 1024 tokens": (4, 24, 1024, 64),
        "4096 tokens": (1, 16, 4096, 128),
    }
    if setting.smoke:
        shapes = {"tiny": (2, 2, 16, 8)}
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            for logit_std in LOGIT_STDS:
                row: Row = {"heads": name, "dtype": _dtype_name(dtype), "logit std": logit_std}
                yield row | _attention_row(shape, dtype, logit_std, setting)


def _attention_row(shape: tuple[int, ...], dtype: torch.dtype, logit_std: float, setting: Setting) -> Row:
    """Errors and times of attention and its tangent on random values of one shape and dtype."""
    from dumo.autodiff import attention

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(setting.device, dtype) for _ in range(6)]
    q, k, v, dq, dk, dv = values
    q = q * logit_std
    out, log_sum = attention.attend(q, k, v)
    tangent = attention.tangent(q, k, v, dq, dk, dv, out, log_sum)

    def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    primals = tuple(x.double() for x in (q, k, v))
    tangents = tuple(x.double() for x in (dq, dk, dv))
    exact_out, exact_tangent = torch.func.jvp(exact_attention, primals, tangents)

    attention_seconds = _median_seconds(lambda: attention.attend(q, k, v), setting)
    tangent_seconds = _median_seconds(lambda: attention.tangent(q, k, v, dq, dk, dv, out, log_sum), setting)
    return {
        "O off": _relative_error(out, exact_out),
        "dO off": _relative_error(tangent, exact_tangent),
        "attention ms": 1e3 * attention_seconds,
        "tangent ms": 1e3 * tangent_seconds,
        "tangent / attention": tangent_seconds / attention_seconds,
    }


# ---------------------------------------------------------------------------------------------- du/dt of the dual slope


def dual_slope(setting: Setting) -> Iterator[Row]:
    """The error of du/dt on a DiT of width 768 through each of attention's kernels, and checkpointed."""
    run = _slope_run(setting, checkpoint=False)
    for name, backend in KERNELS.items():
        yield from _slope_rows(run, {"kernel": name, "checkpoint": False}, backend, "none", setting)
    checkpointed_run = _slope_run(setting, checkpoint=True)
    row: Row = {"kernel": "torch's choice", "checkpoint": True}
    yield from _slope_rows(checkpointed_run, row, None, "none", setting)


def compiled_slope(setting: Setting) -> Iterator[Row]:
    """The error of du/dt with compiled blocks, checkpointed or not."""
    for checkpoint in (False, True):
        run = _slope_run(setting, checkpoint=checkpoint)
        row: Row = {"kernel": "the compiler's", "checkpoint": checkpoint}
        yield from _slope_rows(run, row, None, setting.compile, setting)


def _slope_run(setting: Setting, *, checkpoint: bool) -> "Run":
    """B/2, cut to four blocks, with the dual slope."""
    fields = ["net.depth=4", "objective.slope={kind: dual}", f"train.batch={setting.batch}"]
    fields.append(f"net.checkpoint={str(checkpoint).lower()}")
    return _load_run("imagenet256-b2", setting.fields(*fields))


def _slope_rows(run: "Run", row: Row, backend: SDPBackend | None, compiled: str, setting: Setting) -> Iterator[Row]:
    """`row` with the error of du/dt, once for each precision. Where this machine lacks the kernel, the row says so."""
    from dumo.lab import step_bench

    prepared = step_bench.prepare(run, setting.shape, setting.device, compiled)
    for precision in ("fp32", "bf16"):
        columns: Row = {"compiled": compiled, "precision": precision}
        try:
            with _attention_backend(backend):
                judged = prepared.judge(step_bench.StepRow("dual", precision, compiled), run.objective)
            columns["du/dt off"] = judged.error
        except RuntimeError as error:  # torch's, where no kernel takes these numbers
            columns["refused"] = _first_line(error)
        yield row | columns


# -------------------------------------------------------------------------- dumo.jvp and dumo.Flow in a user's own loop


class AttentionNet(torch.nn.Module):
    """A user's own network, with fused attention and dropout: x (b, tokens, width) and t (b,) in, v and u out."""

    def __init__(self, width: int = 64, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.time = torch.nn.Linear(1, width)
        self.into = torch.nn.Linear(width, 3 * width)
        self.dropout = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h = x + self.time(t[:, None])[:, None]
        q, k, v = self.into(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.dropout(h)).chunk(2, -1)


def user_loop(setting: Setting) -> Iterator[Row]:
    """du/dt by torch.func.jvp and dumo.jvp through each kernel; then a Flow's loop, and what keyed draws cost it."""
    import dumo

    jvps: dict[str, Callable[..., Any]] = {"torch.func.jvp": torch.func.jvp, "dumo.jvp": dumo.jvp}
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, backend in KERNELS.items():
            for call, jvp in jvps.items():
                row: Row = {"call": call, "kernel": kernel, "dtype": _dtype_name(dtype)}
                try:
                    with _attention_backend(backend):
                        row["du/dt off"] = _jvp_error(jvp, dtype, setting)
                except Exception as error:  # whatever torch raises is what the row shows
                    row["refused"] = _first_line(error)
                yield row
    for dropout in (0.0, 0.1):
        yield _flow_row(dropout, setting)


def _jvp_error(jvp: Callable[..., Any], dtype: torch.dtype, setting: Setting) -> float:
    """The relative error of u's derivative along (v, 1), against float64 on the CPU."""
    torch.manual_seed(0)
    net = AttentionNet()
    x, v = torch.randn(2, setting.batch, 32, 64)
    t = torch.rand(setting.batch)
    exact_net = AttentionNet().double()
    exact_net.load_state_dict(net.state_dict())
    primals = (x, t)
    tangents = (v, torch.ones_like(t))
    with sdpa_kernel(SDPBackend.MATH):
        exact_primals = tuple(value.double() for value in primals)
        exact_tangents = tuple(value.double() for value in tangents)
        _, (_, exact) = torch.func.jvp(exact_net, exact_primals, exact_tangents)

    net = net.to(setting.device, dtype)
    primals = tuple(value.to(setting.device, dtype) for value in primals)
    tangents = tuple(value.to(setting.device, dtype) for value in tangents)
    _, (_, du_dt) = jvp(net, primals, tangents)
    return _relative_error(du_dt.cpu(), exact)


def _flow_row(dropout: float, setting: Setting) -> Row:
    """Steps of a user's own loop: how du/dt is taken, the first and the last loss, and a step's time."""
    import dumo

    torch.manual_seed(0)
    flow = dumo.Flow(AttentionNet(dropout=dropout).to(setting.device), "dumo")
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
    x = torch.randn(setting.batch, 32, 64, device=setting.device)
    losses: list[float] = []

    def step() -> None:
        loss = flow(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    seconds = _median_seconds(step, setting)
    return {
        "flow with dropout": dropout,
        "du/dt": flow.slope_reason,
        "ms": 1e3 * seconds,
        "first loss": losses[0],
        "last loss": losses[-1],
        "samples": list(flow.sample(4, nfe=2).shape),
    }


# ------------------------------------------------------ a guided step of XL/2, and of DiTs with other numbers of tokens


def _step_rows(
    recipe: str,
    slopes: list[str],
    setting: Setting,
    *,
    precisions: list[str],
    fields: list[str] | None = None,
    compiled: str = "none",
) -> Iterator[Row]:
    """A training step by each slope, next to the plain step of flow matching, whose slope is "none"."""
    from dumo.lab import step_bench

    run = _load_run(recipe, setting.fields(f"train.batch={setting.batch}", *(fields or [])))
    report = step_bench.measure(
        run,
        slopes=slopes,
        precisions=precisions,
        shape=setting.shape,
        rounds=setting.rounds,
        device=str(setting.device),
        compile=compiled,
    )
    for measured in report["rows"]:
        row: Row = {
            "step": recipe,
            "slope": measured["slope"],
            "precision": measured["precision"],
            "compiled": measured["compile"],
        }
        if measured["refused"]:
            row["refused"] = measured["refused"]
        if measured["milliseconds"] is not None:
            row |= {
                "images/s": measured["images_per_second"],
                "ms": measured["milliseconds"],
                "F counted": measured["units_counted"],
                "F by time": measured["units_timed"],
                "peak GB": (measured["bytes_before"] + measured["bytes"]) / 1e9,
                "share of peak": measured["share_of_peak"],
                "du/dt off": measured["error"],
            }
        yield row


def xl2_eager(setting: Setting) -> Iterator[Row]:
    """A guided step of XL/2 in bf16, not compiled: dual, central and torch.func.jvp."""
    yield from _step_rows("imagenet256-xl2-dual", ["dual", "central", "jvp"], setting, precisions=["bf16"])


def xl2_compiled(setting: Setting) -> Iterator[Row]:
    """A guided step of XL/2 in bf16, with compiled blocks."""
    yield from _step_rows("imagenet256-xl2-dual", ["dual"], setting, precisions=["bf16"], compiled=setting.compile)


def xl2_routed(setting: Setting) -> Iterator[Row]:
    """Half of the tokens past the middle blocks, not compiled and compiled."""
    fields: list[str] = []
    if setting.smoke:
        fields = ["net.route.first=0", "net.route.last=1"]  # of two blocks
    for compiled in dict.fromkeys(("none", setting.compile)):
        yield from _step_rows(
            "imagenet256-xl2-routed",
            ["dual"],
            setting,
            precisions=["bf16"],
            fields=fields,
            compiled=compiled,
        )


def xl2_fp32(setting: Setting) -> Iterator[Row]:
    """As the paper has it: a central difference in fp32, and what TF32 makes of it."""
    precisions = ["fp32"] if setting.smoke else ["tf32", "fp32"]
    yield from _step_rows("imagenet256-xl2", ["central", "dual"], setting, precisions=precisions)


def b1(setting: Setting) -> Iterator[Row]:
    """B/1: 1,024 tokens, whose attention is a third of a pass."""
    fields = ["net.patch=1"]
    slopes = ["dual", "central", "jvp"]
    yield from _step_rows("imagenet256-b2", slopes, setting, precisions=["bf16"], fields=fields)
    yield from _step_rows(
        "imagenet256-b2", ["dual"], setting, precisions=["bf16"], fields=fields, compiled=setting.compile
    )


# ------------------------------------------------------------------------------------ memory as planned and as measured


def memory(setting: Setting) -> Iterator[Row]:
    """The memory of a training step, optimizer and averages included: what `dumo dry` plans, and what is taken."""
    cases = {  # rows of a micro-batch and fields, by a recipe's name and more words
        "imagenet256-xl2-dual": (BATCH, ["train.compile=none"]),
        "imagenet256-xl2-dual compiled": (BATCH, []),
        "imagenet256-xl2-dual checkpointed": (BATCH, ["net.checkpoint=true", "train.compile=none"]),
        "imagenet256-b2": (256, []),
    }
    if setting.smoke:
        cases = {"digits": (8, [])}
    for name, (rows, fields) in cases.items():
        recipe, *_ = name.split()
        row: Row = {"run": name, "rows": rows}
        yield row | _dry_row(recipe, rows, setting.fields(*fields), setting.device)


def _dry_row(recipe: str, rows: int, fields: list[str], device: torch.device) -> Row:
    """What `dumo dry --rows` says: memory planned and taken, and the step's time."""
    options = _set_options([f"train.micro_batch={rows}", *fields])
    process = _run_dumo("dry", recipe, "--rows", str(rows), "--device", str(device), "--json", *options)
    if process.returncode:
        return {"failed": last_error_line(process.stderr)}
    report = json.loads(process.stdout)
    planned = report["memory"]["total"]
    measured = report["step"]["peak_bytes"]
    return {
        "planned GB": planned / 1e9,
        "measured GB": measured / 1e9,
        "measured / planned": measured / planned,
        "images/s": report["step"]["images_per_second"],
    }


# ------------------------------------------------------------------------------------------------------------- sampling


def sampling(setting: Setting) -> Iterator[Row]:
    """Latency of one sample and of a batch at 1, 2 and 4 passes of XL/2, not decoded."""
    from dumo.lab import sample_bench

    for batch in (1, setting.batch):
        run = _load_run("imagenet256-xl2-dual", setting.fields())
        report = sample_bench.measure(
            run,
            nfes=(1, 2, 4),
            precisions=("bf16",),
            shape=setting.shape,
            batch=batch,
            rounds=setting.rounds,
            device=str(setting.device),
        )
        for row in report["rows"]:
            rate = row["images_per_second"]
            yield {
                "batch": batch,
                "NFE": row["nfe"],
                "solver": row["solver"],
                "images/s": rate,
                "ms a batch": 1e3 * batch / rate,
            }


# -------------------------------------------------------------------------------------------- pretrained models in int8


def int8(setting: Setting) -> Iterator[Row]:
    """A step of a LoRA over random weights in int8 and bf16: SD 1.5's U-Net and SD 3's transformer."""
    models = {  # recipe, kind of path and rows of a batch, by the pipeline's name
        "sd15": ("sd15-lora", "diffusion", 16),
        "sd3-medium": ("sd3-lora", "linear", 16),
    }
    if setting.smoke:
        models = {
            "unet-small": ("cifar10-latents", "diffusion", 2),
            "sd3-small": ("cifar10-latents", "linear", 2),
        }
    for pipeline, (recipe, path, rows) in models.items():
        for frozen in ("int8", "bfloat16"):
            lora = f"{{rank: 64, frozen: {frozen}}}"
            net = f"net={{kind: diffusers, weights: drawn, checkpoint: true, lora: {lora}, texts: {{kind: codes}}}}"
            fields = [f"pipeline={pipeline}", net, f"path.kind={path}", "objective.slope={kind: dual}"]
            fields += ["train.precision=bf16", "train.optimizer={kind: adamw, lr: 1e-4}", "train.ema=[]"]
            if not setting.smoke:
                fields.append("data.images.captions=null")
            row: Row = {"model": pipeline, "base": frozen, "rows": rows}
            yield row | _lora_row(_load_run(recipe, fields), rows, setting)


def _lora_row(run: "Run", rows: int, setting: Setting) -> Row:
    """Time and memory of a LoRA's step in bf16: two steps to warm up, and three that are timed."""
    from dumo.plan import rehearsal
    from dumo.runtime.device import peak_bytes
    from dumo.runtime.random import random_batch

    classes = 10  # any number
    shape = run.data.shape
    net = run.net.build(run.objective.needs, shape, classes).to(setting.device)
    x, c = random_batch("gpu", rows, shape, classes)
    batch = (x.to(setting.device), c.to(setting.device))
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    step = rehearsal.make_step(run, net, batch, warm_up=2, rounds=3)
    seconds = step.pass_seconds + step.update_seconds
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "images/s": rows / seconds,
        "ms": 1e3 * seconds,
        "peak GB": peak_bytes(setting.device) / 1e9,
        "loss": step.record.loss,
    }


# ------------------------------------------------------------------------------ the command line, from data to a report


def command_line(setting: Setting) -> Iterator[Row]:
    """Each command of a run on digits, and its seconds; samples of the GPU against the CPU's."""
    steps = 4 if setting.smoke else 200
    with TemporaryDirectory() as folder:
        run = f"{folder}/digits"
        device = ["--device", str(setting.device)]
        options = _set_options(setting.fields(f"train.steps={steps}"))
        yield _command_row("train", "dumo-best", "--out", run, *device, *options)
        yield _command_row("train", run, "--set", f"train.steps={2 * steps}", *device)
        if not setting.smoke:
            options += _set_options(["train.compile=blocks", "train.precision=bf16"])
            yield _command_row("train", "dumo-best", "--out", f"{folder}/compiled", *device, *options)
        in_16_bits = setting.fields(f"train.steps={2 * steps}", *IN_16_BITS)
        yield _command_row("train", "digits", "--out", f"{folder}/in-16-bits", *device, *_set_options(in_16_bits))
        yield _command_row("evaluate", run, "--nfe", "1", *device)
        yield _command_row("report", run, *device)
        difference = _sample_difference(run, setting.device)
        yield {"command": "a sample's largest difference between devices", "difference": difference}


def _command_row(*words: str) -> Row:
    """Run `dumo WORDS`, and time it."""
    began = time.monotonic()
    process = _run_dumo(*words)
    row: Row = {"command": f"dumo {words[0]}", "seconds": time.monotonic() - began}
    if process.returncode:
        row["failed"] = f"exit code {process.returncode}: {last_error_line(process.stderr)}"
    return row


def _sample_difference(run: str, device: torch.device) -> float:
    """The largest difference between samples made on this device and on the CPU.

    The noise is the same, so the difference is rounding alone.
    """
    import dumo

    samples = dumo.load(run, device=str(device)).sample(count=4, nfe=1, seed=0)
    cpu_samples = dumo.load(run, device="cpu").sample(count=4, nfe=1, seed=0)
    return float((samples.cpu() - cpu_samples.cpu()).abs().max())


def _run_dumo(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `dumo WORDS` of this tree in a process of its own, to its end."""
    return subprocess.run(_dumo_command(*words), capture_output=True, text=True, env=_dumo_environment(), check=False)


def _dumo_command(*words: str) -> list[str]:
    """The words of the command that runs `dumo WORDS`."""
    return [sys.executable, "-P", "-m", "dumo", *words]


def _dumo_environment() -> dict[str, str]:
    """An environment in which that command is this tree's, whatever is installed."""
    folders = [str(SRC)]
    folders += [folder for folder in sys.path if folder]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


# ----------------------------------------------------------------------------------------------------------- a real run


def overnight(setting: Setting) -> Iterator[Row]:
    """`dumo train cifar10-overnight` for the seconds that are left.

    It needs the cache that `dumo encode cifar10-latents` makes. Its run is kept in runs/, and the next call resumes it.
    """
    folder = Path("runs/cifar10-overnight")
    recipe = "cifar10-overnight"
    fields: list[str] = []
    if setting.smoke:
        recipe = "digits"
        fields = setting.fields("train.steps=2", "train.batch=16", "train.log_every=1", "evaluate.every=0")
        folder = Path(TemporaryDirectory().name)  # a free name: the folder itself is gone at once
    words = ["train", recipe, "--out", str(folder), "--device", str(setting.device), *_set_options(fields)]
    training = subprocess.Popen(_dumo_command(*words), env=_dumo_environment(), stderr=subprocess.PIPE, text=True)
    try:
        _, stderr = training.communicate(timeout=max(1.0, setting.seconds - SAVING_SECONDS))
    except subprocess.TimeoutExpired:
        training.terminate()  # it saves a checkpoint, from which the next call resumes
        _, stderr = training.communicate()
    log = folder / "metrics.jsonl"
    if not log.exists():
        yield {"run": recipe, "failed": last_error_line(stderr)}
        return
    *_, last_line = log.read_text(encoding="utf-8").splitlines()
    last_row = json.loads(last_line)
    yield {"run": recipe, "steps": last_row["step"], "loss": last_row["loss"]}


# ------------------------------------------------------------------------------------ the parts, and a process for each

PARTS = {  # in order of value
    "kernel": Part(60, "attention's tangent against float64, and its time", attention_kernel),
    "slope": Part(60, "du/dt through attention's kernels, and checkpointed", dual_slope),
    "loop": Part(60, "dumo.jvp beside torch.func.jvp through each kernel, and a user's own loop", user_loop),
    "xl2": Part(120, "a guided step of XL/2 in bf16, beside flow matching and jvp", xl2_eager),
    "memory": Part(150, "memory as planned and as measured", memory),
    "sample": Part(60, "latency at 1, 2 and 4 passes", sampling),
    "int8": Part(180, "LoRA steps of SD 1.5 and SD 3 over int8", int8),
    "xl2-compiled": Part(300, "a guided step of XL/2 in bf16, with compiled blocks", xl2_compiled),
    "slope-compiled": Part(120, "du/dt with compiled blocks, checkpointed or not", compiled_slope),
    "xl2-routed": Part(120, "half of the tokens past the middle blocks", xl2_routed),
    "b1": Part(120, "B/1, 1,024 tokens", b1),
    "xl2-fp32": Part(90, "the paper's central difference in fp32 and TF32", xl2_fp32),
    "commands": Part(150, "the command line on digits, from data to a report", command_line),
    "overnight": Part(600, "cifar10-overnight for as long as there is", overnight),
}


def make_part(name: str, file: Path, setting: Setting) -> None:
    """Make a part in this process, and write its rows to a file as they come, each a line."""
    with file.open("w", encoding="utf-8") as out:
        for row in PARTS[name].rows(setting):
            out.write(json.dumps(row) + "\n")
            out.flush()


def run_part(name: str, smoke: bool, device: str, seconds: float) -> dict[str, Any]:
    """Make a part in a process of its own, which is killed after these seconds.

    Returns its state ("done", or why not), the seconds that it took, and its rows: also those before a failure.
    """
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, __file__, name, "--rows-to", str(file)]
        command += ["--device", device, "--seconds", str(seconds)]
        if smoke:
            command.append("--smoke")
        part = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, stderr = part.communicate(timeout=seconds)
            state = "done" if part.returncode == 0 else f"failed: {last_error_line(stderr)}"
        except subprocess.TimeoutExpired:
            os.killpg(part.pid, signal.SIGKILL)  # with what it has started
            part.communicate()
            state = f"stopped after {seconds:.0f} s"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    failures = [row["failed"] for row in rows if "failed" in row]
    if state == "done" and failures:
        state = f"failed: {failures[0]}"
    return {"state": state, "seconds": time.monotonic() - began, "rows": rows}


def last_error_line(stderr: str) -> str:
    """Of what a program wrote to stderr, the last line that names an error; else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if not lines:
        return "it said nothing"
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported|error)\b", line)]
    return errors[-1] if errors else lines[-1]


def _first_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _machine_facts(device: str) -> Row:
    """What a reader of the numbers must know about the machine."""
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__, "date": date.today().isoformat()}


# ----------------------------------------------------------------------------------------------------- the command line


def _cell(value: object) -> str:
    """A value as a cell of a table: three digits, and commas between thousands."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _print_part(name: str, result: dict[str, Any]) -> None:
    """Print a part's rows as a table of Markdown."""
    print(f"\n{name}: {result['state']}, {result['seconds']:.0f} s\n")
    columns = list(dict.fromkeys(column for row in result["rows"] for column in row))
    if not columns:
        return
    print("|" + "|".join(columns) + "|")
    print("|" + "---|" * len(columns))
    for row in result["rows"]:
        cells = [_cell(row.get(column, "")) for column in columns]
        print("|" + "|".join(cells) + "|", flush=True)


def _print_list() -> None:
    """Print the parts in order, each with its limit."""
    for name, part in PARTS.items():
        print(f"{name:14} {part.seconds:4} s at most  {part.question}")


def _parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help="parts to make again")
    parser.add_argument("--list", action="store_true", help="show the parts and end")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="of all parts together (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, help="folder of results.json (default: runs/gpu, in a smoke run runs/gpu-smoke)"
    )
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)  # in the process of a part
    return parser.parse_args()


def main() -> int:
    """Make the parts that are asked for; return 0 if all are done then, 1 if not, 2 without a GPU."""
    arguments = _parse_arguments()
    if arguments.list:
        _print_list()
        return 0
    device = "cpu" if arguments.smoke else arguments.device
    if device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU: see nvidia-smi, or give --smoke to try everything on a CPU", file=sys.stderr)
        return 2

    # in the process of a part
    if arguments.rows_to:
        setting = Setting(torch.device(device), arguments.smoke, arguments.seconds)
        make_part(arguments.parts[0], arguments.rows_to, setting)
        return 0

    # earlier results
    folder = arguments.out or Path("runs/gpu-smoke" if arguments.smoke else "runs/gpu")
    file = folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    machine = _machine_facts(device)

    # a process for each part
    deadline = time.monotonic() + arguments.seconds
    all_done = True
    for name, part in PARTS.items():
        if arguments.parts:
            is_wanted = name in arguments.parts
        else:
            earlier = results.get(name, {})
            is_done = earlier.get("state") == "done" and earlier["machine"]["device"] == machine["device"]
            is_wanted = not is_done
        if not is_wanted:
            continue
        seconds_left = deadline - time.monotonic()
        if seconds_left < 1:
            print(f"\n{name}: no time left; the same command makes it")
            all_done = False
            continue
        result = run_part(name, arguments.smoke, device, min(part.seconds, seconds_left))
        all_done = all_done and result["state"] == "done"
        results[name] = {"machine": machine, **result}
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        _print_part(name, result)
    return 0 if all_done else 1


if __name__ == "__main__":
    sys.exit(main())
