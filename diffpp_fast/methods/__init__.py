"""Floor 4: the algorithms. They own no optimizer, no device and no process group, and take networks as callables."""

from diffpp_fast.methods.base import Batch, RewardOutput, StepOutput
from diffpp_fast.methods.decoupled_dmd import DecoupledDMD
from diffpp_fast.methods.didr import DIDR
from diffpp_fast.methods.diff_instruct import DiffInstruct, DiffInstructPP
from diffpp_fast.methods.dmd import DMD2
from diffpp_fast.methods.method import Method
from diffpp_fast.methods.names import METHODS
from diffpp_fast.methods.sid import SiD
from diffpp_fast.methods.sim import SIM, DiffInstructStar

__all__ = [
    "DIDR",
    "DMD2",
    "METHODS",
    "SIM",
    "Batch",
    "DecoupledDMD",
    "DiffInstruct",
    "DiffInstructPP",
    "DiffInstructStar",
    "Method",
    "RewardOutput",
    "SiD",
    "StepOutput",
]
