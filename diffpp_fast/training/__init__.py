"""Floor 5: runs. Configuration, prompts, engines, checkpoints, metrics and the loop that uses them.

A run from Python:

    from diffpp_fast.training import Trainer, load_config

    Trainer(load_config("align.yaml", ["training.steps=200"])).run()
"""

from diffpp_fast.errors import CheckpointError, ConfigurationError, NonFiniteError, UserError
from diffpp_fast.training.callbacks import Callback
from diffpp_fast.training.config import Config
from diffpp_fast.training.loading import dump_config, load_config
from diffpp_fast.training.trainer import Outcome, Trainer

__all__ = [
    "Callback",
    "CheckpointError",
    "Config",
    "ConfigurationError",
    "NonFiniteError",
    "Outcome",
    "Trainer",
    "UserError",
    "dump_config",
    "load_config",
]
