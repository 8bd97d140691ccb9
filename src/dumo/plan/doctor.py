"""What this machine has, whether a run's parts fit it, and whether its slope is the derivative here: `dumo doctor`."""

from dataclasses import asdict
from typing import Any

from dumo.config.spec import Run
from dumo.io.read import finite
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
    here, exam = dist.device(device), None
    try:
        exam = examine(run, here)
        text, way = str(exam), "" if exam.passed else exam.way
    except UserError as error:  # the slope refuses, or an operation has no tangent rule
        text, way = "refused", str(error)
    test = Finding("self-test", "failing" if way else "ok", text, way)
    weights = findings.of_weights(run.net, run.data, lambda net: build(run.model_copy(update={"net": net}), here))
    texts = findings.of_texts(run.net, run.data, run.train.seed)
    found = [*look(here), *weights, *findings.of_captions(run.data), *findings.of_buckets(run.data), *texts, test]
    ok = all(finding.state != "failing" for finding in found)
    return {"ok": ok, "findings": [asdict(finding) for finding in found], "examination": exam and finite(asdict(exam))}
