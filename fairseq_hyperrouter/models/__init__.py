"""fairseq architectures."""

from .transformer_lm import HyperRouterLanguageModel

__all__ = ["HyperRouterLanguageModel"]
