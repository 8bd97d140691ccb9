"""What this machine has, whether a run's parts fit it, and whether its slope is the derivative here: `dumo doctor`.

`diagnose` examines the slope first, then looks at the machine (`dumo.plan.machine`), and at the run's weights,
captions, buckets and texts (`dumo.plan.findings`). Its findings are lines, in that order, the self-test last.
"""

from dataclasses import asdict
from typing import Any

from torch import nn

from dumo.config.spec import Run
from dumo.io.read import finite
from dumo.nets import Net
from dumo.plan import findings
from dumo.plan.machine import Finding, look
from dumo.run.examination import examine
from dumo.run.weights import build
from dumo.runtime import dist
from dumo.types import UserError


def diagnose(run: Run, device: str = "auto") -> dict[str, Any]:
    """What this machine has, and how the self-test went: `ok` or not. Raises UserError for a device not there.

    `findings` are lines to read; `examination` is None where the slope refused to begin.
    """
    torch_device = dist.device(device)

    def build_net(net: Net) -> nn.Module:
        return build(run.model_copy(update={"net": net}), torch_device)

    exam = None
    try:
        exam = examine(run, torch_device)
    except UserError as error:  # the slope refuses, or an operation has no tangent rule
        self_test = Finding("self-test", "failing", "refused", str(error))
    else:
        if exam.passed:
            self_test = Finding("self-test", "ok", str(exam))
        else:
            self_test = Finding("self-test", "failing", str(exam), exam.fix)
    of_weights = findings.of_weights(run.net, run.data, build_net)
    of_texts = findings.of_texts(run.net, run.data, run.train.seed)
    all_findings = [
        *look(torch_device),
        *of_weights,
        *findings.of_captions(run.data),
        *findings.of_buckets(run.data),
        *of_texts,
        self_test,
    ]
    return {
        "ok": all(finding.state != "failing" for finding in all_findings),
        "findings": [asdict(finding) for finding in all_findings],
        "examination": None if exam is None else finite(asdict(exam)),
    }
