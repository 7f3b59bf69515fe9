"""Pictures of what was measured: each takes numbers and returns a matplotlib figure."""

from statistics import fmean, stdev
from textwrap import fill
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

import numpy as np

from .row import limit_of

LINES = (
    ("normalised_entropy", "router entropy / ln E"),
    ("load_cv", "load: standard deviation / mean"),
    ("mean_output_similarity", "similarity of experts' outputs (CKA)"),
    ("mean_weight_similarity", "similarity of experts' weights (cosine)"),
    ("hidden_rank", "effective rank of the router's input"),
    ("jacobian_span", "rank of the Jacobian's routing terms, over tokens"),
)
STYLES = {"linestyle": ["-", "--", ":", "-."], "marker": ["o", "s", "^", "D"]}
"""Of curves; the next one where the colours have all been used."""


def perplexity_curves(rows: Sequence[Dict[str, Any]]) -> Any:
    """Perplexity against experts per token, and against operations: the rows of ``fairseq-hyperrouter sweep``."""
    figure, (by_k, by_flops) = _figure(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        perplexity = [row["perplexity"] for row in own]
        flops = [row["flops_per_token"] / 1e6 for row in own]
        if own[0]["top_k"] is None:
            by_k.axhline(perplexity[0], linestyle="--", color="gray", label=label)
            by_flops.plot(flops, perplexity, "x", color="gray", label=label)
            continue
        for curve in dict.fromkeys(map(_curve, own)):
            points = [number for number, row in enumerate(own) if _curve(row) == curve]
            style = {"label": label + curve, "marker": "s" if curve else "o", "linestyle": "--" if curve else "-"}
            by_k.plot([own[n]["mean_top_k"] for n in points], [perplexity[n] for n in points], **style)
            by_flops.plot([flops[n] for n in points], [perplexity[n] for n in points], **style)
    by_k.set(xlabel="experts per token at inference (mean)", ylabel="perplexity")
    by_flops.set(xlabel="MFLOPs per token (forward)")
    _by_top_k(by_k, (row["top_k"] for row in rows if isinstance(row["top_k"], int)))
    by_flops.grid(True, which="both", alpha=0.3)
    figure.legend(*by_k.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _curve(row: Dict[str, Any]) -> str:
    """Which of a model's curves the row is a point of."""
    limit = limit_of(row)
    if limit:
        return f", {limit}"
    return ", k by layer" if isinstance(row["top_k"], (tuple, list)) else ""


def metric_curves(rows: Mapping[str, Mapping[Optional[int], Sequence[float]]], metric: str, title: str) -> Any:
    """A *metric* against k, of {row: {k: values of the seeds}}: means and standard deviations; k = None is dense."""
    from matplotlib import cycler, rcParams

    height = 4.3 + 0.12 * len(rows)  # with two of them in a line of the legend
    figure, axes = _figure(figsize=(7, height), layout="constrained")
    axes.set_prop_cycle(cycler(**STYLES) * rcParams["axes.prop_cycle"])
    for row, at in rows.items():
        if None in at:
            axes.axhline(fmean(at[None]), linestyle="--", color="gray", label=row)
            continue
        top_ks = sorted(at)
        spread = [stdev(at[k]) if len(at[k]) > 1 else 0.0 for k in top_ks]
        axes.errorbar(top_ks, [fmean(at[k]) for k in top_ks], spread, capsize=3, label=row)
    axes.set(xlabel="experts per token at inference", ylabel=metric)
    _by_top_k(axes, (k for at in rows.values() for k in at if k is not None))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set_title(title, fontsize="medium")
    return figure


def _by_top_k(axes: Any, top_ks: Iterable[int]) -> None:
    """Scales and ticks of a diagram of losses against k."""
    from matplotlib.ticker import ScalarFormatter

    ticks = sorted(set(top_ks))
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(True, which="both", alpha=0.3)


def _figure(rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """What pyplot.subplots returns; pyplot does not keep the figure, which can still be drawn and saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **options)
    pyplot.close(figure)
    return figure, axes


def by_layer(checkpoints: Sequence[Dict[str, Any]]) -> Any:
    """One small diagram per quantity: its value in every MoE layer, a line per checkpoint."""
    figure, axes = _figure(2, 3, figsize=(12, 7), layout="constrained")
    for axis, (name, title) in zip(axes.flat, LINES):
        for checkpoint in checkpoints:
            layers = checkpoint["layers"]
            axis.plot(range(len(layers)), [layer[name] for layer in layers], "o-", label=checkpoint["label"])
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("MoE layer")
        axis.set_xticks(range(max(len(checkpoint["layers"]) for checkpoint in checkpoints)))
        axis.grid(True, alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def load_heat_map(checkpoints: Sequence[Dict[str, Any]]) -> Any:
    """Layers down, experts across: the load of an expert over the mean, a map per checkpoint."""
    maps = [[[share * len(layer["load"]) for share in layer["load"]] for layer in one["layers"]] for one in checkpoints]
    titles = [f"{one['label']}: load / mean" for one in checkpoints]
    return _maps(maps, titles, "expert", "MoE layer", low=0.0, high=max(max(map(max, one)) for one in maps))


def similarity_maps(checkpoint: Dict[str, Any]) -> Any:
    """Experts against experts, a map per layer: how similar their outputs are."""
    maps = [layer["output_similarity"] for layer in checkpoint["layers"]]
    titles = [f"{checkpoint['label']}, layer {number}" for number in range(len(maps))]
    return _maps(maps, titles, "expert", "expert", low=0.0, high=1.0)


def _maps(maps: List[Any], titles: List[str], across: str, down: str, low: float, high: float) -> Any:
    width = max(2.6, 0.22 * max(len(one[0]) for one in maps))
    height = max(1.6, 0.22 * max(len(one) for one in maps)) + 0.8
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    figure, axes = _figure(
        rows, columns, figsize=(width * columns + 1, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    for axis, one, title in zip(axes.flat, maps, titles):
        image = axis.imshow(np.array(one, dtype=float), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axis.set_title(fill(title, int(10 * width)), fontsize="small")  # characters in so many inches
        axis.set_xlabel(across, fontsize="small")
        axis.set_ylabel(down, fontsize="small")
        axis.tick_params(labelsize="x-small")
        for one_axis in (axis.xaxis, axis.yaxis):
            one_axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes)
    return figure
