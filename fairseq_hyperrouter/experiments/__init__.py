"""Many trainings and their evaluation from one small file; knows fairseq's commands, nothing of models."""

from .experiment import Experiment, Run, read_experiment
from .runner import run_experiment

__all__ = ["Experiment", "Run", "read_experiment", "run_experiment"]
