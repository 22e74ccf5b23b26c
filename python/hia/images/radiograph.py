"""A radiograph as it was taken: raw pixels and the window they are shown in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Radiograph:
    """One image as it was taken.

    Attributes:
        pixels: [H, W, 1 or 3] uint8, uint16 or fp32.
        window: (low, high) in units of the pixels: what is shown black and white; low > high inverts.
    """

    pixels: Tensor
    window: tuple[float, float]

    def windowed(self) -> Tensor:
        """Return [H, W, C] fp32 in [0, 1]."""
        low, high = self.window
        return ((self.pixels.float() - low) / (high - low)).clamp(0, 1)

    def to_pil(self) -> Image.Image:
        """Return 8-bit RGB, as the host's image processor wants it."""
        grey_or_rgb = (self.windowed() * 255).round().to(torch.uint8).expand(-1, -1, 3)
        return Image.fromarray(grey_or_rgb.numpy(), "RGB")

    def resized(self, height: int, width: int) -> Radiograph:
        """Resize, bilinear with antialiasing; dtype and window stay, and so does an image that has the size."""
        if tuple(self.pixels.shape[:2]) == (height, width):
            return self
        image = self.pixels.float().permute(2, 0, 1)[None]
        small = F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)
        pixels = small[0].permute(1, 2, 0)
        if not self.pixels.is_floating_point():
            top = torch.iinfo(self.pixels.dtype).max
            pixels = pixels.round().clamp(0, top)
        return Radiograph(pixels.to(self.pixels.dtype).contiguous(), self.window)
