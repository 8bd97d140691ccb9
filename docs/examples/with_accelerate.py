"""With Hugging Face accelerate: accelerate launch docs/examples/with_accelerate.py

On two processes of a CPU: torchrun --nproc-per-node 2 docs/examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from digits import EPOCHS, Net, loader

import dumo

torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
flow = dumo.Flow(Net(), "dumo", classes=10)
optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
step, optimizer, loader = accelerator.prepare(flow, optimizer, loader)

for epoch in range(EPOCHS):
    losses = []
    for x, c in loader:
        with accelerator.accumulate(step):
            loss = step(x, c)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")

samples = flow.sample(range(10), nfe=1)
accelerator.print(f"samples {tuple(samples.shape)}")
accelerator.end_training()
