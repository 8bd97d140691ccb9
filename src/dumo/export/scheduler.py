"""The scheduler of an exported model, by which a stock pipeline makes the passes of a run.

`write_flow_map_scheduler` writes that of a flow map u, `write_velocity_scheduler` that of a velocity v. Before either,
`restart_for_scheduler` says which of our solvers the scheduler imitates, or refuses.

A flow map u says where the data lie, x_0 = x_t - t u, so between two passes a pipeline must add fresh noise. Stock
`FlowMatchEulerDiscreteScheduler` does with `stochastic_sampling`:

    x_s = (1 - s) (x_t - t u) + s z,

which is Restart (`dumo.flow.solver`) at the times that the pipeline is given as sigmas. Without it the scheduler
makes an Euler step along u, which keeps the old noise and is wrong from the second pass on.

A net of a diffusion gives its own kind of output still, noise or v, from x_vp at whole indices. `LCMScheduler` makes

    x_vp = a_s (c_out x_0 + c_skip x_vp) + s_s z,   x_0 = (x_vp - s_t F) / a_t (for noise),

the same jumps: c_skip = .25 / (.25 + (c t)^2) is below 1e-9 where its `timestep_scaling` c is large.

Passes of Hop are Euler steps along a mean velocity, x_s = x_t - (t - s) u(x_t, t, s).

A pipeline that takes no times gets a scheduler with a class of its own, `shipped/jumps.py`, which has them.
"""

import json
from pathlib import Path

from dumo.flow.solver import Hermite, Restart, Solver
from dumo.io.read import read_settings, write_json
from dumo.nets.vp import DiffusionToVelocity, scheduler_settings
from dumo.types import UserError

SCHEDULER = "scheduler"  # the folder of a pipeline's scheduler
CONFIG = "scheduler_config.json"  # the file in it
SHIPPED = Path(__file__).parent / "shipped"  # code that is copied into exports
LCM = "LCMScheduler"  # the class of diffusers for the flow map of a diffusion
EULER = "FlowMatchEulerDiscreteScheduler"  # the class of diffusers for all on the linear path
Entry = list[str]  # of model_index.json: library or file, and class
JUMP_SCHEDULER: Entry = ["jumps", "JumpScheduler"]  # of shipped/jumps.py, which has its times
_SHIPPED_TIMES = "START, M = 1.0, 0.5"  # the line of shipped/jumps.py that is written with the run's times
_TIMESTEP_SCALING = 1e4  # c above, so that c_skip is .25 / 1e8 at index 1: ours


def restart_for_scheduler(solver: Solver) -> Restart:
    """Return the Restart that a scheduler imitates: the solver itself, or the default for a solver without jumps.

    Raises UserError for Hermite, which reads u and v of one pass and keeps the old noise: stock schedulers get u alone,
    and add fresh noise.
    """
    if isinstance(solver, Hermite):
        raise UserError(
            f"sample.solver = {solver.model_dump(mode='json')}: schedulers add fresh noise alone between two "
            "passes. Set kind: restart there, in the run's run.yaml"
        )
    return solver if isinstance(solver, Restart) else Restart()


def write_flow_map_scheduler(
    folder: Path,
    solver: Restart,
    diffusion: DiffusionToVelocity | None = None,
    *,
    takes_times: bool = True,
    makes_hops: bool = False,
) -> Entry:
    """Write the scheduler of a flow map into `folder`; return its entry in model_index.json.

    For a model of a diffusion, `diffusion` has the table, and the other arguments are not read. `takes_times`: the
    pipeline has an argument for times; if it has none, the scheduler has those of `solver`. `makes_hops`: the passes
    are steps of a mean velocity, without fresh noise between them.
    """
    if diffusion:
        return _write_lcm(folder, diffusion)
    entry = _write_flow_match(folder, stochastic_sampling=not makes_hops)
    if not makes_hops:
        check_scheduler(folder)  # what is not set above has the defaults of the diffusers that is installed
    if not takes_times:
        entry = _add_times(folder, solver)
    return entry


def write_velocity_scheduler(folder: Path, diffusion: DiffusionToVelocity | None) -> Entry:
    """Write the scheduler of a velocity into `folder`; return its entry in model_index.json.

    It makes Euler steps, or of a model of a diffusion, whose table is in `diffusion`, the steps of DDIM.
    """
    if diffusion:
        return _write_ddim(folder, diffusion)
    return _write_flow_match(folder, stochastic_sampling=False)


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


def _write_flow_match(folder: Path, *, stochastic_sampling: bool) -> Entry:
    """Write a scheduler of Euler steps, or with `stochastic_sampling` one of jumps to the data and fresh noise."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic_sampling)
    scheduler.save_pretrained(folder)
    return ["diffusers", EULER]


def _add_times(folder: Path, solver: Restart) -> Entry:
    """Put the class that has its times next to the config of a scheduler in `folder`, which then names that class."""
    file, class_name = JUMP_SCHEDULER
    code = (SHIPPED / f"{file}.py").read_text(encoding="utf-8")
    code = code.replace(_SHIPPED_TIMES, f"START, M = {solver.start!r}, {solver.m!r}")
    (folder / f"{file}.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"_class_name": class_name})
    return JUMP_SCHEDULER


def _write_lcm(folder: Path, diffusion: DiffusionToVelocity) -> Entry:
    """Write a scheduler that makes the jumps of a diffusion's flow map."""
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    scheduler = LCMScheduler(
        **scheduler_settings(diffusion),
        original_inference_steps=diffusion.schedule.steps,
        timestep_scaling=_TIMESTEP_SCALING,
    )
    scheduler.save_pretrained(folder)
    return ["diffusers", LCM]


def _write_ddim(folder: Path, diffusion: DiffusionToVelocity) -> Entry:
    """Write a scheduler that follows the velocity of a diffusion."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(**scheduler_settings(diffusion), clip_sample=False, timestep_spacing="trailing")
    scheduler.save_pretrained(folder)
    return ["diffusers", "DDIMScheduler"]
