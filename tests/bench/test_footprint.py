"""FLOPs and peaks of models under fake tensors: counted by hand, and against a really measured peak."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from bench.measure import footprint as tracking
from bench.measure.memory import process_peak_unavailable
from bench.table3 import hosts, methods, predict
from bench.table3 import prefill as runs


def test_footprint_of_two_linears_by_hand():
    with tracking.fake_mode():
        model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 64, bias=False))
        x = torch.ones(32, 64)
        wrapped = Called(model)
        found = tracking.footprint(wrapped, {"x": x}, cuda=False)
    weights, hidden = 2 * 64 * 256 * 4, 32 * 256 * 4
    assert found.flops == 2 * 2 * 32 * 64 * 256
    assert found.weight_bytes == weights
    # at the ReLU: weights, the input, what goes in and what comes out
    assert found.peak_bytes == weights + 32 * 64 * 4 + 2 * hidden


class Called(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_the_implementation_behind_an_op_of_ours_is_seen():
    import hia_kernels

    class Injecting(nn.Module):
        def forward(self, hidden, update, weight, rows):
            return hia_kernels.inject_rows(hidden, update, weight, None, rows)

    with tracking.fake_mode():
        inputs = {
            "hidden": torch.ones(64, 128),
            "update": torch.ones(32, 16),
            "weight": torch.ones(128, 16),
            "rows": tracking.real_tensor(list(range(32)), torch.int64),
        }
        found = tracking.footprint(Injecting(), inputs, cuda=False)
    given = (64 * 128 + 32 * 16 + 128 * 16) * 4 + 32 * 8
    output, rows = 64 * 128 * 4, 32 * 128 * 4
    assert found.flops == 2 * 32 * 16 * 128
    # the op's fake would show the output alone; the plain form holds rows, their update and the sum besides
    assert found.peak_bytes >= given + output + 2 * rows


def test_a_gpus_kernels_allocate_their_results_alone():
    import hia_kernels

    class Convolving(nn.Module):
        def forward(self, x, weight, scale):
            return hia_kernels.conv_norm_act(x, weight, scale, scale)

    with tracking.fake_mode():
        x, weight = torch.ones(1, 64, 64, 128, dtype=torch.bfloat16), torch.ones(128, 128, 3, 3, dtype=torch.bfloat16)
        inputs = {"x": x, "weight": weight, "scale": torch.ones(128)}
        fused, plain = (tracking.footprint(Convolving(), inputs, cuda=cuda).peak_bytes for cuda in (True, False))
    out = 64 * 64 * 128 * 2
    assert fused == (x.numel() + weight.numel()) * 2 + 128 * 4 + out
    assert plain > fused + 2 * out  # an unfused convolution, its norm and its activation in fp32


def test_packed_attention_shows_its_scores():
    import hia_kernels

    class Attending(nn.Module):
        def forward(self, q, k, cu_q, cu_k):
            return hia_kernels.cross_attention(q, k, k, cu_q, cu_k, 64, 512)

    with tracking.fake_mode():
        inputs = {
            "q": torch.ones(128, 2, 16),
            "k": torch.ones(1024, 2, 16),
            "cu_q": torch.zeros(3, dtype=torch.int32),
            "cu_k": torch.zeros(3, dtype=torch.int32),
        }
        found = tracking.footprint(Attending(), inputs, cuda=False)
    scores_of_one_sequence = 2 * 64 * 512 * 4
    assert found.peak_bytes > found.weight_bytes + (128 + 1024) * 32 * 4 + scores_of_one_sequence


@pytest.mark.parametrize("masked", [False, True], ids=["flash", "efficient"])
def test_sdpa_is_followed_as_on_cuda(masked):
    class Attention(nn.Module):
        def forward(self, q, mask):
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    with tracking.fake_mode():
        q = torch.ones(1, 4, 1024, 64, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool) if masked else None
        found = tracking.footprint(Attention(), {"q": q, "mask": mask}, cuda=True)
    assert found.flops == 2 * 2 * 4 * 1024 * 1024 * 64
    (op,) = found.flops_by_op
    assert ("efficient" if masked else "flash") in op
    if not masked:
        assert found.peak_bytes < 4 * 1024 * 1024 * 2, "fused attention has no scores in memory"


# Peaks of 0.6 GB and more: a process holds 5 to 24 MB that no tensor owns (kernels' buffers, code loaded on
# first use), which must stay well below the 5 % that are tested.
SHALLOW = hosts.HostSpec(
    "shallow",
    {**hosts.SMALL_LLM, "num_hidden_layers": 3, "intermediate_size": 1024},
    {**hosts.SMALL_VIT, "num_hidden_layers": 2},
)


@pytest.mark.skipif(process_peak_unavailable() is not None, reason=str(process_peak_unavailable()))
@pytest.mark.parametrize(
    ("method", "attention", "spec", "resolution"),
    [("baseline", "eager", SHALLOW, 560), ("hia", "sdpa", hosts.SMALL_LLAVA, 448)],
    ids=["baseline-eager", "hia-sdpa"],
)
def test_prediction_is_within_5_percent_of_the_measured_peak(method, attention, spec, resolution):
    task = predict.Task(method, resolution, (attention,), spec, torch.float32, 2, 20, cuda=False)
    predicted = predict.Predictor()(task).footprints[attention].peak_bytes
    cases = (runs.Case(resolution, attention, predicted),)
    request = runs.RunRequest(method, asdict(spec), "fp32", "cpu", cases, 2, 20, repeats=1, budget_s=0.0)
    (result,) = runs.run_in_subprocess(request)
    assert result.measured is not None and result.capped is None
    assert result.measured.prefill_ms > 0
    assert predicted == pytest.approx(result.measured.memory_bytes, rel=0.05)


def test_methods_labels_name_every_method():
    assert methods.METHODS == ("baseline", "anyres", "released", "hia")
