import torch

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.experts import UnselectedAdapter


def test_against_adapters_that_are_built():
    adapter = UnselectedAdapter(6, 4, 3).double()
    torch.nn.init.normal_(adapter.up)
    x, chosen = torch.randn(5, 6).double(), torch.rand(5, 4) < 0.4
    chosen[0] = True  # nobody is left
    for token, mine, found in zip(x, chosen, adapter(x, chosen)):
        rest = [adapter.expert_embedding[i] for i in range(4) if not mine[i]]
        s = adapter.layer_embedding + (sum(rest) / len(rest) if rest else 0)
        down = sum(c * matrix for c, matrix in zip(s, adapter.down))
        up = sum(c * matrix for c, matrix in zip(s, adapter.up))
        torch.testing.assert_close(found, (token @ down).clamp(min=0) @ up)


def test_nothing_at_the_start_and_trained():
    layer = MoELayer(LinearRouter(6, 4), 8, adapter_dim=3)
    plain = MoELayer(LinearRouter(6, 4), 8)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "adapter" not in name})
    x = torch.randn(7, 6)
    assert torch.equal(layer(x)[0], plain(x)[0])
    torch.nn.init.normal_(layer.adapter.up)
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.adapter.parameters())
