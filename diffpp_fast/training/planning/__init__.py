"""What a run would need: memory by role and kind, operations and an estimate of time, before a weight is read."""

from diffpp_fast.training.planning.plan import Plan, make_plan
from diffpp_fast.training.planning.setup import Lora, Setup, Trained, Zero

__all__ = ["Lora", "Plan", "Setup", "Trained", "Zero", "make_plan"]
