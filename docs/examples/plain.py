"""A training loop of your own, with an average of the weights: python docs/examples/plain.py"""

import torch
from digits import EPOCHS, Net, loader
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dumo

torch.manual_seed(0)
net = Net()
flow = dumo.Flow(net, "dumo", classes=10)
optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))

for epoch in range(EPOCHS):
    losses = []
    for x, c in loader:
        loss = flow(x, c)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(net)
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")

samples = flow.with_net(ema).sample(range(10), nfe=1)
print(f"samples {tuple(samples.shape)}")
