"""What was measured is set out so that the number which counts leads."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contract.case import members
from dumo.config import word
from dumo.config.load import load
from dumo.data import Digits
from dumo.evaluation import measures
from dumo.evaluation.metric import METRICS, headline_score
from dumo.evaluation.wholeset import Reference
from dumo.objectives import Objective
from dumo.report import judgement, page, score
from dumo.report.evaluation_card import judging_settings, make_card
from dumo.report.figure import moving_average
from dumo.run.folder import RunFolder
from dumo.run.trained import TrainedRun
from dumo.types import Sample

PERFECT = {"perfect": {"mean": 0.2, "sd": 0.1, "auc": 0.5, "auc_sd": 0.02}}


def judged(lead: float = 0.5, **more: Any) -> judgement.Judgement:  # noqa: ANN401, what a report holds
    """An evaluation of digits, as it is read."""
    row = {"nfe": 1, "solver": "restart", "fd_grey": lead, "fd": 0.1, "kid": 0.01, "kid_sd": 0.02, "auc": 0.7, **more}
    columns = score.score_names(row)
    return {
        "results": [row],
        "contrast": [],
        "columns": columns,
        "fresh": True,
        "protocol": "digits",
        "baselines": PERFECT,
        "words": word.merits(columns),
    }


def test_the_first_leads() -> None:
    assert headline_score({"mmd": 1, "fd_grey": 2}) == "mmd"
    row = {"nfe": 1, "solver": "hop", "mmd": 1.0, "mmd_sd": 1.0, "fd_grey": 2.0, "kid": None, "state": "untrained"}
    assert score.score_names(row) == ["mmd", "fd_grey", "kid"]


def test_what_sees_classes_leads_and_a_summary_has_no_precision() -> None:
    row = {"nfe": 1, "solver": "hop", "mmd": 1.0, "mmd_sd": 1.0, "class_mmd": 2.0, "class_mmd_sd": 0.5}
    row |= {"precision": 0.9, "recall": 0.1, "pixel_fd": 1.0, "copies": 0.0}
    columns = score.score_names(row)
    assert columns == ["class_mmd", "mmd", "precision", "recall", "pixel_fd", "copies"]
    assert score.summary_names(columns) == ["class_mmd", "recall", "copies"]
    short = score.select_scores(row, score.summary_names(columns))
    assert list(short) == ["nfe", "solver", "class_mmd", "class_mmd_sd", "recall", "copies"]
    assert score.summary_names(score.score_names({"fid": 0.5, "their_score": 0.6})) == ["fid", "their_score"]
    baselines = {"perfect": {"mean": 0.0, "sd": 0.1, "class_mmd": 0.5}}
    named = score.baselines_by_name({"results": [row], "baselines": baselines})
    assert named == {"perfect": {"mmd": 0.0, "mmd_sd": 0.1, "class_mmd": 0.5}}


def test_what_a_run_was_trained_on_does_not_lead() -> None:
    """By pixels a distance of features judges on, by features one of pixels; where nothing else is, it leads marked."""
    features = {"features": "32 of dumo's classifier of digits"}
    row = {"nfe": 1, "fd_grey": 1.0, "fd": 1.0, "kid": 1.0, "kid_sd": 1.0, "auc": 0.7, "pixel_fd": 2.0}
    by_numbers, by_features = features | {"trained_on": "numbers"}, features | {"trained_on": "classifier of digits"}
    assert [score.score_names(row, card)[0] for card in (features, by_numbers)] == ["fd_grey", "fd_grey"]
    assert [score.trained_on_names(row, card) for card in (features, by_numbers)] == [[], ["auc", "pixel_fd"]]
    assert score.trained_on_names(row, by_features) == ["fd_grey", "fd", "kid"]
    assert score.score_names(row, by_features) == ["auc", "fd_grey", "fd", "kid", "pixel_fd"]
    assert score.trained_on_names(row, features | {"trained_on": "Inception"}) == []
    assert headline_score({"mmd2": 1.0}, by_numbers) == "mmd2"


def test_a_card_says_what_a_run_was_trained_on() -> None:
    cards = [judging_settings(run) for run in map(load, ("digits-drift", "digits"))]
    assert [card.get("trained_on") for card in cards] == ["numbers", None]


def test_a_page_marks_what_a_run_was_trained_on(tmp_path: Path) -> None:
    """The baseline beside the number that leads is of that number."""
    row = {"nfe": 1, "solver": "restart", "mmd": 0.5, "auc": 0.7}
    card = {
        "features": "dumo's classifier of digits",
        "trained_on": "classifier of digits",
    }
    told = {"step": 1, "weights": "w", "protocol": "digits", "results": [row], "contrast": [], "baselines": PERFECT}
    pages: list[judgement.Judgement] = []
    opened = TrainedRun(load("digits"), RunFolder(tmp_path), nn.Linear(1, 1), 1, "w", listed_sha256="0" * 64)
    card |= make_card(opened, opened.spec, {}, 2000)
    for one in (card, {key: value for key, value in card.items() if key != "trained_on"}):
        (tmp_path / "evaluation.json").write_text(json.dumps(told | {"card": one}))
        pages += judgement.read_judgements(opened)
    marked, plain = pages
    assert (marked["columns"], plain["columns"]) == (["auc", "mmd"], ["mmd", "auc"])
    [(_, _, cells)] = judgement.baseline_rows(marked, marked["columns"])
    assert cells == ["0.500 ± 0.020", "0.20 ± 0.10"]
    assert [of.better.endswith("; trained on") for of in marked["words"].values()] == [False, True]


def test_every_metric_has_words() -> None:
    assert METRICS.keys() == word.MERITS.keys()


@pytest.mark.slow
def test_every_figure_of_ours_has_words() -> None:
    x, c = Digits().originals().reference(0, 0)
    of_digits = measures.score_digits(x[torch.arange(2000) % len(x)], torch.arange(2000) % 10, Reference(x, c))
    points = torch.randn(20, 2)
    of_points = measures.score_toy(points, torch.zeros(20), Reference(points, torch.zeros(20)))
    named = {key for key in [*of_digits, *of_points] if not key.endswith("_sd")}
    assert named <= word.MERITS.keys()
    assert all(of.better and of.meaning for of in word.MERITS.values())
    for spec in members(Objective):
        told = word.method(spec())
        assert told.name != spec.model_fields["kind"].default, spec
        assert told.what.endswith("."), spec
        assert re.search(r"arXiv \d{4}\.\d{5}", told.source) or told.source.startswith("ours"), spec
    assert word.word(word.MERITS, "some_other") == word.Word("some other")


def test_the_terminal_names_the_reference_below_the_scores() -> None:
    card = {"reference": "20 images of split test", "reference_sha256": "a" * 64, "protocol": "folder"}
    assert "reference: 20 images of split test" in score.terminal_lines(judged() | {"card": card}, None)


def test_a_baseline_stands_under_what_it_is_of() -> None:
    (told,) = judgement.baseline_rows(judged(), judged()["columns"])
    assert (told[0], told[2]) == ("a perfect sampler", ["0.20 ± 0.10", "", "", "0.500 ± 0.020"])
    assert [score.has_too_few_images(one) for one in (judged(), judged() | {"baselines": {}})] == [False, True]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1797, "1,797"), (True, "True"), ("hop", "hop"), (None, "–"), (float("nan"), "–"), (0.0, "0"),
        (2.3456, "2.35"), (94.04, "94.0"), (0.00835, "0.00835"), (1234.5, "1,234"), (-0.02, "−0.0200"),
        (4.87e-5, "4.87 · 10⁻⁵"), (-1.5e-10, "−1.50 · 10⁻¹⁰"), (3.2e7, "3.20 · 10⁷"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: object, text: str) -> None:
    assert score.number(value) == text


def test_spreads_and_large_numbers() -> None:
    assert score.spread(0.14208, 0.0206) == "0.142 ± 0.021"
    assert score.spread(-12.3, 4.56) == "−12.3 ± 4.6"
    assert (score.spread(0.5, 0.0), score.spread(None, None)) == ("0.500", "–")
    assert [score.abbreviate(x) for x in (742_856, 999, 7.58e6, 6.7779e8, 2e15)] == [
        "743\u00a0k", "999", "7.58\u00a0M", "678\u00a0M", "2,000\u00a0T",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "columns"), [(1, [0] * 10), (2, [0] * 5 + [1] * 5), (3, [0, 0, 0, 1, 1, 1, 2, 2, 2])]
)
def test_few_classes_have_several_columns(classes: int, columns: list[int]) -> None:
    run = load("my-images", [f"data.classes={classes}", "data.root=x", "evaluate.protocol.kind=folder"])
    bare = TrainedRun(run, RunFolder(Path("run")), nn.Identity())
    assert page.column_conditions(bare) == columns
    x, c = torch.arange(90.0).view(90, 1, 1, 1).expand(90, *run.data.shape), torch.arange(90) % classes
    sheet = page.arrange_by_class(bare, x, c)
    rows = sheet[:, 0, 0, 0].view(-1, len(columns)).long()
    assert all((row % classes).tolist() == columns for row in rows)
    assert len(rows) == min(8, 90 // classes // (len(columns) // classes))
    assert page.arrange_by_class(bare, x[:1], c[:1])[0].equal(x[0])  # one image of all


def test_smoothing_keeps_the_mean_and_lessens_noise() -> None:
    x: Sample = torch.randn(300, generator=torch.Generator().manual_seed(0)) + 3
    found = moving_average(x.tolist())
    assert found.std() < x.std().item() / 4
    assert found.mean() == pytest.approx(x.mean().item(), abs=0.05)
    assert moving_average([1.0, 5.0]).tolist() == [1.0, 5.0]
