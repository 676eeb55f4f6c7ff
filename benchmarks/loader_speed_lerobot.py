"""LeRobot's own loader, in LeRobot's environment: what benchmarks/loader_speed.py compares with.

It is started by loader_speed.py with the Python of that environment, reads one JSON request a line and
answers one: {"set": folder, "idea": false, "rows": [...]} gives the pictures of these rows as a file, and
with "seconds" instead of "rows" how many samples it gave in how much CPU time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from lerobot.datasets.lerobot_dataset import LeRobotDataset

CHUNK, BATCH, SLOW_BATCH = 50, 16, 4


def one_column_views(self: Any, query_indices: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The idea of LeRobot's pull request 4314: a view of one column for each key, so that asking for the
    actions of a chunk does not read, and decode, all other columns of its rows."""
    views = self.__dict__.setdefault("_one_column", {})
    found: dict[str, torch.Tensor] = {}
    for key, rows in query_indices.items():
        if key not in self._meta.video_keys:
            if key not in views:
                views[key] = self.hf_dataset.select_columns(key)
            found[key] = torch.stack(views[key][rows][key])
    return found


def opened(folder: str, idea: bool) -> LeRobotDataset:
    """The data set with chunks of actions, as a policy asks for them."""
    fps = json.loads((Path(folder) / "meta" / "info.json").read_text())["fps"]
    times = {"action": [step / fps for step in range(CHUNK)]}
    found = LeRobotDataset("local/set", root=folder, delta_timestamps=times, video_backend="torchcodec")
    reader = found.reader if hasattr(found, "reader") else found._ensure_reader()
    if idea:
        reader._query_hf_dataset = one_column_views.__get__(reader, DatasetReader)
    return found


def timed(data: LeRobotDataset, seconds: float, seed: int) -> dict[str, float]:
    """Batches of a shuffled DataLoader in this process, for about so much CPU time."""
    order = torch.Generator().manual_seed(seed)
    size = BATCH if data.meta.video_keys else SLOW_BATCH  # pictures in tables come a few a second
    loader = torch.utils.data.DataLoader(data, batch_size=size, shuffle=True, generator=order, num_workers=0)
    batches = iter(loader)
    next(batches)
    began, count = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            continue
        count += len(batch["action"])
    return {"samples": count, "seconds": spent}


def main() -> None:
    """Answers until there is no request left."""
    torch.set_num_threads(1)
    sets: dict[tuple[str, bool], LeRobotDataset] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["set"], bool(request["idea"])
        if key not in sets:
            sets[key] = opened(*key)
        data, answer = sets[key], dict[str, Any]()
        if "rows" in request:
            samples = [data[row] for row in request["rows"]]
            views = data.meta.camera_keys
            pictures = torch.stack([torch.stack([one[view] for view in views]) for one in samples])
            pictures = pictures.mul(255).round().byte() if pictures.is_floating_point() else pictures
            actions = torch.stack([one["action"] for one in samples])
            np.savez(request["out"], pictures=pictures.numpy(), actions=actions.numpy())
        else:
            answer = timed(data, request["seconds"], request["seed"])
        sys.__stdout__.write(json.dumps(answer) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    sys.stdout = sys.stderr
    main()
