"""All that is measured of one or several checkpoints: ``fairseq-hyperrouter report``."""

import io
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from . import measures, pictures
from .evaluation import Evaluator, labels
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
    inspections: List[Inspection] = []
    for path, label in zip(checkpoints, labels(checkpoints)):
        evaluator = Evaluator(path, data, label=label, **options)
        evaluator.top_ks("--look-at", [look_at])
        sweep = [evaluator.at(k) for k in evaluator.top_ks("--top-k", top_k)]
        inspection = inspect(evaluator, look_at) if evaluator.layers else Inspection([], [])
        found.append({"label": label, "sweep": sweep, "layers": inspection.layers})
        inspections.append(inspection)
    return {"look_at": look_at, "machine": machine(), "checkpoints": found, "changed": _changed(found, inspections)}


def _changed(found: Sequence[Dict[str, Any]], inspections: Sequence[Inspection]) -> List[Dict[str, Any]]:
    """For every two checkpoints with layers alike, the share of tokens whose experts differ, per layer."""
    pairs = []
    for i, one in enumerate(inspections):
        for j in range(i):
            other = inspections[j]
            shapes = [[tuple(chosen.shape) for chosen in inspection.chosen] for inspection in (one, other)]
            if one.chosen and shapes[0] == shapes[1]:
                share = [measures.changed(a, b).item() for a, b in zip(other.chosen, one.chosen)]
                pairs.append({"first": found[j]["label"], "second": found[i]["label"], "share": share})
    return pairs


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
