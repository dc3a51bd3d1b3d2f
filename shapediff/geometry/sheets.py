"""Many pictures on one sheet, and pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shapediff.files import replaced_file
from shapediff.geometry.camera import BACKGROUND, Picture, to_bytes

_INK = (70, 74, 84)
NUM_COLOURS = 256
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) // 4 - 2


def blank(size: int) -> Picture:
    """A picture (size, size, 3) of nothing, for a shape that is empty."""
    return np.tile(to_bytes(BACKGROUND), (size, size, 1))


def contact_sheet(
    pictures: Sequence[Picture],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
) -> Picture:
    """Pictures of one size in rows of `columns`, each with its caption below. Raises ValueError where there is none.

    `rows`, a name for each picture, starts a new row at each new name and writes it above, in place of captions below.
    """
    from PIL import Image, ImageDraw

    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    height, width = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    strip = _strip(width) if captions or rows else 0
    groups = _groups(rows) if rows else [range(len(pictures))]
    num_rows = sum(-(-len(group) // columns) for group in groups)
    total = num_rows * (height + (strip if captions else 0)) + (len(groups) * strip if rows else 0)
    sheet = Image.new("RGB", (columns * width, total), tuple(to_bytes(BACKGROUND).tolist()))
    draw, font, y = ImageDraw.Draw(sheet), _font(strip), 0
    for group in groups:
        if rows:
            name = _fitted(rows[group[0]], columns * width - strip, draw, font)
            draw.text((strip / 2, y + strip * 0.6), name, fill=_INK, anchor="lm", font=font)
            y += strip
        for start in range(0, len(group), columns):
            for column, i in enumerate(group[start : start + columns]):
                sheet.paste(Image.fromarray(pictures[i]), (column * width, y))
                if captions:
                    middle = (column * width + width / 2, y + height + strip / 2)
                    draw.text(middle, _fitted(captions[i], width, draw, font), fill=_INK, anchor="mm", font=font)
            y += height + (strip if captions else 0)
    return np.asarray(sheet)


def save_png(picture: Picture, path: str | Path) -> None:
    """Write a PNG beside its place, then at once."""
    from PIL import Image

    with replaced_file(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def save_gif(pictures: Sequence[Picture], path: str | Path, *, seconds: float) -> None:
    """Write pictures of one size as a GIF that runs for ever, once in `seconds`.

    All share one palette, and shades between its colours are mixed by a pattern that stands still: nothing flickers.
    """
    from PIL import Image

    if not pictures:
        raise ValueError("a moving picture needs at least one picture")
    frames = [Image.fromarray(_patterned(picture)) for picture in pictures]
    palette = _palette(pictures[:: -(-len(pictures) // 6)])
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = max(round(100 * seconds / len(flat)) * 10, 20)  # a GIF counts hundredths of a second
    with replaced_file(path) as partial:
        flat[0].save(
            partial, format="GIF", save_all=True, append_images=flat[1:], duration=milliseconds, loop=0, optimize=False
        )


def _palette(pictures: Sequence[Picture]) -> Any:
    """A picture whose palette suits all of these; colours count by the root of their area, or small areas would get none."""
    from PIL import Image

    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    seen, counts = np.unique(pixels & 0xFE, axis=0, return_counts=True)
    weighted = np.repeat(seen, np.ceil(np.sqrt(counts)).astype(int), axis=0)
    own = np.tile(to_bytes(BACKGROUND), (len(weighted) // 64 + 1, 1))
    colours = np.concatenate([weighted, own])[None]
    return Image.fromarray(colours).quantize(NUM_COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=1)


def _patterned(picture: Picture) -> Picture:
    """The picture with the least steps of Bayer's pattern (1973) on it, the background left even."""
    height, width = picture.shape[:2]
    pattern = np.tile(_BAYER, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    is_even = (picture == to_bytes(BACKGROUND)).all(-1, keepdims=True)
    return np.where(is_even, picture, np.clip(picture + pattern, 0, 255)).astype(np.uint8)


def _groups(names: Sequence[str]) -> list[range]:
    """Runs of equal neighbours."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(names)], strict=True)]


def _strip(width: int) -> int:
    """The height in pixels of a line of text under or over pictures of this width."""
    return max(18, width // 9)


def _font(strip: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=max(10, int(0.6 * strip)))


def _fitted(text: str, width: float, draw: Any, font: Any) -> str:
    """The text on one line, cut where it would not fit."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
