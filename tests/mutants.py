"""Plant an error in the mathematics, see that a test fails; once per error. Run by `make mutants`, about four minutes.

A mutant is one replacement in one file of src, made as Python imports it; the file stays as it is. A mutant that its
tests let live is a law that nobody checks, and the exit code is 1. At last the tests that saw one run without any, and
must pass.
"""

import gc
import importlib
import multiprocessing
import os
import re
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import pytest
import torch

from planted import METHOD, Plant

ROOT = Path(__file__).parent.parent
AT_ONCE = 2
# What dumo and the tests import; a derivative in forward mode asks for the fourth, which takes four seconds.
OTHERS = [
    "jaxtyping",
    "matplotlib.pyplot",
    "pydantic.main",
    "torch._dynamo",
    "safetensors.torch",
    "scipy.linalg",
    "yaml",
]
FORK = multiprocessing.get_context("fork")
ADDED = "--import-mode=importlib --strict-markers --strict-config -ra"
PATIENCE = 600  # seconds, on a busy machine; alone, no run takes 30
THEORY, OBJECTIVES, SOLVERS = "tests/theory", "tests/objectives", "tests/unit/sampling/test_solver.py"
FIXED, LAW, READ, SLOPE, EXACT, UNBIASED = (
    f"{THEORY}/test_{name}.py" for name in ("fixed_point", "law", "read", "slope", "exact", "unbiased")
)
CONTRACT, SHARE, RANDOM = "tests/contract/test_draw.py", "tests/unit/data/test_share.py", "tests/unit/test_random.py"
LIKELIHOOD = f"{THEORY}/test_likelihood.py"
JUDGED, EVALUATED = (f"tests/unit/{room}/test_likelihood.py" for room in ("protocols", "evaluation"))
WEIGHT, DISPERSE = f"{THEORY}/test_weight.py", "tests/unit/flow/test_disperse.py"
READS = "tests/contract/test_read.py"
TIMES = "tests/unit/flow/test_times.py"
DRAW, GUIDANCE = "tests/unit/flow/test_draw.py", f"{THEORY}/test_guidance.py"
GUIDE, PRECISION, WAIT = (
    "tests/unit/flow/test_guide.py",
    "tests/unit/flow/test_precision.py",
    "tests/contract/test_wait.py",
)
CAPTION, LEARNED, HALF = (
    f"tests/unit/{name}.py" for name in ("data/test_caption", "nets/test_learned", "nets/test_half")
)
LORA, STOCK = (f"tests/unit/export/test_{name}.py" for name in ("lora", "stock"))
HELD = "tests/unit/data/test_digits.py"
LATE = "tests/unit/nets/test_late.py"
LED = "tests/unit/run/test_teacher.py::test_a_weak_teacher_leads_the_other_away"
CONTRAST = f"{THEORY}/test_contrast.py"
COUPLING = "tests/unit/flow/test_coupling.py"
PROBE = "tests/unit/training/test_probe.py"
NEIGHBOURS, TWO_SAMPLE = (f"tests/unit/metrics/test_{name}.py" for name in ("neighbours", "two_sample"))
PROTOCOL = "tests/unit/protocols/test_protocol.py"
THEOREM, RATE, DEVIATION = (f"{THEORY}/test_{name}.py" for name in ("theorem", "rate", "deviation"))
SHORTCUT, SPLIT, TWIN, SOFLOW, RCGM, ALPHA, UCGM = (
    f"{OBJECTIVES}/test_{name}.py"
    for name in ("shortcut", "split_meanflow", "twinflow", "soflow", "rcgm", "alpha_flow", "ucgm")
)
DUMO, MEANFLOW, FLOW = (f"{OBJECTIVES}/test_{name}.py" for name in ("dumo", "meanflow", "flow_matching"))
PULL = f"{OBJECTIVES}/test_pull.py"
SID = f"{PULL}::test_match_by_identity_by_hand"
HALF_OF = f"{PULL}::test_half_of_the_identity_is_the_slope_of_the_divergence"
MATCH, CRITIC, DRIFT = (f"{PULL}::test_{name}_by_hand" for name in ("match", "critic", "drift"))
SECOND, GOES_ON = (
    f"{OBJECTIVES}/test_consistency.py::test_a_second_stage_{name}" for name in ("by_hand", "goes_on_from_the_first")
)
PI_FLOW = f"{OBJECTIVES}/test_pi_flow.py"
POLICY = f"{PI_FLOW}::test_a_policy_is_gone_along_in_closed_form"
CONSISTENCY, IMM, SEVERAL, TVM, IMF, FACM, SCT, CMT = (
    f"{OBJECTIVES}/test_{name}.py" for name in ("consistency", "imm", "several", "tvm", "imf", "facm", "sct", "cmt")
)
DISCRETIZATION, EDM, HEADS = (
    f"tests/unit/{name}.py" for name in ("flow/test_discretization", "nets/test_precondition", "nets/test_own")
)


LAYOUT = f"{THEORY}/test_layout.py::test_two_ranks_are_two_pieces_to_the_bit"
DROPPED, EMA, MUON, OPTIM, SNAPSHOT = (
    f"tests/unit/training/test_{name}.py" for name in ("dropout", "ema", "muon", "optim", "snapshot")
)
COLLECTIVE, STEP = f"{THEORY}/test_collective.py", "tests/unit/training/test_step.py"
FROZEN, FROZEN_RANKS = (f"tests/unit/training/test_{name}.py" for name in ("frozen", "frozen_ranks"))
BASE = "tests/unit/run/test_base.py"
LOWPASS, PRETRAINED = (f"tests/unit/nets/test_{name}.py" for name in ("lowpass", "pretrained"))
OLD, APART = f"{PRETRAINED}::test_every_head_begins_as_the_model", f"{PRETRAINED}::test_heads_go_their_own_ways"
ADAPTED = f"{PRETRAINED}::test_adapters_leave_the_model_as_it_is[sd3]"
READING = "tests/unit/nets/test_reading.py"
SKIP, MAGNITUDE = (f"tests/unit/nets/test_{name}.py" for name in ("skip", "magnitude"))
LOOKS, PADDED, EACH, SEES, LABELS = (
    f"{READING}::test_{name}"
    for name in (
        "joint_attention_by_hand",
        "padding_is_nothing",
        "every_token_that_is_there_matters_and_no_other",
        "the_image_sees_itself",
        "where_texts_are_labels_samples_are_those_of_classes",
    )
)
CAPTIONED = "tests/unit/data/test_captioned.py::test_other_captions_are_refused"
DEPTH = "tests/unit/preflight/test_depth.py::test_a_few_blocks_of_each_kind_tell_of_all[flux-dev-lora0]"
CUT, WAVES = f"{LOWPASS}::test_what_is_cut_stays_cut", f"{LOWPASS}::test_waves_are_those_that_the_model_makes[sd3]"
SMOOTH, ROUNDED = (
    f"{LOWPASS}::test_a_smooth_net_stays_what_it_is[sd3]",
    f"{PRETRAINED}::test_times_are_not_rounded_in_bf16",
)
WHOLE, CHECKPOINT = "tests/unit/training/test_manifest.py", "tests/unit/training/test_checkpoint.py"
SKIPPED = f"{STEP}::test_what_is_not_finite_is_counted_and_not_applied"
OTHER = f"{STEP}::test_a_number_of_another_rank_skips_the_step_here"
UNSAVED = f"{CHECKPOINT}::test_what_is_not_finite_is_not_saved"
LAST_GOOD = f"{CHECKPOINT}::test_the_last_good_one_stays_besides_those_that_are_kept"
RULE, DUAL, ATTEND = (f"tests/unit/autodiff/test_{name}.py" for name in ("rule", "dual", "attention"))


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in src/dumo/`file`, becomes `new`; `tests` are to see it."""

    file: str
    old: str
    new: str
    why: str
    tests: str


MUTANTS = [
    Mutant("nets/skip.py", "i == then[0]", "i == then[0] - 1", "one block more is told r", LATE),
    Mutant("nets/dit.py", 'first | {"t": shared["r"]}', "first", "all blocks are told t", LATE),
    Mutant("objectives/meanflow.py", "v_star - k * lift", "v_star - lift", "the derivative does not grow", MEANFLOW),
    Mutant("flow/residual.py", "s / (s.detach().sqrt() + c)", "s / (s.detach() + c)", "the pull is by S", MEANFLOW),
    Mutant(
        "objectives/meanflow.py", "self.power or self.normalize", "self.power", "normalize lets a bias in", MEANFLOW
    ),
    Mutant("config/teacher.py", "(better(x, t, c) - v)", "(v - better(x, t, c))", "the weak leads", LED),
    Mutant("nets/precondition.py", "(x - y) / least", "(x - y) / past", "small times divide", EDM),
    Mutant("nets/precondition.py", "(1 - near) * past", "(1 - near) * primal(past)", "the bound does not move", EDM),
    Mutant("objectives/cmt.py", "b.x_t - b.on(r)", "b.x_t - b.x", "every jump ends at the data", CMT),
    Mutant("objectives/cmt.py", "b.t**2 * u_loss", "b.t * u_loss", "the loss is not of D", CMT),
    Mutant("objectives/cmt.py", "v_hat[0] - b.v_t", "v_hat[0] - chord(b, r)", "v learns the jump", CMT),
    Mutant("objectives/cmt.py", "points=self.times.steps", "points=16", "trajectories are of other steps", CMT),
    Mutant("types.py", "self.trail.shape[1] - 1)", "self.trail.shape[1])", "a place is the one above", CMT),
    Mutant(
        "flow/times.py", "torch.rand(n, generator=g) * k)", "torch.rand(n, generator=g) * (k - 1))", "r stays low", CMT
    ),
    Mutant("flow/draw.py", "b = replace(b, x_t=b.on(t))", "pass", "x_t is on the line", CMT),
    Mutant("flow/draw.py", "teacher(b.x_t, t", "teacher(x_t, t", "the teacher is asked off the trajectory", CMT),
    Mutant("sampling/generate.py", "xs[-2::-1], 1)", "xs[:-1], 1)", "a trajectory runs from the noise", CMT),
    Mutant("sampling/generate.py", "if k % every == 0", "if k % every == 1 % every", "places are those before", CMT),
    Mutant("config/teacher.py", "-self.nfe % (points * solver.passes)", "0", "steps that do not fit are taken", CMT),
    Mutant("objectives/dumo.py", "v_star - lift", "v_star + lift", "u* has the sign of du/dt wrong", FIXED),
    Mutant("objectives/dumo.py", "lift(b.t, b.x_t) * du_dt", "du_dt", "u* forgets the factor t", FIXED),
    Mutant("objectives/dumo.py", "along(v_star)", "along(b.v_t)", "du/dt runs along the unguided velocity", FIXED),
    Mutant("objectives/dumo.py", "_, du_dt =", "du_dt, _ =", "u* takes the slope of v", FIXED),
    Mutant("objectives/dumo.py", "(1 - self.beta) * u_loss", "self.beta * u_loss", "beta weighs both", DUMO),
    Mutant("objectives/dumo.py", "torch.no_grad()", "torch.enable_grad()", "the target is pulled too", DUMO),
    Mutant("objectives/dumo.py", "head=1", "head=0", "the endpoint is read off v", READ),
    Mutant("objectives/flow_matching.py", "(v_hat - v_star)", "(v_hat - b.v_t)", "guidance has no effect", FIXED),
    Mutant("objectives/meanflow.py", "v_star - k", "v_star + k", "u* has the sign of du/dt wrong", FIXED),
    Mutant("objectives/meanflow.py", "lift(b.t - b.r, b.x_t)", "lift(b.t, b.x_t)", "u* forgets r", FIXED),
    Mutant("objectives/meanflow.py", "along(v_star)", "along(b.v_t)", "du/dt runs along the unguided velocity", FIXED),
    Mutant("objectives/meanflow.py", "t=b.t, r=b.t)[0]", "t=b.t, r=b.r)[0]", "guidance takes u for v", FIXED),
    Mutant(
        "objectives/meanflow.py", "self.power, self.floor", "self.floor, self.power", "p and c change places", MEANFLOW
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
        "flow/slope.py",
        "if ref.module is not unwrap(net):",
        "if False:",
        "the tangent rides on the wrong weights",
        SLOPE,
    ),
    Mutant("flow/slope.py", "key=[*rows, *others].__getitem__)", "key=None)", "rows are put back elsewhere", SLOPE),
    Mutant(
        "autodiff/tape.py",
        "now.push(*tangents, *now.saved)",
        "now.push(*tangents[::-1], *now.saved)",
        "operands change places",
        FIXED,
    ),
    Mutant("flow/slope.py", "lambda x, t: ref(", "lambda x, t: net(", "the derivative is not of theta^-", SLOPE),
    Mutant("flow/guide.py", "v_star + self.zeta", "v_star - self.zeta", "zeta pulls to the null", FIXED),
    Mutant("flow/guide.py", "1 - self.omega - self.zeta", "1 - self.omega", "the three weights do not sum to 1", FIXED),
    Mutant("flow/guide.py", "velocity(b, b.null)", "velocity(b, b.c)", "there is no null pass", FIXED),
    Mutant("flow/guide.py", "& (t <= self.high)", "", "the interval has no end", FIXED),
    Mutant("flow/residual.py", "(v_error - u_error)", "(v_error + u_error)", "the heads are added", DUMO),
    Mutant("training/probe.py", "row[i] * row[j]", "row[i] * row[i]", "a cosine of a gradient with itself", PROBE),
    Mutant("flow/guide.py", "return b.kept & self", "return self", "dropped rows are guided", FLOW),
    Mutant("flow/guide.py", "lift(weight.to(v_star), v_star) * (v_", "(v_", "a row stands for itself alone", UNBIASED),
    Mutant("flow/guide.py", "rows.sum(1).to", "(self.every * rows.any(1)).to", "a row stands for all", UNBIASED),
    Mutant("flow/guide.py", ".where(rows, -1).argmax", ".argmax", "a dropped row is picked, for the others", UNBIASED),
    Mutant("flow/guide.py", "else v_hat[place]", "else v_hat[: len(place)]", "the picks take others' V(c)", FLOW),
    Mutant("flow/guide.py", "(b.v_t + v_hat) / 2", "b.v_t + v_hat / 2", "an average is half as much again", FIXED),
    Mutant("flow/guide.py", "(b.v_t + v_hat) / 2", "(b.v_t + 2 * v_hat) / 3", "an average of unequal halves", FLOW),
    Mutant("flow/guide.py", "lift(~self.rows(b), b.x_t)", "lift(self.rows(b), b.x_t)", "other rows average", FLOW),
    Mutant("flow/guide.py", ".where(lift(~self.rows(b), b.x_t), b.v_t)", "", "rows that wait average", UNBIASED),
    Mutant("flow/guide.py", "v_hat = velocity(b, b.c)", "v_hat = velocity(b, b.null)", "V(null) is averaged", MEANFLOW),
    Mutant("sampling/guidance.py", "y_null + self.scale *", "y[place] + self.scale *", "w is one too much", GUIDANCE),
    Mutant("sampling/guidance.py", "torch.full_like(c, null)", "c", "there is no null reading", GUIDANCE),
    Mutant("sampling/guidance.py", "interval.holds(t)", "interval.low <= t", "the interval has no end", GUIDANCE),
    Mutant(
        "objectives/meanflow.py",
        "if self.power or self",
        "if self",
        "a bias is let in",
        f"{UNBIASED}::test_adaptive_weights_are_biased_and_so_refused",
    ),
    Mutant("flow/draw.py", 'step, "coin"', 'step, "kept"', "the coin knows of the label", DRAW),
    Mutant(
        "flow/draw.py", '"z", rows=mine', '"z", rows=range(len(mine))', "all ranks have the first one's noise", CONTRACT
    ),
    Mutant("flow/law.py", "keyed(*key, rows=rows", "keyed(*key, rows=range(batch)", "a rank draws for all", CONTRACT),
    Mutant(
        "flow/law.py", "stream(*key))[rows.start : rows.stop]", "stream(*key))[: len(rows)]", "first rows", CONTRACT
    ),
    Mutant("random.py", '["counter"][3] = number', '["counter"][3] = 0', "all rows have the same noise", RANDOM),
    Mutant("random.py", '["counter"][3] = number', '["counter"][0] = number', "rows overlap", RANDOM),
    Mutant(
        "data/source.py",
        "rest[held] = False",
        "pass",
        "what is held out is trained on",
        f"{HELD}::test_images_held_out_are_in_no_batch",
    ),
    Mutant(
        "data/digits.py",
        "c[order].argsort(stable=True)",
        "order.argsort()",
        "classes lose unequal shares",
        f"{HELD}::test_images_held_out_are_in_no_batch",
    ),
    Mutant(
        "protocols/digits.py",
        "nearest(split.x, of)",
        "nearest(split.whole.x, of)",
        "held images are near",
        f"{PROTOCOL}::test_images_held_out_are_judged_against_by_themselves",
    ),
    Mutant("data/epoch.py", "< 0.5)[rows]", "< 0.5)[: len(range(batch)[rows])]", "others are mirrored", SHARE),
    Mutant("data/album.py", '"augment"))[rows]', '"augment"))[: len(mine)]', "others are augmented", SHARE),
    Mutant("data/augment.py", "arange(b).split(1)", "arange(b).split(4)", "images are rounded with others", SHARE),
    Mutant("data/latents.py", "rows=range(batch)[rows]), c", "rows=range(len(c))), c", "posteriors are shared", SHARE),
    Mutant(
        "flow/draw.py",
        "=moving and moving[rows]",
        "=moving and moving[: len(mine)]",
        "all ranks spare the first one's rows",
        DRAW,
    ),
    Mutant("flow/draw.py", "step, n)[rows]", "step, n)[: len(mine)]", "ranks share masks of dropout", DRAW),
    Mutant("types.py", "host = host[0][rows], host[1][rows]", "pass", "guidance counts on other rows", WAIT),
    Mutant("flow/guide.py", "(kept & self.inside(t))", "kept", "passes are made outside the interval", GUIDE),
    Mutant("flow/precision.py", "cudnn.allow_tf32 = conv", "cudnn.foo = conv", "convolutions are rounded", PRECISION),
    Mutant("types.py", "v_t=v_s, moving=None,", "v_t=v_s,", "rows at another time are taken to rest", DRAW),
    Mutant(
        "autodiff/rule/algebra.py",
        "product(da, b) + product(a, db)",
        "product(da, b) - product(a, db)",
        "the product rule has the wrong sign",
        RULE,
    ),
    Mutant(
        "autodiff/rule/layer.py",
        ".addcmul_(y.to(dx.dtype), along, value=-1)",
        "",
        "a norm forgets that its scale moves",
        RULE,
    ),
    Mutant("autodiff/rule/function.py", "return -x.sin()", "return x.sin()", "the cosine has the wrong slope", RULE),
    Mutant("autodiff/rule/layer.py", "out if plain else x.p", "out", "a norm with weights moves by what it gave", RULE),
    Mutant("autodiff/rule/layer.py", "torch.mul, None, mask", "torch.mul, None, 1 / (1 - p)", "the dropped move", RULE),
    Mutant("autodiff/rule/shape.py", "Tensor.view: Tensor.reshape,", "", "tangents must lie as their primals", RULE),
    Mutant("autodiff/tape.py", "writes != now.writes", "False", "the tape plays what was written over", DUAL),
    Mutant("autodiff/rule/shape.py", "p = x.p.clone()", "p = x.p", "assignment is in place", RULE),
    Mutant(
        "autodiff/rule/shape.py",
        "x.part = True",
        "pass",
        "a base does not see what its view is assigned",
        f"{RULE}::test_what_has_no_rule_raises_and_names_itself",
    ),
    Mutant("autodiff/rule/shape.py", "Dual) and out is x.p", "Dual) and False", "two names have two values", DUAL),
    Mutant("autodiff/rule/shape.py", "0.0 if dy is None else dy", "0.0", "what is assigned does not move", RULE),
    Mutant("autodiff/rule/shape.py", "rows, batch_first, 0.0, side", "rows, batch_first", "padded on one side", RULE),
    Mutant(
        "autodiff/attention.py",
        "seen = _seen(mask, causal, rows, o, k)",
        "seen = None",
        "the mask is lost",
        f"{ATTEND}::test_a_mask_is_part_of_the_scores",
    ),
    Mutant(
        "autodiff/attention.py",
        ".tril(first)",
        ".tril()",
        "each chunk begins at the first key",
        f"{ATTEND}::test_a_mask_is_part_of_the_scores",
    ),
    Mutant(
        "autodiff/attention.py",
        "aten._safe_softmax(masked, -1)",
        "masked.softmax(-1)",
        "0 / 0",
        f"{ATTEND}::test_a_mask_is_part_of_the_scores",
    ),
    Mutant(
        "autodiff/attention.py",
        "x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)",
        "x.repeat(1, q.shape[-3] // x.shape[-3], 1, 1)",
        "queries take the keys of others",
        f"{ATTEND}::test_several_queries_share_a_key",
    ),
    Mutant("autodiff/tape.py", "now.moved = now.saved = ()", "pass", "a tape keeps what it has played", DUAL),
    Mutant(
        "autodiff/dual.py",
        "if not graded and",
        "if False and",
        "gradients are lost unsaid",
        f"{RULE}::test_a_block_that_hides_gradients_raises",
    ),
    Mutant(
        "flow/guide.py",
        "if len(place) == len(b.t):",
        "if True:",
        "guidance is made on all rows",
        GUIDE,
    ),
    Mutant("flow/path.py", ", z - x", ", x - z", "the path runs backwards", EXACT),
    Mutant("flow/path.py", "return 1 - t", "return 1 - t * t", "the path is bent", EXACT),
    Mutant("flow/reading.py", "lift(t - s, x)", "lift(t, x)", "a hop goes all the way", READ),
    Mutant("flow/reading.py", "t=t, r=t)", "t=t, r=0 * t)", "the velocity is read off r = 0", READ),
    Mutant("flow/residual.py", "(s.detach() + c) ** p", "(s + c) ** p", "the weight is pulled too", MEANFLOW),
    Mutant("flow/residual.py", "+ c) ** p", "+ c)", "the power is lost", MEANFLOW),
    Mutant("flow/density.py", "gamma[:, 0] / ", "gamma[:, 1] / ", "a and b change places", LAW),
    Mutant("flow/times.py", "torch.maximum(a, b), torch.minimum(a, b)", "a, b", "r may be after t", LAW),
    Mutant("flow/times.py", "torch.where(moving, r, t)", "r", "r = t is lost", LAW),
    Mutant("flow/residual.py", "min(i ^ 1, last)", "i", "rows are pushed from their own targets", CONTRAST),
    Mutant("flow/residual.py", "loss - strength *", "loss + strength *", "v is pulled to others' targets", CONTRAST),
    Mutant("training/cut.py", "objective.needs.group,", "", "neighbours are parted", CONTRAST),
    Mutant("flow/coupling.py", "there[group] == k", "there[group] >= 0", "classes exchange noise", COUPLING),
    Mutant("flow/coupling.py", ".square()", ".neg()", "the farthest go together", COUPLING),
    Mutant("flow/coupling.py", "rows[assigned", "group[assigned", "rows take the noise of others", COUPLING),
    Mutant("flow/times.py", "t[rest] = r[rest] =", "t[rest] =", "rows at rest jump to the data", LAW),
    Mutant("flow/times.py", "[jumps[i] for i in far], [jumps", "far, [jumps", "rows at rest are overwritten", LAW),
    Mutant("flow/times.py", "t[between] * torch.rand(k", "torch.rand(k", "jumps end where t does not matter", LAW),
    Mutant("flow/times.py", "self.data_ratio < 1", "True", "hop makes jumps that nothing taught", TIMES),
    Mutant("place.py", "so_far.diff() > 0", "so_far.diff() < 0", "rows at rest are said to move", LAW),
    Mutant(
        "flow/density.py",
        "self.std * normal).sigmoid()",
        "normal).sigmoid()",
        "the width of the law is lost",
        f"{LAW}::test_distribution_of_logit_normal",
    ),
    Mutant(
        "flow/density.py",
        "torch.randperm(n, generator=g)",
        "torch.arange(n)",
        "row k has the k-th part",
        f"{LAW}::test_strata_have_a_row_each",
    ),
    Mutant(
        "flow/density.py",
        "+ torch.rand(n, generator=g, dtype=torch.float64)",
        "+ 0.5",
        "times on a grid",
        f"{LAW}::test_a_stratified_row_keeps_its_law",
    ),
    Mutant("flow/density.py", "betaincinv(self.a, self.b,", "betaincinv(self.b, self.a,", "a and b change places", LAW),
    Mutant("flow/mixture.py", "(self.other, self.of), split", "(self.of, self.other), split", "the laws change", LAW),
    Mutant(
        "sampling/solver.py",
        "lift(t - s, x) * velocity(x, t, c)",
        "lift(t - s, x) * velocity(x, s, c)",
        "Euler looks ahead",
        SOLVERS,
    ),
    Mutant(
        "sampling/solver.py", "velocity(x - dt * v, s, c)", "velocity(x - dt * v, t, c)", "Heun stays in time", SOLVERS
    ),
    Mutant("sampling/solver.py", "velocity(x - dt * v, s, c)", "velocity(x, s, c)", "Heun stays in place", SOLVERS),
    Mutant(
        "sampling/solver.py", "z = fresh(k)", "z = fresh(0)", "Restart noises with the noise it started from", SOLVERS
    ),
    Mutant("sampling/solver.py", "flow_map(x, t, s, c)", "flow_map(x, t, 0 * s, c)", "Hop goes all the way", SOLVERS),
    Mutant(
        "sampling/grid.py",
        "log2(n / (n - k))",
        "log2((n - k) / n)",
        "the jumps rise",
        "tests/unit/sampling/test_grid.py",
    ),
    Mutant("sampling/solver.py", "self.m_at.get(n, self.m)", "self.m", "m_at has no effect", SOLVERS),
    Mutant("sampling/solver.py", "sqrt(self.rho) * z + sqrt", "self.rho * z + sqrt", "noise is lost", SOLVERS),
    Mutant("sampling/solver.py", "lift((t - s) ** 2 / t, x_t)", "lift((t - s) ** 2, x_t)", "x_0 is missed", SOLVERS),
    Mutant(
        "sampling/solver.py", "level = sqrt(1 - self.rho)", "level = (1 - self.rho)", "too much noise is taken", SOLVERS
    ),
    Mutant("sampling/solver.py", "both(x, t, c)[0]", "both(x, s, c)[0]", "EulerJump looks ahead", SOLVERS),
    Mutant("objectives/dumo.py", "v, u = net", "u, v = net", "both heads change places", READS),
    Mutant("flow/weight.py", "progress / self.over", "progress", "a line lasts all the training", WEIGHT),
    Mutant("flow/weight.py", "(-log_variance).exp()", "log_variance.exp()", "the variance multiplies", WEIGHT),
    Mutant("flow/weight.py", "* loss + log_variance", "* loss", "the variance grows for ever", WEIGHT),
    Mutant("flow/disperse.py", "-d / self.tau", "d / self.tau", "rows are pulled together", DISPERSE),
    Mutant("flow/disperse.py", "- 2 * log(", "- log(", "the mean is over rows", DISPERSE),
    Mutant("nets/head.py", "round(needs.inside * depth)", "depth", "the last block is shown", DISPERSE),
    Mutant("objectives/shortcut.py", "torch.exp2(-k - 1)", "torch.exp2(-k)", "a half step is a whole one", SHORTCUT),
    Mutant(
        "objectives/shortcut.py", "b.x_t - lift(half", "b.x_t + lift(half", "the half step goes back to noise", SHORTCUT
    ),
    Mutant("objectives/shortcut.py", "b.t - half)", "b.t)", "the second half step has the time of the first", SHORTCUT),
    Mutant(
        "objectives/shortcut.py",
        "((u_1 + u_2) / 2).clamp",
        "(u_1 + u_2).clamp",
        "the sum of both halves, not their mean",
        SHORTCUT,
    ),
    Mutant(
        "objectives/shortcut.py",
        "self.times.levels - 1, b.x_t",
        "self.times.levels - 2, b.x_t",
        "guidance in the second doubling",
        SHORTCUT,
    ),
    Mutant(
        "objectives/shortcut.py",
        "(u_c,) = ref(x, b.c, t=t, k=k + 1)",
        "(u_c,) = ref(x, b.c, t=t, k=k)",
        "a step learns from itself",
        SHORTCUT,
    ),
    Mutant(
        "objectives/shortcut.py",
        "torch.full_like(t, self.times.levels))[0]",
        "0 * t)[0]",
        "the velocity is read at the longest step",
        SHORTCUT,
    ),
    Mutant(
        "objectives/shortcut.py", "t * 2.0**k % 1 == 0", "True", "steps from any place are told as taught", SHORTCUT
    ),
    Mutant(
        "objectives/shortcut.py",
        "self._halves(ref,",
        "self._halves(Frozen(net),",
        "targets of the weights in training",
        SHORTCUT,
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "(1 - share) * u_1 + share * u_2",
        "share * u_1 + (1 - share) * u_2",
        "the parts change weights",
        SPLIT,
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "b.x_t - lift(b.t - s",
        "b.x_t + lift(b.t - s",
        "the first part goes back to noise",
        SPLIT,
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "u_2, b.c, t=s, r=b.r)",
        "u_2, b.c, t=b.t, r=b.r)",
        "the second part starts at t",
        SPLIT,
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "(1 - lam) * b.t + lam * b.r",
        "lam * b.t + (1 - lam) * b.r",
        "s counts from r",
        SPLIT,
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
        "the target is pulled too",
        SPLIT,
    ),
    Mutant(
        "objectives/split_meanflow.py", "b.c, t=b.t, r=s)", "b.c, t=b.t, r=b.r)", "the first part is the whole", SPLIT
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)",
        "lambda b, c: ref(b.x_t, b.c, t=b.t, r=b.t)",
        "V(null) has a label",
        SPLIT,
    ),
    Mutant(
        "objectives/split_meanflow.py",
        "self._parts(ref, b[jump])",
        "self._parts(Frozen(net), b[jump])",
        "targets of the weights in training",
        SPLIT,
    ),
    Mutant(
        "objectives/twinflow.py", "return v_fake - v_real", "return v_real - v_fake", "G pushes samples apart", TWIN
    ),
    Mutant(
        "objectives/twinflow.py",
        "one.x_t - u_one).detach()",
        "one.x_t - u_one)",
        "the twin pulls the sample that it learns",
        TWIN,
    ),
    Mutant("objectives/twinflow.py", "one.x_t - u_one)", "one.x_t + u_one)", "the jump goes past noise", TWIN),
    Mutant("objectives/twinflow.py", 'z=b.drawn["z_twin"].to(b.z)', "z=b.z", "samples meet their own noise", TWIN),
    Mutant("objectives/twinflow.py", ", teacher=None)", ")", "a teacher of the data teaches the samples", TWIN),
    Mutant("objectives/twinflow.py", "t=-b.t, r=-b.t)", "t=b.t, r=b.t)", "the twin is the net itself", TWIN),
    Mutant("objectives/twinflow.py", "self._apart(frozen(net)", "self._apart(ref", "G is of the average", TWIN),
    Mutant("objectives/twinflow.py", 'made.at(b.drawn["t_twin"].to(b.t))', "fake", "G at the time of the twin", TWIN),
    Mutant(
        "objectives/twinflow.py",
        "self.residual(u_one, ref, one, self.aim(ref, one))",
        "self.residual(u_one, ref, one, v_star)",
        "the jump from noise takes v* from elsewhere",
        TWIN,
    ),
    Mutant("objectives/twinflow.py", "v_hat - v_star", "v_hat - b.v_t", "the flow is not guided", TWIN),
    Mutant("objectives/twinflow.py", '"one": self.one', '"one": self.twin', "one has the weight of the twin", TWIN),
    Mutant("sampling/guidance.py", "hops=reads.hops", "hops=None", "guided jumps are of any size", SHORTCUT),
    Mutant(
        "sampling/solver.py",
        "_reach(solver, reads, nfe)\n",
        "pass\n",
        "jumps that nobody taught are made",
        SHORTCUT,
    ),
    Mutant("objectives/soflow.py", "v_star - lift((b", "v_star + lift((b", "u* has the sign of du/dt wrong", SOFLOW),
    Mutant(
        "objectives/soflow.py",
        "lift((b.t - d - b.r).clamp(min=0), b.x_t)",
        "lift(b.t - b.r, b.x_t)",
        "the whole step is weighed, not the rest of it",
        SOFLOW,
    ),
    Mutant(
        "objectives/soflow.py",
        "back(ref, b, v_star, d)",
        "back(ref, b, b.v_t, d)",
        "it goes back along the unguided velocity",
        SOFLOW,
    ),
    Mutant(
        "objectives/soflow.py",
        "torch.where(b.r < b.t, 0.5, 1.0)",
        "torch.where(b.r < b.t, 1.0, 1.0)",
        "rows with r < t have a whole gradient",
        SOFLOW,
    ),
    Mutant("objectives/soflow.py", "mean=True)", "mean=False)", "the metric sums squares", SOFLOW),
    Mutant(
        "objectives/soflow.py",
        "self.first * (self.last / self.first) ** progress",
        "self.first + (self.last - self.first) * progress",
        "the step shrinks by equal parts",
        SOFLOW,
    ),
    Mutant("objectives/soflow.py", "t=b.t, r=b.t)[0]", "t=b.t, r=b.r)[0]", "guidance takes u for v", SOFLOW),
    Mutant("objectives/soflow.py", ".clamp(min=self.gap)", ".clamp(min=0)", "a step may be of no length", SOFLOW),
    Mutant("flow/secant.py", "some.x_t - lift(d, some.x_t)", "some.x_t + lift(d, some.x_t)", "it goes forward", SOFLOW),
    Mutant(
        "flow/secant.py", "r=torch.minimum(some.r, l)", "r=l", "the earlier point is asked for its velocity", SOFLOW
    ),
    Mutant("flow/secant.py", "gain > MAX_GAIN", "gain < 0", "secants are served below fp32", SOFLOW),
    Mutant(
        "objectives/rcgm.py",
        "- v_star\n            off = torch.where",
        "+ v_star\n            off = torch.where",
        "v* has the wrong sign",
        RCGM,
    ),
    Mutant(
        "objectives/rcgm.py", "(now - b.r) / self.order", "(now - b.r)", "the first of N jumps goes all the way", RCGM
    ),
    Mutant("objectives/rcgm.py", "t=now, r=then)[0]", "t=now, r=b.r)[0]", "each jump is asked for the whole way", RCGM),
    Mutant(
        "objectives/rcgm.py",
        "torch.where(far < self.step, u_hat - v_star, off)",
        "off",
        "rows with r = t aim at 0",
        RCGM,
    ),
    Mutant(
        "objectives/rcgm.py",
        "b.x_t - self.step * v_star",
        "b.x_t - self.step * b.v_t",
        "the first step is not guided",
        RCGM,
    ),
    Mutant(
        "objectives/rcgm.py",
        "off.clamp(-self.clip, self.clip)",
        "off.clamp(0, self.clip)",
        "the bound has one side",
        RCGM,
    ),
    Mutant("flow/residual.py", "(alpha / 2 - 1)\n", "(alpha - 2)\n", "Barron's weight has twice its power", RCGM),
    Mutant(
        "objectives/alpha_flow.py",
        "self.floor / (alpha or 1) ** 2",
        "self.floor / (alpha or 1)",
        "the floor is in no units of a velocity",
        ALPHA,
    ),
    Mutant(
        "objectives/alpha_flow.py",
        "(1 - alpha) * back",
        "alpha * back",
        "the two parts of the way change weights",
        ALPHA,
    ),
    Mutant(
        "objectives/alpha_flow.py",
        "(u_hat.detach() - self._far(ref, b, v_star, alpha)) / alpha",
        "(u_hat.detach() - self._far(ref, b, v_star, alpha))",
        "the residual shrinks with alpha",
        ALPHA,
    ),
    Mutant(
        "objectives/alpha_flow.py",
        "u_star = torch.where(lift(moves, u_hat), u_hat.detach() - off, v_star)",
        "u_star = u_hat.detach() - off",
        "rows with r = t are cut, too",
        ALPHA,
    ),
    Mutant(
        "objectives/alpha_flow.py",
        "v_star - lift(b.t - b.r",
        "v_star + lift(b.t - b.r",
        "u* has the sign of du/dt wrong at the end",
        ALPHA,
    ),
    Mutant("objectives/alpha_flow.py", "0.5 - 0.5 * tanh(", "0.5 + 0.5 * tanh(", "alpha grows", ALPHA),
    Mutant(
        "objectives/alpha_flow.py", "(middle, 2 * half)", "(middle, half)", "steps between are counted by half", ALPHA
    ),
    Mutant("objectives/alpha_flow.py", "0.0 if alpha < self.snap else", "", "alpha never comes to 0", ALPHA),
    Mutant(
        "objectives/ucgm.py",
        "- self.ratio * u_s) / (1",
        "+ self.ratio * u_s) / (1",
        "alignment has the wrong sign",
        UCGM,
    ),
    Mutant(
        "objectives/ucgm.py",
        "b.c, t=self.ratio * b.t)",
        "b.c, t=b.t)",
        "F is aligned at another time than its point's",
        UCGM,
    ),
    Mutant(
        "objectives/ucgm.py",
        "lift((1 - self.ratio) * b.t, b.x_t)",
        "lift(self.ratio * b.t, b.x_t)",
        "the point is at (1 - ratio) t",
        UCGM,
    ),
    Mutant("objectives/ucgm.py", "now = frozen(net)", "now = ref", "F is aligned with theta^-", UCGM),
    Mutant("objectives/ucgm.py", "lift(4 / (QUARTER", "lift(1 / (QUARTER", "the gain is a quarter", UCGM),
    Mutant(
        "objectives/ucgm.py", "torch.cos(QUARTER * b.t)", "torch.sin(QUARTER * b.t)", "the weight grows with t", UCGM
    ),
    Mutant(
        "objectives/ucgm.py", "u_hat.detach() + lift(b.t", "u_hat.detach() - lift(b.t", "dF/dt has the wrong sign", UCGM
    ),
    Mutant(
        "objectives/ucgm.py",
        "        with torch.no_grad():\n            u_star",
        "        with torch.enable_grad():\n            u_star",
        "F is pulled less",
        THEOREM,
    ),
    Mutant(
        "objectives/ucgm.py",
        "(u_hat - self.ratio * u_s) / (1 - self.ratio) - b.v_t",
        "(u_hat - self.ratio * u_s) - b.v_t",
        "the rate is not over the time",
        THEOREM,
    ),
    Mutant("flow/residual.py", "((s + c**2).sqrt() + c)", "((s + c**2).sqrt() - c)", "the Huber loss is another", UCGM),
    Mutant(
        "objectives/consistency.py",
        "b.x_t - lift(step, b.x_t) * b.v_t",
        "b.x_t + lift(step, b.x_t) * b.v_t",
        "x_r lies on the other side of x_t",
        CONSISTENCY,
    ),
    Mutant(
        "objectives/consistency.py",
        "ref(x_r, b.c, t=r)",
        "ref(x_r, b.c, t=t)",
        "x_r is asked of at time t",
        CONSISTENCY,
    ),
    Mutant("objectives/consistency.py", "else b.at(t)", "else b", "t moves to the grid, x_t does not", CONSISTENCY),
    Mutant(
        "objectives/consistency.py",
        "lift(r * one_over, b.x_t) *",
        "lift(t * one_over, b.x_t) *",
        "the secant forgets that r is at rest",
        CONSISTENCY,
    ),
    Mutant(
        "objectives/consistency.py",
        "(u_hat - u_r)",
        "(u_hat.detach() - u_r)",
        "the loss no longer lives on D",
        CONSISTENCY,
    ),
    Mutant("objectives/consistency.py", "(u_r,) = ref(", "(u_r,) = net(", "both points are pulled", CONSISTENCY),
    Mutant(
        "objectives/consistency.py",
        "(1 - t) * (1 - r) * one_over",
        "(1 - t) * one_over",
        "the weight forgets 1 - r",
        CONSISTENCY,
    ),
    Mutant(
        "flow/discretization.py",
        "self.q ** -(stage + 1)",
        "self.q**-stage",
        "ECT's stages start one too early",
        DISCRETIZATION,
    ),
    Mutant(
        "flow/discretization.py",
        "level(i + 1), torch.where(i > 0, level(i), 0.0)",
        "level(i + 1), level(i)",
        "no step ends at the data",
        DISCRETIZATION,
    ),
    Mutant(
        "flow/discretization.py",
        "(log2(self.last / self.first) + 1)",
        "log2(self.last / self.first)",
        "iCT doubles once too few",
        DISCRETIZATION,
    ),
    Mutant("objectives/imm.py", "(u_q,) = ref(", "(u_q,) = net(", "y' is pulled too", IMM),
    Mutant("objectives/imm.py", "lift(at_q.t - b.r, b.x_t)", "lift(b.t - b.r, b.x_t)", "y' jumps as far as y", IMM),
    Mutant("objectives/imm.py", "- 2 * kernel(mine, other)", "- kernel(mine, other)", "the discrepancy is none", IMM),
    Mutant("objectives/imm.py", "t=at_q.t, r=b.r)", "t=b.t, r=b.r)", "x_q is asked of at time t", IMM),
    Mutant(
        "objectives/imm.py",
        "* (1 - t) ** (self.a - 1)",
        "* (1 - t) ** self.a",
        "the weight has 1 - t once too often",
        IMM,
    ),
    Mutant(
        "objectives/imm.py",
        "step.clamp(min=NEAREST) * mine.shape[-1]",
        "step.clamp(min=NEAREST)",
        "the kernel does not know of D",
        IMM,
    ),
    Mutant("objectives/imm.py", "torch.maximum(r,", "torch.minimum(r,", "q falls below r", IMM),
    Mutant(
        "objectives/imm.py",
        "exact = torch.promote_types(y.dtype, torch.float32)",
        "exact = y.dtype",
        "kernels are rounded to bf16",
        f"{IMM}::test_distances_are_in_fp32_under_autocast",
    ),
    Mutant("flow/draw.py", "x = x / path.sd", "x = x * path.sd", "data are multiplied by their deviation", DEVIATION),
    Mutant("sampling/generate.py", "path.sd * solver(", "solver(", "samples stay in units of the data's", DEVIATION),
    Mutant("objectives/consistency.py", '"soft": 0.00108', '"soft": 0.00054', "c is in their units", DEVIATION),
    Mutant("objectives/consistency.py", "mean=-1.1 + log(2)", "mean=-1.1", "levels are in their units", DEVIATION),
    Mutant(
        "objectives/sct.py", "Field(default=0.2, gt=0)", "Field(default=0.1, gt=0)", "c is in their units", DEVIATION
    ),
    Mutant("objectives/consistency.py", "lift(r < self.low", "lift(t < self.low", "no first stage below", SECOND),
    Mutant("objectives/consistency.py", "t <= self.low", "t >= self.low", "the inside weighs as the boundary", SECOND),
    Mutant("objectives/consistency.py", "t.clamp(min=self.low)", "t", "rows stay below the boundary", SECOND),
    Mutant("flow/policy.py", "(1 - q, x) * a - lift", "(1 - q, x) * a + lift", "guesses move the other way", POLICY),
    Mutant("flow/policy.py", "reversed(range(pieces))", "range(pieces)", "a policy goes up", POLICY),
    Mutant("objectives/pi_flow.py", "sort(0)", "sort(0, descending=True)", "the late comes first", PI_FLOW),
    Mutant("objectives/pi_flow.py", "v = b.teacher(x, s, b.c, v) if b.teacher else v", "", "imitates data", PI_FLOW),
    Mutant("sampling/solver.py", "min(solver.times(nfe)) >=", "max(solver.times(nfe)) >=", "read too low", GOES_ON),
    Mutant("objectives/pull.py", "progress >= self.after", "progress > self.after", "a pull begins late", MATCH),
    Mutant("objectives/pull.py", "(w - v).detach()", "(v - w).detach()", "match pushes samples off", MATCH),
    Mutant(
        "objectives/pull.py", "path.at((b.z - u).detach(), z, t)", "path.at(b.z - u, z, t)", "w moves samples", MATCH
    ),
    Mutant("objectives/pull.py", "aim - v - alpha * gap", "aim - w - alpha * gap", "SiD is of w's error", HALF_OF),
    Mutant("objectives/pull.py", "path.at(b.z - u, z, t)", "path.at((b.z - u).detach(), z, t)", "SiD is still", SID),
    Mutant("objectives/pull.py", " - identity(w, v, v_t, self.alpha)", "", "w and v learn SiD's loss", SID),
    Mutant("objectives/pull.py", "t / off * apart", "apart", "SiD is not weighed", SID),
    Mutant("objectives/pull.py", "mean_square(w - v_t)", "mean_square(w - b.v_t)", "w learns the data", MATCH),
    Mutant("objectives/pull.py", "softplus(fake - real)", "softplus(real - fake)", "the critic is upside down", CRITIC),
    Mutant("objectives/pull.py", "(real + fake.detach())", "(real + fake)", "the centre moves samples", CRITIC),
    Mutant(
        "objectives/pull.py",
        "self.steepness(b, made.detach(), ask)",
        "self.steepness(b, made, ask)",
        "slopes move samples",
        CRITIC,
    ),
    Mutant("objectives/pull.py", "b.progress) / self.fit", "b.progress)", "a pull is weighed by the fit", CRITIC),
    Mutant(
        "objectives/pull.py",
        "descending(u, v)",
        "descending(u, -v)",
        "samples drift away",
        f"{PULL}::test_drift_moves_samples_of_another_width_back",
    ),
    Mutant(
        "objectives/pull.py", "else frozen(net)", "else net", "samples are made at full price", f"{PULL}::test_passes"
    ),
    Mutant(
        "objectives/pull.py",
        "torch.ones_like(b.t), b.c)[u]",
        "torch.zeros_like(b.t), b.c)[u]",
        "samples start at data",
        MATCH,
    ),
    Mutant("objectives/pull.py", ".repeat_interleave(EVERY)", ".repeat(EVERY)", "slopes are other rows'", CRITIC),
    Mutant(
        "objectives/pull.py", "{0.0, *(pull", "{*(pull", "the time before a pull costs nothing", f"{PULL}::test_cost"
    ),
    Mutant("flow/reverse.py", "-2 * ctx.strength", "2 * ctx.strength", "nothing is reversed", CRITIC),
    Mutant(
        "flow/reverse.py",
        "ctx.floor * scale.abs()",
        "ctx.floor",
        "a floor in units of the batch",
        f"{PULL}::test_reversal_is_the_same_whatever_the_loss_is_multiplied_by",
    ),
    Mutant("flow/drift.py", "& ~torch.eye(group", "| torch.eye(group", "samples repel themselves", DRIFT),
    Mutant(
        "flow/drift.py",
        "logs.softmax(2) * logs.softmax(1)",
        "logs.softmax(2) * logs.softmax(2)",
        "columns are no softmax",
        DRIFT,
    ),
    Mutant(
        "flow/drift.py",
        "repel * attract.sum(2, keepdim=True)",
        "repel * repel.sum(2, keepdim=True)",
        "a force that is there at rest",
        DRIFT,
    ),
    Mutant(
        "flow/drift.py",
        "(far * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)",
        "far.mean((1, 2))",
        "the unit is of strangers",
        DRIFT,
    ),
    Mutant("flow/draw.py", "(dict(objective) | within)", "dict(objective)", "laws of parts are not drawn", MATCH),
    Mutant(
        "objectives/several.py",
        "answers[len(self._headed) :]",
        "answers[len(self.parts) :]",
        "a pull's head is taken for a gauge",
        f"{PULL}::test_a_pull_leaves_gauges_alone",
    ),
    Mutant(
        "training/optim.py", '"betas": head.betas or self.betas', '"betas": self.betas', "heads have no betas", OPTIM
    ),
    Mutant(
        "training/optim.py",
        'group["ratio"] = group["lr"] / self.lr',
        'group["ratio"] = lr / self.lr',
        "heads have muon's rest's rate",
        OPTIM,
    ),
    Mutant(
        "objectives/several.py",
        ".to(b.t) / (1 - self.times.moving_share)",
        ".to(b.t)",
        "rows apart count less",
        f"{SEVERAL}::test_heads_apart_learn_where_r_is_t_alone",
    ),
    Mutant(
        "objectives/several.py",
        "(1 if part.aims else alone)",
        "alone",
        "steps are taught nowhere",
        f"{SEVERAL}::test_heads_apart_learn_where_r_is_t_alone",
    ),
    Mutant(
        "flow/times.py", "torch.where(jumps, t, self.flow(n, g)[0])", "self.flow(n, g)[0]", "steps leave the grid", LAW
    ),
    Mutant("nets/precondition.py", "(2 * past - 1)", "(1 - 2 * past)", "the skip has its sign wrong", EDM),
    Mutant("nets/precondition.py", "skip - y / n", "skip - y", "c_out is 1", EDM),
    Mutant("nets/precondition.py", "return x / n,", "return x,", "c_in is 1", EDM),
    Mutant(
        "objectives/part.py",
        "return v_star - lift(b.t - b.r, b.x_t) * rate",
        "return v_star - lift(b.t, b.x_t) * rate",
        "the average is not down to r",
        SEVERAL,
    ),
    Mutant(
        "objectives/part.py",
        "return v_star - lift(b.t, b.x_t) * rate",
        "return v_star + lift(b.t, b.x_t) * rate",
        "u* has the sign of du/dt wrong",
        SEVERAL,
    ),
    Mutant(
        "objectives/part.py",
        "adaptive(head - target, self.power, self.floor) if self.power else",
        "",
        "all parts have the mean square",
        f"{SEVERAL}::test_the_adaptive_metric_is_of_the_parts_that_have_it",
    ),
    Mutant(
        "objectives/several.py",
        "any(part.power for part",
        "any(False for part",
        "guidance meets power",
        f"{SEVERAL}::test_what_does_not_go_together_is_refused",
    ),
    Mutant(
        "objectives/part.py",
        "middle = (some.t + some.r) / 2",
        "middle = (some.t + some.r) / 3",
        "the halves are none",
        SEVERAL,
    ),
    Mutant(
        "objectives/part.py",
        "lift(some.t - middle, one) * one, middle,",
        "lift(some.t - middle, one) * one, some.t,",
        "the second half has the time of the first",
        SEVERAL,
    ),
    Mutant(
        "objectives/part.py",
        ".where(lift(some.r < some.t, one), m_star[i])",
        "",
        "rows without a step teach themselves",
        f"{SEVERAL}::test_descent_leads_back",
    ),
    Mutant(
        "objectives/several.py",
        "v_star = self.guide(b, heads[first],",
        "v_star = self.guide(b, heads[-1],",
        "guidance asks another head",
        SEVERAL,
    ),
    Mutant(
        "objectives/several.py",
        "self._aimed(ref, first)(b.x_t, b.t, b.r, c)",
        "self._aimed(ref, 0)(b.x_t, b.t, b.r, c)",
        "V(null) is another head's",
        SEVERAL,
    ),
    Mutant(
        "objectives/several.py", "weight_at(part.weight, b.progress) * (1 if", "(1 if", "parts have no weights", SEVERAL
    ),
    Mutant(
        "objectives/several.py",
        "self._aimed(ref, i)) for part, rate, i in asked]",
        "self._aimed(net, i)) for part, rate, i in asked]",
        "halves are those of the weights in training",
        f"{SEVERAL}::test_halves_are_those_of_theta_minus",
    ),
    Mutant(
        "objectives/several.py",
        "None if any(part.derived and not part.aims for part in self.parts) else b.moving",
        "b.moving",
        "no du/dt where r = t",
        SEVERAL,
    ),
    Mutant(
        "objectives/several.py",
        "key=lambda i: self.parts[i].aims",
        "key=lambda i: not self.parts[i].aims",
        "the endpoint is read off m",
        f"{SEVERAL}::test_readings_are_of_the_head_that_is_told_least",
    ),
    Mutant(
        "nets/dit.py",
        "F.silu(last + own[k]) if k in own else e[-1]",
        "F.silu(last + sum(own.values(), 0 * last))",
        "r reaches every head",
        HEADS,
    ),
    Mutant(
        "nets/mlp.py",
        "F.silu(h + own[k]) if k in own else told",
        "F.silu(h + sum(own.values(), 0 * h))",
        "r reaches every head",
        HEADS,
    ),
    Mutant("nets/skip.py", "kept.pop()", "kept.pop(0)", "skips reach the block as far on", SKIP),
    Mutant("nets/skip.py", "nn.init.eye_(self.join.weight)", "pass", "a net with skips starts as another", SKIP),
    Mutant("nets/magnitude.py", "1 + gate * gate", "1 + gate", "a sum changes the magnitude", MAGNITUDE),
    Mutant(
        "nets/magnitude.py",
        "F.linear(input, F.normalize(self.weight, dim=1))",
        "F.linear(input, F.normalize(self.weight, dim=0))",
        "columns have length 1",
        MAGNITUDE,
    ),
    Mutant(
        "nets/magnitude.py", "/ ROOT[self.mlp]", "* ROOT[self.mlp]", "the perceptron changes the magnitude", MAGNITUDE
    ),
    Mutant("training/step.py", "        after_step()", "        pass", "rows grow with the steps", MAGNITUDE),
    Mutant("nets/block.py", "None if mask is None else mask[:, None, None]", "None", "padding is read", PADDED),
    Mutant("nets/reading.py", "return h, vector, (y, mask)", "return h, vector, (y, None)", "room is read", PADDED),
    Mutant("nets/reading.py", "mask.new_ones(h.shape[:2])", "mask.new_zeros(h.shape[:2])", "the image is hidden", SEES),
    Mutant("nets/reading.py", "self.pool is None or pooled", "True or pooled", "no pooled embedding", LABELS),
    Mutant("nets/reading.py", "text.project(text.shown(y, third))", "text.project(y)", "text is not modulated", LOOKS),
    Mutant("nets/reading.py", "h + self.read(", "h + 0 * self.read(", "no block looks at the text", f"{EACH}[7-cross]"),
    Mutant(
        "nets/text/rows.py",
        "full(pooled[c])",
        "full(pooled[c.clamp(max=len(pooled) - 2)])",
        "none is a caption",
        LABELS,
    ),
    Mutant("nets/unet.py", "a = a * (1 + scale) + shift", "a = a * scale + shift", "a head without its norm", HEADS),
    Mutant("objectives/tvm.py", "b.x_t - gap * u_hat", "b.x_t + gap * u_hat", "the jump goes the wrong way", TVM),
    Mutant(
        "objectives/tvm.py", "u_hat - gap * du_dr - v_r", "u_hat + gap * du_dr - v_r", "du/dr has the wrong sign", TVM
    ),
    Mutant(
        "objectives/tvm.py",
        "b.c, t=b.r, r=b.r, **told",
        "b.c, t=b.t, r=b.r, **told",
        "the velocity is that of another time",
        TVM,
    ),
    Mutant("objectives/tvm.py", "terminal = beta**2 *", "terminal = beta *", "guided rows weigh too much", TVM),
    Mutant("objectives/tvm.py", "(b.r < b.t) * ", "", "rows with r = t count", TVM),
    Mutant("objectives/tvm.py", 'of="r", t=b.t', 'of="t", t=b.t', "the derivative is in t", TVM),
    Mutant("objectives/tvm.py", "beta=torch.ones_like(beta)", "beta=beta", "V(null) is told of guidance", TVM),
    Mutant("objectives/tvm.py", "lift(1 / beta, b.x_t)", "lift(beta, b.x_t)", "the scale is upside down", TVM),
    Mutant("objectives/tvm.py", 'b.at(b.drawn["s"])', "b.at(b.r)", "the velocity has no time of its own", TVM),
    Mutant("objectives/tvm.py", "masked_fill(b.kept,", "masked_fill(~b.kept,", "dropped rows are guided", TVM),
    Mutant("flow/rate.py", "inputs[of] + d", "inputs[of] - d", "the difference has the wrong sign", RATE),
    Mutant("flow/rate.py", "/ (2 * self.h)", "/ self.h", "the difference is twice the derivative", RATE),
    Mutant(
        "autodiff/dual.py",
        "if not graded or _state.recorded:",
        "if not graded:",
        "rates lose their gradient",
        RATE,
    ),
    Mutant(
        "autodiff/rule/layer.py",
        "if recording():  # to",
        "if recording() and False:  # to",
        "the norm's deviation is held still",
        RATE,
    ),
    Mutant(
        "autodiff/attention.py",
        "slice(None), o, k))",
        "slice(None), o, k)).detach()",
        "attention's weights are held still",
        RATE,
    ),
    Mutant(
        "nets/checkpointing.py",
        "recorded() if recording() else primal_only()",
        "primal_only()",
        "a checkpoint loses the rate",
        RATE,
    ),
    Mutant("objectives/imf.py", "du_dt, _ = along(v)", "du_dt, _ = along(b.v_t)", "du/dt runs along the draw", IMF),
    Mutant(
        "objectives/imf.py", "v_star - lift(b.t - b.r", "v_star + lift(b.t - b.r", "u* has the sign of du/dt wrong", IMF
    ),
    Mutant(
        "objectives/imf.py",
        'b.drawn["low"].masked_fill(still, 0)',
        'b.drawn["low"]',
        "rows with r = t are not guided at all times",
        IMF,
    ),
    Mutant("objectives/imf.py", "(1 - 1 / w)", "(w - 1)", "guidance takes V(c) for unguided", IMF),
    Mutant("objectives/imf.py", "lift(b.kept * (1", "lift((1", "rows without a label are guided", IMF),
    Mutant(
        "objectives/facm.py",
        "(v_hat,) = net(b.x_t, b.c, t=-b.t)",
        "(v_hat,) = net(b.x_t, b.c, t=b.t)",
        "the anchor is told t",
        FACM,
    ),
    Mutant("objectives/facm.py", "v_star - lift(b.t", "v_star + lift(b.t", "u* has the sign of du/dt wrong", FACM),
    Mutant("objectives/facm.py", "along(v_star)", "along(b.v_t)", "du/dt runs along the unguided velocity", FACM),
    Mutant(
        "objectives/facm.py",
        "lift(1 - (1 - t).sqrt(), error)",
        "lift((1 - t).sqrt(), error)",
        "u is relaxed at the wrong end",
        FACM,
    ),
    Mutant("objectives/facm.py", "u_hat - self.step", "u_star - self.step", "u is led away from its target", FACM),
    Mutant(
        "objectives/facm.py",
        "velocity=lambda x, t, c: net(x, c, t=-t)[0]",
        "velocity=lambda x, t, c: net(x, c, t=t)[0]",
        "the velocity is read off u",
        f"{FACM}::test_readings_are_told_apart_by_the_sign_of_time",
    ),
    Mutant(
        "objectives/sct.py", "grown * sin * (b.x_t + slow", "grown * sin * (b.x_t - slow", "f' has the wrong sign", SCT
    ),
    Mutant("objectives/sct.py", "-cos * (cos * (f", "cos * (cos * (f", "f is pushed from its target", SCT),
    Mutant("objectives/sct.py", "slow * df_dt", "df_dt", "d/dt stands for d/dtheta", SCT),
    Mutant("objectives/sct.py", "grown * sin * (", "sin * (", "there is no warm-up", SCT),
    Mutant(
        "objectives/sct.py",
        "theta.cos() * x - theta.sin()",
        "theta.cos() * x + theta.sin()",
        "the endpoint is on the wrong side",
        SCT,
    ),
    Mutant(
        "objectives/sct.py", "(-log_variance).exp() * pull", "log_variance.exp() * pull", "the gauge multiplies", SCT
    ),
    Mutant(
        "objectives/sct.py", "clamp(EDGE, pi / 2 - EDGE)", "clamp(0, pi / 2)", "the weight at t = 0 is infinite", SCT
    ),
    Mutant("training/step.py", " / (spec.batch / dist.world())", " / spec.batch", "ranks are averaged twice", LAYOUT),
    Mutant(
        "training/step.py",
        "self.draws[here]",
        "self.draws[: len(self.x[here])]",
        "all pieces draw for the first rows",
        STEP,
    ),
    Mutant(
        "training/step.py",
        "self.keys[self.here(rows)]",
        "self.keys[: len(b.t)]",
        "pieces share masks",
        f"{DROPPED}::test_pieces_of_a_batch_meet_the_masks_of_the_whole",
    ),
    Mutant("training/ema.py", "id(tensor),", "id(tensor) + len(found),", "a shared weight is averaged twice", EMA),
    Mutant("training/ema.py", "** (exponent(self.std) + 1)", "** exponent(self.std)", "an average is too wide", EMA),
    Mutant("training/snapshot.py", "late.step) ** b", "late.step) ** a", "profiles overlap otherwise", SNAPSHOT),
    Mutant("training/snapshot.py", "append(with_wanted, unit)", "append(with_wanted, 0)", "weights vanish", SNAPSHOT),
    Mutant("training/spec.py", " or step == self.steps)", ")", "the last average is not kept", EMA),
    Mutant("training/optim.py", "fused.get(name, 1)", "1", "fused matrices are taken for one", MUON),
    Mutant("training/optim.py", "max(self.warmup, (1", "max(0, (1", "the rate falls as it warms up", OPTIM),
    Mutant("training/step.py", ' * group.get("ratio", 1.0)', "", "AdamW takes Muon's rate", MUON),
    Mutant("training/muon.py", "grad.lerp(mean, momentum)", "grad", "there is no momentum", MUON),
    Mutant("training/muon.py", "sqrt(max(rows, columns))", "sqrt(min(rows, columns))", "steps are too short", MUON),
    Mutant("training/muon.py", "mean = whole(", "mean = (", "parts are orthogonalized", LAYOUT),
    Mutant("training/step.py", "        layout.release(self.net)\n", "", "what a probe gathers stays", LAYOUT),
    Mutant("training/layout.py", "(copy, True)", "(copy, reshard)", "an average's weights stay gathered", LAYOUT),
    Mutant("training/layout.py", "        share(copy, net)\n", "        pass\n", "averages stay empty", FROZEN_RANKS),
    Mutant("training/frozen.py", " if name not in fixed", "", "what is frozen is saved", FROZEN),
    Mutant("training/frozen.py", "deepcopy(net, {id(x): x for x in shared})", "deepcopy(net)", "it lies twice", FROZEN),
    Mutant("training/frozen.py", "if now != then", "if False", "a run goes on from another model", FROZEN),
    Mutant(
        "training/optim.py",
        "[p for p in net.parameters() if p.requires_grad]",
        "[*net.parameters()]",
        "the optimizer holds what is frozen",
        FROZEN,
    ),
    Mutant("run/base.py", "evaluating(self.net), ", "", "a teacher drops", BASE),
    Mutant("run/base.py", "off(), ", "", "the net teaches itself", BASE),
    Mutant("nets/dualized.py", "tuple(-head for", "tuple(head for", "data - noise is learned", f"{OLD}[z-image]"),
    Mutant("nets/dualized.py", "1 - t if row.backward", "t if row.backward", "time runs backward", f"{OLD}[lumina2]"),
    Mutant("nets/dualized.py", "clock * time", "time", "a model of 1000 t is told t", f"{OLD}[sd3]"),
    Mutant(
        "nets/dualized.py",
        "(*numbers, *args",
        "(*args[: len(numbers)], *args",
        "t is rounded",
        ROUNDED,
    ),
    Mutant("nets/dualized.py", "(0, 2, 4, 1, 3, 5)", "(0, 2, 4, 3, 5, 1)", "channels are packed last", f"{OLD}[flux]"),
    Mutant("nets/twin.py", "out.unflatten(-1, (-1, self.channels))", "out", "heads share channels", f"{APART}[sd3]"),
    Mutant("nets/adapter.py", "_disable_adapters = True", "_disable_adapters = False", "the base moves", ADAPTED),
    Mutant("nets/lowpass.py", "input * self.keep", "input", "quick waves come back", CUT),
    Mutant(
        "nets/lowpass.py",
        "for _ in range(STEPS)",
        "for _ in range(0)",
        "the curve is left",
        SMOOTH,
    ),
    Mutant("nets/lowpass.py", "angles[:, half:].sin()", "angles[:, half:].cos()", "sines are taken for cosines", WAVES),
    Mutant("training/layout.py", "sync(step)", "sync(True)", "every piece is sent", COLLECTIVE),
    Mutant("training/layout.py", "backward(step or reshard)", "backward(True)", "weights come twice", COLLECTIVE),
    Mutant("training/manifest.py", "if digest.of_file(", "if False and digest.of_file(", "no file is hashed", WHOLE),
    Mutant("training/manifest.py", "sorted(wanted.keys() | sizes.keys())", "sorted(wanted)", "strays stay", WHOLE),
    Mutant("training/manifest.py", "sizes[name] != wanted[name].bytes", "False", "what is cut is only hashed", WHOLE),
    Mutant(
        "training/checkpoint.py",
        "(wrong := manifest.fault(path, read, together=together)) is None",
        "(wrong := None) is None",
        "the list is not asked",
        WHOLE,
    ),
    Mutant(
        "training/retention.py", "            if manifest.sound(path):", "            if True:", "damage is kept", WHOLE
    ),
    Mutant("training/retention.py", "elif not good and", "elif False and", "the last good one goes", LAST_GOOD),
    Mutant("training/step.py", "if not record.finite:", "if False:", "a NaN is applied", SKIPPED),
    Mutant(
        "training/step.py",
        "        state.skips += 1\n        return\n",
        "        state.skips += 1\n        for average in state.averages.values():\n"
        "            average.update(state.net, state.step)\n        return\n",
        "averages move in a skipped step",
        SKIPPED,
    ),
    Mutant(
        "training/step.py",
        "= record.step, record",
        "= state.step + (record.skipped is None), record",
        "a skipped step has no number",
        SKIPPED,
    ),
    Mutant("training/record.py", "dist.mean(table_of(", "torch.clone(table_of(", "each rank sees its own NaN", OTHER),
    Mutant(
        "training/checkpoint.py", "if wrong := not_finite(tensors):", "if wrong := None:", "a NaN is saved", UNSAVED
    ),
    Mutant(
        "training/memory.py",
        "in values.items()}",
        'in values.items() if key != "step"}',
        "its step is lost",
        CHECKPOINT,
    ),
    Mutant("io/shards.py", "== math.prod(about.size)", ">= 0", "a shard may lack", WHOLE),
    Mutant("metrics/neighbours.py", "inside[i[near]] = True", "pass", "what is open is not measured", NEIGHBOURS),
    Mutant("metrics/neighbours.py", "- off > (distances", "+ 9 > (distances", "equals are not told apart", NEIGHBOURS),
    Mutant("metrics/neighbours.py", "return n * u / (1 - n * u)", "return 0.0", "rounding is no error", NEIGHBOURS),
    Mutant("metrics/two_sample.py", "half[1 - learnt]", "half[learnt]", "it is asked what it learned", TWO_SAMPLE),
    Mutant("metrics/two_sample.py", "[len(real), len(fake)]", "[len(fake), len(real)]", "sides change", TWO_SAMPLE),
    Mutant(
        "protocols/digits.py",
        "(reference.x, filed,",
        "(reference.x, x,",
        "what no file holds is told apart",
        f"{PROTOCOL}::test_filed_digits_are_judged_at_the_grey_levels_of_the_data",
    ),
    Mutant(
        "protocols/evaluator.py",
        '"fd_grey" if "fd_grey" in free else next',
        "next",
        "what no file holds leads",
        "tests/unit/report/test_score.py",
    ),
    Mutant("data/caption.py", "labels * many + turn", "labels * many + 0 * turn", "a class has one caption", CAPTION),
    Mutant("data/caption.py", "* len(self.templates) * held", "* held", "held captions are seen ones", CAPTION),
    Mutant("data/caption.py", "if self.digest not in (None, found.digest())", "if False", "others will do", CAPTIONED),
    Mutant("data/captioned.py", "batch=batch, rows=rows)", "batch=batch)[: len(row)]", "ranks draw alike", CAPTION),
    Mutant("texts/caption.py", "(u * counts)", "(u * (counts - 1))", "the last is never drawn", CAPTION),
    Mutant("nets/text/learned.py", ") | last", ")", "a text may lose its end", LEARNED),
    Mutant("nets/text/learned.py", "if self.training and", "if", "words are hidden in sampling, too", LEARNED),
    Mutant(
        "nets/half.py",
        "self.weight.to(input.dtype)",
        "self.weight.to(input.dtype) * 0.5",
        "halved twice",
        f"{HALF}::test_what_is_stored_in_bf16_is_rounded_nowhere",
    ),
    Mutant("preflight/depth.py", "(lengths[i] - few) * step", "lengths[i] * step", "a block too many", DEPTH),
    Mutant("export/lora.py", "new.bias.detach() - old.bias", "new.bias.detach()", "a LoRA adds a bias twice", LORA),
    Mutant("export/stock.py", "self.none + scale - 1", "scale", "Z-Image is guided once too often", STOCK),
    Mutant("export/scheduler.py", "(m / START)", "m", "the times of jumps forget where they start", STOCK),
    Mutant("export/scheduler.py", '"shift": 1.0, ', "", "a scheduler may bend the times", STOCK),
    Mutant("flow/divergence.py", "e * rate_of(v)", "rate_of(v)", "J e is taken for its diagonal", LIKELIHOOD),
    Mutant("sampling/likelihood.py", "grown = grown + more", "grown = grown - more", "volume shrinks", LIKELIHOOD),
    Mutant("sampling/likelihood.py", "(div + div_s) / 2", "div", "volume grows as by Euler", LIKELIHOOD),
    Mutant("sampling/likelihood.py", "x + lift(s - t, x) * v, s, c)", "x, s, c)", "Heun stays put", LIKELIHOOD),
    Mutant("sampling/likelihood.py", " - d * log(path.sd)", "", "the density is of units of sd", LIKELIHOOD),
    Mutant("sampling/likelihood.py", "/ probes**0.5", "", "a trace is as many times itself", JUDGED),
    Mutant("objectives/several.py", "(s - t) * heads[growth]", "(t - s) * heads[growth]", "jumps shrink", LIKELIHOOD),
    Mutant("objectives/several.py", "lift(s - t, x) * heads[jump]", "lift(t - s, x) * heads[jump]", "down", LIKELIHOOD),
    Mutant("objectives/several.py", 'first if part.kind == "divergence" else i', "i", "div g in place of v", SEVERAL),
    Mutant(
        "objectives/part.py",
        "square - lift(b.t - b.r, b.x_t) * rate",
        "square + lift(b.t - b.r, b.x_t) * rate",
        "g* has the sign of dg/dt wrong",
        SEVERAL,
    ),
    Mutant("flow/law.py", "return signs(*key", "return keyed(*key", "squares of directions are not 1", SEVERAL),
    Mutant(
        "flow/times.py",
        "for rows in (data, between) if",
        "for rows in (sorted(data + between),) if",
        "all jumps to the data are turned",
        TIMES,
    ),
    Mutant("protocols/likelihood.py", "log2(self.levels / 2)", "log2(self.levels)", "the range is 1 wide", JUDGED),
    Mutant("protocols/likelihood.py", "+ u) / levels", "+ u) / (levels - 1)", "cells are too wide", JUDGED),
    Mutant("evaluation/likelihood.py", "dist.rank(), len(", "0, len(", "every rank has the first rows", EVALUATED),
]


def warm(compiled: str) -> None:
    """Do here once what each child would do again: import what is not ours, and keep what Python compiles."""
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", METHOD: "fork"}
    sys.dont_write_bytecode, sys.pycache_prefix = False, compiled
    torch.set_num_threads(1)
    for name in OTHERS:
        importlib.import_module(name)
    gc.freeze()


def planted(mutant: Mutant) -> Plant:
    """The module with the error. Raises ValueError unless there is exactly one place for it."""
    file = ROOT / "src/dumo" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times: mend tests/mutants.py")
    name = "dumo." + mutant.file.removesuffix(".py").replace("/", ".")
    return Plant(name, str(file), text.replace(mutant.old, mutant.new))


def run(tests: list[str], plant: Plant | None = None) -> tuple[int, str]:
    """Exit code and output of the tests, in a process forked from this one, where what they import of others is.

    Raises TimeoutError where they take too long.
    """
    with NamedTemporaryFile() as output:
        child = FORK.Process(target=test, args=(tests, plant, output.name))
        child.start()
        end = time.monotonic() + PATIENCE
        while child.exitcode is None:  # not join: what it waits for, the other child has inherited
            if time.monotonic() > end:
                child.kill()
                raise TimeoutError(f"no end after {PATIENCE} s")
            time.sleep(0.05)
        return child.exitcode, Path(output.name).read_text()


def test(tests: list[str], plant: Plant | None, output: str) -> None:
    """Run the tests in this process, and end it. Shapes are not checked here: that takes longer than the tests."""
    with open(output, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.path.insert(0, str(ROOT / "src"))
    if plant:
        plant.plant()
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", f"addopts={ADDED}"]
    os._exit(pytest.main([*options, *tests]))


def trial(mutant: Mutant) -> tuple[str | None, str]:
    """The test that fails with a mutant, None if it lives, and what to say of it."""
    stem = Path(mutant.file).stem
    mine = ["-k", stem] if mutant.file.startswith("objectives/") and mutant.tests == FIXED else []
    try:
        code, output = run([mutant.tests, *mine], planted(mutant))
    except (ValueError, TimeoutError) as error:
        return None, str(error)
    failed = re.search(r"^FAILED (.*?)( - .*)?$", output, re.MULTILINE)
    if code == 1 and failed:
        return failed[1], failed[1].partition("::")[2]
    return None, "SURVIVED" if code == 0 else f"no test failed, yet pytest exits with {code}: {output[-300:]}"


def sane(tests: set[str]) -> str:
    """What the tests that saw an error say without one; empty if they pass."""
    code, output = run(sorted(tests))
    return output[-2000:] if code else ""


def main() -> int:
    """Print a row per mutant. 0 if every one was killed, by a test that passes without it."""
    begun = time.monotonic()
    os.chdir(ROOT)
    seen: list[str] = []
    with TemporaryDirectory() as compiled, ThreadPoolExecutor(AT_ONCE) as pool:
        warm(compiled)
        for mutant, (failed, said) in zip(MUTANTS, pool.map(trial, MUTANTS), strict=True):
            seen += [failed] * (failed is not None)
            print(f"{'killed' if failed else 'ALIVE '}  {mutant.file:28} {mutant.why:46} {said}", flush=True)
        broken = sane(set(seen))
    print(f"BROKEN  without a mutant: {broken}" if broken else f"fine    without a mutant: {len(set(seen))} tests pass")
    took = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = f"{took.ru_utime + took.ru_stime:.0f} s of processors"
    print(f"{len(seen)} of {len(MUTANTS)} mutants killed in {time.monotonic() - begun:.0f} s, {cpu}")
    return 1 if broken or len(seen) < len(MUTANTS) else 0


if __name__ == "__main__":
    sys.exit(main())
