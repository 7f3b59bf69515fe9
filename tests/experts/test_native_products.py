"""The C code computes what torch's operations compute in float64."""

import pytest
import torch

from fairseq_hyperrouter.experts.native_products import NativeRunProducts
from fairseq_hyperrouter.experts.run_products import Rows, RunProducts
from fairseq_hyperrouter.native.usable import has_native

needs_native = pytest.mark.skipif(
    not has_native(), reason="no compiler, or a processor without AVX-512: torch's products do the work"
)
SIZES = pytest.mark.parametrize(
    "n, D, F",
    [
        (1, 1, 1),
        (5, 3, 2),
        (14, 32, 32),
        (15, 16, 33),
        (29, 31, 64),
        (40, 257, 47),  # beyond the depth of one copy
        (300, 40, 530),  # beyond the columns of one copy
        (530, 300, 96),
    ],
)


def operands(n, D, F, tokens=23):
    """a, token, weight, bias, gate; a token may come several times, and y has others too."""
    return (
        torch.randn(tokens, D),
        torch.randint(tokens, (n,)),
        torch.randn(D, F),
        torch.randn(F),
        torch.randn(n),
    )


def assert_same(compute, *tensors):
    """*compute* (products, *tensors) writes into its tensors, or returns one; the same in float64 with torch."""
    exact = [tensor.double() if tensor is not None and tensor.is_floating_point() else tensor for tensor in tensors]
    found, expected = compute(NativeRunProducts, *tensors), compute(RunProducts, *exact)
    for here, there in ((found, expected), *zip(tensors, exact)):
        if here is not None and here.is_floating_point():
            torch.testing.assert_close(here.double(), there, rtol=0, atol=5e-6 * max(1, there.abs().max().item()))


@needs_native
@SIZES
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_rows(n, D, F, transposed):
    a, token, weight, bias, _ = operands(n, D, F)
    weight = weight.t().contiguous() if transposed else weight

    def compute(products, a, token, *args):
        return products.rows(Rows(a, token), *args, transposed=transposed)

    for rows, which in ((a, token), (a[token], None)):
        for added in (bias, None):
            assert_same(compute, rows, which, weight, added)


@needs_native
@SIZES
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_add_rows(n, D, F, transposed):
    a, token, weight, bias, gate = operands(n, D, F)
    a, weight = a[token], weight.t().contiguous() if transposed else weight
    for factors in ((bias, gate), (None, None)):
        y = torch.randn(23, F)
        assert_same(
            lambda products, *args: products.add_rows(*args, transposed=transposed), y, token, a, weight, *factors
        )


@needs_native
@SIZES
def test_weight(n, D, F):
    a, token, _, _, gate = operands(n, D, F)
    b = torch.randn(23, F)

    def compute(products, a, a_token, b, b_token, *args):
        products.weight(Rows(a, a_token), Rows(b, b_token), *args)

    for first in ((a, token), (a[token], None)):
        for second in ((b, token, gate), (b[token], None, None)):
            results = torch.full((D, F), torch.nan), torch.full((F,), torch.nan)
            assert_same(compute, *first, *second, *results)


@needs_native
@SIZES
def test_gates(n, D, F):
    dy, token, _, _, gate = operands(n, D, F)

    def compute(products, dhidden, activated, dy, token, *args):
        products.gates(dhidden, activated, Rows(dy, token), *args)

    for output in ((dy, token), (dy[token], None)):
        tensors = (torch.randn(n, F), torch.randn(n, F), *output, torch.randn(D), gate, torch.full((n,), torch.nan))
        assert_same(compute, *tensors)


@needs_native
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, threads):
    n, D, F = 150, 90, 300
    a, token, weight, bias, gate = operands(n, D, F)

    def everything():
        y, dweight, dbias, dgate = torch.zeros(23, F), torch.empty(D, F), torch.empty(F), torch.empty(n)
        hidden = NativeRunProducts.rows(Rows(a, token), weight, bias)
        NativeRunProducts.add_rows(y, token, a[token], weight, bias, gate)
        NativeRunProducts.gates(hidden, hidden.clone(), Rows(a, token), torch.ones(D), gate, dgate)
        NativeRunProducts.weight(Rows(a, token), Rows(hidden), gate, dweight, dbias)
        return hidden, y, dweight, dbias, dgate

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = everything()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for one, several in zip(alone, everything()):
        assert torch.equal(one, several)
