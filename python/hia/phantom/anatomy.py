"""The drawing: soft tissue, bones, trabeculae and a lesion, as grey values between 0 and 1.

Lengths are in units of a 192nd of the image's shorter side, measured from the image's centre, x to the right and y
downwards. All here is elementwise in (y, x), so the same functions draw an image and judge single points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

REFERENCE_SIDE = 192
BONES = ("femur", "forearm", "knee", "spine")

# grey values: steps between tissues stay below a lesion's contrast, so that a small one is the sharpest thing there is
_AIR, _SOFT, _BONE = 0.05, 0.24, 0.56
# in radii: up to where the lucent core is flat, where it ends, where the sclerotic rim begins; the rim ends at 1
_CORE_FLAT, _CORE_EDGE, _RIM_START = 0.3, 0.75, 0.65


class Form(NamedTuple):
    """The drawn build of one study; every number but ``bone`` is uniform in [-1, 1] and scaled where it is used."""

    bone: str
    offset: float
    tilt: float
    bow: float
    width: float
    second_width: float
    spread: float
    phase: float
    tissue_width: float
    tissue_offset: float
    heel: float


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _bell(t: np.ndarray) -> np.ndarray:
    return np.exp(-t * t)


def _inside(depth: np.ndarray) -> np.ndarray:
    """Compute 1 inside and 0 outside, with an edge of 1.5 units: the penumbra of a real focus."""
    return np.clip(depth / 1.5 + 0.5, 0, 1)


def _tube(x: np.ndarray, centre: np.ndarray, half_width: np.ndarray, marrow: np.ndarray | float) -> np.ndarray:
    """Project the wall of a hollow shaft: brightest along the cortex, where the rays run through it lengthwise."""
    d2 = ((x - centre) / half_width) ** 2
    return np.sqrt(np.maximum(1 - d2, 0)) - 0.8 * np.sqrt(np.maximum(marrow * marrow - d2, 0))


def _axis(form: Form, y: np.ndarray) -> np.ndarray:
    return 3 * form.offset + 0.04 * form.tilt * y + 3 * form.bow * (y / 96) ** 2


def _femur(form: Form, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    flare = _smoothstep((y - 40) / 70)
    return _tube(x, _axis(form, y), 33 + 2 * form.width + 13 * flare, 0.72 + 0.14 * flare)


def _forearm(form: Form, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    axis, spread = _axis(form, y), 33 + 2 * form.spread
    taper = 3 * np.clip(y / 96, -1, 1)
    left = _tube(x, axis - spread, 18 + form.width - taper, 0.7)
    return left + _tube(x, axis + spread, 16 + form.second_width + taper, 0.7)


def _knee(form: Form, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    axis = _axis(form, y)
    flare = _bell(y / 52)
    half_width = 24 + 24 * flare + 2 * form.width
    across = x - 3 * form.offset  # the joint's surfaces stand still while the shaft's axis tilts
    rounding = 0.03 * np.maximum(np.abs(across) - 28, 0) ** 2
    upper = -3 - rounding - 9 * _bell(across / 10)  # between two condyles a notch
    lower = 5 + rounding - 3 * _bell((np.abs(across) - 5) / 3)  # a plateau with two small spines
    above, below = upper - y, y - lower
    plates = 0.22 * (_bell((above - 3) / 2.2) + _bell((below - 3) / 2.2))
    shaft = _tube(x, axis, half_width, 0.72 + 0.16 * flare)
    return (shaft + plates * (np.abs(x - axis) < half_width)) * (_inside(above) + _inside(below))


def _spine(form: Form, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    pitch = 37 + 2 * form.spread
    down = np.mod(y - pitch * form.phase, pitch) - pitch / 2  # from the middle of the vertebra
    across = np.abs(x - _axis(form, y))
    half_height = pitch / 2 - 3.5
    half_width = 36 + 2 * form.width - 4 * np.cos(down / half_height * (math.pi / 2))
    from_plate, from_side = half_height - np.abs(down), half_width - across
    rims = 0.16 * np.maximum(_bell((from_plate - 1.8) / 1.8), _bell((from_side - 1.8) / 1.8))
    pedicles = 0.16 * _bell((across - 20) / 4.5) * _bell((down + 4) / 6)
    process = 0.2 * _bell(across / 3.5) * _bell((down - 5) / 8)
    return (0.4 + rims + pedicles) * _inside(from_plate) * _inside(from_side) + process


_DRAW: dict[str, Callable[[Form, np.ndarray, np.ndarray], np.ndarray]] = {
    "femur": _femur,
    "forearm": _forearm,
    "knee": _knee,
    "spine": _spine,
}


def bone_thickness(form: Form, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Measure how much bone a ray meets at (y, x), arrays that broadcast: 0 outside, about 0.4 to 0.8 within."""
    return _DRAW[form.bone](form, y, x)


def _tissue_half_width(form: Form, y: np.ndarray) -> np.ndarray:
    return (88.0 if form.bone == "spine" else 74.0) + 4 * form.tissue_width + 4 * np.sin(y / 40 + 2 * form.phase)


def tissue_thickness(form: Form, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Measure how much soft tissue a ray meets at (y, x), arrays that broadcast: 0 outside, 1 at the thickest."""
    d = (x - 3 * form.tissue_offset) / _tissue_half_width(form, y)
    root = np.sqrt(np.maximum(1 - d * d, 0))
    return root * np.sqrt(root)


class Texture(NamedTuple):
    """Random fields on fixed lattices, so that every resolution shows the same trabeculae."""

    pitch: tuple[float, float]  # of the lattice, down and across, in units
    values: np.ndarray  # [rows, columns] fp32, unit variance once it is interpolated

    def at(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Interpolate: y [H], x [W] -> [H, W] fp32."""
        down = _interpolated(self.values, y / self.pitch[0])  # [H, columns]
        return _interpolated(down.T, x / self.pitch[1]).T


def draw_texture(rng: np.random.Generator, pitch: tuple[float, float], extent: tuple[float, float]) -> Texture:
    """Draw a field of (rows, columns) ``extent`` units; it is the same whatever the number of pixels."""
    rows, columns = (math.ceil(length / step) + 8 for length, step in zip(extent, pitch))
    # a sum of cubic B-splines over white noise has a variance of (151/315)^2 on average: 151/315 is one axis' mean
    return Texture(pitch, rng.standard_normal((rows, columns), dtype=np.float32) * (315 / 151))


def _interpolated(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Interpolate [knots, m] -> [n, m] fp32 by cubic B-splines; positions are in knots from the lattice's middle.

    Four taps in a fixed order, no matrix product: no BLAS decides the bits, and none of its threads gets in the way.
    """
    at = position.astype(np.float32) + np.float32((len(values) - 1) / 2)
    first = np.floor(at).astype(np.int64) - 1
    total = np.zeros((len(at), values.shape[1]), dtype=np.float32)
    for tap in range(4):
        distance = np.abs(at - (first + tap).astype(np.float32))
        near, far = np.maximum(1 - distance, 0), np.maximum(2 - distance, 0)
        weight = (far * far * far - 4 * (near * near * near)) / 6
        total += weight[:, None] * values[np.clip(first + tap, 0, len(values) - 1)]
    return total


def draw_background(form: Form, textures: Sequence[Texture], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draw an image without lesion and noise.

    Args:
        form: the study's build.
        textures: trabeculae, then their coarse unevenness, then muscle.
        y, x: [H] and [W] fp32, units from the centre.

    Returns:
        [H, W] fp32: grey values, bone bright, mostly within 0.05 and 0.7.
    """
    trabeculae, uneven, muscle = textures
    down, across = y[:, None], x[None, :]
    tissue = tissue_thickness(form, down, across)
    tissue *= _SOFT + 0.02 * muscle.at(y, x) + 0.03 * form.heel * np.clip(down / 96, -1, 1)
    grain = 1 + 0.09 * trabeculae.at(y, x) + 0.05 * uneven.at(y, x)
    return _AIR + tissue + _BONE * bone_thickness(form, down, across) * grain


def add_lesion(image: np.ndarray, row: float, column: float, radius: float, contrast: float) -> None:
    """Add a lucent core with a sclerotic rim to ``image`` in place.

    The rim is as bright as makes the pixels sum to zero: averaged over a neighbourhood larger than itself, the lesion
    leaves nothing behind, whatever its radius.

    Args:
        image: [H, W] fp32 grey values.
        row, column: the centre, in pixels; whole numbers are pixel centres.
        radius: where the rim ends, in pixels.
        contrast: how far the core's middle lies below its surroundings, in grey values.
    """
    height, width = image.shape
    reach = math.ceil(radius) + 1
    top, left = max(round(row) - reach, 0), max(round(column) - reach, 0)
    bottom, right = min(round(row) + reach + 1, height), min(round(column) + reach + 1, width)
    fine = min(max(math.ceil(8 / radius), 1), 32)  # samples a pixel along one axis, so that small ones are round too
    at = (np.arange(fine, dtype=np.float32) + 0.5) / fine - 0.5
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] + at).reshape(-1, 1) - row
    x = (np.arange(left, right, dtype=np.float32)[:, None] + at).reshape(1, -1) - column
    distance = np.hypot(y, x) / radius
    core = _smoothstep((_CORE_EDGE - distance) / (_CORE_EDGE - _CORE_FLAT))
    rim = np.sin(np.clip((distance - _RIM_START) / (1 - _RIM_START), 0, 1) * math.pi) ** 2
    core, rim = (part.reshape(bottom - top, fine, right - left, fine).mean((1, 3)) for part in (core, rim))
    image[top:bottom, left:right] += contrast * (rim * (core.sum() / rim.sum()) - core)
