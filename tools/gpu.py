"""What the first ten minutes on one GPU must settle, in order of value.

    python tools/gpu.py                     all parts that are not done yet, in runs/gpu/results.json
    python tools/gpu.py kernel memory       these parts, again
    python tools/gpu.py --list              the parts, with their limits of seconds
    python tools/gpu.py --smoke             everything tiny, on a CPU: whether the parts run

Each part is a process of its own with a limit of seconds, so one that crashes or hangs does not end the others. Its
rows are written when it ends; a part that is done on this device is not made again. It runs in a clone with nothing
installed but torch, numpy, safetensors, pyarrow and what `import dumo` needs; int8 also needs diffusers, peft and
bitsandbytes.
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
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dumo.runtime.device import peak_bytes

SRC = Path(__file__).resolve().parent.parent / "src"
sys.path.insert(0, str(SRC))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

Row = dict[str, Any]

LATENTS = (4, 32, 32)  # of ImageNet at 256 pixels, by SD-VAE
BATCH = 64  # rows of a pass of XL/2, as the recipes have them
TINY_NET = ["net.width=32", "net.depth=2", "net.attention=2"]
TINY_LATENTS = (4, 8, 8)
TINY_BATCH = 4
KERNELS = {
    "torch's choice": None,
    "math": SDPBackend.MATH,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
LOGIT_STD = (1.0, 10.0)  # standard deviations of attention's scores: fresh nets, and late in training
MIB = 2**20
BUDGET = 600.0  # seconds of all parts together
SAVING = 30.0  # seconds that a part has to end by itself before its limit


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how large."""

    device: torch.device
    smoke: bool
    seconds: float = BUDGET  # after which the part's process is ended

    @property
    def shape(self) -> tuple[int, ...]:
        return TINY_LATENTS if self.smoke else LATENTS

    @property
    def batch(self) -> int:
        return TINY_BATCH if self.smoke else BATCH

    @property
    def compile(self) -> str:
        return "none" if self.smoke else "blocks"  # which takes a minute on a CPU

    @property
    def rounds(self) -> int:
        return 1 if self.smoke else 5

    def fields(self, *fields: str) -> list[str]:
        """Overrides of a recipe; in a smoke run its net is tiny, too."""
        return [*fields, *TINY_NET] if self.smoke else [*fields]


@dataclass(frozen=True)
class Part:
    """One question, and the seconds after which its process is ended."""

    seconds: int
    question: str
    rows: Callable[[Setting], Iterator[Row]]


def load(recipe: str, fields: list[str]) -> Any:  # noqa: ANN401, a Run
    """A recipe's run, with what the disk says of it."""
    from dumo.config.load import load as load_run
    from dumo.run.resolve import resolve

    return resolve(load_run(recipe, fields))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The l2 norm of the error over that of the exact value."""
    return float((found.to(exact) - exact).norm() / exact.norm())


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of several runs of a piece of work, after some to warm up."""
    from dumo.runtime.stopwatch import Stopwatch

    return Stopwatch(device).time_rounds([work], rounds).median().item()


# 1. The kernel of attention's tangent


def attention_kernel(setting: Setting) -> Iterator[Row]:
    """Attention's tangent against float64, and its time over that of attention itself."""
    shapes = {"DiT-XL/2": (16, 16, 256, 72), "SD 3, 1024 tokens": (4, 24, 1024, 64), "4096 tokens": (1, 16, 4096, 128)}
    if setting.smoke:
        shapes = {"tiny": (2, 2, 16, 8)}
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            for logit_std in LOGIT_STD:
                row = {"heads": name, "dtype": str(dtype).removeprefix("torch."), "logit std": logit_std}
                yield row | attention_row(shape, dtype, logit_std, setting)


def attention_row(shape: tuple[int, ...], dtype: torch.dtype, logit_std: float, setting: Setting) -> Row:
    """Errors and times of one shape."""
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
    forward = seconds_of(lambda: attention.attend(q, k, v), setting.device, setting.rounds)
    pushed = seconds_of(lambda: attention.tangent(q, k, v, dq, dk, dv, out, log_sum), setting.device, setting.rounds)
    return {
        "O off": relative_error(out, exact_out),
        "dO off": relative_error(tangent, exact_tangent),
        "attention ms": 1e3 * forward,
        "tangent ms": 1e3 * pushed,
        "tangent / attention": pushed / forward,
    }


# 2. du/dt of the dual slope


def dual_slope(setting: Setting) -> Iterator[Row]:
    """The error of du/dt on a DiT of width 768 through each of attention's kernels, and checkpointed."""
    plain = slope_run(setting, "net.checkpoint=false")
    for name, backend in KERNELS.items():
        yield from slope_rows(plain, {"kernel": name, "checkpoint": False}, backend, "none", setting)
    checkpointed = slope_run(setting, "net.checkpoint=true")
    yield from slope_rows(checkpointed, {"kernel": "torch's choice", "checkpoint": True}, None, "none", setting)


def compiled_slope(setting: Setting) -> Iterator[Row]:
    """The same with compiled blocks."""
    compiled = "none" if setting.smoke else "blocks"
    for checkpoint in (False, True):
        run = slope_run(setting, f"net.checkpoint={str(checkpoint).lower()}")
        yield from slope_rows(run, {"kernel": "the compiler's", "checkpoint": checkpoint}, None, compiled, setting)


def slope_run(setting: Setting, *fields: str) -> Any:  # noqa: ANN401, a Run
    """B/2, cut to four blocks, with the dual slope."""
    own = ["net.depth=4", "objective.slope={kind: dual}", f"train.batch={setting.batch}", *fields]
    return load("imagenet256-b2", setting.fields(*own))


def slope_rows(
    run: Any,  # noqa: ANN401, a Run
    row: Row,
    backend: SDPBackend | None,
    compiled: str,
    setting: Setting,
) -> Iterator[Row]:
    """A row for each precision; one whose kernel this machine lacks says so."""
    from dumo.lab import step

    prepared = step.prepare(run, setting.shape, setting.device, compiled)
    for precision in ("fp32", "bf16"):
        try:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                judged = prepared.judge(step.Row("dual", precision, compiled), run.objective)
            yield row | {"compiled": compiled, "precision": precision, "du/dt off": judged.error}
        except RuntimeError as error:  # torch's, where no kernel takes these numbers
            yield row | {"compiled": compiled, "precision": precision, "refused": first_line(error)}


# 3. dumo.jvp and dumo.Flow in a loop of one's own


class Attending(torch.nn.Module):
    """A network of anybody's: fused attention and dropout, x (b, tokens, width) and t (b,) in, v and u out."""

    def __init__(self, width: int = 64, *, dropout: float = 0.0, heads: int = 2) -> None:
        super().__init__()
        self.time = torch.nn.Linear(1, width)
        self.into = torch.nn.Linear(width, 3 * width)
        self.dropout = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(width, heads * width)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h = x + self.time(t[:, None])[:, None]
        q, k, v = self.into(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.dropout(h)).chunk(2, -1)


def own_loop(setting: Setting) -> Iterator[Row]:
    """du/dt by torch.func.jvp and dumo.jvp through each kernel; then a Flow's loop, and what keyed draws cost it."""
    import dumo

    for dtype in (torch.float32, torch.bfloat16):
        for name, backend in KERNELS.items():
            for call, jvp in (("torch.func.jvp", torch.func.jvp), ("dumo.jvp", dumo.jvp)):
                row = {"call": call, "kernel": name, "dtype": str(dtype).removeprefix("torch.")}
                try:
                    with sdpa_kernel(backend) if backend is not None else nullcontext():
                        yield row | {"du/dt off": jvp_error(jvp, dtype, setting)}
                except Exception as error:  # whatever torch raises is what the row shows
                    yield row | {"refused": first_line(error)}
    for dropout in (0.0, 0.1):
        yield flow_row(dropout, setting)


def jvp_error(jvp: Callable[..., Any], dtype: torch.dtype, setting: Setting) -> float:
    """Of u's derivative along (v, 1), against float64 on the CPU."""
    torch.manual_seed(0)
    net = Attending()
    x, v = torch.randn(2, setting.batch, 32, 64)
    t = torch.rand(setting.batch)
    exact_net = Attending().double()
    exact_net.load_state_dict(net.state_dict())
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(exact_net, (x.double(), t.double()), (v.double(), torch.ones_like(t).double()))[1][1]
    here = net.to(setting.device, dtype)
    moved = [value.to(setting.device, dtype) for value in (x, t, v, torch.ones_like(t))]
    _, (_, du_dt) = jvp(here, tuple(moved[:2]), tuple(moved[2:]))
    return relative_error(du_dt.cpu(), exact)


def flow_row(dropout: float, setting: Setting) -> Row:
    """Steps of a loop of one's own: how du/dt is taken, the loss at its ends, and a step's time."""
    import dumo

    torch.manual_seed(0)
    flow = dumo.Flow(Attending(dropout=dropout).to(setting.device), "dumo")
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
    x = torch.randn(setting.batch, 32, 64, device=setting.device)
    losses: list[float] = []

    def step() -> None:
        loss = flow(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    seconds = seconds_of(step, setting.device, setting.rounds)
    return {
        "flow with dropout": dropout,
        "du/dt": flow.slope_reason,
        "ms": 1e3 * seconds,
        "first loss": losses[0],
        "last loss": losses[-1],
        "samples": list(flow.sample(4, nfe=2).shape),
    }


# 4. A guided step of XL/2, and of DiTs with other numbers of tokens


def step_rows(recipe: str, fields: list[str], slopes: list[str], setting: Setting, **how: Any) -> Iterator[Row]:  # noqa: ANN401
    """A training step by each slope, beside the plain step of flow matching ("none")."""
    from dumo.lab import step

    run = load(recipe, setting.fields(f"train.batch={setting.batch}", *fields))
    report = step.measure(
        run, slopes=slopes, shape=setting.shape, rounds=setting.rounds, device=str(setting.device), **how
    )
    for row in report["rows"]:
        kept = {"step": recipe, "slope": row["slope"], "precision": row["precision"], "compiled": row["compile"]}
        if row["refused"]:
            kept["refused"] = row["refused"]
        if row["milliseconds"] is not None:
            kept |= {
                "images/s": row["images_per_second"],
                "ms": row["milliseconds"],
                "F counted": row["units_counted"],
                "F by time": row["units_timed"],
                "peak GB": (row["bytes_before"] + row["bytes"]) / 1e9,
                "share of peak": row["share_of_peak"],
                "du/dt off": row["error"],
            }
        yield kept


def xl2_eager(setting: Setting) -> Iterator[Row]:
    """bf16, not compiled: dual, central and torch.func.jvp."""
    yield from step_rows("imagenet256-xl2-dual", [], ["dual", "central", "jvp"], setting, precisions=["bf16"])


def xl2_compiled(setting: Setting) -> Iterator[Row]:
    """bf16, with blocks that are compiled."""
    yield from step_rows("imagenet256-xl2-dual", [], ["dual"], setting, precisions=["bf16"], compile=setting.compile)


def xl2_routed(setting: Setting) -> Iterator[Row]:
    """Half of the tokens past the middle blocks, not compiled and compiled."""
    for compiled in dict.fromkeys(("none", setting.compile)):
        fields = ["net.route.first=0", "net.route.last=1"] if setting.smoke else []  # of two blocks
        yield from step_rows("imagenet256-xl2-routed", fields, ["dual"], setting, precisions=["bf16"], compile=compiled)


def xl2_fp32(setting: Setting) -> Iterator[Row]:
    """As the paper has it: a central difference in fp32, and what TF32 makes of it."""
    precisions = ["fp32"] if setting.smoke else ["tf32", "fp32"]
    yield from step_rows("imagenet256-xl2", [], ["central", "dual"], setting, precisions=precisions)


def b1(setting: Setting) -> Iterator[Row]:
    """B/1: 1,024 tokens, whose attention is a third of a pass."""
    yield from step_rows("imagenet256-b2", ["net.patch=1"], ["dual", "central", "jvp"], setting, precisions=["bf16"])
    yield from step_rows(
        "imagenet256-b2", ["net.patch=1"], ["dual"], setting, precisions=["bf16"], compile=setting.compile
    )


# 5. Memory as planned and as measured


def memory(setting: Setting) -> Iterator[Row]:
    """Steps of the training loop, optimizer and averages included, each in a process of its own."""
    cases = {
        "imagenet256-xl2-dual": (BATCH, ["train.compile=none"]),
        "imagenet256-xl2-dual compiled": (BATCH, []),
        "imagenet256-xl2-dual checkpointed": (BATCH, ["net.checkpoint=true", "train.compile=none"]),
        "imagenet256-b2": (256, []),
    }
    if setting.smoke:
        cases = {"digits": (8, [])}
    for name, (rows, fields) in cases.items():
        recipe = name.partition(" ")[0]
        yield {"run": name, "rows": rows} | dry_row(recipe, rows, setting.fields(*fields), setting.device)


def dry_row(recipe: str, rows: int, fields: list[str], device: torch.device) -> Row:
    """What `dumo dry --rows` says: memory planned and taken, and the step's time."""
    sets = [f"--set={field}" for field in [f"train.micro_batch={rows}", *fields]]
    done = run_dumo("dry", recipe, "--rows", str(rows), "--device", str(device), "--json", *sets)
    if done.returncode:
        return {"failed": reason(done.stderr)}
    facts = json.loads(done.stdout)
    planned = facts["memory"]["total"]
    measured = facts["step"]["peak_bytes"]
    return {
        "planned GB": planned / 1e9,
        "measured GB": measured / 1e9,
        "measured / planned": measured / planned,
        "images/s": facts["step"]["images_per_second"],
    }


# 6. Sampling


def sampling(setting: Setting) -> Iterator[Row]:
    """Latency of one sample and of a batch at 1, 2 and 4 passes of XL/2, not decoded."""
    from dumo.lab import bench

    for batch in (1, setting.batch):
        run = load("imagenet256-xl2-dual", setting.fields())
        report = bench.sample(
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


# 7. Pretrained models in int8


def int8(setting: Setting) -> Iterator[Row]:
    """A step of a LoRA over random weights in int8 and bf16: SD 1.5's U-Net and SD 3's transformer."""
    models = {"sd15": ("sd15-lora", "diffusion", 16), "sd3-medium": ("sd3-lora", "linear", 16)}
    if setting.smoke:
        models = {"unet-small": ("cifar10-latents", "diffusion", 2), "sd3-small": ("cifar10-latents", "linear", 2)}
    for pipeline, (recipe, path, rows) in models.items():
        for frozen in ("int8", "bfloat16"):
            lora = f"{{rank: 64, frozen: {frozen}}}"
            net = f"net={{kind: diffusers, weights: drawn, checkpoint: true, lora: {lora}, texts: {{kind: codes}}}}"
            fields = [f"pipeline={pipeline}", net, f"path.kind={path}", "objective.slope={kind: dual}"]
            fields += ["train.precision=bf16", "train.optimizer={kind: adamw, lr: 1e-4}", "train.ema=[]"]
            if not setting.smoke:
                fields.append("data.images.captions=null")
            row = {"model": pipeline, "base": frozen, "rows": rows}
            yield row | lora_row(load(recipe, fields), rows, setting)


def lora_row(run: Any, rows: int, setting: Setting) -> Row:  # noqa: ANN401, a Run
    """Two steps to warm up and three that are timed, in bf16."""
    from dumo.plan import rehearsal
    from dumo.runtime.random import random_batch

    classes = 10
    shape = run.data.shape
    net = run.net.build(run.objective.needs, shape, classes).to(setting.device)
    x, c = random_batch("gpu", rows, shape, classes)
    batch = (x.to(setting.device), c.to(setting.device))
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    step = rehearsal.make_step(run, net, batch, warm_up=2, rounds=3)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "images/s": rows / (step.pass_seconds + step.update_seconds),
        "ms": 1e3 * (step.pass_seconds + step.update_seconds),
        "peak GB": peak_bytes(setting.device) / 1e9,
        "loss": step.record.loss,
    }


# 8. The command line, from data to a report


def command_line(setting: Setting) -> Iterator[Row]:
    """Each command of a run on digits, and its seconds; samples of the GPU against the CPU's."""
    steps = 4 if setting.smoke else 200
    with TemporaryDirectory() as folder:
        run = f"{folder}/digits"
        device = ["--device", str(setting.device)]
        sets = [f"--set={field}" for field in setting.fields(f"train.steps={steps}")]
        yield command_row("train", "dumo-best", "--out", run, *device, *sets)
        yield command_row("train", run, "--set", f"train.steps={2 * steps}", *device)
        if not setting.smoke:
            compiled = [*sets, "--set=train.compile=blocks", "--set=train.precision=bf16"]
            yield command_row("train", "dumo-best", "--out", f"{folder}/compiled", *device, *compiled)
        yield command_row("evaluate", run, "--nfe", "1", *device)
        yield command_row("report", run, *device)
        yield {"command": "a sample's largest difference between devices", "difference": difference(run, setting)}


def command_row(*words: str) -> Row:
    """One `dumo` command in a process of its own."""
    began = time.monotonic()
    done = run_dumo(*words)
    row: Row = {"command": f"dumo {words[0]}", "seconds": time.monotonic() - began}
    if done.returncode:
        row["failed"] = f"exit code {done.returncode}: {reason(done.stderr)}"
    return row


def run_dumo(*words: str) -> subprocess.CompletedProcess[str]:
    """A `dumo` command of this tree, whatever is installed."""
    return subprocess.run(dumo_command(*words), capture_output=True, text=True, env=dumo_environment(), check=False)


def dumo_command(*words: str) -> list[str]:
    """What a `dumo` command is to the shell."""
    return [sys.executable, "-P", "-m", "dumo", *words]


def dumo_environment() -> dict[str, str]:
    """In which it is this tree's."""
    paths = [str(SRC), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def difference(run: str, setting: Setting) -> float:
    """Between a sample made on this device and on the CPU: the noise is the same, so rounding alone."""
    import dumo

    samples = [dumo.load(run, device=device).sample(count=4, nfe=1, seed=0) for device in (str(setting.device), "cpu")]
    return float((samples[0].cpu() - samples[1].cpu()).abs().max())


# 9. A real run


def overnight(setting: Setting) -> Iterator[Row]:
    """`dumo train cifar10-overnight` for as long as there is; it resumes. First: dumo encode cifar10-latents."""
    folder = Path("runs/cifar10-overnight")
    recipe = "cifar10-overnight"
    fields = list[str]()
    if setting.smoke:
        recipe = "digits"
        fields = setting.fields("train.steps=2", "train.batch=16", "train.log_every=1", "evaluate.every=0")
        folder = Path(TemporaryDirectory().name)
    sets = [f"--set={field}" for field in fields]
    words = ["train", recipe, "--out", str(folder), "--device", str(setting.device), *sets]
    training = subprocess.Popen(dumo_command(*words), env=dumo_environment(), stderr=subprocess.PIPE, text=True)
    try:
        _, stderr = training.communicate(timeout=max(1.0, setting.seconds - SAVING))
    except subprocess.TimeoutExpired:
        training.terminate()  # it saves a checkpoint, and resumes from it
        _, stderr = training.communicate()
    log = folder / "metrics.jsonl"
    if not log.exists():
        yield {"run": recipe, "failed": reason(stderr)}
        return
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    yield {"run": recipe, "steps": rows[-1]["step"], "loss": rows[-1]["loss"]}


PARTS = {
    "kernel": Part(60, "attention's tangent against float64, and its time", attention_kernel),
    "slope": Part(60, "du/dt through attention's kernels, and checkpointed", dual_slope),
    "loop": Part(60, "dumo.jvp beside torch.func.jvp through each kernel, and a loop of one's own", own_loop),
    "xl2": Part(120, "a guided step of XL/2 in bf16, beside flow matching and jvp", xl2_eager),
    "memory": Part(150, "memory as planned and as measured", memory),
    "sample": Part(60, "latency at 1, 2 and 4 passes", sampling),
    "int8": Part(180, "LoRA steps of SD 1.5 and SD 3 over int8", int8),
    "xl2-compiled": Part(300, "the same with compiled blocks", xl2_compiled),
    "slope-compiled": Part(120, "du/dt with compiled blocks, checkpointed or not", compiled_slope),
    "xl2-routed": Part(120, "half of the tokens past the middle blocks", xl2_routed),
    "b1": Part(120, "B/1, 1,024 tokens", b1),
    "xl2-fp32": Part(90, "the paper's central difference in fp32 and TF32", xl2_fp32),
    "commands": Part(150, "the command line on digits, from data to a report", command_line),
    "overnight": Part(600, "cifar10-overnight for as long as there is", overnight),
}


def reason(text: str) -> str:
    """Of what a program wrote to stderr, the last line that names an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported|error)\b", line)]
    return (errors or lines or ["it said nothing"])[-1]


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def make_part(name: str, file: Path, setting: Setting) -> None:
    """Write a part's rows to a file as they come, each a line."""
    with file.open("w", encoding="utf-8") as out:
        for row in PARTS[name].rows(setting):
            out.write(json.dumps(row) + "\n")
            out.flush()


def run_part(name: str, smoke: bool, device: str, seconds: float) -> dict[str, Any]:
    """A part in a process of its own: its state, seconds and rows; rows that were there when it ended are kept."""
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        words = [sys.executable, __file__, name, "--rows-to", str(file), "--device", device, "--seconds", str(seconds)]
        if smoke:
            words.append("--smoke")
        part = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, stderr = part.communicate(timeout=seconds)
            state = "done" if part.returncode == 0 else f"failed: {reason(stderr)}"
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


def machine_of(device: str) -> Row:
    """What a reader of the numbers must know."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else "CPU"
    return {"device": name, "torch": torch.__version__, "date": date.today().isoformat()}


def shown(value: object) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_part(name: str, result: dict[str, Any]) -> None:
    """A part's rows as a table of Markdown."""
    print(f"\n{name}: {result['state']}, {result['seconds']:.0f} s\n")
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    if not columns:
        return
    print("|" + "|".join(columns) + "|")
    print("|" + "---|" * len(columns))
    for row in result["rows"]:
        print("|" + "|".join(shown(row.get(column, "")) for column in columns) + "|", flush=True)


def print_list() -> None:
    """The parts in order, each with its limit."""
    for name, part in PARTS.items():
        print(f"{name:14} {part.seconds:4} s at most  {part.question}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help="parts to make again")
    parser.add_argument("--list", action="store_true", help="show the parts and end")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="of all parts together (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, help="folder of results.json (default: runs/gpu, in a smoke run runs/gpu-smoke)"
    )
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)  # in the process of a part
    return parser.parse_args()


def main() -> int:
    """Make the parts; 1 where one is not done then."""
    arguments = parse_arguments()
    if arguments.list:
        print_list()
        return 0
    device = "cpu" if arguments.smoke else arguments.device
    if device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU: see nvidia-smi, or give --smoke to try everything on a CPU", file=sys.stderr)
        return 2
    if arguments.rows_to:
        setting = Setting(torch.device(device), arguments.smoke, arguments.seconds)
        make_part(arguments.parts[0], arguments.rows_to, setting)
        return 0

    file = (arguments.out or Path("runs/gpu-smoke" if arguments.smoke else "runs/gpu")) / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    machine = machine_of(device)
    deadline = time.monotonic() + arguments.seconds
    all_done = True
    for name, part in PARTS.items():
        before = results.get(name, {})
        is_done = before.get("state") == "done" and before["machine"]["device"] == machine["device"]
        if name not in arguments.parts and (arguments.parts or is_done):
            continue
        seconds_left = deadline - time.monotonic()
        if seconds_left < 1:
            print(f"\n{name}: no time left; the same command makes it")
            all_done = False
            continue
        result = run_part(name, arguments.smoke, device, min(part.seconds, seconds_left))
        all_done = all_done and result["state"] == "done"
        results[name] = {"machine": machine, **result}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print_part(name, result)
    return 0 if all_done else 1


if __name__ == "__main__":
    sys.exit(main())
