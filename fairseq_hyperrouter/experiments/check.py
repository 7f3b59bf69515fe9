"""Whether a run can be trained, and evaluated as its experiment says: asked before the first training."""

from fairseq_hyperrouter.errors import UserError

from .arguments import check_arguments
from .experiment import Experiment, Run


def check_run(place: str, run: Run, experiment: Experiment, data: str) -> None:
    """Raise a UserError (a ValueError), which begins with *place*, where a training or an evaluation would end in one.

    What takes the data or the checkpoint to be found wrong, they find themselves.
    """
    cfg = check_arguments(place, [data, *run.options])
    experts = getattr(cfg.model, "moe_expert_count", None)
    if experts is not None and max(run.at) > experts:
        raise UserError(f"{place}: at {max(run.at)}: must be at most moe-expert-count ({experts})")
    evaluation = dict(zip(experiment.evaluation[::2], experiment.evaluation[1::2]))
    longest = cfg.model.max_target_positions or cfg.task.tokens_per_sample
    length = int(evaluation.get("--tokens-per-sample", cfg.task.tokens_per_sample))
    context = int(evaluation.get("--context-window", 0))
    if length > longest:
        raise UserError(f"{place}: evaluation: tokens-per-sample {length}: the model takes at most {longest}")
    if context >= length:
        raise UserError(f"{place}: evaluation: context-window {context}: must be below tokens-per-sample ({length})")
