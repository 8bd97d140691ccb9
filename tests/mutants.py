"""Plant an error in the mathematics, see that a test fails; once per error. Run by `make mutants`, about two minutes.

A mutant is one replacement in one file of a copy of src. The tests run against the copy; a mutant that they let live
is a law that nobody checks, and the exit code is 1. One run is without an error, and must pass.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
AT_ONCE = 2
PATIENCE = 600  # seconds, on a busy machine; alone, no run takes 30
THEORY, SOLVERS = "tests/theory", "tests/unit/sample/test_solver.py"
FIXED, FORMULA, LAW, READ, SLOPE, EXACT, UNBIASED = (
    f"{THEORY}/test_{name}.py" for name in ("fixed_point", "formula", "law", "read", "slope", "exact", "unbiased")
)
DRAW, GUIDANCE = "tests/unit/flow/test_draw.py", f"{THEORY}/test_guidance.py"
PROBE = "tests/unit/train/test_probe.py"


RULE, DUAL = "tests/unit/flow/test_rule.py", "tests/unit/flow/test_dual.py"


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in src/dumo/`file`, becomes `new`; `tests` are to see it."""

    file: str
    old: str
    new: str
    why: str
    tests: str


MUTANTS = [
    Mutant("objectives/dumo.py", "v_star - lift", "v_star + lift", "u* has the sign of du/dt wrong", FIXED),
    Mutant("objectives/dumo.py", "lift(b.t, b.x_t) * du_dt", "du_dt", "u* forgets the factor t", FIXED),
    Mutant("objectives/dumo.py", "along(v_star)", "along(b.v_t)", "du/dt runs along the unguided velocity", FIXED),
    Mutant("objectives/dumo.py", "_, du_dt =", "du_dt, _ =", "u* takes the slope of v", FIXED),
    Mutant("objectives/dumo.py", "(1 - self.beta) * u_loss", "self.beta * u_loss", "beta weighs both", FORMULA),
    Mutant("objectives/dumo.py", "torch.no_grad()", "torch.enable_grad()", "the target is pulled too", FORMULA),
    Mutant("objectives/dumo.py", "net(x, c, t=t)[1]", "net(x, c, t=t)[0]", "the endpoint is read off v", READ),
    Mutant("objectives/flow_matching.py", "(v_hat - v_star)", "(v_hat - b.v_t)", "guidance has no effect", FIXED),
    Mutant("objectives/meanflow.py", "v_star - lift", "v_star + lift", "u* has the sign of du/dt wrong", FIXED),
    Mutant("objectives/meanflow.py", "lift(b.t - b.r, b.x_t)", "lift(b.t, b.x_t)", "u* forgets r", FIXED),
    Mutant("objectives/meanflow.py", "along(v_star)", "along(b.v_t)", "du/dt runs along the unguided velocity", FIXED),
    Mutant("objectives/meanflow.py", "t=b.t, r=b.t)[0]", "t=b.t, r=b.r)[0]", "guidance takes u for v", FIXED),
    Mutant(
        "objectives/meanflow.py", "self.power, self.floor", "self.floor, self.power", "p and c change places", FORMULA
    ),
    Mutant("flow/slope.py", "(b - a) / (2", "(a - b) / (2", "the difference has the wrong sign", FIXED),
    Mutant("flow/slope.py", "(2 * self.h)", "self.h", "the difference is twice the derivative", FIXED),
    Mutant("flow/slope.py", "c, t=t - self.h", "c, t=t", "one end stays in time", FIXED),
    Mutant("flow/slope.py", "t=t + self.h", "t=(t + self.h).clamp(max=1)", "one-sided at t = 1", SLOPE),
    Mutant("flow/slope.py", "(w, torch.ones_like(t))", "(w, torch.zeros_like(t))", "time stands still", FIXED),
    Mutant(
        "flow/slope.py",
        "w.detach(), torch.ones_like(t)",
        "w.detach(), torch.zeros_like(t)",
        "on tape, time stands still",
        FIXED,
    ),
    Mutant(
        "flow/slope.py",
        "net(pair(x, w.detach()), c, t=pair(t, torch.ones_like(t))",
        "net(pair(x, w.detach()), c, t=t",
        "on a ride, time stands still",
        FIXED,
    ),
    Mutant("flow/slope.py", "_moved(ref, x, c, w,", "_moved(ref, x, c, 0 * w,", "in a dual pass, x_t rests", SLOPE),
    Mutant(
        "flow/slope.py", "if ref.module is not bare(net):", "if False:", "the tangent rides on the wrong weights", SLOPE
    ),
    Mutant("flow/slope.py", "key=[*rows, *others].__getitem__)", "key=None)", "rows are put back elsewhere", SLOPE),
    Mutant(
        "flow/dual.py",
        "now.push(*tangents, *now.saved)",
        "now.push(*tangents[::-1], *now.saved)",
        "operands change places",
        FIXED,
    ),
    Mutant("flow/slope.py", "lambda x, t: ref(", "lambda x, t: net(", "the derivative is not of theta^-", SLOPE),
    Mutant("flow/guide.py", "v_star + self.zeta", "v_star - self.zeta", "zeta pulls to the null", FIXED),
    Mutant("flow/guide.py", "1 - self.omega - self.zeta", "1 - self.omega", "the three weights do not sum to 1", FIXED),
    Mutant("flow/guide.py", "velocity(b, b.null)", "velocity(b, b.c)", "there is no null pass", FIXED),
    Mutant("flow/guide.py", "& (b.t <= self.interval.high)", "", "the interval has no end", FIXED),
    Mutant("flow/metric.py", "(v_error - u_error)", "(v_error + u_error)", "the heads are added", FORMULA),
    Mutant("train/probe.py", "row[i] * row[j]", "row[i] * row[i]", "a cosine of a gradient with itself", PROBE),
    Mutant("flow/guide.py", "return b.kept & (", "return (", "dropped rows are guided", FORMULA),
    Mutant("flow/guide.py", "lift(weight.to(v_star), v_star) * (v_", "(v_", "a row stands for itself alone", UNBIASED),
    Mutant("flow/guide.py", "rows.sum(1).to", "(self.every * rows.any(1)).to", "a row stands for all", UNBIASED),
    Mutant("flow/guide.py", ".where(rows, -1).argmax", ".argmax", "a dropped row is picked, for the others", UNBIASED),
    Mutant("flow/guide.py", "else v_hat[place]", "else v_hat[: len(place)]", "the picks take others' V(c)", FORMULA),
    Mutant("flow/guide.py", "(b.v_t + v_hat) / 2", "b.v_t + v_hat / 2", "an average is half as much again", FIXED),
    Mutant("flow/guide.py", "(b.v_t + v_hat) / 2", "(b.v_t + 2 * v_hat) / 3", "an average of unequal halves", FORMULA),
    Mutant("flow/guide.py", "lift(~self.rows(b), b.x_t)", "lift(self.rows(b), b.x_t)", "other rows average", FORMULA),
    Mutant("flow/guide.py", ".where(lift(~self.rows(b), b.x_t), b.v_t)", "", "rows that wait average", UNBIASED),
    Mutant("flow/guide.py", "v_hat = velocity(b, b.c)", "v_hat = velocity(b, b.null)", "V(null) is averaged", FORMULA),
    Mutant("sample/guidance.py", "y_null + self.scale *", "y[place] + self.scale *", "w is one too much", GUIDANCE),
    Mutant("sample/guidance.py", "torch.full_like(c, null)", "c", "there is no null reading", GUIDANCE),
    Mutant("sample/guidance.py", "& (t <= self.interval.high)", "", "the interval has no end", GUIDANCE),
    Mutant("objectives/meanflow.py", "if self.power:", "if not self.power:", "a bias is let in", UNBIASED),
    Mutant("flow/draw.py", 'step, "coin"', 'step, "kept"', "the coin knows of the label", DRAW),
    Mutant("flow/draw.py", "moving(n)[mine]", "moving(n)[: len(x)]", "all ranks spare the first one's rows", DRAW),
    Mutant("types.py", "v_t=v_s, moving=None)", "v_t=v_s)", "rows at another time are taken to rest", DRAW),
    Mutant(
        "flow/rule/algebra.py",
        "product(da, b) + product(a, db)",
        "product(da, b) - product(a, db)",
        "the product rule has the wrong sign",
        RULE,
    ),
    Mutant(
        "flow/rule/layer.py",
        ".addcmul_(y.to(dx.dtype), along, value=-1)",
        "",
        "a norm forgets that its scale moves",
        RULE,
    ),
    Mutant("flow/rule/function.py", "return -x.sin()", "return x.sin()", "the cosine has the wrong slope", RULE),
    Mutant("flow/rule/layer.py", "out if plain else x.p", "out", "a norm with weights moves by what it gave", RULE),
    Mutant("flow/rule/layer.py", "torch.mul, None, mask", "torch.mul, None, 1 / (1 - p)", "the dropped move", RULE),
    Mutant("flow/rule/shape.py", "Tensor.view: Tensor.reshape,", "", "tangents must lie as their primals", RULE),
    Mutant("flow/dual.py", "now.moved = now.saved = ()", "pass", "a tape keeps what it has played", DUAL),
    Mutant("flow/dual.py", "if not torch.is_grad_enabled() and", "if False and", "gradients are lost unsaid", RULE),
    Mutant(
        "flow/guide.py",
        "if len(place) == len(b.t):",
        "if True:",
        "guidance is made on all rows",
        "tests/unit/flow/test_guide.py",
    ),
    Mutant("flow/path.py", ", z - x", ", x - z", "the path runs backwards", EXACT),
    Mutant("flow/path.py", "return 1 - t", "return 1 - t * t", "the path is bent", EXACT),
    Mutant("flow/read.py", "lift(t - s, x)", "lift(t, x)", "a hop goes all the way", READ),
    Mutant("flow/read.py", "t=t, r=t)", "t=t, r=0 * t)", "the velocity is read off r = 0", READ),
    Mutant("flow/metric.py", "s.detach()", "s", "the weight is pulled too", FORMULA),
    Mutant("flow/metric.py", "+ c) ** p", "+ c)", "the power is lost", FORMULA),
    Mutant("flow/times.py", "gamma[:, 0] / ", "gamma[:, 1] / ", "a and b change places", LAW),
    Mutant("flow/times.py", "torch.maximum(a, b), torch.minimum(a, b)", "a, b", "r may be after t", LAW),
    Mutant("flow/times.py", "self.moving(n)), r, t)", "self.moving(n)), r, r)", "r = t is lost", LAW),
    Mutant("flow/times.py", "so_far.diff() == 0", "so_far.diff() >= 0", "rows at rest are said to move", LAW),
    Mutant("flow/times.py", "self.std * torch.randn", "torch.randn", "the width of the law is lost", LAW),
    Mutant(
        "sample/solver.py",
        "lift(t - s, x) * velocity(x, t, c)",
        "lift(t - s, x) * velocity(x, s, c)",
        "Euler looks ahead",
        SOLVERS,
    ),
    Mutant(
        "sample/solver.py", "velocity(x - dt * v, s, c)", "velocity(x - dt * v, t, c)", "Heun stays in time", SOLVERS
    ),
    Mutant("sample/solver.py", "velocity(x - dt * v, s, c)", "velocity(x, s, c)", "Heun stays in place", SOLVERS),
    Mutant("sample/solver.py", "fresh(k)", "fresh(0)", "Restart noises with the noise it started from", SOLVERS),
    Mutant("sample/solver.py", "flow_map(x, t, s, c)", "flow_map(x, t, 0 * s, c)", "Hop goes all the way", SOLVERS),
    Mutant(
        "sample/grid.py", "log2(n / (n - k))", "log2((n - k) / n)", "the jumps rise", "tests/unit/sample/test_grid.py"
    ),
]


def plant(mutant: Mutant, src: Path) -> None:
    """Put the error into the copy. Raises ValueError unless there is exactly one place for it."""
    file = src / "dumo" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times: mend tests/mutants.py")
    file.write_text(text.replace(mutant.old, mutant.new))


def run(src: Path, tests: list[str]) -> tuple[int, str]:
    """Exit code and output of the tests against this copy. Raises RuntimeError if another one would be tested."""
    env = {**os.environ, "PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    where = [sys.executable, "-c", "import dumo; print(dumo.__file__)"]
    found = subprocess.run(where, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()
    if Path(found) != src / "dumo" / "__init__.py":
        raise RuntimeError(f"the tests would run against {found}, not against {src}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout + done.stderr


def trial(mutant: Mutant | None) -> tuple[bool, str]:
    """Whether the tests did what they should, pass without a mutant and fail with one, and what they said."""
    with TemporaryDirectory() as folder:
        src = Path(folder).resolve() / "src"
        shutil.copytree(ROOT / "src", src, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is None:
            code, output = run(src, sorted({m.tests for m in MUTANTS}))
            return code == 0, output.strip().splitlines()[-1]
        try:
            plant(mutant, src)
            code, output = run(src, [mutant.tests])
        except (ValueError, subprocess.TimeoutExpired) as error:
            return False, str(error)
    failed = re.search(r"^FAILED \S*::(\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return True, failed[1]
    return False, "SURVIVED" if code == 0 else f"no test failed, yet pytest exits with {code}: {output[-300:]}"


def main() -> int:
    """Print a row per mutant. 0 if every one was killed."""
    begun = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sane = pool.submit(trial, None)
        dead = []
        for mutant, (killed, said) in zip(MUTANTS, pool.map(trial, MUTANTS), strict=True):
            dead.append(killed)
            print(f"{'killed' if killed else 'ALIVE '}  {mutant.file:28} {mutant.why:46} {said}", flush=True)
    fine, said = sane.result()
    print(f"{'fine  ' if fine else 'BROKEN'}  without a mutant: {said}")
    print(f"{sum(dead)} of {len(MUTANTS)} mutants killed in {time.monotonic() - begun:.0f} s")
    return 0 if fine and all(dead) else 1


if __name__ == "__main__":
    sys.exit(main())
