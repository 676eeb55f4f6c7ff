"""What every kind of term promises: it trains beside the action, resumes to the same bits and is documented.
Its gradient is right, moves what it should, and nothing that is masked counts, even if it is NaN.

A new kind needs one line in KINDS and one in REACHED; without them the first test fails.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from fixtures.term_batches import as_double, make_batch, make_loss, make_model, reached
from tutti.models.vla import VLA
from tutti.objectives.config import DEFAULT_KINDS, ObjectiveConfig, TermConfig
from tutti.objectives.term import Term
from tutti.objectives.unified import UnifiedLoss
from tutti.plugin import CUSTOM
from tutti.training.metric_names import METRICS, describe_metric
from tutti.training.optim.averages import Ema
from tutti.training.optim.optimizers import AdamWConfig
from tutti.types import Batch, DataNeeds, Observation, Tokens, UserError

ROOT = Path(__file__).parents[2]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs" / "background" / "terms.md"

# What stands in the config of each kind besides its `kind`: sizes that suit the small model, nothing more.
KINDS: dict[str, dict[str, Any]] = {
    "contrastive": {"width": 16},
    "sigmoid": {"width": 16},
    "state_contrastive": {"width": 16},
    "recoverable_language": {"width": 16},
    "future_latent": {"hidden": 32, "decay": 0.9},
    "progress": {"hidden": 16},
    "chunk": {},
    "future_patches": {"width": 16, "heads": 2},
    "changed_patches": {"width": 16, "heads": 2},
    "masked_patches": {"width": 16, "heads": 2},
    "next_token": {},
    "inverse_dynamics": {"hidden": 16, "channels": 4, "offset": 2},
    "future_states": {"offsets": (1, 3), "hidden": 16, "gripper": {"dimension": -1}},
    CUSTOM: {"kind": "own_term:StateChange", "options": {"offset": 2}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "contrastive of the change": {"kind": "contrastive", "width": 16, "pictures": "change", "offset": 2},
    "sigmoid of the goal": {"kind": "sigmoid", "width": 16, "pictures": "goal", "positives": "soft"},
    "state_contrastive of vision": {"kind": "state_contrastive", "width": 16, "read": "vision"},
    "recoverable_language of the readout": {"kind": "recoverable_language", "width": 16, "action": "readout"},
    "next_token of vision": {"kind": "next_token", "read": "vision"},
    "uniform future_patches": {"kind": "future_patches", "width": 16, "heads": 2, "weighting": "uniform"},
}
CASES = {kind: {"kind": kind, **given} for kind, given in KINDS.items()} | VARIANTS

# The parts of the model, and the term's own head, that its gradient moves.
REACHED = {
    "contrastive": "vision language head",
    "contrastive of the change": "vision language head",
    "sigmoid of the goal": "vision language head",
    "sigmoid": "vision language head",
    "state_contrastive": "vision language fusion head",
    "state_contrastive of vision": "vision head",
    "recoverable_language": "vision language head",
    "recoverable_language of the readout": "vision language fusion head",
    "future_latent": "vision language fusion head",
    "progress": "vision language fusion head",
    "chunk": "vision language fusion action",
    "future_patches": "vision language fusion head",
    "uniform future_patches": "vision language fusion head",
    "changed_patches": "vision language fusion head",
    "masked_patches": "vision language head",
    "next_token": "vision language fusion head",
    "next_token of vision": "vision language head",
    "inverse_dynamics": "vision head",
    "future_states": "vision language fusion head",
    CUSTOM: "vision language fusion head",
}
NEEDS = {
    "contrastive of the change": DataNeeds(futures=(2,), labels=("text",)),
    "sigmoid of the goal": DataNeeds(futures=("last",), labels=("text",)),
    "contrastive": DataNeeds(labels=("text",)),
    "sigmoid": DataNeeds(labels=("text",)),
    "state_contrastive": DataNeeds(labels=("state",)),
    "state_contrastive of vision": DataNeeds(labels=("state",)),
    "recoverable_language": DataNeeds(labels=("actions", "text")),
    "recoverable_language of the readout": DataNeeds(labels=("text",)),
    "chunk": DataNeeds(labels=("actions",)),
    "future_latent": DataNeeds(futures=(4,)),
    "future_patches": DataNeeds(futures=(4,)),
    "uniform future_patches": DataNeeds(futures=(4,)),
    "changed_patches": DataNeeds(futures=(4,)),
    "next_token": DataNeeds(labels=("answer",)),
    "next_token of vision": DataNeeds(labels=("answer",)),
    "inverse_dynamics": DataNeeds(futures=(2,), labels=("actions",)),
    "future_states": DataNeeds(states=(1, 3, "last", "next_key"), grippers=(-1,), labels=("state",)),
    CUSTOM: DataNeeds(futures=(2,), labels=("state",)),
}
STEPS = 3


@pytest.fixture(autouse=True)
def _own_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_term", raising=False)


def tags() -> set[str]:
    """The tags of the union of all terms."""
    union = get_args(TermConfig)[0]
    return {get_args(member)[1].tag for member in get_args(union)}


def build(kind: str, weight: float = 0.7) -> tuple[VLA, UnifiedLoss]:
    model = make_model()
    return model, make_loss(model, extra={"kind": kind, "weight": weight, **KINDS[kind]})


def exact(case: str, **options: Any) -> tuple[VLA, Term, Batch]:
    """The model, the term and a batch in float64, with prepared pictures; evaluated, so that nothing is drawn
    but views to drop."""
    model = make_model().double()
    term = make_loss(model, extra={**CASES[case], **options}).terms["extra"].double().eval()
    assert isinstance(term, Term)

    def prepared(seen: Observation) -> Observation:
        return replace(seen, images=model.prepare(seen.images))

    batch = as_double(make_batch())
    futures = {k: replace(v, observation=prepared(v.observation)) for k, v in batch.futures.items()}
    return model, term, replace(batch, observation=prepared(batch.observation), futures=futures)


def value_of(model: VLA, term: Term, batch: Batch) -> Tensor:
    torch.manual_seed(0)
    return term(model(batch.observation), batch, model).value


def gradients(*modules: torch.nn.Module) -> list[Tensor]:
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


def spoiled(batch: Batch, fill: float) -> Batch:
    """The same batch with something else wherever it says that nothing is there."""

    def seen(observation: Observation, there: Tensor) -> Observation:
        shown = (observation.image_mask & there[:, None])[:, :, None, None, None]
        return replace(
            observation,
            images=observation.images.masked_fill(~shown, fill),
            text=torch.where(observation.text_mask, observation.text, 3),
            state=observation.state.masked_fill(~there[:, None], fill),
        )

    assert batch.later_states is not None and batch.answer_mask is not None
    later = batch.later_states
    return replace(
        batch,
        observation=seen(batch.observation, torch.ones_like(batch.window, dtype=torch.bool)),
        actions=batch.actions.masked_fill(~batch.action_mask, fill),
        futures={k: replace(v, observation=seen(v.observation, v.mask)) for k, v in batch.futures.items()},
        later_states=replace(later, values=later.values.masked_fill(~later.mask[..., None], fill)),
        answer=torch.where(batch.answer_mask, batch.answer, 3),  # pyright: ignore
    )


def blanked(tokens: Tokens, fill: float) -> Tokens:
    return replace(tokens, values=tokens.values.masked_fill(~tokens.mask[..., None], fill))


def steps(model: VLA, loss: UnifiedLoss, optimizer: Any, batches: list[Batch]) -> list[Tensor]:
    """Updates as the trainer makes them; gives the totals."""
    totals: list[Tensor] = []
    for batch in batches:
        terms = loss(model(batch.observation), batch, model)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.update_targets(model)
        loss.hooks.after_step({name: value.item() for name, value in terms.values.items()})
        totals.append(terms.total.detach())
    return totals


def state(*modules: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{k}": v for n, module in enumerate(modules) for k, v in module.state_dict().items()}


def test_every_kind_of_the_union_is_tried_here() -> None:
    assert set(KINDS) == tags() and set(REACHED) == set(CASES)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_beside_the_action(kind: str) -> None:
    model, loss = build(kind)
    before = {key: value.clone() for key, value in state(model, loss).items()}
    optimizer = AdamWConfig(lr=1e-3).build(model, loss)
    totals = steps(model, loss, optimizer, [make_batch(seed) for seed in range(STEPS)])
    assert all(math.isfinite(total.item()) for total in totals)
    after = state(model, loss)
    assert all(value.isfinite().all() for value in after.values())
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    trained = {f"0.{name}" for name, _ in model.named_parameters()}
    trained |= {f"1.{name}" for name, value in loss.named_parameters() if value.requires_grad}
    assert trained <= moved, f"never moved: {sorted(trained - moved)}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_term_goes_on_to_the_same_bits(kind: str) -> None:
    batches = [make_batch(seed) for seed in range(4)]
    model, loss = build(kind)
    optimizer = AdamWConfig().build(model, loss)
    steps(model, loss, optimizer, batches[:2])
    saved = copy.deepcopy((model.state_dict(), loss.state_dict(), optimizer.state_dict()))
    random = torch.get_rng_state()
    expected = steps(model, loss, optimizer, batches[2:])

    torch.manual_seed(9)
    other, other_loss = build(kind)
    other_optimizer = AdamWConfig().build(other, other_loss)
    for module, values in zip((other, other_loss, other_optimizer), saved, strict=True):
        module.load_state_dict(values)
    torch.set_rng_state(random)
    found = steps(other, other_loss, other_optimizer, batches[2:])
    assert torch.equal(torch.stack(found), torch.stack(expected))
    ours, theirs = state(model, loss), state(other, other_loss)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_evaluated_with_averaged_weights_and_leaves_no_trace(kind: str) -> None:
    model, loss = build(kind)
    averages = [Ema(model, 0.9), Ema(loss, 0.9)]
    optimizer = AdamWConfig().build(model, loss)
    steps(model, loss, optimizer, [make_batch(0)])
    for average in averages:
        average.update()
    before = copy.deepcopy(state(model, loss))
    batch = make_batch(5)
    with averages[0].applied(), averages[1].applied(), torch.no_grad():
        terms = loss.eval()(model.eval()(batch.observation), batch, model)
        assert terms.total.isfinite()
    assert all(torch.equal(value, before[key]) for key, value in state(model, loss).items())


@pytest.mark.parametrize("case", CASES)
def test_what_is_masked_does_not_count_even_if_it_is_nan(case: str) -> None:
    fill = 100.0 if case == CUSTOM else math.nan  # the example is short: NaN would come back in its gradient
    model, term, batch = exact(case)
    torch.manual_seed(0)
    clean = term(model(batch.observation), batch, model)
    other = spoiled(batch, fill)
    features = model(other.observation)
    features = replace(
        features, vision=blanked(features.vision, fill), language=blanked(features.language, fill)
    )
    torch.manual_seed(0)
    dirty = term(features, other, model)
    assert dirty.value.item() == clean.value.item()
    torch.testing.assert_close(dirty.metrics, clean.metrics, rtol=1e-12, atol=0)
    dirty.value.backward()
    found = gradients(model, term)
    assert found and all(bool(gradient.isfinite().all()) for gradient in found)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"progress"}))  # progress is known of every window
def test_nothing_left_gives_zero_with_zero_gradient(case: str) -> None:
    model, term, batch = exact(case)

    def empty(observation: Observation) -> Observation:
        return replace(
            observation, image_mask=observation.image_mask & False, text_mask=observation.text_mask & False
        )

    assert batch.later_states is not None and batch.answer_mask is not None
    nothing = replace(
        batch,
        observation=empty(batch.observation),
        action_mask=batch.action_mask & False,
        embodiment=torch.arange(len(batch.window)),  # no other window of the same robot
        futures={k: replace(v, mask=v.mask & False) for k, v in batch.futures.items()},
        later_states=replace(batch.later_states, mask=batch.later_states.mask & False),
        answer_mask=batch.answer_mask & False,
    )
    result = term(model(nothing.observation), nothing, model)
    assert result.value == 0 and all(bool(metric.isfinite()) for metric in result.metrics.values())
    if result.value.requires_grad:
        result.value.backward()
    assert not any(bool(gradient.any()) for gradient in gradients(model, term))


@pytest.mark.parametrize("case", CASES)
def test_it_moves_what_it_reads_and_a_stop_stops_it(case: str) -> None:
    model, term, batch = exact(case)
    assert reached(model, term, batch) == set(REACHED[case].split())
    still, stopped, _ = exact(case, stop_gradient=("vision", "language", "fused"))
    assert reached(still, stopped, batch) == {"action" if case == "chunk" else "head"}
    assert value_of(still, stopped, batch) == value_of(model, term, batch)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"chunk", CUSTOM}))
def test_gradients_are_right(case: str) -> None:
    model, term, batch = exact(case)
    features = model(batch.observation)
    own = {name: p for name, p in term.named_parameters() if p.requires_grad}
    tokens = (features.vision, features.language, features.fused_vision)
    read = [features.readout, *(each.values for each in tokens)]
    if "recoverable" in case:  # what is subtracted has a slope, but sends no gradient
        own, read = {name: p for name, p in own.items() if name.startswith("joint")}, []

    def value(*given: Tensor) -> Tensor:
        torch.manual_seed(0)
        seen, heads = features, given[len(read) :]
        if read:
            vision, language, fused = (
                replace(each, values=values) for each, values in zip(tokens, given[1:4], strict=True)
            )
            seen = replace(seen, readout=given[0], vision=vision, language=language, fused_vision=fused)
        return torch.func.functional_call(
            term, dict(zip(own, heads, strict=True)), (seen, batch, model)
        ).value

    inputs = tuple(x.detach().clone().requires_grad_() for x in (*read, *own.values()))
    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_it_asks_for_its_data_and_refuses_a_batch_without(case: str) -> None:
    config = ObjectiveConfig.model_validate(
        {"align": None, "recon": None, "state": None, "extra": CASES[case]}
    )
    action, needs = NEEDS["chunk"], NEEDS.get(case, DataNeeds())
    assert config.terms()["extra"].needs("extra") == needs and config.needs() == DataNeeds.union(
        [action, needs]
    )
    if needs.futures or needs.states or case == "progress":
        model, term, batch = exact(case)
        bare = replace(batch, futures={}, later_states=None, progress=None)
        with pytest.raises(UserError, match=r"objective\.extra needs"):
            term(model(bare.observation), bare, model)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (kind, {"offsets": (2, 6)}, r"extra\.offsets is 6, but must lie in 1\.\.5.*raise data\.horizon")
            for kind in ("future_latent", "future_patches", "changed_patches")
        ),
        ("inverse_dynamics", {"offset": 6}, r"extra\.offset is 6, but must lie in 1\.\.5.*data\.horizon"),
        ("changed_patches", {"offsets": (4, 2)}, "must rise"),
        *(
            (kind, {"downsample": 3}, r"extra\.downsample is 3, but must divide the patch of 16")
            for kind in ("future_patches", "masked_patches")
        ),
        ("changed_patches", {"width": 10, "heads": 4}, "not divisible by heads"),
        ("changed_patches", {"weighting": "uniform"}, "weighting"),
        ("masked_patches", {"ratio": 0.9}, r"extra\.ratio is 0\.9, which leaves 0 of a view's 4 patches"),
        ("masked_patches", {"ratio": 0.1}, r"leaves 4 of .* Choose a ratio between 0\.25 and 0\.75"),
        ("future_states", {"offsets": (3, 1)}, "must rise"),
        ("future_states", {"offsets": (), "last": False, "gripper": "off"}, "no state is predicted"),
        ("sigmoid", {"bias": math.nan}, "bias"),
        ("sigmoid", {"bias": "half"}, "bias"),
        ("sigmoid", {"temperature": 0.001}, "temperature"),
        ("state_contrastive", {"temperature": 0}, "temperature"),
        ("state_contrastive", {"state_scale": -1.0}, "state_scale"),
        ("state_contrastive", {"read": "language"}, "read"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValidationError), match=message):
        make_loss(make_model(), extra={**CASES[kind], **options})


@pytest.mark.parametrize("kind", ["future_patches", "masked_patches"])
def test_patches_need_a_square_grid_of_tokens(kind: str) -> None:
    model = make_model()
    model.vision.tokens_per_view = 5
    with pytest.raises(UserError, match=r"objective\.extra needs vision tokens on a square grid"):
        make_loss(model, extra=CASES[kind])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {CUSTOM}))
def test_its_metrics_are_scalars_with_a_line_of_their_own(kind: str) -> None:
    usual = {used: name for name, used in DEFAULT_KINDS.items()}
    name = usual.get(kind, "extra")
    model = make_model()
    loss = make_loss(model, **{name: {"kind": kind, **KINDS[kind]}})
    batch = make_batch()
    features = model(batch.observation)
    found = {**loss(features, batch, model).metrics, **loss.eval()(features, batch, model).metrics}
    assert all(value.ndim == 0 and not value.requires_grad for value in found.values())
    bare = [metric for metric in found if describe_metric(f"metric/{metric}") == METRICS["metric/*"]]
    assert bare == [], f"metric_names.py and docs/reference/metrics.md need a line metric/*/... for {bare}"


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {CUSTOM}))
def test_it_has_a_row_in_the_docs(kind: str) -> None:
    assert f"\n| `{kind}` |" in DOCS.read_text(encoding="utf-8")


def test_the_configs_in_the_docs_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    shown = [yaml.safe_load(block)["objective"] for block in blocks]
    assert len(shown) >= 4
    for objective in shown:
        ObjectiveConfig.model_validate(objective)
