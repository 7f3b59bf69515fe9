"""Optimizers that know experts which are divided over workers."""

from .expert_parallel import ExpertParallelOptimizer, divide_experts

__all__ = ["ExpertParallelOptimizer", "divide_experts"]
