"""Evaluate checkpoints at a list of experts per token: ``fairseq-hyperrouter sweep``."""

import json
import logging
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from fairseq import checkpoint_utils, utils
from fairseq.logging import progress_bar
from fairseq_cli.eval_lm import eval_lm

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.token_length import characters_per_token

from .cost import model_cost
from .table import markdown_table

logger = logging.getLogger(__name__)
Row = Dict[str, Any]


def sweep(
    checkpoints: Sequence[Path],
    data: str,
    top_k: Sequence[int],
    *,
    split: str = "test",
    batch_size: int = 8,
    tokens_per_sample: Optional[int] = None,
    context_window: int = 0,
    cpu: bool = False,
) -> Iterator[Row]:
    """Evaluate every checkpoint at every k, with the code of ``fairseq-eval-lm``; one row per checkpoint and k.

    A checkpoint without experts gives one row, its "top_k" None.

    Args:
        tokens_per_sample: by default what each checkpoint was trained with.
        context_window: tokens of context that are not scored, as in ``fairseq-eval-lm``.

    Raises:
        UserError (a ValueError): a k that a checkpoint cannot have, a file that is missing or of another model.
    """
    if tokens_per_sample is not None and tokens_per_sample < 1:
        raise UserError(f"--tokens-per-sample {tokens_per_sample}: must be at least 1")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    for path, label in zip(checkpoints, _labels(checkpoints)):
        if not path.is_file():
            raise UserError(
                f"CHECKPOINT {path}: " + ("a folder, name a file in it" if path.is_dir() else "no such file")
            )
        overrides = {"data": data}  # of the task alone: the model keeps the length that it was trained with
        if tokens_per_sample is not None:
            overrides["tokens_per_sample"] = tokens_per_sample
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], {"task": overrides})
        if torch.cuda.is_available() and not cpu:
            model.cuda()
        model.prepare_for_inference_(cfg)
        sparse = hasattr(model, "at_top_k")
        if sparse:
            model.decoder.check_top_k(f"{path}: --top-k", top_k)
        context = task.args.tokens_per_sample
        if context > model.max_positions():
            raise UserError(f"--tokens-per-sample {context}: {path} takes at most {model.max_positions()}")
        if not 0 <= context_window < context:
            raise UserError(f"--context-window {context_window}: must be below the tokens per sample ({context})")
        task.args.tokens_per_sample -= context_window  # as fairseq-eval-lm does
        task.load_dataset(split)
        for k in top_k if sparse else [None]:
            batches = task.eval_lm_dataloader(
                dataset=task.dataset(split),
                max_tokens=None,
                batch_size=batch_size,
                max_positions=model.max_positions(),
                num_workers=0,
                context_window=context_window,
            )
            prefix = f"{label} k={k}" if sparse else label
            progress = progress_bar.progress_bar(batches, log_format="tqdm", prefix=prefix)
            if sparse:
                model.set_eval_top_k(k)
            row = {"checkpoint": str(path), "label": label, "top_k": k, "split": split, "context": context}
            row.update(_evaluate(model, task, progress))
            row.update(model_cost(model, k or 0, context)._asdict())
            yield row


def _labels(paths: Sequence[Path]) -> List[str]:
    """A short name for each checkpoint that tells them apart: its folder, else folder and file, else the whole path."""
    folders = [path.resolve().parent.name for path in paths]
    files = [f"{folder}/{path.stem}" for folder, path in zip(folders, paths)]
    for labels in (folders, files):
        if len(set(labels)) == len(paths):
            return labels
    return [str(path) for path in paths]


def _evaluate(model: Any, task: Any, batches: Iterable[Dict[str, Any]]) -> Row:
    dictionary = task.target_dictionary
    characters = characters_per_token(dictionary, getattr(task.args, "token_unit", "auto"))
    count = {"tokens": 0, "characters": 0.0, "start": 0.0}
    device = next(model.parameters()).device

    def counted() -> Iterator[Dict[str, Any]]:
        for sample in batches:
            if not count["start"]:  # what happens once is no speed of this k: the first batch is computed before, too
                with torch.no_grad():
                    model(
                        **utils.move_to_cuda(sample["net_input"], device)
                        if device.type == "cuda"
                        else sample["net_input"]
                    )
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                count["start"] = time.perf_counter()
            if "target" in sample:
                target = sample["target"][sample["target"] != dictionary.pad()]
                if task.args.add_bos_token:  # which fairseq-eval-lm does not score
                    target = target[target != dictionary.bos()]
                count["tokens"] += target.numel()
                count["characters"] += characters[target].sum().item()
            yield sample

    results = eval_lm(
        models=[model],
        source_dictionary=task.source_dictionary,
        batch_iterator=counted(),
        target_dictionary=dictionary,
        remove_bos_token=task.args.add_bos_token,
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


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; for several checkpoints, their perplexities side by side first."""
    detail = [["model", "k", "perplexity", "bits/token", "bits/char", "tokens/s", "active params", "MFLOPs/token"]]
    for row in rows:
        detail.append(
            [
                row["label"],
                _k(row),
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_token']:.4f}",
                f"{row['bits_per_character']:.4f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['active_parameters']:,}",
                f"{row['flops_per_token'] / 1e6:.2f}",
            ]
        )
    labels = list(dict.fromkeys(row["label"] for row in rows))
    if len(labels) == 1:
        return markdown_table(detail)
    top_ks = list(dict.fromkeys(_k(row) for row in rows))
    found = {(_k(row), row["label"]): f"{row['perplexity']:.2f}" for row in rows}
    side = [["perplexity at k =", *top_ks]] + [
        [label, *(found.get((k, label), "") for k in top_ks)] for label in labels
    ]
    return markdown_table(side) + "\n\n" + markdown_table(detail)


def _k(row: Row) -> str:
    return "dense" if row["top_k"] is None else str(row["top_k"])


def write(rows: Sequence[Row], folder: Path) -> List[Path]:
    """Write sweep.json, sweep.md and sweep.png into *folder* and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    (folder / "sweep.md").write_text(markdown(rows) + "\n")
    _plot(rows, folder / "sweep.png")
    return [folder / name for name in ("sweep.json", "sweep.md", "sweep.png")]


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_k, by_flops) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        perplexity = [row["perplexity"] for row in own]
        flops = [row["flops_per_token"] / 1e6 for row in own]
        if own[0]["top_k"] is None:
            by_k.axhline(perplexity[0], linestyle="--", color="gray", label=label)
            by_flops.plot(flops, perplexity, "x", color="gray", label=label)
        else:
            by_k.plot([row["top_k"] for row in own], perplexity, "o-", label=label)
            by_flops.plot(flops, perplexity, "o-", label=label)
    ticks = sorted({row["top_k"] for row in rows if row["top_k"] is not None})
    by_k.set(xlabel="experts per token at inference", ylabel="perplexity")
    if ticks:
        by_k.set_xscale("log", base=2)
        by_k.set_xticks(ticks, [str(k) for k in ticks])
    by_flops.set(xlabel="MFLOPs per token (forward)")
    by_k.set_yscale("log")
    for axes in (by_k, by_flops):
        axes.grid(True, which="both", alpha=0.3)
        axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    by_k.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
