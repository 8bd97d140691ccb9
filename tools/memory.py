"""Measure the host memory of a training's phases on one or more ranks, next to what `dumo dry` says.

    python tools/memory.py --mode int8 --gigabytes 2 --ranks 1 2 4 [--heap] [--set FIELD=VALUE ...] [--json FILE]

The model is a Stable Diffusion 3 of random weights, written to --folder in bf16 (--dtype): --gigabytes is its size in
float32. Trained on digits, 16 patches each, so that work is small. Bytes are of a process's own memory (RssAnon
of /proc); of a base in bf16, which one process maps from its file, all pages count, read or not. The heap of glibc
keeps freed blocks of up to 32 MB, as many as it has gaps between others; here blocks of 128 KiB and more go back at
once, unless --heap. Then a step takes less time, and more memory than is counted.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

WIDTH, WEIGHTS = 1024, "transformer/diffusion_pytorch_model.safetensors"
EVERY = 0.004  # seconds between two looks
MODES = {
    "full": [],
    "adamw8bit": ["train.optimizer.kind=adamw8bit", "train.weights=bfloat16", "train.precision=bf16"],
    **{f: [f"net.lora={{rank: 64, frozen: {f}}}", "train.precision=bf16"] for f in ("bfloat16", "int8", "nf4")},
}


def model(folder: Path, gigabytes: float, dtype: str) -> None:
    """Write the model, block by block."""
    import torch
    from safetensors.torch import save_file

    config = {
        "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1,
        "num_layers": max(2, round(gigabytes * 1e9 / 4 / (36 * WIDTH**2))), "attention_head_dim": 64,
        "num_attention_heads": WIDTH // 64, "joint_attention_dim": 64, "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 64, "pos_embed_max_size": 8,
    }  # fmt: skip
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    entry = ["diffusers", "SD3Transformer2DModel"]
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    import diffusers

    with torch.device("meta"):
        wanted = diffusers.SD3Transformer2DModel.from_config(config).state_dict()
    g = torch.Generator().manual_seed(0)
    made = {
        name: (torch.randn(x.shape, generator=g) * (len(x) / x.numel()) ** 0.5).to(getattr(torch, dtype))
        for name, x in wanted.items()
    }
    save_file(made, folder / WEIGHTS, {"format": "pt"})


def words(folder: Path, more: list[str]) -> list[str]:
    """The run, over digits."""
    own = ["net={kind: diffusers, texts: {kind: codes}}", "evaluate.every=0"]
    own += [f"train.share={os.environ.get('WORLD_SIZE', '1')}"]
    return [f"pipeline={folder}", *own, "train.batch=8", "train.ema=[{decay: 0.9}]", "train.steps=2", *more]


def work(args: argparse.Namespace) -> None:
    """One rank: each phase, whose name it writes before it."""
    phase = Path(os.environ["PHASE"])
    import torch

    from dumo.config.load import load
    from dumo.nets import lowpass
    from dumo.run.folder import write_run_file
    from dumo.run.net import flow_in_training
    from dumo.run.weights import begin
    from dumo.runtime import dist
    from dumo.training import checkpoint
    from dumo.training.manifest import Checkpoints
    from dumo.training.saver import Saver
    from dumo.training.step import pieces, span, train_step

    torch.set_num_threads(1)
    lowpass.STEPS = 1  # of the time embedder's fit: most of a start's seconds, and none of its memory
    run, out, here = load("digits", words(args.folder / "model", args.set)), args.folder / "run", torch.device("cpu")
    with dist.join():
        time.sleep(0.1)
        phase.write_text(args.work)
        checkpoints = Checkpoints(out / "checkpoints")
        state, last = begin(run, checkpoints, here)
        assert (args.work == "resume") == (last is not None)
        time.sleep(0.1)
        if args.work == "start":
            mine = span(pieces(run.train, run.objective))
            flow = flow_in_training(run, state)
            batch = run.data.open().batch(0, run.train.batch, run.train.seed, mine)
            phase.write_text("first step")
            train_step(state, flow, [*batch], run.train)
            time.sleep(0.1)
            phase.write_text("save")
            if dist.is_main():
                out.mkdir(exist_ok=True)
                write_run_file(run, out)
            state.step = 1
            with Saver() as saver:
                copy = checkpoint.copy(state, checkpoint.Notes(), saver.memory)
                saver.start(lambda: checkpoint.put(checkpoints, copy, 1))
                time.sleep(0.1)
                phase.write_text("step")
                train_step(state, flow, [*batch], run.train)  # while it is written
            time.sleep(0.1)
        dist.barrier()
    os._exit(0)


def own(pid: int) -> int:
    """Bytes of a process's own memory."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def mapped(pid: int, file: Path) -> int:
    """Bytes of a file if a process has mapped it, whether they are read or not."""
    return file.stat().st_size * (str(file) in Path(f"/proc/{pid}/maps").read_text())


def measure(args: argparse.Namespace, ranks: int, work: str) -> dict[str, int]:
    """The most that any of these ranks had, by phase."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    phases = [args.folder / f"phase-{rank}" for rank in range(ranks)]
    running: list[subprocess.Popen[bytes]] = []
    for rank, phase in enumerate(phases):
        phase.write_text(work if work == "export" else "imports")
        env = {"PHASE": str(phase), "OMP_NUM_THREADS": "1"}
        env |= {} if args.heap else {"MALLOC_MMAP_THRESHOLD_": f"{2**17}"}
        if ranks > 1:
            env |= {
                "RANK": f"{rank}",
                "LOCAL_RANK": f"{rank}",
                "WORLD_SIZE": f"{ranks}",
                "LOCAL_WORLD_SIZE": f"{ranks}",
            }
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        words = [sys.executable, __file__, "--work", work, "--folder", str(args.folder), "--mode", args.mode]
        words += ["--set", *args.more] if args.more else []
        if work == "export":
            words = [sys.executable, "-P", "-m", "dumo", "export", "--to", "safetensors", str(args.folder / "run")]
            words += [str(args.folder / "out.safetensors")]
        running.append(subprocess.Popen(words, env=os.environ | env))
    most = dict[str, int]()
    keeps = ranks == 1 and args.mode == "bfloat16" and work != "export"  # which has weights of its own
    while any(one.poll() is None for one in running):
        for one, phase in zip(running, phases, strict=True):
            try:
                pages = mapped(one.pid, args.folder / "model" / WEIGHTS) if keeps else 0
                name, size = phase.read_text(), own(one.pid) + pages
            except (OSError, KeyError):  # it ends
                continue
            if not name:  # it is being written
                continue
            most[name] = max(most.get(name, 0), size)
        time.sleep(EVERY)
    if any(one.returncode for one in running):
        raise SystemExit(f"{work} on {ranks} ranks failed")
    return most


def planned(args: argparse.Namespace, ranks: int) -> dict[str, int]:
    """Bytes of a process by phase, as `dumo dry` counts them."""
    line = [sys.executable, "-P", "-m", "dumo", "dry", "digits", "--json", "--ranks", f"{ranks}", "--share", f"{ranks}"]
    for field in words(args.folder / "model", args.set):
        line += ["--set", field]
    made = subprocess.run(line, check=True, stdout=subprocess.PIPE)
    return json.loads(made.stdout)["cluster"]["host"]["CPU"]["process"]


def main() -> None:
    """Measure, and print a row for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/memory"))
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder, args.more = args.folder.resolve(), args.set
    args.set = [*MODES[args.mode], *args.set]
    if args.work:
        return work(args)
    import shutil

    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model").is_dir():
        model(args.folder / "model", args.gigabytes, args.dtype)
    for ranks in args.ranks:
        shutil.rmtree(args.folder / "run", ignore_errors=True)
        (args.folder / "out.safetensors").unlink(missing_ok=True)
        found = measure(args, ranks, "start")
        found |= {"resume": measure(args, ranks, "resume")["resume"]}
        found |= measure(args, 1, "export")
        dry = planned(args, ranks)
        rows = {name: {"measured": size, "dry": dry[name]} for name, size in found.items() if name in dry}
        each = (f"{name} {size / 1e9:.2f} / {dry[name] / 1e9:.2f}" for name, size in found.items() if name in dry)
        print(f"{ranks}: {', '.join(each)}; imports {found['imports'] / 1e9:.2f}", flush=True)
        if args.json:
            found = json.loads(args.json.read_text()) if args.json.exists() else {}
            mode = args.mode + (", heap" if args.heap else "")
            there = found.get(mode, {}).get("ranks", {})
            found[mode] = {"gigabytes": args.gigabytes, "set": args.set, "ranks": there | {f"{ranks}": rows}}
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
