"""DICOM radiographs through pydicom, with the window their header asks for. Needs the extra ``[dicom]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .radiograph import Radiograph


def read_dicom(path: Path) -> Radiograph:
    """Read one single-frame image; no header field but the pixels' description is kept.

    Modality LUT, then the first VOI window (DICOM PS3.3 C.11.2.1.2), or the full range if there is none.
    MONOCHROME1 (bright means dark) becomes an inverted window; the pixels stay as stored.

    Args:
        path: the file.

    Returns:
        uint16 pixels where the values are whole numbers below 65,536, fp32 otherwise; values below zero are
        shifted up, and the window with them.

    Raises:
        ImportError: pydicom, or a decoder for the file's compression, is not installed.
        ValueError: several frames, or no pixels.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError as error:
        raise ImportError(f"hia: reading {path.name} needs pydicom; pip install 'hia-kernels[dicom]'") from error
    dataset = pydicom.dcmread(path)
    if "PixelData" not in dataset:
        raise ValueError(f"hia: {path} must hold an image, got a DICOM file without pixel data")
    frames = int(getattr(dataset, "NumberOfFrames", 1) or 1)
    if frames != 1:
        raise ValueError(f"hia: {path} must hold one frame, got {frames}; pass the frame's array instead")
    try:
        stored = dataset.pixel_array
    except (RuntimeError, NotImplementedError) as error:  # pydicom: no plugin for this transfer syntax
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise ImportError(
            f"hia: decoding {path.name} ({syntax}) failed: {error}; pip install 'hia-kernels[dicom]'"
        ) from error
    if stored.ndim == 3:
        return Radiograph(torch.from_numpy(np.ascontiguousarray(stored)), _full_range(stored))

    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    if "VOILUTSequence" in dataset:  # a curve, not a window: no two numbers say it
        values = np.asarray(apply_voi_lut(values.astype(np.int64), dataset), dtype=np.float64)
        low, high = float(values.min()), float(values.max())
    else:
        low, high = _voi_window(dataset, values)
    offset = min(0.0, float(values.min()))
    values, low, high = values - offset, low - offset, high - offset
    if low == high:
        high = low + 1
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        low, high = high, low
    whole = bool((values == np.rint(values)).all()) and values.max() < 65536
    pixels = torch.from_numpy(values.astype(np.uint16 if whole else np.float32))
    return Radiograph(pixels[..., None], (low, high))


def _full_range(stored: np.ndarray) -> tuple[float, float]:
    return (0.0, 255.0) if stored.dtype == np.uint8 else (float(stored.min()), float(stored.max()))


def _voi_window(dataset: Any, values: np.ndarray) -> tuple[float, float]:
    """Return the first window's ends; the linear function's half-pixel terms are the standard's (C.11.2.1.2.1)."""
    centre, width = getattr(dataset, "WindowCenter", None), getattr(dataset, "WindowWidth", None)
    if centre is None or width is None:
        return float(values.min()), float(values.max())
    first = [float(value if np.isscalar(value) or isinstance(value, float) else value[0]) for value in (centre, width)]
    if getattr(dataset, "VOILUTFunction", "LINEAR") == "LINEAR_EXACT":
        return first[0] - first[1] / 2, first[0] + first[1] / 2
    half = (first[1] - 1) / 2
    return first[0] - 0.5 - half, first[0] - 0.5 + half
