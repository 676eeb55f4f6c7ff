"""The model card of an export: what the policy is, was trained on, scores, and cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutti.serving.interface import reads_state, table

CARD = "README.md"
NOT_MEASURED = (
    "Not evaluated here: `tutti evaluate` plays it in its simulator, with intervals and controls, and the "
    "next `tutti export` of the run writes them here."
)
LIMITS = (
    "It has learned from the data above alone: other robots, cameras, camera places, units and instructions "
    "are outside of it.",
    "Success in a simulator says little about a real robot. Limit forces and speeds in its own controller.",
    "An interval is of one training: other seeds of the same config differ by more.",
)


def card(
    name: str, about: Mapping[str, Any], config: Mapping[str, Any], results: Mapping[str, Any] | None
) -> str:
    """Markdown. `about` is export.json, `config` config.yaml, `results` results.json of an evaluation."""
    title, rows = table(about)
    data, training = _section(config, "data"), _section(config, "training")
    sources = [str(one.get("name") or one.get("path", "?")) for one in data.get("sources") or [] if one]
    objective = [name for name, value in _section(config, "objective").items() if isinstance(value, Mapping)]
    lines = [
        *("---", "library_name: tutti", "pipeline_tag: robotics", "tags: [robotics, vision-language-action]"),
        *("---", "", f"# {name}", ""),
        f"A vision-language-action policy of Tutti with {about['parameters']:,} parameters: "
        f"{'pictures, state' if reads_state(about) else 'pictures'} and an instruction in, {title}.",
        *("", "```python", "import tutti", f'policy = tutti.Policy.load("{name}")', "```", ""),
        *("## Inputs and outputs", "", "| | name | unit | smallest | largest |", "|---|---|---|---|---|"),
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        *("", "## Training", ""),
        f"* Data: {', '.join(map(_cell, sources)) or 'recorded in the simulator'}; robots: "
        f"{', '.join(map(_cell, about['inputs']['robots']))}.",
        f"* Checkpoint {about['checkpoint']}, weights {about['weights']}; training.steps "
        f"{training.get('steps', '?')}.",
        f"* Terms of the loss: {', '.join(objective) or 'as config.yaml says'}. All of it is in config.yaml.",
        *("", "## Evaluation", "", *_scores(results, f"{about['checkpoint']}, {about['weights']}")),
        *("", "## Limits", "", *(f"* {line}" for line in (*_rounding(about), *LIMITS))),
        *("", "## Licence", "", "Not said. The data that it was trained on may bind it."),
        *("", "## Files", "", "export.json lists the SHA-256 of each; nothing in them is a pickle.", ""),
    ]
    return "\n".join(lines)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def _rounding(about: Mapping[str, Any]) -> list[str]:
    if (found := about.get("int8")) is None:
        return []
    return [
        f"model.int8.onnx rounds: its actions are off by {found['mean']:.2%} of their range in the training "
        f"data on average and by {found['largest']:.1%} at most, on {found['examples']} pictures of noise; "
        "evaluate it before you rely on it."
    ]


def _scores(results: Mapping[str, Any] | None, exported: str) -> list[str]:
    if results is None:
        return [NOT_MEASURED]
    policy = results["protocol"].get("policy", "")
    if policy not in ("", exported):
        return [
            NOT_MEASURED,
            "",
            f"The run's evaluation is of another policy, {policy}; this one is {exported}.",
        ]
    lines = ["| | success | 95 % interval |", "|---|---|---|"]
    for condition, score in results["scores"].items():
        low, high = (score["interval"][end] for end in ("low", "high"))
        lines.append(f"| {condition} | {score['mean']:.1%} | {low:.1%} to {high:.1%} |")
    for task in results["scores"]["policy"]["tasks"]:
        counts = f"{task['successes']} of {task['episodes']}"
        low, high = (task["interval"][end] for end in ("low", "high"))
        lines.append(f"| policy, {_cell(task['task'])} | {counts} | {low:.1%} to {high:.1%} |")
    return [*lines, "", *([f"Of {policy}."] if policy else []), *map(str, results["notes"])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
