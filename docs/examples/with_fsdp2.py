"""With FSDP2 and torch.distributed.checkpoint: torchrun --nproc-per-node 2 docs/examples/with_fsdp2.py"""

import torch
import torch.distributed as dist
from digits import EPOCHS, Net, data
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import dumo

dist.init_process_group("gloo")  # on GPUs "nccl", and the net and each batch go there
torch.manual_seed(0)
net = Net()
for block in net.blocks:
    fully_shard(block, reshard_after_forward=False)  # so du/dt is taken in the pass that learns
flow = dumo.Flow(fully_shard(net, reshard_after_forward=False), "dumo", classes=10)
optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data), drop_last=True)

for epoch in range(EPOCHS):
    loader.sampler.set_epoch(epoch)
    losses = torch.zeros(len(loader))
    for i, (x, c) in enumerate(loader):
        loss = flow(x, c)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[i] = loss.detach()
    dist.all_reduce(losses)
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {losses.mean() / dist.get_world_size():.4f}")

samples = flow.sample(range(10), nfe=1)  # on all ranks
weights, moments = get_state_dict(flow, optimizer)
checkpoint.save({"flow": weights, "optimizer": moments}, checkpoint_id="checkpoint")
if dist.get_rank() == 0:
    print(f"samples {tuple(samples.shape)}")
dist.destroy_process_group()
