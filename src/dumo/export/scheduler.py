"""The scheduler of an exported model, by which a stock pipeline makes the passes of a run.

A flow map u says where the data lie, x_0 = x_t - t u, so between two passes a pipeline must add fresh noise. Stock
`FlowMatchEulerDiscreteScheduler` does with `stochastic_sampling`:

    x_s = (1 - s) (x_t - t u) + s z,

which is Restart (`dumo.flow.solver`) at the times that the pipeline is given as sigmas. Without it the scheduler
makes an Euler step along u, which keeps the old noise and is wrong from the second pass on.

A net of a diffusion gives its own kind of output still, noise or v, from x_vp at whole indices. `LCMScheduler` makes

    x_vp = a_s (c_out x_0 + c_skip x_vp) + s_s z,   x_0 = (x_vp - s_t F) / a_t (for noise),

the same jumps: c_skip = .25 / (.25 + (c t)^2) is below 1e-9 where its `timestep_scaling` c is large.

Passes of Hop are Euler steps along a mean velocity, x_s = x_t - (t - s) u(x_t, t, s).
"""

import json
from pathlib import Path

from dumo.flow.solver import Hermite, Restart, Solver
from dumo.io.read import read_settings, write_json
from dumo.nets.vp import DiffusionToVelocity, settings
from dumo.types import UserError

SCHEDULER = "scheduler"  # its folder
CONFIG = "scheduler_config.json"  # the file in it
LCM = "LCMScheduler"  # of a diffusion's flow map
TIMESTEP_SCALING = 1e4  # c above, so that c_skip is .25 / 1e8 at index 1
EULER = "FlowMatchEulerDiscreteScheduler"
JUMP_SCHEDULER = ["jumps", "JumpScheduler"]  # the file and class of a scheduler that has its times
JUMPS = '''"""Times of jumps to the data, for a pipeline that takes none: the first START, the second of two M."""

from math import log2

from diffusers import FlowMatchEulerDiscreteScheduler

START, M = {start!r}, {m!r}


class JumpScheduler(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **given):
        n = num_inference_steps
        times = [START * (M / START) ** log2(n / (n - k)) for k in range(n or 0)]
        super().set_timesteps(device=device, **given or {{"sigmas": times}})
'''
Entry = list[str]  # of model_index.json: library or file, and class


def restart(solver: Solver) -> Restart:
    """The solver if it is Restart, which schedulers can make, and the default Restart for one without jumps.

    Raises UserError for Hermite, whose noise between two passes no scheduler adds.
    """
    if isinstance(solver, Hermite):
        raise UserError(
            f"sample.solver = {solver.model_dump(mode='json')}: schedulers add fresh noise alone between two "
            "passes. Set kind: restart there, in the run's run.yaml"
        )
    return solver if isinstance(solver, Restart) else Restart()


def write_scheduler(
    folder: Path,
    solver: Restart,
    frame: DiffusionToVelocity | None = None,
    *,
    takes_times: bool = True,
    hops: bool = False,
) -> Entry:
    """Write the scheduler of a flow map into `folder`; return its entry in model_index.json.

    `takes_times`: the pipeline has an argument for them; else a class of its own has them. `frame` is that of a model
    of a diffusion. `hops`: it makes the steps of a mean velocity, and adds no noise.
    """
    if frame:
        from diffusers.schedulers.scheduling_lcm import LCMScheduler

        scheduler = LCMScheduler(
            **settings(frame), original_inference_steps=frame.schedule.steps, timestep_scaling=TIMESTEP_SCALING
        )
        scheduler.save_pretrained(folder)
        return ["diffusers", LCM]
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=not hops).save_pretrained(folder)
    if not hops:
        check_scheduler(folder)
    if takes_times:
        return ["diffusers", EULER]
    file, class_name = JUMP_SCHEDULER
    (folder / f"{file}.py").write_text(JUMPS.format(start=solver.start, m=solver.m), encoding="utf-8")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"_class_name": class_name})
    return JUMP_SCHEDULER


def check_scheduler(folder: Path) -> None:
    """Raise UserError for a scheduler under which a flow map makes no images: one of plain Euler steps, or shifted."""
    config = read_settings(folder / CONFIG, "export the run anew")
    required = {"stochastic_sampling": True, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    for name, value in required.items():
        if config.get(name) != value:
            raise UserError(
                f"{folder / CONFIG}: {name} is {config.get(name)}, and a flow map needs {value}: fresh noise between "
                "two passes, at the times as they are given. Set FlowMatchEulerDiscreteScheduler(shift=1.0, "
                "stochastic_sampling=True)"
            )


def write_euler(folder: Path, frame: DiffusionToVelocity | None = None) -> Entry:
    """Write the scheduler of a velocity, with Euler steps, or DDIM's of a diffusion's `frame`; return its entry."""
    if frame:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        DDIMScheduler(**settings(frame), clip_sample=False, timestep_spacing="trailing").save_pretrained(folder)
        return ["diffusers", "DDIMScheduler"]
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler().save_pretrained(folder)
    return ["diffusers", EULER]
