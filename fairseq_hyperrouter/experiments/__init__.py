"""Many trainings and their evaluation from one small file; knows fairseq's commands and configs, nothing of models.

experiment.py   what a file says
arguments.py    whether fairseq-train takes a run's options
check.py        whether it can be trained and evaluated
run_folder.py   what is done of a run
provenance.py   what trained it
results.py      what the runs came to
comparison.py   one row of it against the others
processes.py    commands in processes of their own
progress.py     the bar
runner.py       all of it
"""

from .check import check_run
from .experiment import Experiment, Run, read_experiment
from .runner import run_experiment

__all__ = ["Experiment", "Run", "check_run", "read_experiment", "run_experiment"]
