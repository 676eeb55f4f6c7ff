"""A robot's data and questions about pictures train one model by one sum, which resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import pair_sets
from fixtures import squares_data as world
from fixtures.run_equality import Killed, differing
from fixtures.towers import READ, save_tokenizer, tf
from tutti.config.run_config import RunConfig
from tutti.nested_dicts import merge
from tutti.runs.build import build_training
from tutti.runs.label_shares import label_shares
from tutti.training.records import read_records
from tutti.types import UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Squares to go to, and pictures in which one colour prevails, most with a question and an answer."""
    home = tmp_path_factory.mktemp("sets")
    robot = world.write(home / "robot", world.episodes(6))
    (home / "pairs" / "pictures").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(pair_sets.pictures(24)):
        name = f"pictures/{number:03}.png"
        (home / "pairs" / name).write_bytes(pair_sets.encoded(picture))
        answer = "" if number % 8 == 7 else pair_sets.COLOURS[number % 3]
        rows.append({"file_name": name, "question": "the square", "answer": answer})
    pair_sets.write_lines(home / "pairs", rows)
    torch.manual_seed(0)
    tower = tf.LlamaConfig(**READ, tie_word_embeddings=True)
    tf.LlamaForCausalLM(tower).save_pretrained(home / "llama")
    save_tokenizer(home / "llama")
    language = {"kind": "pretrained", "path": str(home / "llama"), "num_tokens": 2, "heads": 2}
    pairs = {"path": str(home / "pairs"), "text": "question", "answer": "answer"}
    return world.config(
        robot,
        data={"sources": [{"path": str(robot)}, pairs], "batch_size": 8, "mixture": {"labelled": 0.5}}
        | {"cache": {"folder": str(home)}},
        model=merge(world.MODEL, {"language": language}),
        objective={"answer": {"kind": "next_token"}},
        training=world.TRAINING
        | {"steps": 6, "checkpoints": {"every": 3}, "validation": {"every": 3}, "log_every": 2},
    )


def test_actions_and_answers_train_in_one_sum_and_resume_to_the_same_bits(
    config: RunConfig, tmp_path: Path
) -> None:
    def kill(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    built = build_training(config, tmp_path / "straight")
    shares = label_shares(config, built.data).shares
    assert shares["action"] == [1.0, 0.0]
    assert shares["answer"][0] == 0 and 0.7 < shares["answer"][1] < 1
    batch = built.data.train.batch_at(0)
    assert batch.answer_mask is not None and not batch.answer_mask[batch.embodiment >= 0].any()
    built.fit()
    with pytest.raises(Killed):
        build_training(config, tmp_path / "killed").fit(kill)
    build_training(config, tmp_path / "killed").fit()
    assert differing(tmp_path / "straight", tmp_path / "killed") == []
    losses = [record for record in read_records(tmp_path / "straight") if "loss/total" in record]
    train = [record for record in losses if record["kind"] == "train"]
    for record in train:
        assert record["loss/action/raw@robot"] == pytest.approx(record["loss/action/raw"])
        assert record["loss/answer/raw@pairs"] == pytest.approx(record["loss/answer/raw"])
        assert "loss/answer/raw@robot" not in record and "loss/action/raw@pairs" not in record
        assert 0 < record["data/labelled/answer"] < 0.5
        # One sum: each term times its lambda, that of the answer found by its share.
        terms = [key.split("/")[1] for key in record if key.endswith("/weighted")]
        assert record["loss/total"] == pytest.approx(sum(record[f"loss/{t}/weighted"] for t in terms))
    assert train[-1]["lambda/answer"] > 0
    held_out = [one for one in read_records(tmp_path / "straight") if one["kind"] == "validation"]
    assert "valid/metric/answer/picture_gain" in held_out[-1]
    assert held_out[-1]["valid/answer@pairs"] == pytest.approx(held_out[-1]["valid/answer"])


def test_answers_that_are_nowhere_are_refused(config: RunConfig, tmp_path: Path) -> None:
    robot, pairs = config.data.sources
    mixture = config.data.mixture.model_copy(update={"labelled": "by_weight"})
    data = config.data.model_copy(update={"sources": (robot,), "mixture": mixture})
    alone = config.model_copy(update={"data": data})
    with pytest.raises(
        UserError, match=r"answer learns from nothing: it needs answer.*\n.*sources\.answer=COLUMN"
    ):
        build_training(alone, tmp_path)
    for source, why in (
        (robot, "has no picture-text pairs"),
        (pairs, "'caption' of sources.answer is missing"),
    ):
        wrong = source.model_copy(update={"answer": "caption"})
        data = config.data.model_copy(update={"sources": (wrong, robot)})
        with pytest.raises(UserError, match=why):
            build_training(config.model_copy(update={"data": data}), tmp_path)
