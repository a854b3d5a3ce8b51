"""The needs of a run: memory by role and kind, operations and an estimate of time, before a weight is read."""

from diffpp_fast.training.planning.architectures import KNOWN, known_config
from diffpp_fast.training.planning.plan import RunPlan, make_plan, run_of, savings
from diffpp_fast.training.planning.states import PlannedRun
from diffpp_fast.training.planning.timing import GPUS, gpu_named

__all__ = ["GPUS", "KNOWN", "PlannedRun", "RunPlan", "gpu_named", "known_config", "make_plan", "run_of", "savings"]
