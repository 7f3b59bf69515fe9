"""Pictures of what was measured: each takes numbers and returns a matplotlib figure."""

from typing import Any, Dict, List, Sequence

LINES = (
    ("normalised_entropy", "router entropy / ln E"),
    ("coefficient_of_variation", "load: standard deviation / mean"),
    ("mean_output_similarity", "similarity of experts' outputs (CKA)"),
    ("mean_weight_similarity", "similarity of experts' weights (cosine)"),
    ("hidden_rank", "effective rank of the router's input"),
    ("jacobian_span", "rank of the routing term of the Jacobian"),
)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def by_layer(checkpoints: Sequence[Dict[str, Any]]) -> Any:
    """One small diagram per quantity: its value in every MoE layer, a line per checkpoint."""
    figure, axes = _pyplot().subplots(2, 3, figsize=(12, 6.5))
    for axis, (name, title) in zip(axes.flat, LINES):
        for checkpoint in checkpoints:
            layers = checkpoint["layers"]
            axis.plot(range(len(layers)), [layer[name] for layer in layers], "o-", label=checkpoint["label"])
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("MoE layer")
        axis.set_xticks(range(max(len(checkpoint["layers"]) for checkpoint in checkpoints)))
        axis.grid(True, alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.tight_layout()
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
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(width * columns + 1, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    for axis, one, title in zip(axes.flat, maps, titles):
        image = axis.imshow(one, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axis.set_title(title, fontsize="small")
        axis.set_xlabel(across, fontsize="small")
        axis.set_ylabel(down, fontsize="small")
        axis.tick_params(labelsize="x-small")
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes)
    return figure
