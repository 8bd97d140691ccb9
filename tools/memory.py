"""Measure the host memory of a training's phases on one or more ranks, next to what `dumo dry` says.

    python tools/memory.py --mode int8 --gigabytes 2 --ranks 1 2 4 [--heap] [--set FIELD=VALUE ...] [--json FILE]

The order of events for each number of ranks (`main`):

1. `measure_peaks` starts the ranks, each a process of this file with `--work start`, which makes two steps of a
   training and saves between (`do_work`). A rank writes the phase that it is in to a file; meanwhile this process looks
   at the memory of all ranks every few milliseconds and keeps the most that any had in each phase.
2. In the same way it measures `--work resume`, which opens what was saved, and `dumo export`, which exports it.
3. `planned_bytes` asks `dumo dry` what each phase should take.
4. A line with both is printed, and with --json their bytes are written.

The model is a Stable Diffusion 3 of random weights, written to --folder in bf16 (--dtype): --gigabytes is its size in
float32. It is trained on digits, 16 patches each, so that the work is small.

Bytes are of a process's own memory (RssAnon of /proc, so this needs Linux). One process maps a base in bf16 from its
file: then all of the file's pages count, whether they are read or not. On several ranks they count while each rank
examines the net in one piece.

The heap of glibc keeps freed blocks of up to 32 MB, as many as it has gaps between others. Here blocks of 128 KiB and
more go back at once, unless --heap is given. With it, a step takes less time, and more memory than is counted.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

MODEL_WIDTH = 1024
HEAD_WIDTH = 64  # of attention
WEIGHTS_FILE = "transformer/diffusion_pytorch_model.safetensors"
LOOK_SECONDS = 0.004  # between two looks at the processes: ours
PHASE_SECONDS = 0.1  # for which a phase is drawn out at its end, so that a look falls into it: ours
SMALL_BLOCK_BYTES = 2**17  # of a block, from which on memory goes back at once: glibc's own first threshold
PHASE_VARIABLE = "PHASE"  # the environment variable that names a rank's phase file
MODES: dict[str, list[str]] = {  # the fields of run.yaml that each sets
    "full": [],
    "adamw8bit": ["train.optimizer.kind=adamw8bit", "train.weights=bfloat16", "train.precision=bf16"],
    "bfloat16": ["net.lora={rank: 64, frozen: bfloat16}", "train.precision=bf16"],
    "int8": ["net.lora={rank: 64, frozen: int8}", "train.precision=bf16"],
    "nf4": ["net.lora={rank: 64, frozen: nf4}", "train.precision=bf16"],
}

PhaseBytes = dict[str, int]  # bytes of a process by phase


@dataclass(frozen=True)
class Setting:
    """What is trained, and where its files lie."""

    folder: Path
    mode: str  # of MODES
    user_fields: list[str]  # of run.yaml, by --set
    has_plain_heap: bool  # --heap

    @property
    def model_folder(self) -> Path:
        """The folder of the model that is tuned."""
        return self.folder / "model"

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return self.folder / "run"

    @property
    def export_file(self) -> Path:
        """The file to which the run is exported."""
        return self.folder / "out.safetensors"

    @property
    def fields(self) -> list[str]:
        """The fields of run.yaml that the mode and the user set."""
        return [*MODES[self.mode], *self.user_fields]

    def phase_file(self, rank: int) -> Path:
        """The file in which a rank names its phase."""
        return self.folder / f"phase-{rank}"


# ------------------------------------------------------------------------------------------------ the model and the run


def write_model(folder: Path, gigabytes: float, dtype: str) -> None:
    """Write the model to a folder, without its autoencoder and text encoders."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    parameters_per_layer = 36 * MODEL_WIDTH**2
    num_layers = round(gigabytes * 1e9 / 4 / parameters_per_layer)
    config = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": max(2, num_layers),
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": MODEL_WIDTH // HEAD_WIDTH,
        "joint_attention_dim": 64,
        "caption_projection_dim": MODEL_WIDTH,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
    }
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        meta_weights = diffusers.SD3Transformer2DModel.from_config(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, x in meta_weights.items():
        std = (len(x) / x.numel()) ** 0.5  # so that a layer keeps the size of its input
        weights[name] = (torch.randn(x.shape, generator=generator) * std).to(getattr(torch, dtype))
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def run_fields(setting: Setting, share: int) -> list[str]:
    """The fields of run.yaml of the run, which tunes the model on digits; the weights lie in `share` parts."""
    return [
        f"pipeline={setting.model_folder}",
        "net={kind: diffusers, texts: {kind: codes}}",
        "evaluate.every=0",
        f"train.share={share}",
        "train.batch=8",
        "train.ema=[{decay: 0.9}]",
        "train.steps=2",
        *setting.fields,
    ]


# --------------------------------------------------------------------------------------------------- one rank's process


def do_work(setting: Setting, work: str) -> NoReturn:
    """Be one rank of a training: `work` is "start" or "resume". Name each phase in the rank's phase file.

    The phase "imports" is named already, by `measure_peaks`. Does not return: it ends the process.
    """
    # imported here, as part of the phase "imports", so that the measuring process stays small
    import torch

    from dumo.config.load import load
    from dumo.nets import lowpass
    from dumo.run import examination
    from dumo.run.folder import write_run_file
    from dumo.run.net import flow_in_training
    from dumo.run.weights import begin_or_resume, build
    from dumo.runtime import dist
    from dumo.runtime.heap import low_memory_heap
    from dumo.training import checkpoint, layout
    from dumo.training.manifest import Checkpoints
    from dumo.training.saver import Saver
    from dumo.training.step import passes_of_rank, span, train_step

    phase_file = Path(os.environ[PHASE_VARIABLE])

    def begin_phase(name: str) -> None:
        time.sleep(PHASE_SECONDS)
        phase_file.write_text(name)

    torch.set_num_threads(1)
    lowpass.STEPS = 1  # of the time embedder's fit: most of a start's seconds, and none of its memory
    share = int(os.environ.get("WORLD_SIZE", "1"))
    run = load("digits", run_fields(setting, share))
    with dist.join():
        begin_phase(work)
        checkpoints = Checkpoints(setting.run_folder / "checkpoints")
        state, last_checkpoint = begin_or_resume(
            run, checkpoints, torch.device("cpu"), checkpoints.latest(together=True), or_before=True
        )
        if work == "resume":
            assert last_checkpoint is not None, "`--work start` saves one"
        else:
            assert last_checkpoint is None, "`main` removes an older run"
            rows = span(passes_of_rank(run.train, run.objective))
            flow = flow_in_training(run, state)
            batch = run.data.open().batch(0, run.train.batch, run.train.seed, rows)

            begin_phase("first step")
            train_step(state, flow, [*batch], run.train)

            begin_phase("examination")
            with low_memory_heap():
                net = layout.gather_net(state.net, partial(build, run))
                examination.examine_weights(run, net, torch.device("cpu"))
                del net
                gc.collect()

            begin_phase("save")
            if dist.is_main():
                setting.run_folder.mkdir(exist_ok=True)
                write_run_file(run, setting.run_folder)
            state.step = 1
            with Saver() as saver:
                copy = checkpoint.copy(state, checkpoint.CheckpointNotes(), saver.memory)
                saver.start(lambda: checkpoint.save_copy(checkpoints, copy, 1))
                begin_phase("step")
                train_step(state, flow, [*batch], run.train)  # while the copy is written
        time.sleep(PHASE_SECONDS)
        dist.barrier()
    os._exit(0)


# ------------------------------------------------------------------------------------------------------ the measurement


def measure_peaks(setting: Setting, ranks: int, work: str) -> PhaseBytes:
    """Start `work` on a number of ranks; return the most bytes that any rank had in each phase.

    work: "start", "resume" or "export". Raises SystemExit where a rank fails.
    """
    port = _free_port()
    first_phase = "export" if work == "export" else "imports"  # an export names no phases
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        setting.phase_file(rank).write_text(first_phase)
        processes.append(_start_rank(setting, work, rank, ranks, port))

    peaks: PhaseBytes = {}
    maps_base = setting.mode == "bfloat16" and work != "export"  # an export has weights of its own
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            try:
                phase = setting.phase_file(rank).read_text()
                size = _own_bytes(process.pid)
                if maps_base and (ranks == 1 or phase == "examination"):
                    size += _mapped_bytes(process.pid, setting.model_folder / WEIGHTS_FILE)
            except (OSError, KeyError):  # the process is about to end
                continue
            if phase:  # else it is being written
                peaks[phase] = max(peaks.get(phase, 0), size)
        time.sleep(LOOK_SECONDS)
    if any(process.returncode for process in processes):
        raise SystemExit(f"{work} on {ranks} ranks failed")
    return peaks


def _start_rank(setting: Setting, work: str, rank: int, ranks: int, port: int) -> "subprocess.Popen[bytes]":
    """Start one rank of a training, or the export; of several ranks, in the environment that torchrun would set."""
    environment = {PHASE_VARIABLE: str(setting.phase_file(rank)), "OMP_NUM_THREADS": "1"}
    if not setting.has_plain_heap:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(SMALL_BLOCK_BYTES)
    if ranks > 1:
        environment["RANK"] = str(rank)
        environment["LOCAL_RANK"] = str(rank)
        environment["WORLD_SIZE"] = str(ranks)
        environment["LOCAL_WORLD_SIZE"] = str(ranks)
        environment["MASTER_ADDR"] = "127.0.0.1"
        environment["MASTER_PORT"] = str(port)
    if work == "export":
        command = [sys.executable, "-P", "-m", "dumo", "export", "--to", "safetensors"]
        command += [str(setting.run_folder), str(setting.export_file)]
    else:
        command = [sys.executable, __file__, "--work", work, "--folder", str(setting.folder), "--mode", setting.mode]
        if setting.user_fields:
            command += ["--set", *setting.user_fields]
    return subprocess.Popen(command, env=os.environ | environment)


def _free_port() -> int:
    """A port of this machine that no program listens on."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        _, port = free_socket.getsockname()
        return port


def _own_bytes(pid: int) -> int:
    """Bytes of a process's own memory. Raises OSError or KeyError where it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    kilobytes = fields["RssAnon"].split()[0]
    return int(kilobytes) * 1024


def _mapped_bytes(pid: int, file: Path) -> int:
    """The size of a file if a process has mapped it, whether its pages are read or not; else 0."""
    is_mapped = str(file) in Path(f"/proc/{pid}/maps").read_text()
    return file.stat().st_size if is_mapped else 0


def planned_bytes(setting: Setting, ranks: int) -> PhaseBytes:
    """Bytes of a process by phase, as `dumo dry` counts them."""
    command = [sys.executable, "-P", "-m", "dumo", "dry", "digits", "--json"]
    command += ["--ranks", str(ranks), "--share", str(ranks)]
    for field in run_fields(setting, share=1):
        command += ["--set", field]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(process.stdout)["cluster"]["host"]["CPU"]["process"]


# ----------------------------------------------------------------------------------------------------- the command line


def write_rows(file: Path, setting: Setting, gigabytes: float, ranks: int, rows: dict[str, PhaseBytes]) -> None:
    """Put the rows of a number of ranks into the file of --json, next to what it holds."""
    report = json.loads(file.read_text()) if file.exists() else {}
    title = f"{setting.mode}, heap" if setting.has_plain_heap else setting.mode
    rows_by_ranks = report.get(title, {}).get("ranks", {})
    rows_by_ranks[str(ranks)] = rows
    report[title] = {"gigabytes": gigabytes, "set": setting.fields, "ranks": rows_by_ranks}
    file.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/memory"))
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # in the process of a rank: what it is to do
    return parser.parse_args()


def main() -> None:
    """Measure, and print a line for each number of ranks: measured and planned GB of each phase."""
    arguments = parse_arguments()
    setting = Setting(
        folder=arguments.folder.resolve(),
        mode=arguments.mode,
        user_fields=arguments.set,
        has_plain_heap=arguments.heap,
    )
    if arguments.work:
        do_work(setting, arguments.work)

    setting.folder.mkdir(parents=True, exist_ok=True)
    if not setting.model_folder.is_dir():
        write_model(setting.model_folder, arguments.gigabytes, arguments.dtype)
    for ranks in arguments.ranks:
        shutil.rmtree(setting.run_folder, ignore_errors=True)
        setting.export_file.unlink(missing_ok=True)

        # measure and plan
        measured = measure_peaks(setting, ranks, "start")
        measured["resume"] = measure_peaks(setting, ranks, "resume")["resume"]
        measured |= measure_peaks(setting, 1, "export")
        planned = planned_bytes(setting, ranks)

        # print and write
        rows: dict[str, PhaseBytes] = {}
        texts: list[str] = []
        for phase, size in measured.items():
            if phase in planned:
                rows[phase] = {"measured": size, "dry": planned[phase]}
                texts.append(f"{phase} {size / 1e9:.2f} / {planned[phase] / 1e9:.2f}")
        print(f"{ranks}: {', '.join(texts)}; imports {measured['imports'] / 1e9:.2f}", flush=True)
        if arguments.json:
            write_rows(arguments.json, setting, arguments.gigabytes, ranks, rows)


if __name__ == "__main__":
    main()
