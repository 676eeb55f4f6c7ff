"""A policy as one graph of tensors: torch.export's .pt2 and ONNX, for programs without Tutti.

    images uint8 (b, v, 3, s, s), state float32 (b, state), text int64 (b, l), text_mask bool (b, l)
    -> actions float32 (b, t, a)

State and actions are in data units. Pictures are resized before, texts are tokenised before; the batch is any
number from 1 on.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from tutti.models.decoders.fast import WritingDecoder
from tutti.serving.policy import Policy
from tutti.types import Observation, UserError

GraphKind = Literal["pt2", "onnx"]
EXACT, INT8 = "model.onnx", "model.int8.onnx"
OPSET = 20
INPUTS = ("images", "state", "text", "text_mask")
TRIED = 3
"""The batch of the example that the graph is traced with; another one is tried afterwards."""


class GraphPolicy(nn.Module):
    """`Policy.predict` of a batch, from pictures of the model's size and tokens on."""

    def __init__(self, policy: Policy) -> None:
        """Raises: UserError for a policy that is no graph."""
        super().__init__()
        if isinstance(policy.model.action, WritingDecoder):
            raise UserError(
                "model.action.kind is fast, which writes as many tokens as a chunk needs: no graph has a "
                "length that depends on values. Take `tutti serve`; the other decoders have a graph."
            )
        robots = list(policy.model.spec.embodiments)
        if len(robots) > 1:
            raise UserError(
                "this policy is of several robots, whose numbers are placed outside of the model. Take "
                "`tutti serve --robot NAME`."
            )
        if policy.prediction.place.conversion is not None:
            raise UserError(
                "this policy answers in the conventions of its robot, which are computed outside of the "
                "model. Take `tutti serve`, or train on data of one convention."
            )
        if policy.remembers:
            raise UserError(
                "this policy looks at earlier observations too, which a graph of one moment does not have. "
                "Take `policy.actor()` in Python, or train with data.history=[0]."
            )
        self.model, self.horizon = policy.model, policy.spec.horizon
        both = policy.normalizer.stats[robots[0]]
        self.state_center, self.state_scale = _buffers(*both.state.center_and_scale(policy.normalizer.kind))
        self.action_center, self.action_scale = _buffers(
            *both.action.center_and_scale(policy.normalizer.kind)
        )
        self.low, self.high = _buffers(*(policy.prediction.bounds or (np.array(-np.inf), np.array(np.inf))))

    def forward(
        self,
        images: UInt8[Tensor, "b v 3 h w"],
        state: Float[Tensor, "b s"],
        text: Int[Tensor, "b l"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b t a"]:
        """The actions in data units."""
        always = (
            torch.ones_like(state[:, :1], dtype=torch.bool) if state.shape[1] else text_mask[:, :1] | True
        )
        seen = Observation(
            images=images,
            image_mask=always.expand(-1, images.shape[1]),
            text=text,
            text_mask=text_mask,
            state=(state - self.state_center) / self.state_scale,
            state_mask=always[:, 0],
        )
        chunk = self.model.action.predict(self.model(seen))[:, : self.horizon].float()
        return torch.clamp(chunk * self.action_scale + self.action_center, self.low, self.high)


def _buffers(*values: np.ndarray) -> Iterator[Tensor]:
    return (nn.Buffer(torch.from_numpy(one.astype(np.float32))) for one in values)


def example(policy: Policy, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of noise for a graph: pictures, states near the mean, token ids with a mask."""
    spec, random = policy.spec, torch.Generator().manual_seed(batch)
    size = (batch, len(spec.views), 3, spec.image_size, spec.image_size)
    stats = policy.normalizer.stats[policy.model.spec.embodiments[0]]
    mean = torch.from_numpy(stats.state.mean.astype(np.float32))
    lengths = torch.randint(1, spec.text_length + 1, (batch, 1), generator=random)
    return (
        torch.randint(0, 256, size, dtype=torch.uint8, generator=random),
        mean + 0.1 * torch.randn(batch, spec.state_dim, generator=random),
        torch.randint(0, spec.vocab_size, (batch, spec.text_length), generator=random),
        torch.arange(spec.text_length)[None] < lengths,
    )


def graphs_of(policy: Policy, kinds: Collection[GraphKind]) -> dict[str, bytes]:
    """The content of model.pt2 and model.onnx.

    Raises: UserError for a policy that is no graph, or where packages are missing. A graph whose batch is not
    free is an error of torch: another batch than that of the example is tried.
    """
    if not kinds:
        return {}
    graph, made = GraphPolicy(policy).eval(), dict[str, bytes]()
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in INPUTS}
    with torch.no_grad(), _silent():
        program = torch.export.export(graph, example(policy, TRIED), dynamic_shapes=dynamic, strict=False)
        program.module()(*example(policy, TRIED + 2))  # a graph of one size would refuse it
        if "pt2" in kinds:
            file = io.BytesIO()
            torch.export.save(program, file)
            made["model.pt2"] = file.getvalue()
        if "onnx" in kinds:
            made[EXACT] = _onnx(program)
    return made


def _onnx(program: torch.export.ExportedProgram) -> bytes:
    try:
        import onnxscript  # noqa: F401  (what torch.onnx needs)
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX needs {error.name}. Install it: pip install 'tutti-vla[onnx]'") from error
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=INPUTS,
        output_names=["actions"],
        verbose=False,
    )
    assert made is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        made.save(path, external_data=False)
        return path.read_bytes()


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings of the exporters, which are about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
