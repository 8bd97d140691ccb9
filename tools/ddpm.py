"""Train a small UNet by the loss of DDPM, with diffusers alone, on latents of CIFAR-10; and judge stock DDIM with it.

    python tools/ddpm.py 0 runs/unet-0    # seed, folder; DUMO_DATA as for the recipe cifar10-latents

The folder is as diffusers saves a pipeline's: unet/ and scheduler/, of Stable Diffusion's noise schedule. Nothing of
dumo's path, objectives or samplers is in here, only its data, its codes of classes, and the protocol that judges.
ddim.json has the scores of DDIM at each number of passes, and what the training took. A run of dumo begins from the
folder by `--set pipeline=FOLDER` (plan `unet`).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.encoders.pipeline import published
from dumo.evaluation import Context
from dumo.nets.rows import codes
from dumo.run.judge import judged_data, real_data

STEPS, BATCH, RATE, WARM, DECAY = 8000, 64, 1e-3, 200, 0.999
PASSES = (50,)  # of the bar in docs/log.md; the plan measures fewer, by Euler on the linear path
SMALL = published("unet-small")
# Of Stable Diffusion; from the last entry of the table down, as few steps want it (Lin et al. 2023), to its first.
DDIM = {name: value for name, value in SMALL["scheduler"].items() if not name.startswith("_")}
SCHEDULE = {name: DDIM[name] for name in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}


def train(run: Run, seed: int, steps: int) -> UNet2DConditionModel:
    """A UNet whose weights are an average, by ||eps_hat - eps||^2 at whole timesteps, each as likely."""
    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel.from_config(SMALL["transformer"])
    noising, source, tokens = DDPMScheduler(**SCHEDULE), run.data.open(), codes(run.data.classes, 32, 0).tokens
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99))
    rate = get_cosine_schedule_with_warmup(optimizer, min(WARM, steps // 10), steps)
    average = EMAModel(unet.parameters(), decay=DECAY)
    begun = time.monotonic()
    for step in range(steps):
        x, c = source.batch(step, BATCH, seed)
        z, k = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
        loss = F.mse_loss(unet(noising.add_noise(x, z, k), k, tokens[c]).sample, z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        if step % 250 == 249:
            print(f"step {step + 1}: loss {loss.item():.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    average.copy_to(unet.parameters())
    return unet.eval()


@torch.no_grad()
def ddim(unet: Any, tokens: Tensor, shape: tuple[int, ...], passes: int, seed: int) -> Tensor:  # noqa: ANN401
    """Samples (n, *shape), a row per row of tokens, by diffusers' own loop over its own times."""
    scheduler = DDIMScheduler(**DDIM)
    scheduler.set_timesteps(passes)
    x = torch.randn(len(tokens), *shape, generator=torch.Generator().manual_seed(seed))
    for k in scheduler.timesteps:
        parts = zip(x.split(500), tokens.split(500), strict=True)
        out = torch.cat([unet(part, k, row).sample for part, row in parts])
        x = scheduler.step(out, k, x).prev_sample
    return x


def judge(unet: Any, run: Run, seed: int) -> list[dict[str, float]]:  # noqa: ANN401
    """Scores of DDIM at each number of passes, by the protocol of the recipe on the images that no training saw."""
    data, protocol = run.data, run.evaluate.protocol
    context = Context(
        lambda: judged_data(data, run.evaluate.split), trained=lambda: real_data(data), classes=data.classes, seed=0
    )
    judged, codec = protocol.evaluator(context), data.codec.open()
    c = protocol.labels(data.classes)
    tokens, rows = codes(data.classes, 32, 0).tokens[c], list[dict[str, float]]()
    for passes in PASSES:
        z = ddim(unet, tokens, data.shape, passes, seed)
        x = torch.cat([codec.decode(part) for part in z.split(250)])
        rows.append({"nfe": passes, **judged.score([(torch.arange(len(x)), x)])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Train, save, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    run, begun = load("cifar10-latents", []), time.monotonic()
    unet: Any = train(run, given.seed, given.steps)
    took = time.monotonic() - begun
    unet.save_pretrained(given.folder / "unet")
    DDIMScheduler(**DDIM).save_pretrained(given.folder / "scheduler")
    parameters = sum(p.numel() for p in unet.parameters())
    facts = {"seed": given.seed, "steps": given.steps, "parameters": parameters, "seconds": round(took)}
    report = {**facts, "results": judge(unet, run, given.seed)}
    (given.folder / "ddim.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
