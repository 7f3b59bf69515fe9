"""The report as one HTML page that holds its pictures."""

import base64
import html
from typing import Any, Dict, Iterator, Sequence

from .inspection import TOKENS
from .layer_numbers import JACOBIANS, SAMPLE
from .layer_table import NUMBERS, layer_rows

STYLE = """
body { font-family: system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 90%; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.tokens { text-align: left; } td.tokens span { background: #eef; border-radius: .3em; padding: 0 .3em; margin: .1em; }
img { max-width: 100%; } details { margin: .5em 0; } summary { cursor: pointer; } .note { color: #666; }
"""


def page(content: Dict[str, Any], images: Dict[str, bytes]) -> str:
    """The page about the *content* of report.json.

    Args:
        images: PNG files by name: "loss", "layers", "load", and "similarity0", ... of the checkpoints with experts.
    """
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
        parts += ["<h2>Tokens whose experts differ</h2>", *_changed(content["changed"])]
    for number, checkpoint in enumerate(sparse):
        parts += [
            f"<h2>{html.escape(checkpoint['label'])}</h2>",
            _table(layer_rows(checkpoint)),
            _image(f"similarity{number}", images, "similarity of experts' outputs"),
            *(_token_table(index, layer) for index, layer in enumerate(checkpoint["layers"])),
        ]
    meanings = "".join(f"<li><b>{html.escape(t)}</b>: {html.escape(m)}</li>" for _, t, m in NUMBERS if m)
    tokens = (
        f"Of routing: over at most {TOKENS:,} tokens, evenly from the whole text. Similarity of outputs and rank of "
        f"inputs: over about {SAMPLE} of these; J's routing term: at about {JACOBIANS}. Layers: from 0. "
        "Tokens are written as the dictionary has them. The logits of the router hash are constants: entropy, p1 / p2, "
        "mass and margin say nothing of it."
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
        rows.append(
            [
                row["label"],
                "" if row["top_k"] is None else str(row["top_k"]),
                *numbers,
                f"{row['flops_per_token'] / 1e6:.2f}",
            ]
        )
    return _table(rows)


def _changed(pairs: Sequence[Dict[str, Any]]) -> Iterator[str]:
    compared = [pair for pair in pairs if pair["share"] is not None]
    if compared:
        layers = range(max(len(pair["share"]) for pair in compared))
        rows = [[pair["first"], pair["second"], *(f"{share:.1%}" for share in pair["share"])] for pair in compared]
        yield _table([["first", "second", *(f"layer {number}" for number in layers)], *rows])
    for pair in pairs:
        if pair["share"] is None:
            text = f"{pair['first']} and {pair['second']} cannot be compared: {pair['incomparable']}."
            yield f"<p class='note'>{html.escape(text)}</p>"


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
