"""What the examples share: handwritten digits, and a small transformer. An argument is the number of epochs."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = int(sys.argv[1]) if sys.argv[1:] else 15  # of 28 batches

pixels, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels))
loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)


class Net(nn.Module):
    """Takes images, a time and a class for each; returns v and u."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(16, width) / 8)
        self.time = nn.Sequential(nn.Linear(11, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(11, width)  # ten digits, and none
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.heads = nn.ConvTranspose2d(width, 2, 2, stride=2)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """Each of shape (b, 1, 8, 8)."""
        waves = torch.cos(t[:, None] * torch.arange(11, device=t.device) / 2)  # of at most 5 radians
        h = self.patches(x).flatten(2).mT + self.places + (self.time(waves) + self.label(c))[:, None]
        for block in self.blocks:
            h = block(h)
        return self.heads(h.mT.unflatten(2, (4, 4))).chunk(2, 1)
