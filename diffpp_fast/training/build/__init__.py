"""From a configuration to a run's networks, rewards and method; what doesn't fit together is refused here."""

from diffpp_fast.training.build.agreement import idle_keys, idle_sentences, naming, refuse_misfits, text_length
from diffpp_fast.training.build.networks import Networks, Trained, compute_dtype, stored_weights
from diffpp_fast.training.build.run import (
    Run,
    Sampler,
    build_run,
    build_sampler,
    load_checked_schedule,
    make_generator,
    make_method,
)
from diffpp_fast.training.build.text import load_text

__all__ = [
    "Networks",
    "Run",
    "Sampler",
    "Trained",
    "build_run",
    "build_sampler",
    "compute_dtype",
    "idle_keys",
    "idle_sentences",
    "load_checked_schedule",
    "load_text",
    "make_generator",
    "make_method",
    "naming",
    "refuse_misfits",
    "stored_weights",
    "text_length",
]
