"""``high_resolution=False``: the adapter sees its images at the host's resolution (paper, Table 2).

An ablation that silently measured the full model would be worse than an error: every way in goes through here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..encoder.encoder import Encoder
from ..hosts import LlamaHost
from ..images.load import check_pixels
from ..images.radiograph import Radiograph
from ..layers.features import ImageFeatures

_ABLATION = "high_resolution=False"


def limited(high_resolution: bool, host: LlamaHost, images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Bring raw pixels to what the encoder may see.

    Args:
        high_resolution: whether it may see the images as they are.
        host: whose resolution it is otherwise.
        images: [H, W, 1 or 3] each.

    Returns:
        The images, without high resolution resized as :class:`hia.HiAProcessor` does it.

    Raises:
        ValueError, TypeError: no images; the host doesn't state its resolution.
    """
    if high_resolution:
        return images
    for number, pixels in enumerate(images):
        check_pixels(f"high_res_pixels[{number}]", pixels)
    size = _host_size(host, "high_res_pixels", [tuple(pixels.shape[:2]) for pixels in images])
    window = (0.0, 1.0)  # resizing is of the pixels alone
    return [Radiograph(pixels, window).resized(*size).pixels for pixels in images]


def limited_sizes(high_resolution: bool, host: LlamaHost, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tell the (height, width) that images of these sizes have where the encoder sees them.

    Raises:
        ValueError: the host doesn't state its resolution.
    """
    if high_resolution:
        return list(sizes)
    return [_host_size(host, "sizes", sizes)] * len(sizes)


def check_features(high_resolution: bool, host: LlamaHost, encoder: Encoder, features: ImageFeatures) -> None:
    """Refuse features of more than the encoder may see; they don't say what they were made from.

    Raises:
        ValueError: a map larger than an image of the host's resolution has; the host doesn't state it.
    """
    if high_resolution:
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
            f"got {shown}; resize the images yourself and call model.set_high_resolution(True)"
        )
    return host.image_size
