"""int8: an ONNX graph whose matrix products are of bytes, and how far its actions are off."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tutti.serving.exports.graph import EXACT, INPUTS, INT8, example
from tutti.serving.policy import Policy
from tutti.types import UserError

EXAMPLES = 64
PRODUCTS = ["MatMul", "Gemm"]


def quantised(graph: bytes) -> bytes:
    """The graph with weights in 7 bits of a byte, a scale for each channel, and inputs that are rounded to 8
    bits as they come (dynamic quantisation). Convolutions stay as they are.

    With 8 bits of weight a processor without VNNI would overflow in silence; so it computes the same.

    Raises: UserError where onnxruntime is missing.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ModuleNotFoundError as error:
        raise UserError(f"--int8 needs {error.name}. Install it: pip install 'tutti-vla[onnx]'") from error
    before = logging.root.level
    with tempfile.TemporaryDirectory() as folder:
        exact, small = Path(folder) / EXACT, Path(folder) / INT8
        exact.write_bytes(graph)
        try:
            logging.root.setLevel(logging.ERROR)  # advice about pictures, given through the root logger
            quantize_dynamic(
                *(exact, small, PRODUCTS),
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.root.setLevel(before)
        return small.read_bytes()


def error_of(policy: Policy, exact: bytes, small: bytes) -> dict[str, Any]:
    """|a_int8 - a| over max - min of the action's dimension in the training data: its mean and largest value
    over `EXAMPLES` pictures of noise with states near the mean and random tokens."""
    import onnxruntime

    given = {name: one.numpy() for name, one in zip(INPUTS, example(policy, EXAMPLES), strict=True)}
    providers = ["CPUExecutionProvider"]
    first, second = (
        onnxruntime.InferenceSession(graph, providers=providers).run(None, given)[0]
        for graph in (exact, small)
    )
    stats = policy.normalizer.stats[policy.model.spec.embodiments[0]].action
    width = np.where(stats.moves, stats.max - stats.min, 1.0)
    apart = np.abs(np.asarray(second) - np.asarray(first)) / width
    return {"mean": float(apart.mean()), "largest": float(apart.max()), "examples": EXAMPLES}
