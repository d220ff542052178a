import torch

from perp import probe

# The models here are tiny: a second thread costs more in waiting at barriers than it computes.
torch.set_num_threads(1)
# Every run is planned first, and what its plan says of time is of no interest here.
probe.ROUNDS = 1
