"""Tries an installed package, an operator and the command line. Prints what serves, and why csrc does not."""

import subprocess
import sys

import torch

from diffpp_fast import Noise, backends, ops

x_t = ops.add_noise(torch.zeros(2, 3), torch.ones(2), torch.ones(2), Noise(1, torch.arange(2)))
assert torch.isfinite(x_t).all()
subprocess.run([sys.executable, "-m", "diffpp_fast", "doctor"], check=True, stdout=subprocess.DEVNULL)
print(backends.default_backend("add_noise", x_t.device), backends.why_not("add_noise", "cpu", x_t.device, x_t.dtype))
