"""Measure the host memory of a training's phases on one or more ranks, next to what `dumo dry` says.

    python tools/memory.py --mode int8 --gigabytes 2 --ranks 1 2 4 [--heap] [--set FIELD=VALUE ...] [--json FILE]

For each number of ranks: `--work start` begins a training in processes of its own, makes two steps and saves between;
`--work resume` opens what was saved; `dumo export` exports it. Each process writes the phase that it is in to a file;
meanwhile this process looks at their memory and keeps the most of each phase. `dumo dry` says what it should be.

The model is a Stable Diffusion 3 of random weights, written to --folder in bf16 (--dtype): --gigabytes is its size in
float32. Trained on digits, 16 patches each, so that work is small. Bytes are of a process's own memory (RssAnon of
/proc); of a base in bf16, which one process maps from its file, all pages count, read or not, and so they do
where each rank examines the net in one piece. The heap of glibc keeps
freed blocks of up to 32 MB, as many as it has gaps between others; here blocks of 128 KiB and more go back at once,
unless --heap. Then a step takes less time, and more memory than is counted.
"""

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

WIDTH = 1024  # of the model
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LOOK_SECONDS = 0.004  # between two looks at the processes
PHASE_SECONDS = 0.1  # at the end of a phase, so that a look falls into it
SMALL_BLOCK = 2**17  # bytes of a block, from which on memory goes back at once
MODES = {  # the fields of run.yaml that each sets
    "full": [],
    "adamw8bit": ["train.optimizer.kind=adamw8bit", "train.weights=bfloat16", "train.precision=bf16"],
    "bfloat16": ["net.lora={rank: 64, frozen: bfloat16}", "train.precision=bf16"],
    "int8": ["net.lora={rank: 64, frozen: int8}", "train.precision=bf16"],
    "nf4": ["net.lora={rank: 64, frozen: nf4}", "train.precision=bf16"],
}


def write_model(folder: Path, gigabytes: float, dtype: str) -> None:
    """Write the model, without its autoencoder and text encoders."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    parameters_per_layer = 36 * WIDTH**2
    config = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": max(2, round(gigabytes * 1e9 / 4 / parameters_per_layer)),
        "attention_head_dim": 64,
        "num_attention_heads": WIDTH // 64,
        "joint_attention_dim": 64,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
    }
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        outline = diffusers.SD3Transformer2DModel.from_config(config).state_dict()
    g = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, x in outline.items():
        size = (len(x) / x.numel()) ** 0.5  # so that a layer keeps the size of its input
        weights[name] = (torch.randn(x.shape, generator=g) * size).to(getattr(torch, dtype))
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def run_fields(model: Path, fields: list[str]) -> list[str]:
    """The fields of the run, which tunes the model on digits; the weights lie in parts over all ranks."""
    return [
        f"pipeline={model}",
        "net={kind: diffusers, texts: {kind: codes}}",
        "evaluate.every=0",
        f"train.share={os.environ.get('WORLD_SIZE', '1')}",
        "train.batch=8",
        "train.ema=[{decay: 0.9}]",
        "train.steps=2",
        *fields,
    ]


def do_work(args: argparse.Namespace) -> None:
    """Be one rank of a training that starts or resumes (`args.work`), and name each phase in the file $PHASE."""
    phase_file = Path(os.environ["PHASE"])
    import torch

    from dumo.config.load import load
    from dumo.nets import lowpass
    from dumo.run import examination
    from dumo.run.folder import write_run_file
    from dumo.run.net import flow_in_training
    from dumo.run.weights import begin, build
    from dumo.runtime import dist
    from dumo.runtime.heap import low_memory_heap
    from dumo.training import checkpoint, layout
    from dumo.training.manifest import Checkpoints
    from dumo.training.saver import Saver
    from dumo.training.step import pieces, span, train_step

    def begin_phase(name: str) -> None:
        time.sleep(PHASE_SECONDS)
        phase_file.write_text(name)

    torch.set_num_threads(1)
    lowpass.STEPS = 1  # of the time embedder's fit: most of a start's seconds, and none of its memory
    run = load("digits", run_fields(args.folder / "model", args.set))
    run_folder = args.folder / "run"
    with dist.join():
        begin_phase(args.work)
        checkpoints = Checkpoints(run_folder / "checkpoints")
        state, last = begin(run, checkpoints, torch.device("cpu"))
        assert (args.work == "resume") == (last is not None)
        if args.work == "start":
            rows = span(pieces(run.train, run.objective))
            flow = flow_in_training(run, state)
            batch = run.data.open().batch(0, run.train.batch, run.train.seed, rows)
            begin_phase("first step")
            train_step(state, flow, [*batch], run.train)
            begin_phase("examination")
            with low_memory_heap():
                net = layout.gathered(state.net, partial(build, run))
                examination.examine_weights(run, net, torch.device("cpu"))
                del net
                gc.collect()
            begin_phase("save")
            if dist.is_main():
                run_folder.mkdir(exist_ok=True)
                write_run_file(run, run_folder)
            state.step = 1
            with Saver() as saver:
                copy = checkpoint.copy(state, checkpoint.Notes(), saver.memory)
                saver.start(lambda: checkpoint.put(checkpoints, copy, 1))
                begin_phase("step")
                train_step(state, flow, [*batch], run.train)  # while the copy is written
        time.sleep(PHASE_SECONDS)
        dist.barrier()
    os._exit(0)


def own_bytes(pid: int) -> int:
    """Bytes of a process's own memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def mapped_bytes(pid: int, file: Path) -> int:
    """Bytes of a file if a process has mapped it, whether they are read or not; else 0."""
    is_mapped = str(file) in Path(f"/proc/{pid}/maps").read_text()
    return file.stat().st_size if is_mapped else 0


def start_rank(args: argparse.Namespace, work: str, rank: int, ranks: int, port: int) -> "subprocess.Popen[bytes]":
    """Start one rank of a training, or the export."""
    environment = {"PHASE": str(phase_file(args, rank)), "OMP_NUM_THREADS": "1"}
    if not args.heap:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(SMALL_BLOCK)
    if ranks > 1:
        environment["RANK"] = environment["LOCAL_RANK"] = str(rank)
        environment["WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"] = str(ranks)
        environment["MASTER_ADDR"] = "127.0.0.1"
        environment["MASTER_PORT"] = str(port)
    if work == "export":
        command = [sys.executable, "-P", "-m", "dumo", "export", "--to", "safetensors"]
        command += [str(args.folder / "run"), str(args.folder / "out.safetensors")]
    else:
        command = [sys.executable, __file__, "--work", work, "--folder", str(args.folder), "--mode", args.mode]
        if args.user_fields:
            command += ["--set", *args.user_fields]
    return subprocess.Popen(command, env=os.environ | environment)


def phase_file(args: argparse.Namespace, rank: int) -> Path:
    """The file in which a rank names its phase."""
    return args.folder / f"phase-{rank}"


def measure(args: argparse.Namespace, ranks: int, work: str) -> dict[str, int]:
    """The most bytes that any of these ranks had, by phase."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        phase_file(args, rank).write_text(work if work == "export" else "imports")
        processes.append(start_rank(args, work, rank, ranks, port))
    peaks: dict[str, int] = {}
    maps_base = args.mode == "bfloat16" and work != "export"  # an export has weights of its own
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            try:
                phase = phase_file(args, rank).read_text()
                size = own_bytes(process.pid)
                if maps_base and (ranks == 1 or phase == "examination"):
                    size += mapped_bytes(process.pid, args.folder / "model" / WEIGHTS)
            except (OSError, KeyError):  # the process is about to end
                continue
            if phase:  # else it is being written
                peaks[phase] = max(peaks.get(phase, 0), size)
        time.sleep(LOOK_SECONDS)
    if any(process.returncode for process in processes):
        raise SystemExit(f"{work} on {ranks} ranks failed")
    return peaks


def planned_bytes(args: argparse.Namespace, ranks: int) -> dict[str, int]:
    """Bytes of a process by phase, as `dumo dry` counts them."""
    command = [sys.executable, "-P", "-m", "dumo", "dry", "digits", "--json"]
    command += ["--ranks", str(ranks), "--share", str(ranks)]
    for field in run_fields(args.folder / "model", args.set):
        command += ["--set", field]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(process.stdout)["cluster"]["host"]["CPU"]["process"]


def write_rows(args: argparse.Namespace, ranks: int, rows: dict[str, dict[str, int]]) -> None:
    """Put the rows of a number of ranks into the file of --json, next to what it holds."""
    report = json.loads(args.json.read_text()) if args.json.exists() else {}
    mode = f"{args.mode}, heap" if args.heap else args.mode
    rows_by_ranks = report.get(mode, {}).get("ranks", {})
    rows_by_ranks[str(ranks)] = rows
    report[mode] = {"gigabytes": args.gigabytes, "set": args.set, "ranks": rows_by_ranks}
    args.json.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Measure, and print a line for each number of ranks: measured and planned GB of each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/memory"))
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # what a process of a training is to do
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.user_fields = args.set
    args.set = [*MODES[args.mode], *args.set]
    if args.work:
        return do_work(args)

    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model").is_dir():
        write_model(args.folder / "model", args.gigabytes, args.dtype)
    for ranks in args.ranks:
        shutil.rmtree(args.folder / "run", ignore_errors=True)
        (args.folder / "out.safetensors").unlink(missing_ok=True)
        measured = measure(args, ranks, "start")
        measured["resume"] = measure(args, ranks, "resume")["resume"]
        measured |= measure(args, 1, "export")
        planned = planned_bytes(args, ranks)
        rows: dict[str, dict[str, int]] = {}
        texts: list[str] = []
        for phase, size in measured.items():
            if phase in planned:
                rows[phase] = {"measured": size, "dry": planned[phase]}
                texts.append(f"{phase} {size / 1e9:.2f} / {planned[phase] / 1e9:.2f}")
        print(f"{ranks}: {', '.join(texts)}; imports {measured['imports'] / 1e9:.2f}", flush=True)
        if args.json:
            write_rows(args, ranks, rows)


if __name__ == "__main__":
    main()
