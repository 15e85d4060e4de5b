"""sasa.kernels.projection: the product of query, key and value as a 1x1 convolution of the map as it is."""

import pytest
import torch
import torch.nn.functional as F

from sasa.kernels.projection import project

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def inputs(shape, dtype=torch.float32, layout=torch.channels_last, width=6):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    return x, torch.randn(width, shape[1], 1, 1, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [
    (2, 4, 5, 7), (1, 4, 5, 7), (1, 16, 8, 8), (1, 3, 1, 9), (3, 4, 8, 1), (2, 1, 4, 4), (1, 1, 1, 1), (17, 8, 6, 6),
    (0, 4, 3, 3),
])  # fmt: skip
def test_it_is_the_convolution(shape, layout, dtype):
    """The numbers, and the layout of output and input's gradient."""
    x, weight = inputs(shape, dtype, LAYOUTS[layout])
    wanted, got = F.conv2d(x, weight), project(x, weight)
    grad = torch.randn(wanted.shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    tolerance = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
    torch.testing.assert_close(got, wanted, **tolerance)
    (dx, dw), (wanted_dx, wanted_dw) = (torch.autograd.grad(y, (x, weight), grad) for y in (got, wanted))
    torch.testing.assert_close(dx, wanted_dx, **tolerance)
    torch.testing.assert_close(dw, wanted_dw, **tolerance)
    for ours, theirs in ((got, wanted), (dx, wanted_dx)):
        long = [axis for axis, size in enumerate(ours.shape) if size > 1]
        assert [ours.stride(axis) for axis in long] == [theirs.stride(axis) for axis in long]


def test_a_part_of_a_map_is_not_copied_first(monkeypatch):
    """Rows of one pixel each need a view: of any other strides the convolution gets the map as it is."""
    x, weight = inputs((2, 4, 6, 6))
    seen, convolve = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, weight: (seen.append(tuple(x.shape)), convolve(x, weight))[1])
    for part in (x[:, :, ::2], x[:, :, :, 1:], x):
        torch.testing.assert_close(project(part, weight), convolve(part, weight))
    assert seen == [(2, 4, 3, 6), (2, 4, 6, 5), (2, 4, 1, 36)]


def test_what_is_compiled_or_traced_has_the_plain_convolution():
    x, weight = inputs((2, 4, 6, 6))
    traced = torch.jit.trace(project, (x.detach(), weight.detach()))
    assert "flatten" not in str(traced.graph) and "aten::_convolution(%x" in str(traced.graph)
    graphs = []
    torch.compile(project, backend=lambda graph, _: (graphs.append(graph.code), graph.forward)[1])(x, weight)
    assert len(graphs) == 1 and "flatten" not in graphs[0] and "conv2d" in graphs[0]


def test_second_derivatives_and_transforms():
    x, weight = inputs((2, 3, 4, 4), torch.float64)
    assert torch.autograd.gradcheck(project, (x, weight)) and torch.autograd.gradgradcheck(project, (x, weight))
    each = torch.func.vmap(lambda one: project(one[None], weight)[0])(x)
    torch.testing.assert_close(each, F.conv2d(x, weight))
