"""A picture of a data set starts no program and fills no memory."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fixtures import squares_data
from fixtures.hostile import bounded, one_screen
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.types import UserError


def picture(form: str, size: tuple[int, int] = (32, 32)) -> bytes:
    """The bytes of a picture in another form than its data set says."""
    buffer = io.BytesIO()
    if form == "PostScript":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n"
    if form in ("bomb", "huge"):  # the header alone: more must not be looked at
        edge = 9_000 if form == "bomb" else 2**31 - 1
        data = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
        end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        return b"\x89PNG\r\n\x1a\n" + chunk + end
    Image.new("RGB", size).save(buffer, form)
    content = buffer.getvalue()
    return content[:60] if form == "JPEG" else content


@pytest.mark.parametrize("form", ["PostScript", "bomb", "huge", "GIF", "TIFF", "BMP", "PPM", "JPEG"])
def test_a_picture_of_another_form_is_refused(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Pillow would start Ghostscript for one, and fill the memory for another."""
    canary, tools = tmp_path / "canary", tmp_path / "bin"
    tools.mkdir()
    for name in ("gs", "gswin64c"):
        (tools / name).write_text(f"#!/bin/sh\nmkdir {canary}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    data = shutil.copytree(template / "data", tmp_path / "data")
    (file,) = (data / "data").glob("*/*.parquet")
    table = pq.read_table(file)
    view = squares_data.VIEWS[0]
    rows = table[view].to_pylist()
    rows[3]["bytes"] = picture(form)
    place = table.schema.get_field_index(view)
    spoilt = pa.array(rows, table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), spoilt), file)
    store = LeRobotStore(data)
    with bounded(), pytest.raises(UserError, match="frame row 3") as caught:
        store.frames(view, np.arange(6))
    one_screen(str(caught.value))
    assert view in str(caught.value) and not canary.exists()
