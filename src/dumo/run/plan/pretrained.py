"""What one asks of a pretrained net before it is tuned: is it what it was, and may its derivative be regressed on.

Asked of the weights as the source has them, at several times, on random numbers in the place of images.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import pair, primal, tangent
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.run.config.spec import Run
from dumo.run.plan.machine import Finding
from dumo.runtime.random import random_batch
from dumo.types import lift

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
CHANGE = 0.02  # ours: a low-pass that moves v by more has cut what the model uses
AGAIN = (
    "teach it v again, first by objective.kind=flow_matching, then from that run by start; net.lowpass=30 keeps more "
    "waves, but such a net was too quick for DuMo on digits"
)
ROUGH = 3.0  # ours: |t dv/dt| / |v| of digits nets that could be tuned was at most 0.6, of one that could not, 4.4


def findings(run: Run, here: torch.device) -> list[Finding]:
    """The low-pass, the dual pass, and how quickly v changes. Raises UserError as the net's `build`."""
    net = run.build(here).eval()
    assert isinstance(net, Dualized)
    net.refit()
    x, c = (part.to(here) for part in random_batch("pretrained", len(TIMES), run.data.shape, run.data.classes))
    t = torch.tensor(TIMES, device=here)
    with torch.no_grad():
        v, rate, same = moved(net, x, c, t)
        found = [Finding("dual pass", "ok", "has the bits of the plain one")]
        if not same:
            found = [Finding("dual pass", "failing", "is not the plain one", "objective.slope.kind=jvp")]
        if net.fits:
            with old(run, net, here) as before:
                found.append(lowpassed(net, float((v - before(x, c, t=t)[0]).norm() / v.norm())))
    ratios = [float(r) for r in (lift(t, v) * rate).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)]
    text = ", ".join(f"{r:.2g} at {s:g}" for s, r in zip(TIMES, ratios, strict=True))
    way = "net.lowpass=10, or less: u may diverge where v changes so quickly" if max(ratios) > ROUGH else ""
    return [*found, Finding("|t dv/dt| / |v|", "warning" if way else "ok", text, way)]


def moved(net: nn.Module, x: Tensor, c: Tensor, t: Tensor) -> tuple[Tensor, Tensor, bool]:
    """v and dv/dt along v itself, and whether a dual pass has the bits of a plain one."""
    v = net(x, c, t=t)[0]
    dual = net(pair(x, v), c, t=pair(t, torch.ones_like(t)))[0]
    rate = tangent(dual)
    assert isinstance(rate, Tensor)
    return v, rate, torch.equal(primal(dual), v)


def old(run: Run, net: Dualized, here: torch.device) -> AbstractContextManager[nn.Module]:
    """The model that it was: the same with its adapters off, or built again."""
    assert isinstance(run.net, Pretrained)
    if run.net.lora:
        return net.base()
    as_it_was = run.net.model_copy(update={"lowpass": None})
    return nullcontext(run.model_copy(update={"net": as_it_was}).build(here).eval())


def lowpassed(net: Dualized, change: float) -> Finding:
    """How the low-pass went."""
    way = AGAIN if change > CHANGE else ""
    text = "; ".join(map(str, net.fits)) + f"; |dv| / |v| = {100 * change:.2g} %"
    return Finding("low-pass", "warning" if way else "ok", text, way)
