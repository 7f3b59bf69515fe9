"""All that is measured of one or several checkpoints: ``fairseq-hyperrouter report``."""

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch

from . import measures, pictures
from .evaluation import evaluators
from .inspection import Inspection, inspect
from .layer_table import layer_rows
from .machine import machine
from .page import page
from .table import markdown_table


def report(
    checkpoints: Sequence[Path], data: str, top_k: Optional[Sequence[int]], look_at: int, **options: Any
) -> Dict[str, Any]:
    """Everything that is measured of the *checkpoints* on a text, as JSON takes it.

    Args:
        top_k: where the loss is evaluated; by default 1, 2, 4, ... and all experts.
        look_at: experts per token for what is looked at inside the model.
        options: Evaluator's.
    """
    found: List[Dict[str, Any]] = []
    inspections: Dict[str, Inspection] = {}
    for evaluator in evaluators(checkpoints, data, **options):
        evaluator.top_ks("--look-at", [look_at])
        sweep = [evaluator.at(k) for k in evaluator.top_ks("--top-k", top_k)]
        layers: List[Dict[str, Any]] = []
        if evaluator.layers:
            inspections[evaluator.label] = inspect(evaluator, look_at)
            layers = inspections[evaluator.label].layers
        found.append({"label": evaluator.label, "sweep": sweep, "layers": layers})
    return {
        "look_at": look_at,
        "machine": machine(options.get("cpu", False)),
        "checkpoints": found,
        "changed": _changed(inspections),
    }


def _changed(inspections: Mapping[str, Inspection]) -> List[Dict[str, Any]]:
    """For every two checkpoints with experts the share of tokens whose experts differ, per layer; or why there is none.

    Args:
        inspections: by the labels of the checkpoints.
    """
    pairs = []
    for (first, one), (second, other) in combinations(inspections.items(), 2):
        reason, share = _incomparable(one, other), None
        if reason is None:
            share = [measures.changed(*chosen).item() for chosen in zip(one.chosen, other.chosen)]
        pairs.append({"first": first, "second": second, "share": share, "incomparable": reason})
    return pairs


def _incomparable(one: Inspection, other: Inspection) -> Optional[str]:
    """Why it cannot be said which tokens have other experts; None where it can."""
    for what, numbers in (
        ("MoE layers", [len(inspection.chosen) for inspection in (one, other)]),
        ("experts", [inspection.chosen[0].size(1) for inspection in (one, other)]),
    ):
        if numbers[0] != numbers[1]:
            return f"{numbers[0]} and {numbers[1]} {what}"
    if not torch.equal(one.token_ids, other.token_ids):
        options = "--tokens-per-sample, --sample-break-mode, --shorten-method or --add-bos-token"
        return f"they see other tokens of the text, by the {options} of their trainings"
    return None


def write(content: Dict[str, Any], folder: Path) -> List[Path]:
    """Write report.json, the pictures, and report.html, one page that holds them; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sparse = [checkpoint for checkpoint in content["checkpoints"] if checkpoint["layers"]]
    figures = {
        "loss": pictures.perplexity_curves(
            [row for checkpoint in content["checkpoints"] for row in checkpoint["sweep"]]
        )
    }
    if sparse:
        figures.update(layers=pictures.by_layer(sparse), load=pictures.load_heat_map(sparse))
    for number, checkpoint in enumerate(sparse):
        figures[f"similarity{number}"] = pictures.similarity_maps(checkpoint)
    images = {name: _png(figure) for name, figure in figures.items()}
    paths = [folder / "report.json", *(folder / f"{name}.png" for name in images), folder / "report.html"]
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    paths[-1].write_text(page(content, images), encoding="utf-8")
    return paths


def markdown(content: Dict[str, Any]) -> str:
    """The numbers per layer, a table per checkpoint."""
    parts = []
    for checkpoint in content["checkpoints"]:
        if checkpoint["layers"]:
            parts.append(f"{checkpoint['label']}, k = {content['look_at']}\n\n{markdown_table(layer_rows(checkpoint))}")
    return "\n\n".join(parts)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
