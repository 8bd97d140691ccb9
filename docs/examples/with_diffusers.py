"""With a network of diffusers and texts as conditions: python docs/examples/with_diffusers.py

Images and texts are random: put yours there. `call` says how to call a network whose arguments are not t and c.
"""

import sys

import torch
from diffusers import UNet2DConditionModel

import dumo

STEPS = int(sys.argv[1]) if sys.argv[1:] else 40

torch.manual_seed(0)
net = UNet2DConditionModel(
    in_channels=3,
    out_channels=6,  # v and u
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    norm_num_groups=8,
    layers_per_block=1,
    cross_attention_dim=24,
)
texts = torch.randn(8, 5, 24)  # of an encoder, 5 tokens each
images = torch.rand(8, 3, 16, 16) * 2 - 1
flow = dumo.Flow(net, "dumo", null=torch.zeros(5, 24), call=lambda net, x, t, c: net(x, t, c).sample.chunk(2, 1))
optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)

for step in range(STEPS):
    loss = flow(images, texts)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss:.4f}")

samples = flow.sample(texts[:4], nfe=2)
print(f"samples {tuple(samples.shape)}")
