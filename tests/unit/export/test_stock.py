"""Stock schedulers and arguments say what dumo's solvers and guidance do."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dumo.export import scheduler
from dumo.export.stock import STOCKS, Stock, at, restart
from dumo.flow.solver import Hermite, Restart, jumps
from dumo.nets.family import FAMILIES
from dumo.types import UserError

SOLVER = Restart(m=0.7, start=0.99)


def test_the_scheduler_makes_restarts_steps(tmp_path: Path) -> None:
    """x_s = (1 - s) (x_t - t u) + s z, to the bit, at any number of times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert scheduler.write(tmp_path, STOCKS["SD3Transformer2DModel"], SOLVER)[0] == "diffusers"
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    stock.set_timesteps(sigmas=(times := at(SOLVER, 4)))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=g)
    for told, (t, s) in zip(stock.timesteps, pairwise(torch.tensor([*times, 0.0])), strict=True):
        u, seed = torch.randn(2, 3, generator=g), int(1000 * t)
        found = stock.step(u, told, x, generator=torch.Generator().manual_seed(seed)).prev_sample
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, s * z + (1 - s) * (x - t * u))
        x = found


@pytest.mark.parametrize("wrong", [{"stochastic_sampling": False}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_a_scheduler_of_other_steps_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    scheduler.write(tmp_path, None, SOLVER)
    scheduler.check(tmp_path)
    config = json.loads((tmp_path / scheduler.FILE).read_text("utf-8"))
    (tmp_path / scheduler.FILE).write_text(json.dumps(config | wrong), encoding="utf-8")
    with pytest.raises(UserError, match=next(iter(wrong))):
        scheduler.check(tmp_path)


def test_steps_that_no_scheduler_makes_are_refused() -> None:
    with pytest.raises(UserError, match="kind: restart"):
        restart(Hermite())


def test_a_pipeline_that_is_told_no_times_has_them_in_its_scheduler(tmp_path: Path) -> None:
    module, name = scheduler.write(tmp_path, Stock("WanPipeline", told=()), SOLVER)
    spec = importlib.util.spec_from_file_location(module, tmp_path / f"{module}.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    stock = getattr(found, name).from_pretrained(tmp_path)
    for n in (1, 2, 4):
        stock.set_timesteps(n)
        torch.testing.assert_close(stock.sigmas, torch.tensor([*jumps(n, 0.7, 0.99), 0.0]), rtol=0, atol=0)
        torch.testing.assert_close(stock.timesteps, 1000 * stock.sigmas[:-1], rtol=0, atol=0)


def test_guidance_is_said_in_each_pipelines_own_way() -> None:
    """V(null) + w (V(c) - V(null)) is what most say; Z-Image adds w - 1 times the difference to V(c)."""
    w, times = 3.5, [1.0, 0.7]
    said = {name: stock.arguments(times, scale=w) for name, stock in STOCKS.items()}
    assert said["SD3Transformer2DModel"] == {"sigmas": times, "guidance_scale": w}
    assert said["ZImageTransformer2DModel"]["guidance_scale"] == w - 1
    assert said["QwenImageTransformer2DModel"]["true_cfg_scale"] == w
    assert said["CogView4Transformer2DModel"]["timesteps"] == [1000, 700]
    assert said["WanTransformer3DModel"]["num_inference_steps"] == 2
    told = STOCKS["FluxTransformer2DModel"].arguments(times, embedded=4.0)
    assert told == {"sigmas": times, "true_cfg_scale": 1.0, "guidance_scale": 4.0}


def test_every_row_is_a_class_that_dumo_trains() -> None:
    assert STOCKS.keys() <= FAMILIES.keys()
