"""One page about one or several checkpoints: ``fairseq-hyperrouter report``."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from . import measures, pictures
from .evaluation import Evaluator, labels
from .inspection import JACOBIANS, SAMPLE, TOKENS, Inspection, inspect
from .machine import machine
from .table import markdown_table

NUMBERS = (
    ("router_entropy", "router entropy, nats", "of the softmax over all experts; ln E when undecided"),
    ("normalised_entropy", "entropy / ln E", ""),
    ("inner_balance", "p1 / p2", "probability of the best expert over the second's, geometric mean"),
    ("outer_balance", "mass of the chosen", "probability of the chosen experts together"),
    ("margin", "margin", "how much the logits of the chosen experts are above those of the others"),
    ("coefficient_of_variation", "load CV", "standard deviation over mean of the tokens per expert; 0 when even"),
    ("max_violation", "max violation", "load of the fullest expert over the mean, less 1 (arXiv 2408.15664)"),
    ("unused_experts", "unused", "experts that no token has"),
    (
        "mean_output_similarity",
        "output CKA",
        "of two experts' outputs, unbiased: 1 when equal but for rotation, scale and shift, about 0 when unrelated; "
        "mean over pairs",
    ),
    ("mean_weight_similarity", "weight cosine", "of two experts' weights, mean over pairs"),
    ("hidden_rank", "rank of inputs", "effective rank of the router's input; at most its width, and the sample"),
    ("jacobian_rank", "rank of J's routing term", "at one token, mean"),
    (
        "jacobian_span",
        "span over tokens",
        "of the routing terms of all tokens looked at; at most E for a linear router",
    ),
)


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
    paths[-1].write_text(_page(content, images), encoding="utf-8")
    return paths


def markdown(content: Dict[str, Any]) -> str:
    """The numbers per layer, a table per checkpoint."""
    parts = []
    for checkpoint in content["checkpoints"]:
        if checkpoint["layers"]:
            parts.append(
                f"{checkpoint['label']}, k = {content['look_at']}\n\n{markdown_table(_layer_rows(checkpoint))}"
            )
    return "\n\n".join(parts)


def _layer_rows(checkpoint: Dict[str, Any]) -> List[List[str]]:
    head = ["layer", *(str(number) for number in range(len(checkpoint["layers"])))]
    return [head, *([title, *(_cell(layer[name]) for layer in checkpoint["layers"])] for name, title, _ in NUMBERS)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


STYLE = """
body { font-family: system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 90%; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.tokens { text-align: left; } td.tokens span { background: #eef; border-radius: .3em; padding: 0 .3em; margin: .1em; }
img { max-width: 100%; } details { margin: .5em 0; } summary { cursor: pointer; } .note { color: #666; }
"""


def _page(content: Dict[str, Any], images: Dict[str, bytes]) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Routing report</title>",
        f"<style>{STYLE}</style></head><body><h1>Routing report</h1>",
        f"<p class='note'>{html.escape(content['machine'])}; inside the models k = {content['look_at']}</p>",
        "<h2>Loss against experts and operations</h2>",
        _image("loss", images, "perplexity against experts per token and against FLOPs"),
        _sweep_table(content),
    ]
    sparse = [checkpoint for checkpoint in content["checkpoints"] if checkpoint["layers"]]
    if sparse:
        parts += [
            "<h2>Layer by layer</h2>",
            _image("layers", images, "router entropy, load, similarity and ranks per layer"),
            "<h2>Load</h2>",
            _image("load", images, "load of every expert in every layer"),
        ]
    if content["changed"]:
        parts += ["<h2>Tokens whose experts differ</h2>", _changed_table(content["changed"])]
    for number, checkpoint in enumerate(sparse):
        parts += [
            f"<h2>{html.escape(checkpoint['label'])}</h2>",
            _table(_layer_rows(checkpoint)),
            _image(f"similarity{number}", images, "similarity of experts' outputs"),
            *(_token_table(index, layer) for index, layer in enumerate(checkpoint["layers"])),
        ]
    meanings = "".join(f"<li><b>{html.escape(t)}</b>: {html.escape(m)}</li>" for _, t, m in NUMBERS if m)
    tokens = (
        f"Of routing: over at most {TOKENS:,} tokens, evenly from the whole text. Similarity of outputs and rank of "
        f"inputs: over about {SAMPLE} of these; J's routing term: at about {JACOBIANS}. Layers: the MoE layers, from 0."
    )
    end = f"<h2>What the numbers mean</h2><p>{tokens}</p><ul>{meanings}</ul></body></html>"
    return "\n".join([*parts, end])


def _image(name: str, images: Dict[str, bytes], text: str) -> str:
    return (
        f"<p><img alt='{html.escape(text)}' src='data:image/png;base64,{base64.b64encode(images[name]).decode()}'></p>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head.replace('td>', 'th>')}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _sweep_table(content: Dict[str, Any]) -> str:
    cost = ("total_parameters", "trained_parameters", "frozen_parameters", "active_parameters")
    names = [name.replace("_", " ") for name in cost]
    rows = [["model", "k", "perplexity", "bits per character", *names, "MFLOPs per token"]]
    for row in (row for checkpoint in content["checkpoints"] for row in checkpoint["sweep"]):
        numbers = [f"{row['perplexity']:.3f}", f"{row['bits_per_character']:.4f}", *(f"{row[name]:,}" for name in cost)]
        rows.append([row["label"], _cell(row["top_k"]), *numbers, f"{row['flops_per_token'] / 1e6:.2f}"])
    return _table(rows)


def _changed_table(pairs: Sequence[Dict[str, Any]]) -> str:
    rows = [["first", "second", *(f"layer {number}" for number in range(max(len(pair["share"]) for pair in pairs)))]]
    rows += [[pair["first"], pair["second"], *(f"{share:.1%}" for share in pair["share"])] for pair in pairs]
    return _table(rows)


def _token_table(index: int, layer: Dict[str, Any]) -> str:
    lines = []
    for expert, tokens in enumerate(layer["top_tokens"]):
        spans = []
        for one in tokens:
            title = f"{one['count']} times, {one['share']:.0%} of its occurrences"
            spans.append(f"<span title='{title}'>{html.escape(one['token'])}</span>")
        load = f"{layer['load'][expert]:.1%}"
        lines.append(f"<tr><td>{expert}</td><td>{load}</td><td class='tokens'>{' '.join(spans)}</td></tr>")
    head = "<tr><th>expert</th><th>load</th><th>takes more of these than its share</th></tr>"
    title = f"<summary>Layer {index}: tokens of every expert</summary>"
    return f"<details>{title}<table>{head}{''.join(lines)}</table></details>"
