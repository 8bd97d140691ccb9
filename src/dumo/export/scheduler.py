"""Write the scheduler of an exported model, with which a stock pipeline samples as the run does.

`write_flow_map_scheduler` is for a flow map u, and `write_velocity_scheduler` for a velocity v;
`restart_for_scheduler` returns the solver that the scheduler reproduces.

A flow map u predicts the data, x_0 = x_t - t u, so a pipeline must add fresh noise between two passes.
`FlowMatchEulerDiscreteScheduler` does so with `stochastic_sampling`:

    x_s = (1 - s) (x_t - t u) + s z,

which is Restart (`dumo.flow.solver`) at the times that the pipeline gets as sigmas. Without it the scheduler makes an
Euler step along u, which keeps the old noise and is wrong after the first pass.

A diffusion model predicts noise or v from x_vp at integer timesteps. `LCMScheduler` computes

    x_vp = a_s (c_out x_0 + c_skip x_vp) + s_s z,   x_0 = (x_vp - s_t F) / a_t (for noise),

which are the same jumps: c_skip = .25 / (.25 + (c t)^2) is below 1e-9 if its `timestep_scaling` c is large.

Hop makes Euler steps along a mean velocity, x_s = x_t - (t - s) u(x_t, t, s).

A pipeline without an argument for times gets a custom scheduler class that has them, `shipped/jumps.py`.
"""

import json
from pathlib import Path

from dumo.flow.solver import Hermite, Restart, Solver
from dumo.io.read import write_json
from dumo.nets.vp import DiffusionToVelocity, scheduler_settings
from dumo.types import UserError

# The folder of a pipeline's scheduler, and its config file.
SCHEDULER = "scheduler"
CONFIG = "scheduler_config.json"
# The diffusers classes for the flow map of a diffusion model, and for the linear path.
LCM = "LCMScheduler"
EULER = "FlowMatchEulerDiscreteScheduler"
# An entry of model_index.json: library or file, and class.
Entry = list[str]
# The custom scheduler, and the line of its file that is replaced by the run's times.
JUMP_SCHEDULER: Entry = ["jumps", "JumpScheduler"]
_SHIPPED_TIMES = "START, M = 1.0, 0.5"
# c above: c_skip is .25 / 1e8 at index 1.
_TIMESTEP_SCALING = 1e4
# It does not affect the times. StableDiffusionPipeline warns of a config without it.
_STEPS_OFFSET = 1


def restart_for_scheduler(solver: Solver) -> Restart:
    """Return the Restart that a scheduler reproduces: the solver itself, or the default for a solver without jumps.

    Raises UserError for Hermite, which uses u and v of one pass and keeps the old noise, because stock schedulers only
    get u and add fresh noise.
    """
    if isinstance(solver, Hermite):
        raise UserError("sample.solver is hermite, but standard schedulers only use u: set sample.solver.kind=restart")
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

    For a diffusion model, `diffusion` has the noise schedule, and the other arguments are ignored. If the pipeline has
    no argument for times (`takes_times` is False), the scheduler has the times of `solver`. With `makes_hops`, passes
    are steps of a mean velocity, without fresh noise.
    """
    if diffusion:
        return _write_lcm(folder, diffusion)
    entry = _write_flow_match(folder, stochastic_sampling=not makes_hops)
    # Other settings depend on the defaults of the installed diffusers.
    if not makes_hops:
        check_scheduler(folder)
    if not takes_times:
        entry = _add_times(folder, solver)
    return entry


def write_velocity_scheduler(folder: Path, diffusion: DiffusionToVelocity | None) -> Entry:
    """Write the scheduler of a velocity into `folder`; return its entry in model_index.json.

    It makes Euler steps, or DDIM steps for a diffusion model, whose noise schedule is in `diffusion`.
    """
    if diffusion:
        return _write_ddim(folder, diffusion)
    return _write_flow_match(folder, stochastic_sampling=False)


def check_scheduler(folder: Path) -> None:
    """Raise UserError for a scheduler with plain Euler steps or shifted times, which are wrong for a flow map."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    required = {"stochastic_sampling": True, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    for name, value in required.items():
        if config.get(name) != value:
            raise UserError(
                f"{EULER} of the installed diffusers has {name}={config.get(name)}, but a flow map needs {value}: "
                "install another version of diffusers"
            )


def _write_flow_match(folder: Path, *, stochastic_sampling: bool) -> Entry:
    """Write a scheduler of Euler steps or, with `stochastic_sampling`, of jumps to the data and fresh noise."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic_sampling)
    scheduler.save_pretrained(folder)
    return ["diffusers", EULER]


def _add_times(folder: Path, solver: Restart) -> Entry:
    """Write the custom scheduler class next to the scheduler's config in `folder`, and reference it there."""
    file, class_name = JUMP_SCHEDULER
    code = (Path(__file__).parent / "shipped" / f"{file}.py").read_text(encoding="utf-8")
    code = code.replace(_SHIPPED_TIMES, f"START, M = {solver.start!r}, {solver.m!r}")
    (folder / f"{file}.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"_class_name": class_name})
    return JUMP_SCHEDULER


def _write_lcm(folder: Path, diffusion: DiffusionToVelocity) -> Entry:
    """Write a scheduler for the flow map of a diffusion model."""
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    scheduler = LCMScheduler(
        **scheduler_settings(diffusion),
        original_inference_steps=diffusion.schedule.steps,
        timestep_scaling=_TIMESTEP_SCALING,
        steps_offset=_STEPS_OFFSET,
    )
    scheduler.save_pretrained(folder)
    return ["diffusers", LCM]


def _write_ddim(folder: Path, diffusion: DiffusionToVelocity) -> Entry:
    """Write a scheduler for the velocity of a diffusion model."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(
        **scheduler_settings(diffusion), clip_sample=False, timestep_spacing="trailing", steps_offset=_STEPS_OFFSET
    )
    scheduler.save_pretrained(folder)
    return ["diffusers", "DDIMScheduler"]
