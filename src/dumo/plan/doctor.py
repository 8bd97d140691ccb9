"""What this machine has, whether a run's parts fit it, and whether its slope is the derivative here: `dumo doctor`.

`diagnose` is the entrance. It examines the slope first, then looks at the machine (`dumo.plan.machine`), and at the
run's weights, captions, buckets and texts (`dumo.plan.findings`). Its findings are lines in that order, but for the
self-test, which comes last.
"""

from dataclasses import asdict
from typing import Any

from torch import nn

from dumo.config.spec import Run
from dumo.io.read import null_nonfinite
from dumo.nets import Net
from dumo.plan import findings
from dumo.plan.machine import Finding, examine_machine
from dumo.run.examination import examine
from dumo.run.net import require_room
from dumo.run.trial_net import with_trial_net
from dumo.run.weights import build
from dumo.runtime.device import choose_device
from dumo.types import UserError


def diagnose(run: Run, device: str = "auto") -> dict[str, Any]:
    """Examine a run on this machine.

    Returns `ok`, whether nothing is failing; `findings`, lines to read, as `Finding` has them; and `examination`, the
    self-test's numbers, None where the slope refused to begin. Raises UserError where there is no such device.
    """
    torch_device = choose_device(device)

    def build_net(net: Net) -> nn.Module:
        return build(run.model_copy(update={"net": net}), torch_device)

    exam = None
    try:
        require_room(with_trial_net(run), torch_device)
        exam = examine(run, torch_device)
    except UserError as error:  # the slope refuses, or an operation has no tangent rule
        self_test = Finding("self-test", "failing", "refused", str(error))
    else:
        if exam.passed:
            self_test = Finding("self-test", "ok", str(exam))
        else:
            self_test = Finding("self-test", "failing", str(exam), exam.fix)
    all_findings = [
        *examine_machine(torch_device),
        *findings.weight_findings(run.net, run.data, build_net),
        *findings.caption_findings(run.data),
        *findings.bucket_findings(run.data),
        *findings.text_findings(run.net, run.data, run.train.seed),
        self_test,
    ]
    return {
        "ok": all(finding.state != "failing" for finding in all_findings),
        "findings": [asdict(finding) for finding in all_findings],
        "examination": None if exam is None else null_nonfinite(asdict(exam)),
    }
