import pytest
import torch

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.analysis.observation import observed


def test_every_forward_pass_inside_the_block():
    layers = [MoELayer(LinearRouter(6, 4), 8, top_k=k) for k in (1, 2)]
    x, calls = torch.randn(2, 3, 6), []

    def observe(number, seen, arguments, routing):
        calls.append((number, seen is x, sorted(arguments), routing.expert_index.shape))

    with observed(layers, observe):
        for layer in (1, 0, 1):
            layers[layer](x, update=layer)
    with pytest.raises(KeyError), observed(layers, observe):
        raise KeyError
    layers[0](x)
    assert calls == [(layer, True, ["update"], (6, layer + 1)) for layer in (1, 0, 1)]
