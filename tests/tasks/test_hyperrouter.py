"""The task tells routers the load of an update, and only of one that was made."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.tasks.language_modeling import LanguageModelingTask

from fairseq_hyperrouter.tasks.hyperrouter import HyperRouterTask


class Scaler:
    """torch's, of --amp: it skips an update that overflowed, and shrinks."""

    def __init__(self, overflows):
        self.scale, self.overflows = 128.0, overflows

    def get_scale(self):
        return self.scale

    def step(self):
        if self.overflows:
            self.scale /= 2


@pytest.mark.parametrize("overflows, said", [(False, "tell"), (True, "forget")])
def test_amp(overflows, said):
    scaler, heard = Scaler(overflows), []
    task = HyperRouterTask.__new__(HyperRouterTask)
    task.update_load = SimpleNamespace(tell=lambda _: heard.append("tell"), forget=lambda: heard.append("forget"))
    task.optimizer_step(SimpleNamespace(scaler=scaler, step=scaler.step), model=None, update_num=1)
    assert heard == [said]


def test_without_amp():
    """--fp16's scaler, which raises before this, is another one; float32 has none."""
    for optimizer in (SimpleNamespace(scaler=SimpleNamespace(loss_scale=1.0)), SimpleNamespace()):
        optimizer.step, heard = (lambda: None), []
        task = HyperRouterTask.__new__(HyperRouterTask)
        task.update_load = SimpleNamespace(tell=lambda _: heard.append("tell"))  # noqa: B023
        task.optimizer_step(optimizer, model=None, update_num=1)
        assert heard == ["tell"]


def test_what_the_first_micro_batch_is(monkeypatch):
    """That before which no parameter has a gradient: with adaptive input some get none from it."""
    monkeypatch.setattr(LanguageModelingTask, "train_step", lambda *_, **__: (0, 1, {}))
    task, heard = HyperRouterTask.__new__(HyperRouterTask), []
    task.update_load = SimpleNamespace(forget=lambda: heard.append("forget"))
    task._count_characters = lambda _: 0
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    task.train_step({}, model, None, None, 0)
    model[1].weight.grad = torch.zeros(1, 1)
    task.train_step({}, model, None, None, 0)
    assert heard == ["forget"]
