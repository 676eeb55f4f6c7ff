"""tensorflow_datasets' own pipeline, in its environment: what benchmarks/rlds_loader.py compares with.

It is started by rlds_loader.py with the Python of that environment: FOLDER ROWS OUT writes the pictures of
the first ROWS steps as a file; FOLDER SECONDS prints samples and CPU seconds as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

BATCH, VIEWS = 16, ("image_0", "image_1")


def steps(folder: str) -> Any:
    """The steps of all episodes one after the other, as users of RLDS sets flatten them, in one thread."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    reading = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    episodes = tfds.builder_from_directory(folder).as_dataset(
        split="train", read_config=reading, shuffle_files=False
    )
    found = episodes.flat_map(lambda episode: episode["steps"])
    options = tf.data.Options()
    options.autotune.enabled, options.threading.private_threadpool_size = False, 1
    return found.with_options(options)


def main(folder: str, amount: str, out: str = "") -> None:
    """Pictures, or a rate."""
    if out:
        rows = [step["observation"] for step in tfds.as_numpy(steps(folder).take(int(amount)))]
        np.save(out, np.stack([[row[view] for view in VIEWS] for row in rows]))
        return
    batches = iter(tfds.as_numpy(steps(folder).repeat().batch(BATCH)))
    next(batches)
    began, count = time.process_time(), 0
    while (spent := time.process_time() - began) < float(amount):
        count += len(next(batches)["action"])
    print(json.dumps({"samples": count, "seconds": spent}))


if __name__ == "__main__":
    main(*sys.argv[1:])
