"""A contact sheet: what the studies look like, beside what a host sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .anatomy import BONES
from .questions import ask
from .studies import CHANGES, PhantomConfig, Seed, Study, Visit, check_seed, draw_study

LARGE = (10.0, 20.0)  # radii that the small view shows too
VIEW = 42  # pixels a side of the host's view
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
    "DroidSansFallbackFull.ttf",
)

_TILE, _GAP, _LINE = 256, 8, 15
_PAPER, _INK, _FAINT, _MARK = (250, 250, 248), (20, 20, 20), (110, 110, 110), (255, 196, 0)


class _Tile(NamedTuple):
    title: str
    picture: Image.Image


def find_cjk_font(font: str | Path | None = None) -> ImageFont.FreeTypeFont | None:
    """Open a font with Chinese characters: the one given, else the first of ``CJK_FONTS`` that is installed, else None.

    Raises:
        ValueError: the font given is no font file.
    """
    for name in CJK_FONTS if font is None else (str(font),):
        try:
            return ImageFont.truetype(name, 12)
        except OSError:
            if font is not None:
                raise ValueError(f"hia.phantom: font must be a TrueType or OpenType file, got {font}") from None
    return None


def draw_sheet(
    seed: Seed = 0, config: PhantomConfig | None = None, font: ImageFont.FreeTypeFont | None = None
) -> Image.Image:
    """Draw the contact sheet.

    A row for each bone: a lesion of the config's radii unmarked, marked, and in the host's 42 x 42 view; the same with
    a lesion of 10 to 20 pixels' radius. Then a row for each change: both visits with marks, and both visits and their
    views with a large lesion. The questions and answers are under each row.

    Args:
        seed: of the studies.
        config: of the small lesions; None means ``PhantomConfig()``.
        font: for Chinese; None leaves Chinese out, because PIL's own font has none.

    Returns:
        An RGB image about 1,600 pixels wide.
    """
    config = config or PhantomConfig()
    large = replace(config, radius=LARGE)
    parts = check_seed(seed)
    strips = []
    for number, bone in enumerate(BONES):
        studies = [draw_study((*parts, number), each, lesion=True, bone=bone) for each in (config, large)]
        tiles = [tile for study, size in zip(studies, ("small", "large")) for tile in _bone_tiles(study, size)]
        strips.append(_strip(tiles, _texts(studies[0], ("description", "disease", "location", "bone"), font)))
    for number, change in enumerate(CHANGES):
        seeds = (*parts, len(BONES) + number)
        small, big = (draw_study(seeds, each, visits=2, change=change) for each in (config, large))
        strips.append(_strip(_change_tiles(small, big), _texts(small, ("comparative",), font)))
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), _PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _bone_tiles(study: Study, size: str) -> list[_Tile]:
    visit, bone = study.visits[0], study.bone
    height, width = visit.radiograph.pixels.shape[:2]
    return [
        _Tile(f"{bone}, {size} lesion, {height} x {width}", _picture(visit)),
        _Tile(f"marked: {study.quadrant}, radius {visit.lesions[0].radius:.1f} px", _picture(visit, marked=True)),
        _Tile(f"the {VIEW} x {VIEW} view", _view(visit)),
    ]


def _change_tiles(small: Study, large: Study) -> list[_Tile]:
    found = []
    for number, visit in enumerate(small.visits, start=1):
        radius = f"radius {visit.lesions[0].radius:.1f} px" if visit.lesions else "no lesion"
        found.append(_Tile(f"{small.change}, visit {number}: {radius}", _picture(visit, marked=True)))
    found += [_Tile(f"large, visit {number}", _picture(visit)) for number, visit in enumerate(large.visits, start=1)]
    return found + [
        _Tile(f"its {VIEW} x {VIEW} view {number}", _view(visit)) for number, visit in enumerate(large.visits, start=1)
    ]


def _picture(visit: Visit, marked: bool = False) -> Image.Image:
    """Draw a tile of the radiograph; marked, each lesion has a circle around it that leaves it to be seen."""
    picture = visit.radiograph.to_pil()
    factor = _TILE / max(picture.size)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)
    if marked:
        draw = ImageDraw.Draw(picture)
        for lesion in visit.lesions:
            x, y, r = (lesion.column + 0.5) * factor, (lesion.row + 0.5) * factor, lesion.radius * factor + 6
            draw.ellipse((x - r, y - r, x + r, y + r), outline=_MARK, width=1)
    return picture


def _view(visit: Visit) -> Image.Image:
    view = visit.radiograph.resized(VIEW, VIEW).to_pil()
    return view.resize((_TILE, _TILE), Image.Resampling.NEAREST)


def _texts(study: Study, tasks: Sequence[str], font: ImageFont.FreeTypeFont | None) -> list[tuple[str, Any]]:
    """List lines of text, each with its font."""
    latin = ImageFont.load_default(12)
    lines: list[tuple[str, Any]] = []
    for task in tasks:
        question = ask(study, task)
        lines.append((f"{task}:  {question.text}  {question.answer}", latin))
        if font is not None:
            question = ask(study, task, "zh")
            lines.append((f"{question.text}  {question.answer}", font))
    return lines


def _strip(tiles: Sequence[_Tile], texts: Sequence[tuple[str, Any]]) -> Image.Image:
    """Draw one row of the sheet: titles, pictures, lines of text in columns of two."""
    width = len(tiles) * (_TILE + _GAP) + _GAP
    rows = (len(texts) + 1) // 2
    strip = Image.new("RGB", (width, _GAP + _LINE + _TILE + _GAP // 2 + rows * (_LINE + 2) + _GAP), _PAPER)
    draw = ImageDraw.Draw(strip)
    latin = ImageFont.load_default(12)
    for number, tile in enumerate(tiles):
        left = _GAP + number * (_TILE + _GAP)
        draw.text((left, _GAP - 2), tile.title, fill=_FAINT, font=latin)
        strip.paste(tile.picture, (left, _GAP + _LINE))
    for number, (text, face) in enumerate(texts):
        left = _GAP + (number % 2) * (width // 2)
        draw.text((left, _GAP + _LINE + _TILE + _GAP // 2 + number // 2 * (_LINE + 2)), text, fill=_INK, font=face)
    return strip
