import torch

# Without a GPU nothing here is collected; the same kernels run on the CPU in test_emulated.py.
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
