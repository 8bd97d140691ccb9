"""Measure dumo on one GPU: where a training step waits for the host, steps, optimizers, memory, and a training.

    python tools/gpu.py                    # about fifteen minutes; writes runs/gpu.json
    python tools/gpu.py --seconds 1800     # the training gets the time that the measurements leave
    python tools/gpu.py --smoke            # everything tiny, on a CPU: whether it runs

The training is `dumo train cifar10-overnight`. It needs the cache that `dumo encode cifar10-latents` makes, and the
same command resumes it.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.autodiff import attention
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.lab import bench
from dumo.plan.cost import count_cost
from dumo.run.net import make_flow
from dumo.run.random_net import random_net
from dumo.run.resolve import resolve
from dumo.runtime.device import peak_bytes
from dumo.runtime.random import random_batch
from dumo.runtime.stopwatch import Stopwatch
from dumo.training.state import State, begin

Row = dict[str, Any]

# Shapes of attention: batch, heads, tokens, width of a head.
SHAPES = {
    "DiT-XL/2": (16, 16, 256, 72),
    "SD 3, 1024 tokens": (4, 24, 1024, 64),
    "4096 tokens": (1, 16, 4096, 128),
}
# Standard deviations of attention's scores: of fresh networks, and late in training.
LOGIT_STDS = (1.0, 10.0)
# Rows of a pass of XL/2.
BATCH = 64
TINY = ["net.width=32", "net.depth=2", "net.attention=2", "train.steps=2", "train.log_every=1"]
# Before its time is over, the training saves a checkpoint.
SAVING_SECONDS = 30.0


def kernel_rows(device: torch.device, smoke: bool) -> Iterator[Row]:
    """The error of attention and of its tangent against float64, and their times."""
    watch = Stopwatch(device)
    for name, shape in {"tiny": (2, 2, 16, 8)}.items() if smoke else SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for logit_std in LOGIT_STDS:
                # Draw queries, keys, values and their tangents.
                g = torch.Generator().manual_seed(0)
                q, k, v, dq, dk, dv = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(6))
                q = q * logit_std

                # Compute attention and its tangent, and both in float64.
                out, log_sum = attention.attend(q, k, v)
                tangent = attention.tangent(q, k, v, dq, dk, dv, out, log_sum)
                exact_out, exact_tangent = torch.func.jvp(
                    lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v,
                    (q.double(), k.double(), v.double()),
                    (dq.double(), dk.double(), dv.double()),
                )

                # Time them.
                tasks = [
                    lambda q=q, k=k, v=v: attention.attend(q, k, v),
                    lambda values=(q, k, v, dq, dk, dv, out, log_sum): attention.tangent(*values),
                ]
                attention_ms, tangent_ms = (1e3 * watch.time_rounds(tasks, 1 if smoke else 5).median(1).values).tolist()
                yield {
                    "heads": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "logit std": logit_std,
                    "O off": relative_error(out, exact_out),
                    "dO off": relative_error(tangent, exact_tangent),
                    "attention ms": attention_ms,
                    "tangent ms": tangent_ms,
                    "tangent / attention": tangent_ms / attention_ms,
                }


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The l2 norm of the error over that of the exact value."""
    return float((value.to(exact) - exact).norm() / exact.norm())


def wait_rows(device: torch.device, smoke: bool) -> Iterator[Row]:
    """The lines that wait for the GPU in the second training step of each kind of run, and how often."""
    runs = {
        "digits": resolve(load("digits", ["train.precision=bf16", *(TINY if smoke else [])])),
        "XL/2": load_xl2(smoke, "train.compile=none"),
        "XL/2, Muon": load_xl2(smoke, "train.compile=none", "train.optimizer.kind=muon"),
        "XL/2, adamw8bit": load_xl2(smoke, "train.compile=none", "train.optimizer.kind=adamw8bit"),
    }
    if not smoke:
        runs["SD 3, LoRA"] = load_sd3()
    for name, run in runs.items():
        _, step = prepare_step(run, device)
        step()
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
        yield {"run": name, "waits": places.total(), "places": " ".join(f"{p} x{n}" for p, n in places.items())}


def load_sd3() -> Run:
    """The run of an SD 3 LoRA, with captions in host memory."""
    return resolve(load("sd3-lora", ["train.batch=8", "train.micro_batch=8", "net.texts.memory=0"]))


def load_xl2(smoke: bool, *fields: str) -> Run:
    """The run of a guided XL/2 with the dual slope."""
    batch = 4 if smoke else BATCH
    return resolve(load("imagenet256-xl2-dual", [f"train.batch={batch}", *fields, *(TINY if smoke else [])]))


def step_rows(device: torch.device, smoke: bool) -> Iterator[Row]:
    """A guided training step without the optimizer, next to plain flow matching: XL/2 eager and compiled, SD 3 LoRA."""
    cases = [("XL/2", load_xl2(smoke), "none")]
    if not smoke:
        cases += [("XL/2", load_xl2(smoke), "blocks"), ("SD 3, LoRA, captions in host memory", load_sd3(), "none")]
    for name, run, compile in cases:
        report = bench.measure(
            run,
            slopes=["dual"],
            precisions=["bf16"],
            compile=compile,
            rounds=1 if smoke else 5,
            device=str(device),
        )
        for row in report["rows"]:
            yield {
                "run": name,
                "slope": row["slope"],
                "compiled": row["compile"],
                "images/s": row["images_per_second"],
                "ms": row["milliseconds"],
                "F counted": row["units_counted"],
                "F by time": row["units_timed"],
                "peak GB": (row["bytes_before"] + row["bytes"]) / 1e9,
                "share of peak": row["share_of_peak"],
                "du/dt off": row["error"],
            }


def prepare_step(run: Run, device: torch.device) -> tuple[State, Callable[[], None]]:
    """The state of a run with random weights, and its training step on a random batch."""
    state = begin(random_net(run, device), run.train)
    x, c = random_batch("gpu", run.train.batch, run.data.shape, run.data.classes)
    return state, partial(take_step, run, state, x.to(device), c.to(device))


def take_step(run: Run, state: State, x: Tensor, c: Tensor) -> None:
    """Take an optimizer step on a whole batch, and update the averages."""
    flow = make_flow(run, state)
    draws = flow.make_draws(state.step, run.data.shape, batch=run.train.batch)
    flow.compute_loss(flow.add_noise(x, c, draws)).loss.mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    for average in state.averages.values():
        average.update(state.net, state.step)


def optimizer_rows(device: torch.device, smoke: bool) -> Iterator[Row]:
    """The time of the optimizer's step, and its share of a whole step of XL/2, not compiled."""
    for kind in ("adamw", "adamw8bit", "muon"):
        run = load_xl2(smoke, "train.compile=none", f"train.optimizer.kind={kind}")
        state, step = prepare_step(run, device)
        step()
        # A step of the optimizer alone has gradients of zeros, which take as long as others.
        for p in state.net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer_seconds = Stopwatch(device).time_rounds([state.optimizer.step], 1 if smoke else 5).median().item()
        seconds = Stopwatch(device).time_rounds([step], 1 if smoke else 5).median().item()
        yield {"optimizer": kind, "ms": 1e3 * optimizer_seconds, "share of a step": optimizer_seconds / seconds}


def memory_rows(device: torch.device, smoke: bool) -> Iterator[Row]:
    """The memory of a training step with optimizer and average, counted and measured."""
    for checkpoint in (False, True):
        run = load_xl2(smoke, "train.compile=none", f"net.checkpoint={str(checkpoint).lower()}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _, step = prepare_step(run, device)
        seconds = Stopwatch(device).time_rounds([step], 1 if smoke else 3).median().item()
        yield {
            "checkpointed": checkpoint,
            "counted GB": count_cost(run).memory[0].total / 1e9,
            "measured GB": peak_bytes(device) / 1e9,
            "images/s": run.train.batch / seconds,
        }


def train(seconds: float, device: torch.device, smoke: bool) -> Iterator[Row]:
    """`dumo train cifar10-overnight` for so many seconds."""
    words = ["train", "cifar10-overnight"]
    if smoke:
        words = ["train", "digits", "--out", "runs/gpu-smoke", *TINY]
    training = subprocess.Popen([sys.executable, "-P", "-m", "dumo", *words, "--device", str(device)])
    try:
        training.wait(max(1.0, seconds - SAVING_SECONDS))
    except subprocess.TimeoutExpired:
        # It saves a checkpoint, from which the next call resumes.
        training.terminate()
        training.wait()
    log = Path("runs/gpu-smoke" if smoke else "runs/cifar10-overnight") / "metrics.jsonl"
    if log.exists():
        last_row = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        yield {"step": last_row["step"], "loss": last_row["loss"]}


def print_rows(title: str, rows: list[Row]) -> None:
    """Print rows as a table of Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n\n|{'|'.join(columns)}|\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        print("|" + "|".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + "|")
    sys.stdout.flush()


def main() -> None:
    """Measure in order of value, and write the file after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of everything (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="default: %(default)s")
    options = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cpu" if options.smoke else "cuda")
    name = "CPU" if options.smoke else torch.cuda.get_device_name()
    results: dict[str, Any] = {"machine": {"device": name, "torch": torch.__version__, "date": str(date.today())}}
    parts = {
        "waits": wait_rows,
        "step": step_rows,
        "optimizer": optimizer_rows,
        "memory": memory_rows,
        "kernel": kernel_rows,
    }
    for part, measure in parts.items():
        results[part] = list(measure(device, options.smoke))
        print_rows(part, results[part])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    seconds_left = options.seconds - (time.monotonic() - began)
    results["training"] = list(train(seconds_left, device, options.smoke))
    print_rows("training", results["training"])
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
