"""Stock schedulers and arguments say what dumo's solvers and guidance do; a LoRA and a decoder are those of the run."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dumo.config.spec import Sampling
from dumo.export.lora import change_as_product
from dumo.export.model import INDEX, ExportedModel, require_pipeline, stored_dtype
from dumo.export.model_card import _pipeline_calls, license_metadata
from dumo.export.scheduler import CONFIG, check_scheduler, write_flow_map_scheduler
from dumo.export.stock import PIPELINE_BY_MODEL
from dumo.export.write import _copy_files, read_index
from dumo.flow.path import Diffusion, Linear
from dumo.flow.solver import Hop, Restart, jump_times
from dumo.nets.family import FAMILIES, FLUX2
from dumo.nets.vp import read_scheduler
from dumo.types import Readings, UserError
from transformers_saved import of

SOLVER = Restart(m=0.7, start=0.99)
SCALE = 1.2  # of the codec of recipe cifar10-latents; its shift is 0


def test_the_scheduler_makes_restarts_steps(tmp_path: Path) -> None:
    """x_s = (1 - s) (x_t - t u) + s z, to the bit, at any number of times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert write_flow_map_scheduler(tmp_path, SOLVER)[0] == "diffusers"
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    stock.set_timesteps(sigmas=(times := SOLVER.times(4)))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=g)
    for when, (t, s) in zip(stock.timesteps, pairwise(torch.tensor([*times, 0.0])), strict=True):
        u, seed = torch.randn(2, 3, generator=g), int(1000 * t)
        found = stock.step(u, when, x, generator=torch.Generator().manual_seed(seed)).prev_sample
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, s * z + (1 - s) * (x - t * u))
        x = found


def test_the_scheduler_of_hops_makes_eulers_steps(tmp_path: Path) -> None:
    """x_s = x_t - (t - s) u, without noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    write_flow_map_scheduler(tmp_path, SOLVER, makes_hops=True)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(sigmas=[1.0, 0.25])
    x, u = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scheduler.step(u, scheduler.timesteps[0], x).prev_sample, x - 0.75 * u)


def test_the_dtype_of_a_model_is_that_of_most_of_its_numbers(tmp_path: Path) -> None:
    """Some layers may be kept in float32; what no model is exported in is opened in float32."""
    file = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    assert stored_dtype(tmp_path) == "float32"
    for most, dtype in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float64, "float32")):
        save_file({"a": torch.zeros(2, 4), "b": torch.zeros(9, dtype=most)}, file)
        assert stored_dtype(tmp_path) == dtype


def test_a_hop_ends_where_the_next_begins() -> None:
    run: Any = SimpleNamespace(sample=SimpleNamespace(solver=Hop()), path=Linear())
    none: Any = None
    two = ExportedModel(run, spec=none, net=none, head="u", nfe=(2,))
    assert two.pass_intervals == [(1.0, 0.5), (0.5, 0.0)]


def test_a_card_has_no_call_whose_times_were_not_taught() -> None:
    sample = Sampling(solver=Restart(m=0.7))
    run: Any = SimpleNamespace(sample=sample, path=Linear(), data=SimpleNamespace(shape=(4, 8, 8)))
    net: Any = SimpleNamespace(guidance=None)
    spec: Any = SimpleNamespace(texts=None, pipeline=SimpleNamespace(is_published=True))
    for lowest, passes in ((0.0, ["one pass", "two", "four"]), (0.7, ["one pass", "two"])):
        run.readings = Readings(lowest=lowest)
        calls = _pipeline_calls(ExportedModel(run, spec, net, "u"), PIPELINE_BY_MODEL["SD3Transformer2DModel"])
        assert [comment for _, comment in calls] == passes


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_scheduler_of_a_diffusion_makes_restarts_jumps(prediction: str, passes: int, tmp_path: Path) -> None:
    """`LCMScheduler`, as a pipeline calls it, against Restart on the path: a net of its input and index alone."""
    from diffusers import LCMScheduler

    said = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    frame = read_scheduler(said | {"prediction_type": prediction})
    path = Diffusion(schedule=frame.schedule)
    assert write_flow_map_scheduler(tmp_path, SOLVER, frame)[1] == "LCMScheduler"
    stock = LCMScheduler.from_pretrained(tmp_path)
    z = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))

    def net(x: Tensor, index: Tensor) -> Tensor:
        return (x + 0.01 * index[:, None]).sin()

    def endpoint(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        scaled, index, velocity = frame(x, t)
        return x - t[:, None] * velocity(net(scaled, index))

    solver = Restart(m=0.7)
    mine = solver(Readings(endpoint=endpoint), path, path.initial_std * z[0], torch.zeros(3), passes, lambda k: z[k])
    stock.set_timesteps(timesteps=path.nearest_indices(solver.times(passes)))
    x = z[0] * stock.init_noise_sigma
    for k, index in enumerate(stock.timesteps):
        with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, k=k, **__: z[k + 1]):
            x = stock.step(net(x, index.expand(3).float()), index, x).prev_sample
    assert (x - mine).norm() / mine.norm() < 1e-5


@pytest.mark.parametrize("wrong", [{"stochastic_sampling": False}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_a_scheduler_of_other_steps_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    write_flow_map_scheduler(tmp_path, SOLVER)
    check_scheduler(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps(config | wrong), encoding="utf-8")
    with pytest.raises(UserError, match=next(iter(wrong))):
        check_scheduler(tmp_path)


def test_a_pipeline_that_is_told_no_times_has_them_in_its_scheduler(tmp_path: Path) -> None:
    module, name = write_flow_map_scheduler(tmp_path, SOLVER, takes_times=False)
    spec = importlib.util.spec_from_file_location(module, tmp_path / f"{module}.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    stock = getattr(found, name).from_pretrained(tmp_path)
    for n in (1, 2, 4):
        stock.set_timesteps(n)
        torch.testing.assert_close(stock.sigmas, torch.tensor([*jump_times(n, 0.7, 0.99), 0.0]), rtol=0, atol=0)
        torch.testing.assert_close(stock.timesteps, 1000 * stock.sigmas[:-1], rtol=0, atol=0)


def test_guidance_is_said_in_each_pipelines_own_way() -> None:
    """V(null) + w (V(c) - V(null)) is what most say; Z-Image adds w - 1 times the difference to V(c)."""
    w, times = 3.5, [1.0, 0.7]
    said = {
        name: stock.arguments([999, 547] if stock.indexed_times else times, scale=w)
        for name, stock in PIPELINE_BY_MODEL.items()
    }
    assert said.keys() <= FAMILIES.keys()  # all are classes that dumo trains
    assert said["SD3Transformer2DModel"] == {"sigmas": times, "guidance_scale": w}
    assert said["ZImageTransformer2DModel"]["guidance_scale"] == w - 1
    assert said["QwenImageTransformer2DModel"]["true_cfg_scale"] == w
    assert said["CogView4Transformer2DModel"]["timesteps"] == [1000, 700]
    assert said["WanTransformer3DModel"]["num_inference_steps"] == 2
    assert said["UNet2DConditionModel"] == {"timesteps": [999, 547], "guidance_scale": w}
    found = PIPELINE_BY_MODEL["FluxTransformer2DModel"].arguments(times, embedded=4.0)
    assert found == {"sigmas": times, "true_cfg_scale": 1.0, "guidance_scale": 4.0}


@pytest.mark.parametrize("is_distilled", [True, False])
def test_a_distilled_klein_is_guided_by_no_argument(is_distilled: bool, tmp_path: Path) -> None:
    """Its pipeline ignores guidance_scale, and warns where that is left at its default."""
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": is_distilled, "transformer": ["diffusers", FLUX2]}
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": FLUX2, "guidance_embeds": False}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config), encoding="utf-8")
    run: Any = SimpleNamespace(sample=SimpleNamespace(guide=SimpleNamespace(scale=2.0)))
    net: Any = SimpleNamespace(model=type(FLUX2, (), {})())
    exported = ExportedModel(run, of(tmp_path), net, "u")
    assert exported.stock is not None
    if is_distilled:
        assert exported.stock.arguments([1.0]) == {"sigmas": [1.0]}
        assert exported.stock.extra_arguments == ("guidance_scale=1.0",)
        with pytest.raises(UserError, match="Flux2KleinPipeline"):
            require_pipeline(exported)
        return
    assert require_pipeline(exported).arguments([1.0], scale=2.0) == {"sigmas": [1.0], "guidance_scale": 2.0}


def test_what_holds_for_the_source_alone_is_left_out(tmp_path: Path) -> None:
    """Its name, and the few-step settings that servers read."""
    index: dict[str, Any] = {"transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]}
    of_source = {"dmd2_config": {}, "dmd2_denoising_timesteps": [999], "_use_default_values": {}}
    (tmp_path / INDEX).write_text(json.dumps(index | of_source | {"_name_or_path": "owner/model"}), encoding="utf-8")
    assert read_index(tmp_path) == index


def test_a_licence_is_linked_where_the_link_leads_somewhere() -> None:
    facts = {"class": "FluxPipeline", "license": "other", "license_name": "mine", "license_link": "LICENSE.md"}
    licence = {"license": "other", "license_name": "mine"}
    assert license_metadata(facts) == licence
    facts["license_link"] = "https://a.org/LICENSE.md"
    assert license_metadata(facts) == licence | {"license_link": "https://a.org/LICENSE.md"}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    """An export without it would not be whole."""
    with pytest.raises(FileNotFoundError):
        _copy_files(tmp_path / "gone", tmp_path / "out")


@pytest.mark.parametrize(("wide", "high"), [(3, 5), (5, 3), (4, 4)])
def test_a_product_is_the_change(wide: int, high: int) -> None:
    torch.manual_seed(0)
    old, new = (nn.Linear(wide, high, dtype=torch.float64) for _ in range(2))
    new.bias = old.bias
    path, a, b = change_as_product("layer", old, new)
    assert (path, a.shape, b.shape) == ("layer", (min(wide, high), wide), (high, min(wide, high)))
    x = torch.randn(7, wide, dtype=torch.float64)
    torch.testing.assert_close(old(x) + (x @ a.T) @ b.T, new(x), rtol=0, atol=1e-14)
