"""Contracts under torch.compile and torch.export: the public functions' own checks, and sizes that nobody knows yet."""

import pytest
import torch

import hia_kernels
from hia_kernels.ops.cross_attention.inputs import packing

HIDDEN, WEIGHT = torch.randn(8, 16), torch.randn(12, 16)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_lengths_that_change(dynamic):
    def attend(q, k, cu_seqlens_q, cu_seqlens_k):
        return hia_kernels.cross_attention(q, k, k, cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])

    run = compiled(attend, dynamic=dynamic)
    for queries, keys in ((5, 7), (6, 9), (8, 3)):
        q, k, found = torch.randn(queries, 2, 16).requires_grad_(), torch.randn(keys, 2, 16), packing([queries], [keys])
        arguments = (q, k, found["cu_seqlens_q"], found["cu_seqlens_k"])
        assert torch.equal(run(*arguments), attend(*arguments))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
def test_sizes_that_only_values_tell():
    """Trace rows that a mask selects, and a length that a tensor holds: the checks wait for the run."""
    ones, mask = torch.ones(16), torch.tensor([1, 0, 1, 0, 1, 0, 0, 0], dtype=torch.bool)

    def project(mask):
        return hia_kernels.norm_linear(HIDDEN, ones, ones, WEIGHT, None, mask.nonzero()[:, 0])

    def inject(mask, update):
        return hia_kernels.inject_rows(HIDDEN, update, WEIGHT.T, None, mask.nonzero()[:, 0])

    def attend(q, k, cu_seqlens_q, cu_seqlens_k, **lengths):
        longest = cu_seqlens_q.diff().max().item()
        return hia_kernels.cross_attention(q, k, k, cu_seqlens_q, cu_seqlens_k, longest, lengths["max_seqlen_k"])

    calls = [
        (project, (mask,), {}),
        (inject, (mask, torch.randn(3, 12)), {}),
        (attend, (torch.randn(5, 2, 16), torch.randn(7, 2, 16)), packing([2, 3], [4, 3])),
    ]
    for function, args, kwargs in calls:
        assert torch.equal(compiled(function)(*args, **kwargs), function(*args, **kwargs))
    with pytest.raises(
        ValueError, match=r"hia::inject_rows: row_idx must have shape \[R\], got \[3\]; R=4 is fixed by"
    ):
        compiled(inject)(mask, torch.randn(4, 12))


def test_errors_name_the_argument():
    cases = [
        (
            lambda: hia_kernels.linear(HIDDEN, WEIGHT[:, :3]),
            r"hia::linear: weight must have shape \[D, C\], got \[12, 3\]",
        ),
        (lambda: hia_kernels.linear(HIDDEN, WEIGHT.half()), "hia::linear: weight must be float32 like x, got float16"),
        (lambda: hia_kernels.row_softmax(HIDDEN, True), "hia::row_softmax: scale must be a number, got bool"),
    ]
    for function, message in cases:
        with pytest.raises(Exception, match=message):
            compiled(function)()


def test_export_keeps_the_checks():
    class Linear(torch.nn.Module):
        def forward(self, x, weight):
            return hia_kernels.linear(x, weight)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Linear(), (HIDDEN, WEIGHT), dynamic_shapes=({0: rows}, None))
    x = torch.randn(3, 16)
    assert torch.equal(program.module()(x, WEIGHT), hia_kernels.linear(x, WEIGHT))
    (node,) = (node for node in program.graph.nodes if node.op == "call_function")
    with pytest.raises(ValueError, match=r"hia::linear: weight must have shape \[D, C\], got \[12, 15\]"):
        node.target(x, WEIGHT[:, :15], None)
