"""Batch-norms of an encoder whose weights are folded."""

from __future__ import annotations

import torch
from torch import nn

from tests.hia.encoders import WINDOW, encoder_of, pixels_of


@torch.no_grad()
def test_norms_put_in_after_folding_are_asked():
    """``convert_sync_batchnorm`` keeps the tensors, and thereby the weights' version, and replaces the modules."""
    encoder, pixels = encoder_of().eval(), pixels_of(64, 96)
    encoder.fold_weights()
    nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    assert encoder._executor().weights
    next(module for module in encoder.modules() if isinstance(module, nn.SyncBatchNorm)).train()
    assert not encoder._executor().weights
    encoder.eval()
    assert encoder._executor().weights and encoder(pixels, WINDOW).isfinite().all()
