# type: ignore
"""Times of jumps to the data, for a pipeline that takes none: the first is START, the second of two is M.

It needs diffusers alone. dumo writes this file into the folder of a scheduler, with the START and M of the run.
"""

from math import log2

from diffusers import FlowMatchEulerDiscreteScheduler

START, M = 1.0, 0.5


class JumpScheduler(FlowMatchEulerDiscreteScheduler):
    """A scheduler that has its own times, unless it is given others."""

    def set_timesteps(self, num_inference_steps=None, device=None, **times):  # noqa: ANN001, ANN003, ANN201
        """Set the times of the passes: those of jumps, unless `sigmas` or `timesteps` are among `times`."""
        n = num_inference_steps
        if not times:
            times = {"sigmas": [START * (M / START) ** log2(n / (n - k)) for k in range(n or 0)]}
        super().set_timesteps(device=device, **times)
