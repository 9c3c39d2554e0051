"""A small language model whose attention is one field of its configuration."""

from nsa.models.generate import generate
from nsa.models.language_model import LanguageModel, LMConfig

__all__ = ["LMConfig", "LanguageModel", "generate"]
