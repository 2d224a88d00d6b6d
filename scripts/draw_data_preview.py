"""Draws docs/images/data_preview.png: the coloured preview of one row, as a terminal shows it.

    python scripts/draw_data_preview.py CONFIG [key=value ...]

Needs Pillow, which matplotlib brings, and uses the monospaced font that matplotlib carries.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "data_preview.png"
WIDTH, SIZE, MARGIN = 118, 15, 14
PAPER, INK = (24, 26, 31), (222, 222, 222)
STYLES = {"0": (INK, None), "2": ((150, 150, 150), None), "30;42": ((0, 0, 0), (80, 185, 105)),
          "97;41": ((255, 255, 255), (190, 50, 50))}  # fmt: skip


def main(words: list[str]) -> None:
    """Run the command with colours and draw what it prints."""
    command = [sys.executable, "-m", "llamafactory", "data", "preview", *words]
    environment = os.environ | {"FORCE_COLOR": "1"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    draw(shown.rstrip("\n"), TARGET)


def draw(text: str, target: Path) -> None:
    """Draw text with ANSI colours, a line at a time; long lines are wrapped."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")), SIZE)
    cell, height = font.getlength("M"), SIZE + 5
    lines = [line for whole in text.split("\n") for line in wrapped(whole)]
    size = (int(2 * MARGIN + WIDTH * cell), 2 * MARGIN + height * len(lines))
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        top, column = MARGIN + number * height, 0
        for style, part in line:
            ink, background = STYLES[style]
            left = MARGIN + column * cell
            if background:
                pen.rectangle((left, top, left + len(part) * cell - 1, top + height - 1), fill=background)
            pen.text((left, top + 1), part, font=font, fill=ink)
            column += len(part)
    image.quantize(32).save(target, optimize=True)


def wrapped(line: str) -> list[list[tuple[str, str]]]:
    """A line as lines of at most WIDTH columns, each a list of (style, text)."""
    pieces = re.split(r"\x1b\[([\d;]+)m", line)
    styled = [("0", pieces[0]), *zip(pieces[1::2], pieces[2::2], strict=True)]
    styles = [style for style, part in styled for _ in part]
    plain = "".join(part for _, part in styled)
    lines: list[list[tuple[str, str]]] = []
    start = 0
    for part in textwrap.wrap(plain, WIDTH, drop_whitespace=False, replace_whitespace=False) or [""]:
        lines.append([(styles[start + place], letter) for place, letter in enumerate(part)])
        start += len(part)
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
