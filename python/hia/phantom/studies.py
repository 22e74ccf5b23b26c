"""Synthetic studies: what is drawn, how it is asked for, and the radiographs."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..images.radiograph import Radiograph
from .anatomy import BONES, REFERENCE_SIDE, Form, Texture, add_lesion, bone_thickness, draw_background, draw_texture

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
CHANGES = ("new", "gone", "grown", "shrunk", "unchanged")
MARGIN = 16.0  # the centre of a lesion keeps this distance from both midlines, its radius if that is more
GROWTH = (1.6, 2.2)  # the factor between the radii of a lesion that grew or shrank

_DRIFT = 2.0  # how far a second visit may be shifted, in units
_SMALLEST_SIDE = 16
_LARGEST_RADIUS = 24.0
_CANDIDATES = 128

Seed = int | tuple[int, ...]


@dataclass(frozen=True)
class PhantomConfig:
    """Parameters of how studies look.

    Attributes:
        size: (height, width) in pixels, or one number for both; at least 16.
        bits: 8 to 16; 8 gives uint8, more gives uint16 below 2**bits.
        radius: (least, most) radius of a lesion at a shorter side of 192 pixels; it scales with the image. A lesion
            that grows or shrinks does so within them where they differ by a factor of 1.6 or more; where they don't,
            the larger radius is 1.6 times the smaller one.
        contrast: how far a lesion's core lies below its surroundings, as a fraction of full scale; at most 0.6.
        noise: standard deviation of the noise of each pixel, as a fraction of full scale.

    Raises:
        TypeError: another type. ValueError: out of range.
    """

    size: int | tuple[int, int] = (REFERENCE_SIDE, REFERENCE_SIDE)
    bits: int = 12
    radius: tuple[float, float] = (1.5, 3.25)
    contrast: float = 0.45
    noise: float = 0.02

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if not all(_is_int(side) for side in sides):
            raise TypeError(f"hia.phantom: size must be an integer or a pair of them, got {self.size!r}")
        if (isinstance(self.size, tuple) and len(sides) != 2) or min(sides) < _SMALLEST_SIDE:
            raise ValueError(
                f"hia.phantom: size must be (height, width) of at least {_SMALLEST_SIDE} pixels, got {self.size!r}"
            )
        if not _is_int(self.bits):
            raise TypeError(f"hia.phantom: bits must be an integer, got {self.bits!r}")
        if not 8 <= self.bits <= 16:
            raise ValueError(f"hia.phantom: bits must be 8 to 16, got {self.bits}")
        if not isinstance(self.radius, tuple) or len(self.radius) != 2 or not all(map(_is_number, self.radius)):
            raise TypeError(f"hia.phantom: radius must be a pair of numbers (least, most), got {self.radius!r}")
        if not 0.5 <= self.radius[0] <= self.radius[1] <= _LARGEST_RADIUS:
            raise ValueError(
                f"hia.phantom: radius must be (least, most) within 0.5 and {_LARGEST_RADIUS:g}, got {self.radius}"
            )
        for name, most in (("contrast", 0.6), ("noise", 0.25)):
            value = getattr(self, name)
            if not _is_number(value):
                raise TypeError(f"hia.phantom: {name} must be a number, got {value!r}")
            if not 0 <= value <= most:
                raise ValueError(f"hia.phantom: {name} must be 0 to {most}, got {value}")

    @property
    def shape(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def scale(self) -> float:
        """Return the pixels per unit: the shorter side over 192."""
        return min(self.shape) / REFERENCE_SIDE


@dataclass(frozen=True)
class Lesion:
    """A lucent core with a sclerotic rim.

    Attributes:
        row, column: the centre in pixels of the image; whole numbers are pixel centres.
        radius: where the rim ends, in pixels of the image.
    """

    row: float
    column: float
    radius: float


@dataclass(frozen=True)
class Visit:
    """One radiograph and what is in it.

    Attributes:
        radiograph: pixels [H, W, 1], uint8 for 8 bits, else uint16 below 2**bits; window (0, 2**bits - 1).
        lesions: one or none.
    """

    radiograph: Radiograph
    lesions: tuple[Lesion, ...]

    def mask(self) -> Tensor:
        """Mark the lesions' pixels: [H, W] bool. A lesion smaller than a pixel marks the one that holds its centre."""
        height, width = self.radiograph.pixels.shape[:2]
        mask = torch.zeros(height, width, dtype=torch.bool)
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        for lesion in self.lesions:
            mask |= (rows - lesion.row) ** 2 + (columns - lesion.column) ** 2 <= lesion.radius**2
            mask[round(lesion.row), round(lesion.column)] = True
        return mask


@dataclass(frozen=True)
class Study:
    """The visits of one patient that never was.

    Attributes:
        visits: one or two.
        bone: one of ``BONES``.
        change: one of ``CHANGES`` for two visits, None for one.
    """

    visits: tuple[Visit, ...]
    bone: str
    change: str | None

    @property
    def quadrant(self) -> str | None:
        """Tell where the lesion is in the image, of the last visit that has one; None without a lesion."""
        for visit in reversed(self.visits):
            for lesion in visit.lesions:
                height, width = visit.radiograph.pixels.shape[:2]
                lower, right = lesion.row > (height - 1) / 2, lesion.column > (width - 1) / 2
                return QUADRANTS[2 * lower + right]
        return None


class _Site(NamedTuple):
    """A lesion in units, before any shift, with its radius at each visit; 0 where it is absent."""

    y: float
    x: float
    radii: tuple[float, ...]


def draw_study(
    seed: Seed,
    config: PhantomConfig | None = None,
    *,
    visits: int = 1,
    lesion: bool | None = None,
    change: str | None = None,
    quadrant: str | None = None,
    bone: str | None = None,
) -> Study:
    """Draw a study that follows from its arguments alone. What is None is drawn from the seed.

    The streams of random numbers don't depend on each other: with one seed, a study with a lesion and one without
    have the same bones, the same texture and the same noise.

    Args:
        seed: an integer or a tuple of them, of any size and sign; different ones give different studies.
        config: sizes, bits, radii, contrast, noise; None means ``PhantomConfig()``.
        visits: 1 or 2. The second has its own noise, exposure, and a shift of one to two 192nds of the shorter side.
        lesion: whether there is one. With two visits, True or None means in at least one of them; False leaves both
            without, which is the change "unchanged".
        change: for two visits, one of ``CHANGES``.
        quadrant: of the image (not of the patient), one of ``QUADRANTS``.
        bone: one of ``BONES``.

    Raises:
        TypeError: another type of seed or config. ValueError: an unknown name, or arguments that contradict.
    """
    config = PhantomConfig() if config is None else config
    _check_study(config, visits, lesion, change, quadrant, bone)
    form = _draw_form(_generator(seed, "form"), bone)
    rng = _generator(seed, "lesion")
    drawn = rng.integers([2, len(QUADRANTS), len(CHANGES)]).tolist()  # always all, so that a given one moves nothing
    present = (visits == 2 or bool(drawn[0])) if lesion is None else lesion
    if visits == 2:
        change = change or (CHANGES[drawn[2]] if present else "unchanged")
    site = _draw_site(rng, config, form, quadrant or QUADRANTS[drawn[1]], change)
    textures = _draw_textures(_generator(seed, "texture"), config)
    drawn_visits = tuple(
        _draw_visit(_generator(seed, f"visit {index}"), index, config, form, textures, site if present else None)
        for index in range(visits)
    )
    return Study(drawn_visits, form.bone, change)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the argument, unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"hia.phantom: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_seed(seed: Seed) -> tuple[int, ...]:
    """Return the seed as a tuple, or raise a TypeError."""
    parts = seed if isinstance(seed, tuple) else (seed,)
    if not parts or not all(map(_is_int, parts)):
        raise TypeError(f"hia.phantom: seed must be an integer or a tuple of them, got {seed!r}")
    return parts


def _check_study(
    config: PhantomConfig,
    visits: int,
    lesion: bool | None,
    change: str | None,
    quadrant: str | None,
    bone: str | None,
) -> None:
    if not isinstance(config, PhantomConfig):
        raise TypeError(f"hia.phantom: config must be a PhantomConfig, got {type(config).__name__}")
    if visits not in (1, 2):
        raise ValueError(f"hia.phantom: visits must be 1 or 2, got {visits!r}")
    if lesion not in (None, True, False):
        raise ValueError(f"hia.phantom: lesion must be None, True or False, got {lesion!r}")
    for name, value, choices in (("change", change, CHANGES), ("quadrant", quadrant, QUADRANTS), ("bone", bone, BONES)):
        if value is not None:
            check_choice(name, value, choices)
    if change is not None and visits == 1:
        raise ValueError(f"hia.phantom: change must be None for one visit, got {change!r}; visits=2 has one")
    if lesion is False and change not in (None, "unchanged"):
        raise ValueError(f"hia.phantom: change must be unchanged without a lesion, got {change!r}")
    if lesion is False and quadrant is not None:
        raise ValueError(f"hia.phantom: quadrant must be None without a lesion, got {quadrant!r}")


def _generator(seed: Seed, purpose: str) -> np.random.Generator:
    """Start a stream of its own for each purpose. Hashing the text keeps (1, 0), 1 and 2**32 apart; NumPy's own pool of
    32-bit words doesn't."""
    text = f"{','.join(map(str, check_seed(seed)))};{purpose}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def _draw_form(rng: np.random.Generator, bone: str | None) -> Form:
    drawn = BONES[int(rng.integers(len(BONES)))]
    return Form(bone or drawn, *rng.uniform(-1, 1, len(Form._fields) - 1).tolist())


def _draw_textures(rng: np.random.Generator, config: PhantomConfig) -> tuple[Texture, ...]:
    """Draw trabeculae, which run along the bone: their lattice is finer across than down."""
    height, width = (side / config.scale for side in config.shape)
    pitches = ((4.5, 2.0), (14.0, 9.0), (22.0, 12.0))
    return tuple(draw_texture(rng, pitch, (height, width)) for pitch in pitches)


def _draw_site(rng: np.random.Generator, config: PhantomConfig, form: Form, quadrant: str, change: str | None) -> _Site:
    radii = _draw_radii(rng, config, change)
    # a shift must carry the centre neither into the margin nor the rim out of the image
    near = max(MARGIN, *radii) + _DRIFT
    far = [side / config.scale / 2 - near for side in config.shape]
    share = rng.random((2, _CANDIDATES))
    half_y, half_x = far[0], max(near, min(far[1], 66.0))  # within the soft tissue, were there no bone
    y = (near + share[0] * (half_y - near)) * (1 if "lower" in quadrant else -1)
    x = (near + share[1] * (half_x - near)) * (1 if "right" in quadrant else -1)
    reach = max(radii) * np.array([[0, 0, 0, 1, -1], [0, 1, -1, 0, 0]])[:, :, None]
    depth = bone_thickness(form, y + reach[0], x + reach[1])  # [5, candidates]: the centre and four points of the rim
    best = int(np.argmax((depth > 0.2).sum(0) + 5 * (depth[0] > 0.2)))
    return _Site(float(y[best]), float(x[best]), radii)


def _draw_radii(rng: np.random.Generator, config: PhantomConfig, change: str | None) -> tuple[float, ...]:
    least, most = config.radius
    share, growth = rng.random(2).tolist()
    if change in ("grown", "shrunk"):
        small = least + share * max(most / GROWTH[0] - least, 0)
        largest = max(min(GROWTH[1], most / small), GROWTH[0])
        large = small * (GROWTH[0] + growth * (largest - GROWTH[0]))
        return (small, large) if change == "grown" else (large, small)
    radius = least + share * (most - least)
    return {"new": (0.0, radius), "gone": (radius, 0.0)}.get(change or "", (radius, radius))


def _draw_visit(
    rng: np.random.Generator,
    index: int,
    config: PhantomConfig,
    form: Form,
    textures: tuple[Texture, ...],
    site: _Site | None,
) -> Visit:
    height, width = config.shape
    gain, offset, curve, angle, distance = rng.uniform(-1, 1, 5).tolist()
    length = (1.5 + 0.5 * distance) * (index > 0)  # of the shift
    down, across = length * math.sin(math.pi * angle), length * math.cos(math.pi * angle)
    y = ((np.arange(height) + 0.5 - height / 2) / config.scale - down).astype(np.float32)
    x = ((np.arange(width) + 0.5 - width / 2) / config.scale - across).astype(np.float32)
    grey = draw_background(form, textures, y, x)
    grey = (1 + 0.05 * gain) * (grey + 0.1 * curve * grey * (1 - grey)) + 0.01 * offset  # exposure and the film's curve
    lesions: tuple[Lesion, ...] = ()
    if site is not None and site.radii[index] > 0:
        row = (site.y + down) * config.scale + (height - 1) / 2
        column = (site.x + across) * config.scale + (width - 1) / 2
        lesions = (Lesion(row, column, site.radii[index] * config.scale),)
        add_lesion(grey, row, column, lesions[0].radius, config.contrast)
    if config.noise:
        grey += rng.standard_normal((height, width), dtype=np.float32) * np.float32(config.noise)
    top = 2**config.bits - 1
    levels = np.rint(np.clip(grey, 0, 1) * top).astype(np.uint8 if config.bits == 8 else np.uint16)
    return Visit(Radiograph(torch.from_numpy(levels)[..., None], (0.0, float(top))), lesions)
