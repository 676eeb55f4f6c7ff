"""Whether the videos of a data set are as long as their episodes, by what their headers say."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path

import numpy as np

from tutti.data.formats.chosen import TOLERANCE
from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.lerobot.metadata import LeRobotMeta
from tutti.data.formats.lerobot.video import frames_and_end
from tutti.errors import UserError

LOOKED_AT = 256
"""Videos of a view whose headers are read when a data set is opened, evenly spread. Whether others have too
few frames is seen when they are decoded."""
_READERS = 4


def check_videos(meta: LeRobotMeta, views: tuple[str, ...]) -> Iterator[str]:
    """Remarks on views whose videos have more frames than the episodes have rows, such as a take that was
    discarded: frames are taken by their times, so these are passed over.

    Raises: UserError naming the episodes of a video that has fewer frames than they have rows, or ends before
    one of them does.
    """
    of_file: dict[Path, list[int]] = {}

    def look(path: Path) -> tuple[int, float]:
        try:
            return frames_and_end(path)
        except UserError as error:
            raise UserError(f"{error}{meta.or_leave_out(of_file[path])}") from error

    for view in views:
        if (table := meta.videos.get(view)) is None:
            continue
        of_file.clear()
        for episode, path in enumerate(table.paths):
            of_file.setdefault(path, []).append(episode)
        files = [path for path, episodes in of_file.items() if meta.kept[episodes].any()]
        places = np.unique(np.linspace(0, len(files) - 1, LOOKED_AT).round().astype(int)).tolist()
        chosen = [files[place] for place in places]
        longer = 0
        with ThreadPoolExecutor(_READERS) as pool:
            for path, (frames, end) in zip(chosen, pool.map(look, chosen), strict=True):
                episodes = of_file[path]
                rows = int(meta.lengths[episodes].sum())
                late = table.to_timestamp[episodes] - max(0.5, meta.tolerance) / meta.info.fps > end
                ends = np.isfinite(table.to_timestamp[episodes])  # else the whole file is the episode's
                bad = list(compress(episodes, late & ends))
                # With times by a clock the nearest frame is taken, as far as that is allowed.
                bad = bad or episodes * (0 < frames < rows and meta.tolerance <= TOLERANCE)
                if bad := [episode for episode in bad if meta.kept[episode]]:
                    raise data_error(
                        f"{path}: the video has {frames} frames and ends at {end:.4g} s: too few for "
                        f"episode{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:20]))} of {meta.folder}.",
                        expected=f"at least {rows} frames, as many as rows",
                        cure=COPY_AGAIN + meta.or_leave_out(bad),
                    )
                longer += frames > rows
        if longer:
            yield (
                f"{longer} of {len(chosen)} videos of {view} have more frames than their episodes have rows; "
                "frames are taken by their times, the others are passed over"
            )
