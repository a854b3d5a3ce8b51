"""Floor 4: the algorithms. They own no optimizer, no device and no process group, and take networks as callables."""

from diffpp_fast.methods.base import Batch, StepOutput
from diffpp_fast.methods.diff_instruct import DiffInstruct, DiffInstructPP

__all__ = ["Batch", "DiffInstruct", "DiffInstructPP", "StepOutput"]
