"""Prompts: where they come from, the order in which a run meets them, and their encodings."""

from diffpp_fast.training.prompts.embeddings import EmbeddingCache
from diffpp_fast.training.prompts.encoder import PromptEncoder
from diffpp_fast.training.prompts.order import PromptOrder
from diffpp_fast.training.prompts.source import PromptSource, open_prompts

__all__ = ["EmbeddingCache", "PromptEncoder", "PromptOrder", "PromptSource", "open_prompts"]
