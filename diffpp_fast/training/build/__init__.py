"""From a configuration to a run's networks, rewards and method; what doesn't fit together is refused here."""

from diffpp_fast.training.build.networks import Networks, Trained
from diffpp_fast.training.build.run import Run, Sampler, build_run, build_sampler
from diffpp_fast.training.build.text import load_text

__all__ = ["Networks", "Run", "Sampler", "Trained", "build_run", "build_sampler", "load_text"]
