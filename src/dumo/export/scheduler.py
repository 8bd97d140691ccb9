"""The scheduler beside an exported model: for a flow map one that adds fresh noise between two passes."""

import json
from pathlib import Path

from dumo.export.stock import Stock
from dumo.flow.solver import Restart
from dumo.io.read import read_json, write_json
from dumo.types import UserError

FOLDER, FILE = "scheduler", "scheduler_config.json"
OWN = ["jumps", "JumpScheduler"]  # its file and class
JUMPS = '''"""Times of jumps to the data, for a pipeline that is told none: the first START, the second of two M."""

from math import log2

from diffusers import FlowMatchEulerDiscreteScheduler

START, M = {start!r}, {m!r}


class JumpScheduler(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **told):
        n = num_inference_steps
        times = [START * (M / START) ** log2(n / (n - k)) for k in range(n or 0)]
        super().set_timesteps(device=device, **told or {{"sigmas": times}})
'''
Entry = list[str]  # of model_index.json: library or file, and class


def write(folder: Path, stock: Stock | None, solver: Restart) -> Entry:
    """Write the scheduler of a flow map into `folder`; return its entry in model_index.json.

    A class of its own where the pipeline takes no times.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True).save_pretrained(folder)
    check(folder)
    if stock is None or stock.told:
        return ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / f"{OWN[0]}.py").write_text(JUMPS.format(start=solver.start, m=solver.m), encoding="utf-8")
    config = json.loads((folder / FILE).read_text(encoding="utf-8"))
    write_json(folder / FILE, config | {"_class_name": OWN[1]})
    return OWN


def check(folder: Path) -> None:
    """Raise UserError for a scheduler under which a flow map makes no images: one of plain Euler steps, or shifted."""
    config = read_json(folder / FILE, "export the run anew")
    wanted = {"stochastic_sampling": True, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise UserError(
                f"{folder / FILE}: {name} is {config.get(name)}, and a flow map needs {value}: fresh noise between two "
                "passes, at the times as they are told. Set FlowMatchEulerDiscreteScheduler(shift=1.0, "
                "stochastic_sampling=True)"
            )


def plain(folder: Path) -> Entry:
    """Write the scheduler of a velocity, with Euler steps; return its entry."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler().save_pretrained(folder)
    return ["diffusers", "FlowMatchEulerDiscreteScheduler"]
