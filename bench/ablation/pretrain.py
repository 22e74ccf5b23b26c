"""The high-resolution encoder before HiA: taught on the phantoms' lesion masks, without questions or answers.

Each feature tells whether a lesion lies in its patch of the image, and of what radius; the heads that tell are thrown
away. It stands for the pre-trained CNN that HiA starts from: trained from scratch through a frozen LLM the encoder does
not learn within the ablation's steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hia.encoder.encoder import Encoder

RADIUS_WEIGHT = 0.05  # of the squared error in pixels beside the cross-entropy


def targets(masks: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Make what the features are to tell.

    Args:
        masks: [n, H, W] bool.
        grid: (H', W') of the features.

    Returns:
        [n, H', W'] fp32, 1 where a lesion lies in the patch; [n] the radius of a disc of the mask's area, pixels.
    """
    return F.adaptive_max_pool2d(masks[:, None].float(), grid)[:, 0], (masks.sum((1, 2)) / math.pi).sqrt()


def pretrain(
    encoder: Encoder,
    images: list[Tensor],
    windows: Tensor,
    masks: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> float:
    """Train the encoder, with live batch-norm statistics and without positions; it is in evaluation afterwards.

    Args:
        encoder: to be trained.
        images: [H, W, 1] each, of one size.
        windows: [n, 2].
        masks: [n, H0, W0] bool, at the phantoms' own size.
        steps: of AdamW, warm-up over 50 and a cosine.
        batch: images a step.
        lr: highest.
        seed: of heads and order.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    live, position = encoder.live_statistics, encoder.position
    encoder.live_statistics, encoder.position = True, "none"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(encoder.channels, 2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=0.01)
    generator, losses = torch.Generator().manual_seed(seed), []
    grid = (encoder.halved(images[0].shape[0]), encoder.halved(images[0].shape[1]))
    present, radius = targets(masks, grid)
    try:
        encoder.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
            chosen = torch.randint(len(images), (batch,), generator=generator)
            features = torch.stack(encoder.forward_many([images[i] for i in chosen.tolist()], windows[chosen]))
            told, here = head(features), present[chosen]
            loss = F.binary_cross_entropy_with_logits(told[..., 0], here)
            error = (told[..., 1] - radius[chosen, None, None]).square() * here
            loss = loss + RADIUS_WEIGHT * error.sum() / here.sum().clamp_min(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        encoder.live_statistics, encoder.position = live, position
        encoder.eval()
    return sum(losses[-max(1, steps // 10) :]) / max(1, steps // 10)
