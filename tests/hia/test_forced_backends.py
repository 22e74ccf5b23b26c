"""A whole model with one backend forced: ops without it run auto, and the numbers stay what they are."""

import contextvars
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import hia
import hia_kernels
from hia_kernels.core import backend
from tests.hia.conftest import ONE, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llava
from tests.ops.harness import skip_unless_here


@pytest.fixture
def model():
    """Make a model of channels in multiples of 32, which the extension's convolutions want."""
    base = tiny_llava()
    return stir(hia.get_hia_model(base, tiny_config(base, encoder_width=32)))


def served_by(call):
    """Return what a call returns and who served its ops, in a context of its own, apart from other tests."""

    def run():
        return call(), {op: hia_kernels.last_backend(op) for op in backend.TABLES}

    return contextvars.Context().run(run)


def assert_served_by(name, served):
    assert served["conv_norm_act"] == served["norm_linear"] == name
    for op, found in served.items():
        assert found in (None, name) or backend.TABLES[op].row(name) is None, f"{op} was served by {found}"


@pytest.mark.parametrize("how", ["environment", "block"])
@pytest.mark.parametrize("name", ["native", "cpu", "reference"])
def test_forward(name, how, model, batch, monkeypatch):
    skip_unless_here(name)
    with torch.no_grad():
        expected = model(**batch).logits
        for folded in (False, True):
            if folded:
                model.fold_weights()

            def forced():
                with hia_kernels.use_backend(name) if how == "block" else nullcontext():
                    return model(**batch).logits

            with monkeypatch.context() as patch, torch.no_grad():
                if how == "environment":
                    patch.setenv("HIA_BACKEND", name.upper())
                logits, served = served_by(forced)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            assert_served_by(name, served)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.adapter.named_parameters()}


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_training(name, model, processor, monkeypatch):
    inputs = processor(ONE, random_images()[2:], answers="no.")
    expected = gradients(model.train(), inputs)
    monkeypatch.setenv("HIA_BACKEND", name)
    found, served = served_by(partial(gradients, model, inputs))
    for parameter, grad in found.items():
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-3, atol=1e-4, msg=parameter)
    assert_served_by(name, served)


def test_a_row_that_cannot_run_a_call_still_raises(model, processor, monkeypatch):
    """Ask the extension for a strided convolution's gradient, the one it has none of."""
    skip_unless_here("native")
    monkeypatch.setenv("HIA_BACKEND", "native")
    with pytest.raises(NotImplementedError, match="native: gradients are for 3 x 3 with stride 1"):
        gradients(model.train(), processor(ONE, random_images()[2:], answers="no."))
