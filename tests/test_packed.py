"""Packed products are the stock ones, only for a moment, and only where their copy has room."""

import pytest
import torch
from models import tiny, tiny_model
from torch import nn

from specdec import packed
from specdec.packed import ROWS, packed_head, packed_layers, replaced

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")


@needs_mkl
@pytest.mark.parametrize("rows", [1, 3, ROWS, ROWS + 1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_the_products_are_the_same(rows: int, bias: bool) -> None:
    layer = nn.Linear(48, 80, bias).requires_grad_(False)
    x_1TD = torch.randn(1, rows, 48, generator=torch.Generator().manual_seed(rows))
    want = layer(x_1TD)
    for forwards in (packed_layers(nn.Sequential(layer)), packed_head(layer)):
        with replaced(forwards):
            got = layer(x_1TD)
        torch.testing.assert_close(got, want)


@needs_mkl
def test_modules_are_as_before_whatever_happens() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    forwards = packed_layers(nn.Sequential(layer))
    with replaced(forwards):
        assert layer.forward is forwards[layer]
    with pytest.raises(ZeroDivisionError), replaced(forwards):
        _ = 1 / 0
    assert "forward" not in vars(layer)


@needs_mkl
def test_every_layer_of_a_small_model_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_model().base_model
    linears = [m for m in decoder.modules() if isinstance(m, nn.Linear)]
    assert set(packed_layers(decoder)) == set(linears)
    assert packed_layers(tiny_model().to(torch.float16).base_model) == {}
    monkeypatch.setattr(packed, "memory_gib", lambda: None)
    assert packed_layers(decoder) == {}


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_packed_where_the_cpu_knows_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(packed, "native_bf16", lambda: native)
    decoder = tiny_model().to(torch.bfloat16).base_model
    forwards = packed_layers(decoder)
    assert len(forwards) == (sum(isinstance(m, nn.Linear) for m in decoder.modules()) if native else 0)
    for layer, forward in forwards.items():
        x = torch.randn(1, 5, layer.in_features, dtype=torch.bfloat16)
        assert torch.allclose(forward(x), layer(x), rtol=2**-7, atol=2**-7)


@needs_mkl
@pytest.mark.parametrize(
    ("rows", "batch", "run"), [(1, 1, 1), (3, 1, 3), (4, 1, 8), (8, 1, 8), (9, 1, 9), (3, 2, 4), (2, 3, 2)]
)
def test_rows_are_padded_to_what_is_packed(rows: int, batch: int, run: int) -> None:
    assert tiny().padded(rows, batch) == run


def test_other_modules_are_left_alone() -> None:
    assert packed_head(nn.Embedding(4, 4)) == packed_head(None) == {}
    assert packed_head(nn.Linear(4, 4, dtype=torch.float64)) == {}
