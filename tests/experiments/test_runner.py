"""What counts as done. Whole experiments: tests/end_to_end/test_experiment.py."""

import json
from pathlib import Path

from fairseq_hyperrouter.experiments.experiment import Experiment, Run
from fairseq_hyperrouter.experiments.runner import SWEEP, _Workers

RUN = Run("smoe", "smoe", 1, (1, 8), ("--lr", "0.1"), 3)


def test_an_evaluation_counts_when_it_is_whole(tmp_path, monkeypatch):
    """A sweep that fails, or is interrupted, writes down what it has."""
    folder = tmp_path / RUN.folder
    folder.mkdir()
    (folder / "logged.json").write_text("{}")
    workers = _Workers(Experiment("", "", "perplexity", (), "last", None, (), (RUN,)), "data", tmp_path, 1, True)
    rows, failures = [{"top_k": 1}], ["cut short", ""]

    def sweep(self, run, arguments, log, lock):
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(exist_ok=True)
        for name in (SWEEP, "sweep.png"):
            (out / name).write_text(json.dumps(rows))
        return failures.pop(0)

    monkeypatch.setattr(_Workers, "_run", sweep)
    assert workers.complete(RUN) == "cut short"
    assert not (folder / SWEEP).exists()
    rows.append({"top_k": 8})
    assert workers.complete(RUN) == ""
    assert json.loads((folder / SWEEP).read_text()) == rows and (folder / "sweep.png").exists()
    assert workers.complete(RUN) == "" and not failures
