"""Radiographs in (PIL, NumPy, torch, files, DICOM), raw pixel tensors and their windows out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .radiograph import Radiograph

PIXEL_DTYPES = (torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PIL_MODES = {"1": "L", "P": "RGB", "RGBA": "RGB", "PA": "RGB", "LA": "L", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}


def check_pixels(name: str, pixels: Tensor, smallest_side: int = 1) -> None:
    """Raise unless ``pixels`` is an image the encoder takes.

    Raises:
        TypeError: no tensor, or another dtype. ValueError: no [H, W, 1 or 3], too small, NaN, infinite, negative.
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"hia: {name} must be a tensor, got {type(pixels).__name__}")
    if pixels.dtype not in PIXEL_DTYPES:
        raise TypeError(f"hia: {name} must be uint8, uint16 or float, got {str(pixels.dtype).removeprefix('torch.')}")
    if pixels.dim() != 3 or pixels.shape[-1] not in (1, 3):
        hint = "; move the channels last" if pixels.dim() == 3 and pixels.shape[0] in (1, 3) else ""
        raise ValueError(f"hia: {name} must have shape [H, W, 1] or [H, W, 3], got {list(pixels.shape)}{hint}")
    height, width, _ = pixels.shape
    if min(height, width) < smallest_side:
        raise ValueError(
            f"hia: {name} must be at least {smallest_side} x {smallest_side} pixels, the stem's reach, got "
            f"{height} x {width}"
        )
    if pixels.is_floating_point() and pixels.device.type == "cpu":
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError(f"hia: {name} must be finite, got NaN or infinite pixels")
        if bool((pixels < 0).any()):
            raise ValueError(f"hia: {name} must not be negative, got a pixel of {float(pixels.min()):g}")


def check_windows(windows: Tensor, images: int) -> None:
    """Raise unless ``windows`` is [images, 2] of two different values each (these are looked at on the CPU alone)."""
    if not isinstance(windows, Tensor):
        raise TypeError(
            f"hia: windows must be a tensor of shape [{images}, 2], got {type(windows).__name__}; torch.tensor(windows)"
        )
    if tuple(windows.shape) != (images, 2):
        raise ValueError(f"hia: windows must have shape [{images}, 2], got {list(windows.shape)}")
    if windows.device.type != "cpu":
        return
    low, high = windows.float().unbind(1)
    empty = ((low == high) | ~torch.isfinite(low + high)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"hia: windows[{empty[0]}] must hold two different finite values, got {windows[empty[0]].tolist()}"
        )


def windows_of(images: Sequence[Tensor | Radiograph], windows: Tensor | None) -> Tensor:
    """Return the windows that go with some images, checked.

    Args:
        images: radiographs or pixels.
        windows: [n, 2]; None takes each radiograph's own, and :func:`default_window` of pixels.

    Returns:
        [n, 2].
    """
    if windows is None:
        known = [image.window if isinstance(image, Radiograph) else default_window(image) for image in images]
        windows = torch.tensor(known, dtype=torch.float32).view(-1, 2)
    check_windows(windows, len(images))
    return windows


def default_window(pixels: Tensor) -> tuple[float, float]:
    """Guess the window of pixels that come without one.

    Returns:
        (0, 255) of uint8, (0, 1) of float images within [0, 1], and else the image's own range, since a uint16 array
        doesn't say how many of its bits are used.
    """
    if pixels.dtype == torch.uint8:
        return 0.0, 255.0
    values = pixels.float()
    low, high = float(values.min()), float(values.max())
    if pixels.is_floating_point() and high <= 1:
        return 0.0, 1.0
    return (low, high) if high > low else (low, low + 1)


def load_image(image: Any, name: str = "image", window: tuple[float, float] | None = None) -> Radiograph:
    """Make a radiograph of whatever holds one.

    Args:
        image: a :class:`Radiograph`, a PIL image (8 or 16 bit, grey or RGB), an array or tensor [H, W] or
            [H, W, 1 or 3] of uint8, uint16 or float, or the path of an image or DICOM file.
        name: for error messages.
        window: (low, high) in units of the pixels; None takes the file's own (DICOM) or :func:`default_window`.

    Raises:
        TypeError: another kind of object, or another dtype.
        ValueError: zero-sized, NaN, infinite, negative pixels; a wrong shape; an empty window.
        FileNotFoundError: no such file. ImportError: DICOM without pydicom.
    """
    if isinstance(image, (str, Path)):
        image = _read_file(Path(image), name)
    if isinstance(image, Radiograph):
        pixels, own = image.pixels, image.window
    else:
        pixels, own = _to_tensor(image, name), None
    check_pixels(name, pixels)
    low, high = window or own or default_window(pixels)
    if low == high or not np.isfinite([low, high]).all():
        raise ValueError(f"hia: {name}'s window must hold two different finite values, got ({low:g}, {high:g})")
    return Radiograph(pixels, (float(low), float(high)))


def _read_file(path: Path, name: str) -> Radiograph | Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"hia: {name} must be an image file, got {path}, which does not exist")
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        from .dicom import read_dicom

        return read_dicom(path)
    with Image.open(path) as opened:
        opened.load()
        return opened


def _to_tensor(image: Any, name: str) -> Tensor:
    """Make a tensor [H, W, C] of an image, whatever C is; it is not checked yet."""
    if isinstance(image, Image.Image):
        array = _pil_to_array(image, name)
    elif isinstance(image, Tensor):
        array = image.detach().cpu()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise TypeError(
            f"hia: {name} must be a PIL image, a NumPy array, a tensor or a path, got {type(image).__name__}"
        )
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"hia: {name} must have shape [H, W] or [H, W, C] without a zero, got {list(array.shape)}")
    if isinstance(array, np.ndarray):
        if array.dtype.name not in ("uint8", "uint16", "float16", "float32", "float64"):
            raise TypeError(f"hia: {name} must be uint8, uint16 or float, got {array.dtype.name}")
        array = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    if array.dtype in (torch.float64, torch.float16, torch.bfloat16):
        array = array.float()
    return array[..., None] if array.ndim == 2 else array.contiguous()


def _pil_to_array(image: Image.Image, name: str) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"hia: {name} must not be zero-sized, got {image.size[0]} x {image.size[1]} pixels")
    if image.mode in ("L", "RGB", "F"):
        return np.asarray(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":  # PIL's 32-bit integers: how it opens some 16-bit PNG files
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"hia: {name} must hold 16-bit values, got {array.min()} to {array.max()}")
        return array.astype(np.uint16)
    if image.mode not in _PIL_MODES:
        raise TypeError(f"hia: {name} must have a PIL mode like L, I;16, F or RGB, got {image.mode}")
    return np.asarray(image.convert(_PIL_MODES[image.mode]))
