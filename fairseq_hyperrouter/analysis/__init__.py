"""What a trained model costs and does: numbers first, pictures from the numbers."""

from .cost import ModelCost, model_cost
from .sweep import sweep

__all__ = ["ModelCost", "model_cost", "sweep"]
