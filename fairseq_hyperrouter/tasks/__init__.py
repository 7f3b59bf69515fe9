"""fairseq tasks."""

from .hyperrouter import HyperRouterTask

__all__ = ["HyperRouterTask"]
