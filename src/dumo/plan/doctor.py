"""What this machine has, whether a run's parts fit it, and whether its slope is the derivative here: `dumo doctor`.

`diagnose` is the entrance. It examines the slope first, then looks at the machine (`dumo.plan.machine`), and at the
run's weights, captions, buckets and texts (`dumo.plan.findings`). Its findings are lines in that order, but for the
self-test, which comes last.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dumo.config.spec import Run
from dumo.io.read import null_nonfinite
from dumo.nets import Net
from dumo.plan import findings
from dumo.plan.machine import Finding, examine_machine
from dumo.run.examination import Examination, examine
from dumo.run.net import require_room
from dumo.run.trial_net import with_trial_net
from dumo.run.weights import build
from dumo.runtime.device import choose_device
from dumo.types import UserError


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found out."""

    findings: list[Finding]
    examination: Examination | None  # the self-test's numbers; None: the slope refused to begin

    @property
    def is_ok(self) -> bool:
        """Whether nothing is failing."""
        return all(finding.state != "failing" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """All that was found out, with null for numbers that are not finite."""
        return {
            "ok": self.is_ok,
            "findings": [asdict(finding) for finding in self.findings],
            "examination": None if self.examination is None else null_nonfinite(asdict(self.examination)),
        }


def diagnose(run: Run, device: str = "auto") -> Diagnosis:
    """Examine a run on this machine. Raises UserError where there is no such device."""
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
    return Diagnosis(all_findings, exam)
