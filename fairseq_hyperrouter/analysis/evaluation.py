"""A checkpoint's model, ready to be evaluated again and again with other experts per token."""

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.logging import progress_bar
from fairseq_cli.eval_lm import eval_lm
from torch import Tensor

from fairseq_hyperrouter.config import TopK, format_ints
from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.moe_layer import moe_layers
from fairseq_hyperrouter.routing import Routing, totals
from fairseq_hyperrouter.routing.schedule import doubling
from fairseq_hyperrouter.token_length import characters_per_token

from .cost import model_cost
from .observation import observed
from .row import LIMITS, Row

SOFTMAX_BYTES = 16 * 2**20
"""Bytes of the probabilities of all symbols that a CPU computes at a time.

Those of a whole batch of words are hundreds of MiB, and the kernel finds room for them page by page, for every batch
anew: glibc keeps pieces of up to 32 MiB only (docs/performance.md).
"""
LEAST_PIECE = 64
"""Tokens of them at the least: an adaptive softmax reads its weights once for each piece."""


class Evaluator:
    """What ``fairseq-eval-lm`` computes, with its code, at any number of experts per token.

    Args:
        tokens_per_sample: by default what the checkpoint was trained with.
        context_window: tokens of context that are not scored, as in ``fairseq-eval-lm``.
        tokens: about how many of the split's to evaluate: every n-th batch; by default all.

    Raises:
        UserError (a ValueError): a file that is missing or of another model, an option out of range.
    """

    def __init__(
        self,
        path: Path,
        data: str,
        *,
        split: str = "test",
        batch_size: int = 8,
        tokens_per_sample: Optional[int] = None,
        context_window: int = 0,
        tokens: Optional[int] = None,
        cpu: bool = False,
        label: Optional[str] = None,
    ) -> None:
        if tokens_per_sample is not None and tokens_per_sample < 1:
            raise UserError(f"--tokens-per-sample {tokens_per_sample}: must be at least 1")
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: must be at least 1")
        if tokens is not None and tokens < 1:
            raise UserError(f"--tokens {tokens}: must be at least 1")
        _check_file(path)
        overrides = {"data": data}  # of the task alone: the model keeps the length that it was trained with
        if tokens_per_sample is not None:
            overrides["tokens_per_sample"] = tokens_per_sample
        try:
            (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], {"task": overrides})
        except AssertionError as error:  # how stock models say that a dictionary is not theirs
            raise UserError(f"{path}: cannot be made with DATA {data}: {error}") from None
        if torch.cuda.is_available() and not cpu:
            model.cuda()
        model.prepare_for_inference_(cfg)
        context = task.args.tokens_per_sample
        if context > model.max_positions():
            raise UserError(f"--tokens-per-sample {context}: {path} takes at most {model.max_positions()}")
        if not 0 <= context_window < context:
            raise UserError(f"--context-window {context_window}: must be below the tokens per sample ({context})")
        task.args.tokens_per_sample -= context_window  # as fairseq-eval-lm does
        task.load_dataset(split)
        self.path, self.label = path, label or path.stem
        self.model, self.task, self.split = model, task, split
        self.context, self.context_window, self.batch_size = context, context_window, batch_size
        self.every = 1 if tokens is None else every_nth(task.dataset(split).sizes, tokens)
        self.layers = moe_layers(model)
        self.has_experts = bool(self.layers)
        self.has_probabilities = self.has_experts and model.decoder.moe_config.has_probabilities
        self.device = next(model.parameters()).device
        piece = SOFTMAX_BYTES // (4 * len(task.target_dictionary))
        self.softmax_batch = max(LEAST_PIECE, piece) if self.device.type == "cpu" else 0

    def top_ks(self, option: str, values: Optional[Sequence[int]] = None) -> Sequence[Optional[int]]:
        """The k to evaluate at: *values*, by default 1, 2, 4, ... and all experts; None without experts.

        Raises:
            UserError (a ValueError): a k that the model cannot have, by the name of the *option*.
        """
        if not self.has_experts:
            return [None]
        if values is None:
            return doubling(1, self.model.decoder.moe_config.moe_expert_count)
        self.model.decoder.check_top_k(f"{self.path}: {option}", values)
        return values

    def batches(self, prefix: str = "") -> Iterable[Dict[str, Any]]:
        """The split's batches, or every n-th of them, with a progress bar when *prefix* names it."""
        batches = self.task.eval_lm_dataloader(
            dataset=self.task.dataset(self.split),
            max_tokens=None,
            batch_size=self.batch_size,
            max_positions=self.model.max_positions(),
            num_workers=0,
            num_shards=self.every,
            context_window=self.context_window,
        )
        return progress_bar.progress_bar(batches, log_format="tqdm", prefix=prefix) if prefix else batches

    def at(self, top_k: Optional[TopK] = None, show: bool = True, **limit: float) -> Row:
        """Loss, speed and cost with *top_k* experts per token, or as many per MoE layer, within a *limit* of LIMITS.

        Without one exactly so many: a threshold or top-p that the checkpoint was trained with does not hold.
        "mean_top_k" is how many experts a token had, averaged over tokens and layers. Without experts *top_k* is None.
        """
        name = f"{self.label} k={format_ints(top_k)}" if self.has_experts else self.label
        row: Row = {"checkpoint": str(self.path), "label": self.label, "top_k": top_k, "split": self.split}
        at_top_k = self.model.at_top_k(top_k, **limit) if self.has_experts else nullcontext()
        counts = torch.zeros(len(self.layers), 2, dtype=torch.double, device=self.device)

        def count(layer: int, _: Tensor, __: Dict[str, Any], routing: Routing) -> None:
            counts[layer] += torch.stack((totals.expert_load(routing).sum(), totals.num_tokens(routing)))

        with at_top_k, observed(self.layers, count):
            row.update(context=self.context, **self._evaluate(self.batches(name if show else "")))
        mean = [assignments / max(1, tokens) for assignments, tokens in counts.tolist()]
        row.update({name: limit.get(name) for name in LIMITS})
        row["mean_top_k"] = sum(mean) / len(mean) if mean else None
        row.update(model_cost(self.model, mean, self.context)._asdict())
        return row

    def _evaluate(self, batches: Iterable[Dict[str, Any]]) -> Row:
        dictionary, options = self.task.target_dictionary, self.task.args
        characters = characters_per_token(dictionary, getattr(options, "token_unit", "auto"))
        count = {"tokens": 0, "characters": 0.0, "start": 0.0}

        def counted() -> Iterator[Dict[str, Any]]:
            for sample in batches:
                if not count["start"]:  # what happens once is no speed of this k: the first batch is computed before
                    self.forward(sample)
                    count["start"] = time.perf_counter()
                if "target" in sample:
                    target = sample["target"][sample["target"] != dictionary.pad()]
                    if options.add_bos_token:  # which fairseq-eval-lm does not score
                        target = target[target != dictionary.bos()]
                    count["tokens"] += target.numel()
                    count["characters"] += characters[target].sum().item()
                yield sample

        results = eval_lm(
            models=[self.model],
            source_dictionary=self.task.source_dictionary,
            batch_iterator=counted(),
            target_dictionary=dictionary,
            softmax_batch=self.softmax_batch,
            remove_bos_token=options.add_bos_token,
        )
        seconds = time.perf_counter() - count["start"]
        if not count["tokens"]:
            raise UserError("nothing to evaluate: every sample is longer than the model takes, or the data is empty")
        bits = float(results["loss"])
        return {
            "bits_per_token": bits,
            "perplexity": 2**bits,
            "bits_per_character": bits * count["tokens"] / count["characters"],
            "tokens": count["tokens"],
            "tokens_per_second": count["tokens"] / seconds,
        }

    @torch.no_grad()
    def forward(self, sample: Dict[str, Any]) -> Any:
        """What the model returns for one batch."""
        on_gpu = self.device.type == "cuda"
        inputs = utils.move_to_cuda(sample["net_input"], self.device) if on_gpu else sample["net_input"]
        output = self.model(**inputs)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        return output


def evaluators(paths: Sequence[Path], data: str, **options: Any) -> Iterator[Evaluator]:
    """One for each checkpoint, with a label that tells them apart; the *options* are theirs.

    Raises:
        UserError (a ValueError): as Evaluator does; a file that is missing before the first one is loaded.
    """
    for path in paths:
        _check_file(path)
    for path, label in zip(paths, labels(paths)):
        yield Evaluator(path, data, label=label, **options)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"CHECKPOINT {path}: " + ("a folder, name a file in it" if path.is_dir() else "no such file"))


def every_nth(sizes: np.ndarray, tokens: int) -> int:
    """Which of the batches to take of a split with samples of these *sizes* for about so many *tokens*."""
    in_split = int(np.sum(sizes, dtype=np.int64))  # fairseq's are of a type that 65,536 overflows
    return max(1, round(in_split / tokens))


def labels(paths: Sequence[Path]) -> List[str]:
    """A short name for each checkpoint that tells them apart: its folder, else folder and file, else with as many
    folders above as it takes.

    A file that is named again gets a number: "smoe", "smoe (2)".
    """
    files = [Path(os.path.abspath(path)) for path in paths]
    names = [file.parent.name for file in files]
    deepest = max(len(file.parts) for file in files)
    for depth in range(2, deepest + 1):
        if len(set(names)) == len(set(files)):
            break
        names = ["/".join(file.with_suffix("").parts[-depth:]) for file in files]
    times = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if time == 1 else f"{name} ({time})" for name, time in zip(names, times)]
