"""What is drawn, by the lines and maps of the figures."""

from itertools import pairwise

import numpy as np
import pytest

from fairseq_hyperrouter.analysis import pictures


def test_numbers_without_a_meaning_are_left_out():
    lost = {name: None for name, _ in pictures.LINES}
    layers = [
        {**lost, "output_similarity": [[1.0, None], [None, None]]},
        dict.fromkeys(lost, 1.0) | {"output_similarity": [[1.0, 0.5], [0.5, 1.0]]},
    ]
    lines = pictures.by_layer([{"label": "one", "layers": layers}])
    drawn = lines.axes[0].lines[0].get_ydata().astype(float)
    assert np.isnan(drawn[0]) and drawn[1] == 1
    maps = pictures.similarity_maps({"label": "one", "layers": layers})
    assert maps.axes[0].images[0].get_array().mask.tolist() == [[False, True], [True, True]]


def row(label, k, perplexity, flops, **limit):
    limits = {"top_p": None, "threshold": None, **limit}
    return {"label": label, "top_k": k, "mean_top_k": k, "perplexity": perplexity, "flops_per_token": flops, **limits}


def test_losses_against_k_and_operations():
    rows = [row("a", 1, 9.0, 1e6), row("a", 2, 8.0, 2e6), row("b", 1, 7.0, 1e6), row("b", 2, 6.0, 2e6)]
    by_k, by_flops = pictures.perplexity_curves(rows).axes
    for axes, across in ((by_k, [1, 2]), (by_flops, [1.0, 2.0])):
        found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        assert found == {"a": (across, [9.0, 8.0]), "b": (across, [7.0, 6.0])}
    assert "FLOPs" in by_flops.get_xlabel() and "experts" in by_k.get_xlabel()


def test_every_quantity_of_layers_has_a_diagram():
    names = ("normalised_entropy", "load_cv", "mean_output_similarity", "mean_weight_similarity", "hidden_rank")
    names = (*names, "jacobian_span")
    layer = {name: float(number) for number, name in enumerate(names)}
    axes = pictures.by_layer([{"label": "one", "layers": [layer, layer]}]).axes
    assert [list(one.lines[0].get_ydata()) for one in axes] == [[float(number)] * 2 for number in range(6)]
    titles = ("entropy", "load", "outputs", "weights", "input", "Jacobian")
    assert all(word in one.get_title() for word, one in zip(titles, axes))


def test_curves_of_many_rows_can_be_told_apart():
    rows = {f"row {number}": {1: [2.0 + number], 2: [1.0 + number]} for number in range(25)}
    (axes,) = pictures.metric_curves(rows, "perplexity", "many").axes
    curves = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 2]
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curves}
    assert len(styles) == 25


@pytest.mark.parametrize("names", [["a", "b"], ["/a/very/long/path/of/a/folder/checkpoint_last.pt"] * 3])
def test_titles_of_maps_do_not_overlap(names):
    loads = [{"load": [0.25] * 4}, {"load": [0.25] * 4}]
    figure = pictures.load_heat_map([{"label": name, "layers": loads} for name in names])
    figure.canvas.draw()
    *maps, _ = figure.axes
    boxes = [axes.title.get_window_extent() for axes in maps]
    assert all(one.x1 <= other.x0 for one, other in pairwise(boxes))
    assert all(float(tick.get_text().replace("\u2212", "-")).is_integer() for tick in maps[0].get_xticklabels())
