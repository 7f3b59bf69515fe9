"""``--task hyperrouter``: language modeling for models that can use more or fewer experts."""

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from fairseq import utils
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import ListConfig

from fairseq_hyperrouter.analysis.validation import ValidationLog
from fairseq_hyperrouter.checks.data_folder import check_folders, check_split
from fairseq_hyperrouter.checks.distributed_options import check_evaluation_workers
from fairseq_hyperrouter.checks.stock_options import check_training
from fairseq_hyperrouter.compat import mend_config
from fairseq_hyperrouter.config import format_ints, parse_ints
from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.moe_layer import moe_layers
from fairseq_hyperrouter.running import running_command
from fairseq_hyperrouter.token_length import TOKEN_UNITS, characters_per_token
from fairseq_hyperrouter.workers import gives_up_without_memory, number_of_workers

from .epoch_batches import EpochBatches
from .update_load import UpdateLoad

logger = logging.getLogger(__name__)


@dataclass
class HyperRouterTaskConfig(LanguageModelingConfig):
    """Stock language_modeling's options and these."""

    valid_top_k: Optional[str] = field(
        default=None,
        metadata={
            "help": "validate with each of these numbers of experts per token, as in 1,2,8, without threshold or "
            "top-p, beside --moe-eval-top-k; the metrics loss_k1, ppl_k1, bpc_k1, ... can be named by "
            "--best-checkpoint-metric"
        },
    )
    token_unit: str = field(
        default="auto",
        metadata={
            "help": "what a token stands for when bits per character (bpc) are counted: character (or byte), word, "
            "auto (character when every symbol of the dictionary is one character long)"
        },
    )


@register_task("hyperrouter", dataclass=HyperRouterTaskConfig)
class HyperRouterTask(LanguageModelingTask):
    """Language modeling that validates at several numbers of experts and counts bits per character.

    It also looks at the options, the data folder and the checkpoint to be restored before training starts.

    Raises:
        UserError (a ValueError): naming the option or file, its value and what is allowed.
    """

    checks_training = True
    """``build_model`` has called ``check_training``; with another task the model must."""

    def __init__(self, args: Any, dictionary: Any, output_dictionary: Any = None, targets: Any = None) -> None:
        super().__init__(args, dictionary, output_dictionary, targets)
        self.valid_top_k = parse_ints("--valid-top-k", args.valid_top_k) if args.valid_top_k is not None else ()
        if args.token_unit not in TOKEN_UNITS:
            raise UserError(f"--token-unit {args.token_unit!r}: choose from {', '.join(TOKEN_UNITS)}")
        self.update_load = UpdateLoad()
        self.validation_log = ValidationLog()
        self.update_freq: Sequence[int] = (1,)
        self.max_valid_steps = math.inf
        self.builds_for_training = self.divides_experts = False
        self.characters = characters_per_token(self.output_dictionary, args.token_unit) if dictionary else None

    @classmethod
    def add_args(cls, parser: Any) -> None:
        super().add_args(parser)
        # A mistyped option ends in one line, not in the hundred lines of all options.
        parser.usage = "%(prog)s DATA [options]   (--help lists them)"

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "HyperRouterTask":
        if args.data:
            check_folders(args.data)
        if args.tokens_per_sample < 1:
            raise UserError(f"--tokens-per-sample {args.tokens_per_sample} (less --context-window): must be at least 1")
        mend_config(args)
        return super().setup_task(args, **kwargs)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> Any:
        cfg = args._get_parent() if hasattr(args, "_get_parent") else None
        if isinstance(getattr(args, "moe_eval_top_k", None), (list, ListConfig)):  # as a --model-overrides may say it
            args.moe_eval_top_k = format_ints(args.moe_eval_top_k)
        self.builds_for_training = cfg is not None and not from_checkpoint
        if self.builds_for_training:
            self.update_freq = tuple(cfg.optimization.update_freq)
            if cfg.dataset.max_valid_steps is not None:
                self.max_valid_steps = cfg.dataset.max_valid_steps + 1  # which is what fairseq does
            check_training(cfg, self.valid_top_k)
            if cfg.criterion is not None and cfg.criterion._name == "moe_cross_entropy":
                self._check_best_metric(cfg.checkpoint.best_checkpoint_metric, cfg.criterion.sentence_avg)
        model = super().build_model(args, from_checkpoint)
        self.divides_experts = getattr(model.decoder, "parallel", None) is not None
        if from_checkpoint and running_command() != "validate":  # --valid-top-k is then that of its training
            return model
        if self.valid_top_k and not moe_layers(model):
            raise UserError(f"--valid-top-k {self.args.valid_top_k}: this model has no experts")
        if self.valid_top_k:
            model.decoder.check_top_k("--valid-top-k", self.valid_top_k)
        return model

    def can_reuse_epoch_itr(self, dataset: Any) -> bool:
        """No: stock fairseq makes an epoch's batches from seed and epoch, but keeps those of its first epoch for all.

        A training resumed in a later epoch would then see other batches than one that was not interrupted.
        """
        return False

    def get_batch_iterator(self, *args: Any, **kwargs: Any) -> EpochBatches:
        batches = EpochBatches.like(super().get_batch_iterator(*args, **kwargs), self.update_freq)
        self.validation_log.begin_set(batches, self.max_valid_steps)
        return batches

    def eval_lm_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Stock; but several workers of fairseq-eval-lm, which adds up nothing over them, each evaluate the whole set.

        What they print is then its loss, and not that of one worker's share. fairseq-validate divides the work.
        """
        if number_of_workers() > 1:
            logger.warning("fairseq-eval-lm: every worker evaluates the whole set; fairseq-validate on GPUs divides it")
            kwargs.update(num_shards=1, shard_id=0)
        return super().eval_lm_dataloader(*args, **kwargs)

    def _check_best_metric(self, name: str, sentence_avg: bool) -> None:
        per_k = [f"{metric}_k{top_k}" for top_k in self.valid_top_k for metric in ("loss", "ppl", "bpc")]
        logged = ["loss", "ppl", "bpc", *(["nll_loss"] if sentence_avg else []), *per_k]
        if name not in logged:
            raise UserError(f"--best-checkpoint-metric {name}: choose from {', '.join(logged)}")

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        check_evaluation_workers("hyperrouter")
        paths = utils.split_paths(self.args.data)
        if self.args.dataset_impl in (None, "mmap"):
            check_split(os.path.join(paths[(epoch - 1) % len(paths)], split), len(self.dictionary))
        return super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)

    def train_step(
        self,
        sample: Dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> Tuple[Any, Any, Dict[str, Any]]:
        if all(parameter.grad is None for parameter in model.parameters()):  # the first micro-batch
            self.update_load.forget()
        sample = {**sample, "is_dummy": ignore_grad}
        with gives_up_without_memory(others_wait=number_of_workers() > 1):
            loss, sample_size, logging_output = super().train_step(
                sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
            )
        logging_output["ncharacters"] = self._count_characters(sample)
        if ignore_grad:  # in the place of a batch that another worker has more; the trainer would count its tokens
            sample_size = sample_size * 0
            logging_output = {name: value * 0 for name, value in logging_output.items()}
        if "moe_load" in logging_output:
            self.update_load.add(logging_output)
        return loss, sample_size, logging_output

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Stock; then routers that learn from the load of their experts are told that of this update.

        With --amp an update that overflowed comes here too; torch's scaler, which skips it, then shrinks its scale.
        """
        scale = getattr(getattr(optimizer, "scaler", None), "get_scale", lambda: 1.0)  # of --amp alone
        before = scale()
        super().optimizer_step(optimizer, model, update_num)
        if scale() < before:
            self.update_load.forget()
        else:
            self.update_load.tell(model)

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        super().begin_valid_epoch(epoch, model)
        self.validation_log.begin()

    def valid_step(self, sample: Dict[str, Any], model: Any, criterion: Any) -> Tuple[Any, Any, Dict[str, Any]]:
        if not sample:  # fairseq-validate, where another worker has one batch more
            return 0, 0, {"ntokens": 0, "nsentences": 0, "sample_size": 0}
        with gives_up_without_memory(others_wait=self.divides_experts):
            loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
            if getattr(criterion, "logs_layers", False):
                self.validation_log.look(model, sample)
            for top_k in self.valid_top_k:
                with model.at_top_k(top_k):
                    _, _, output = super().valid_step(sample, model, criterion)
                logging_output[f"loss_k{top_k}"] = output.get("nll_loss", output["loss"])
        logging_output["ncharacters"] = self._count_characters(sample)
        return loss, sample_size, logging_output

    def _count_characters(self, sample: Dict[str, Any]) -> Any:
        target = sample["target"]
        self.characters = self.characters.to(target.device)
        return self.characters[target].sum()

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        tokens = sum(output.get("ntokens", 0) for output in logging_outputs)
        characters = sum(output.get("ncharacters", 0) for output in logging_outputs)
        for suffix in ("", *(f"_k{top_k}" for top_k in self.valid_top_k)):
            outputs = [output for output in logging_outputs if f"loss{suffix}" in output]
            if not outputs:
                continue  # training computes no loss_k*
            name = "nll_loss" if not suffix and "nll_loss" in outputs[0] else f"loss{suffix}"
            bits = sum(output[name] for output in outputs) / math.log(2)
            if characters > 0:
                metrics.log_scalar(f"bpc{suffix}", bits / characters, characters, priority=40, round=4)
            if suffix:
                metrics.log_scalar(f"loss{suffix}", bits / tokens, tokens, priority=30, round=3)
                metrics.log_derived(
                    f"ppl{suffix}",
                    lambda meters, key=f"loss{suffix}": utils.get_perplexity(meters[key].avg),
                    priority=35,
                )
