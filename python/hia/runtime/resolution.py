"""``HiAConfig(high_resolution=False)``: the adapter sees its images at the host's resolution (paper, Table 2).

An ablation that silently measured the full model would be worse than an error: every way in goes through here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config import HiAConfig
from ..encoder.encoder import Encoder
from ..hosts import LlamaHost
from ..images.load import check_pixels
from ..images.radiograph import Radiograph
from ..layers.features import ImageFeatures

_ABLATION = "HiAConfig(high_resolution=False)"


def for_encoder(config: HiAConfig, radiograph: Radiograph, size: tuple[int, int]) -> Radiograph:
    """Give the encoder its view of an image.

    Args:
        config: of the adapter.
        radiograph: as it was taken.
        size: the host's (height, width), pixels.

    Returns:
        The radiograph itself at high resolution, or if it has that size; else resized to it, dtype and window kept.
    """
    if config.high_resolution or tuple(radiograph.pixels.shape[:2]) == tuple(size):
        return radiograph
    return radiograph.resized(*size)


def limited(config: HiAConfig, host: LlamaHost, images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Bring raw pixels to what the config lets the encoder see.

    Args:
        config: of the adapter.
        host: whose resolution it is.
        images: [H, W, 1 or 3] each.

    Returns:
        The images, resized as :class:`hia.HiAProcessor` does it where the config says so.

    Raises:
        ValueError, TypeError: no images; the host doesn't state its resolution.
    """
    if config.high_resolution:
        return images
    for number, pixels in enumerate(images):
        check_pixels(f"high_res_pixels[{number}]", pixels)
    size = _host_size(host, "high_res_pixels", [tuple(pixels.shape[:2]) for pixels in images])
    window = (0.0, 1.0)  # resizing is of the pixels alone
    return [for_encoder(config, Radiograph(pixels, window), size).pixels for pixels in images]


def limited_sizes(config: HiAConfig, host: LlamaHost, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tell the (height, width) that images of these sizes have where the encoder sees them.

    Raises:
        ValueError: the host doesn't state its resolution.
    """
    if config.high_resolution:
        return list(sizes)
    return [_host_size(host, "sizes", sizes)] * len(sizes)


def check_features(config: HiAConfig, host: LlamaHost, encoder: Encoder, features: ImageFeatures) -> None:
    """Refuse features of more than the config lets the encoder see; they don't say what they were made from.

    Raises:
        ValueError: a map larger than an image of the host's resolution has; the host doesn't state it.
    """
    if config.high_resolution:
        return
    maps = [tuple(features_map.shape[:2]) for features_map in features]
    height, width = _host_size(host, "features", maps)
    most = encoder.halved(height), encoder.halved(width)
    for number, (rows, columns) in enumerate(maps):
        if rows > most[0] or columns > most[1]:
            raise ValueError(
                f"hia: features must be of images at the host's resolution with {_ABLATION}, at most {most[0]} x "
                f"{most[1]} for {height} x {width} pixels, got {rows} x {columns} for image {number}; make them with "
                f"this model's encode_images"
            )


def _host_size(host: LlamaHost, name: str, got: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    if host.image_size is None:
        shown = ", ".join(" x ".join(map(str, size)) for size in got)
        raise ValueError(
            f"hia: {name} must be of images at the host's resolution with {_ABLATION}, and {host.class_name} has none, "
            f"got {shown}; resize the images yourself and set high_resolution=True"
        )
    return host.image_size
