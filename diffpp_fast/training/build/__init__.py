"""From a configuration to a run's networks, rewards and method; what doesn't fit together is refused here."""

from diffpp_fast.training.build.networks import Trained
from diffpp_fast.training.build.run import Run, Sampler, build_run, build_sampler, build_trained
from diffpp_fast.training.build.text import load_text

__all__ = ["Run", "Sampler", "Trained", "build_run", "build_sampler", "build_trained", "load_text"]
