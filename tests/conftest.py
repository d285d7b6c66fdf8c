"""Settings for every test: few threads, because many small products stall on more."""

import torch

torch.set_num_threads(2)
