"""Pictures of numbers that there are not all of. What whole pictures show is for people to see."""

import numpy as np

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
