"""Settings that all tests share."""

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # the tests run side by side, and a number of threads is a number of roundings
