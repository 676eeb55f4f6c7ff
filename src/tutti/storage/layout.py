"""The files of a checkpoint or an export by name: the one list that every writer and reader uses.

model.safetensors      weights; ema.safetensors their moving average
objective.safetensors  heads of the terms, if they have any state; objective_ema.safetensors likewise
optimizer.pt  rng.pt   moments of the optimisers; random states
shards/                instead of the .safetensors files and the tensors of optimizer.pt, if each rank has
                       written its own shares (see tutti.storage.shards)
config.yaml            the run's config
spec.json  normalizer.json  tokenizer.json     what the policy must know of the data
state.json             manifest of a checkpoint: step, loader position, metrics, versions, checksums
export.json            manifest of an export, in place of state.json
"""

from __future__ import annotations

import re
from typing import Literal

Weights = Literal["ema", "raw"]
WEIGHTS: dict[Weights, str] = {"ema": "ema.safetensors", "raw": "model.safetensors"}
OPTIMIZER, RNG = "optimizer.pt", "rng.pt"
SHARDS, SHARD_INDEX = "shards", "index.json"
SHARD_FILE = re.compile(r"rank-\d{5,9}\.safetensors")
CONFIG = "config.yaml"
SPEC, NORMALIZER, TOKENIZER = "spec.json", "normalizer.json", "tokenizer.json"
DATA_FILES = (SPEC, NORMALIZER, TOKENIZER)
"""What a checkpoint says of its data; a resumed or forked run must have the same."""
POLICY_FILES = (CONFIG, *DATA_FILES)
"""What a policy reads beside the weights."""
STATE, EXPORT = "state.json", "export.json"
"""The manifests: of a checkpoint, its last file to be written; and of an export."""
BEST_MARK = "best.json"
"""Beside the checkpoints of a run: step, metric, mode and value of the best one."""
