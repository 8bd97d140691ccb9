"""Draw embedder.png: gradient norms by module, of one run at one rate and of one with `train.optimizer.time_lr`.

    python docs/embedder.py RUN RUN

Both are `dumo-best-latents` with `train.coupling=null` for 736 steps with the schedule of `scaling`, seed 0. A row of
their logs has the largest norms of 50 steps.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from dumo.training.log import read_log

TITLES = ("one rate", "the embedder at an eighth of it")
MODULES = {"scalars": "embedder of t", "blocks": "blocks", "heads.u": "head u", "heads.v": "head v"}


def main(*runs: str) -> None:
    """Both side by side, on one scale."""
    figure = Figure((8.0, 3.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, run, title in zip(panels, runs, TITLES, strict=True):
        rows = [row for row in read_log(Path(run) / "metrics.jsonl") if row.get("grad_peaks")]
        for module, name in MODULES.items():
            axes.plot([row["step"] for row in rows], [row["grad_peaks"][module] for row in rows], label=name)
        axes.set(title=title, xlabel="step", yscale="log")
    panels[0].set_ylabel("largest gradient norm of 50 steps")
    panels[0].legend(frameon=False)
    figure.savefig(Path(__file__).with_name("embedder.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
