"""Contact sheets: many pictures on one page, each over its text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(images: torch.Tensor, texts: Sequence[str] = (), columns: int = 8, cell: int = 256) -> Image.Image:
    """A page of pictures (B, 3, H, W) uint8, `columns` wide, each `cell` pixels across, with its text below it."""
    strip = 56 if texts else 0
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + strip + 8) + 8), (250, 250, 250))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for i, picture in enumerate(images.cpu()):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * (cell + strip + 8)
        tile = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
        page.paste(tile if tile.width == cell else tile.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        if texts:
            lines = textwrap.wrap(texts[i], max(8, cell // 6))[:3]
            draw.multiline_text((x, y + cell + 3), "\n".join(lines), fill=(30, 30, 30), font=font, spacing=2)
    return page
