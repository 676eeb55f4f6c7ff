"""The reach table: it is what the gradients say, leaves everything as it was, and names what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.run_equality import unequal
from fixtures.term_batches import as_double, make_batch
from numerics import test_unified_loss
from tutti.training.diagnostics.reach import ReachTable, problems, reach
from tutti.types import Batch

world: Any = test_unified_loss
MODULES = ("vision", "language", "fusion", "action", "align head", "recon head", "state head")


def batch() -> Batch:
    return as_double(make_batch())


def table_of(options: dict[str, Any] | None = None, given: Batch | None = None, **terms: Any) -> ReachTable:
    model, loss = world.build(**terms)
    return reach(model, loss, given if given is not None else batch(), **(options or {}))


def detach(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    model, _ = world.build()
    kind = type(getattr(model, part))
    forward = kind.forward

    def detached(self: Any, *inputs: Tensor) -> Any:
        tokens = forward(self, *inputs)
        return replace(tokens, values=tokens.values.detach())

    monkeypatch.setattr(kind, "forward", detached)


def test_the_default_table_is_the_known_one() -> None:
    table = table_of()
    assert table.terms == tuple(world.REACH) and table.parts == MODULES
    assert {term: table.reached(term) for term in table.terms} == world.REACH
    assert table.frozen == () and problems([table]) == []


def test_an_entry_is_the_norm_of_the_raw_terms_gradient() -> None:
    model, loss = world.build()
    table = reach(model, loss, batch())
    given = batch()
    value = loss(model(given.observation), given, model).values["recon"]
    for part, module in world.parts(model, loss).items():
        found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True, retain_graph=True)
        present = [gradient.flatten() for gradient in found if gradient is not None]
        norm = table.norms["recon"][part]
        if not present:
            assert norm is None
        else:
            assert norm == pytest.approx(torch.cat(present).norm().item(), rel=1e-12)


def test_nothing_is_left_behind() -> None:
    model, loss = world.build(mask={"kind": "masked_patches", "downsample": 1})
    model.eval()
    model.language.requires_grad_(False)
    state = {key: value.clone() for module in (model, loss) for key, value in module.state_dict().items()}
    random = torch.get_rng_state()
    first = reach(model, loss, batch(), frozen=("vision",))
    assert torch.equal(random, torch.get_rng_state())
    assert not model.training and loss.training
    assert all(parameter.requires_grad for parameter in model.vision.parameters())
    assert not any(parameter.requires_grad for parameter in model.language.parameters())
    assert all(parameter.grad is None for module in (model, loss) for parameter in module.parameters())
    after = {key: value for module in (model, loss) for key, value in module.state_dict().items()}
    assert unequal(state, after) == []
    assert reach(model, loss, batch(), frozen=("vision",)) == first


def test_it_looks_at_training_and_puts_buffers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = world.build()
    term = loss.eval().terms["state"]
    term.register_buffer("count", torch.zeros(()))
    compute, modes = type(term).compute, []

    def counted(self: Any, *given: Any) -> Any:
        self.count.add_(1)
        modes.append((self.training, model.training))
        return compute(self, *given)

    monkeypatch.setattr(type(term), "compute", counted)
    reach(model, loss, batch())
    assert modes == [(True, True)] and term.count == 0


def test_a_term_of_weight_zero_is_absent_with_its_head() -> None:
    table = table_of(align={"weight": 0.0}, recon={"weight": {"start": 0.0, "end": 1.0}})
    assert table.terms == ("action", "state")
    assert "align head" not in table.parts and "recon head" not in table.parts
    assert problems([table]) == []
    late = table_of({"progress": 0.5}, align={"weight": 0.0}, recon={"weight": {"start": 0.0, "end": 1.0}})
    assert late.terms == ("action", "recon", "state")


def test_a_planted_detach_of_vision_is_named_unless_it_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    detach(monkeypatch, "vision")
    table = table_of()
    assert not any("vision" in table.reached(term) for term in table.terms)
    (problem,) = problems([table])
    assert problem.startswith("vision gets no gradient from any term, though its parameters learn: ")
    assert "detached, or frozen?" in problem
    table = table_of({"frozen": ("vision",)})  # no problem where it does not learn
    assert table.frozen == ("vision",) and problems([table]) == []
    assert table.rows()[0] == ("term", *MODULES)
    assert dict(zip(table.rows()[0], table.rows()[1], strict=True))["vision"] == "frozen"
    model, loss = world.build()
    model.vision.requires_grad_(False)
    assert reach(model, loss, batch()).frozen == ("vision",)


def test_stop_gradient_everywhere_is_named_with_the_keys() -> None:
    stop = ["vision", "language", "fused"]
    table = table_of(
        align={"stop_gradient": stop},
        action={"stop_gradient": ["fused"]},
        recon={"stop_gradient": ["fused"]},
        state={"stop_gradient": ["fused"], "offsets": [1, 3]},
    )
    assert {term: table.reached(term) for term in table.terms} == {
        "align": {"align head"},
        "action": {"action"},
        "recon": {"recon head"},
        "state": {"state head"},
    }
    found = problems([table])
    assert [line.split(" gets no")[0] for line in found[:3]] == ["vision", "language", "fusion"]
    assert "stop_gradient of objective: align (vision, fused); action (fused)" in found[0]
    assert "freeze the part in the strategy" in found[2]
    heads = [line for line in found if "moves only its own head" in line]
    assert [line.split("'")[1] for line in heads] == ["align", "recon", "state"]
    assert "stop_gradient of objective: recon (fused). Take a boundary out" in heads[1]


def test_a_term_that_reaches_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of({"frozen": ("action",)}, action={"stop_gradient": ["fused"]})
    assert table.reached("action") == set()
    (problem,) = problems([table])
    assert problem.startswith(
        "term 'action' reaches nothing: is it stopped? stop_gradient of objective: action (fused)."
    )
    still = ("vision", "language", "fusion", "action")
    (problem,) = problems([table_of({"frozen": still, "only": ("action",)})])
    assert problem.startswith("term 'action' reaches nothing: what it could move is frozen (vision, ")

    _, loss = world.build()
    kind = type(loss.terms["state"])
    compute = kind.compute

    def silent(self: Any, *given: Any) -> Any:
        result = compute(self, *given)
        return replace(result, value=result.value.detach())

    monkeypatch.setattr(kind, "compute", silent)
    (problem,) = problems([table_of()])
    assert problem.startswith("term 'state' reaches nothing: is it detached")


def test_a_gradient_of_exactly_zero_does_not_reach() -> None:
    given = batch()
    ids = torch.zeros_like(given.instruction_id)  # one instruction in the batch: align is masked
    table = table_of(None, replace(given, instruction_id=ids))
    assert table.norms["align"]["vision"] == 0.0 and table.norms["align"]["fusion"] is None
    assert table.reached("align") == set()
    (problem,) = problems([table])
    assert problem.startswith("term 'align' reaches nothing: its gradient is exactly zero on this batch.")
    cells = dict(zip(table.rows()[0], table.rows()[1], strict=True))
    assert cells["vision"] == "0" and cells["fusion"] == "."


def test_a_gradient_too_small_to_square_still_reaches() -> None:
    model, loss = world.build()
    model, loss = model.float(), loss.float()
    head = loss.terms["state"].head
    with torch.no_grad():
        head[2].weight.mul_(1e-30)
        head[2].bias.zero_()
    given = batch()
    assert given.later_states is not None
    given = replace(
        given,
        later_states=replace(given.later_states, values=given.later_states.values.float()),
        actions=given.actions.float(),
        observation=replace(given.observation, state=given.observation.state.float()),
    )
    table = reach(model, loss, given)
    norm = table.norms["state"]["language"]
    assert norm is not None and 0 < norm < 1e-25
    assert problems([table]) == []


def test_a_mask_forbids_parts_but_never_the_own_head() -> None:
    mask = {"recon": ("fusion",), "align": ()}
    table = table_of({"mask": mask})
    assert table.reached("recon") == {"fusion", "recon head"}
    assert table.reached("align") == {"align head"}
    assert table.reached("action") == world.REACH["action"]
    (problem,) = problems([table])
    assert problem.startswith("term 'align' moves only its own head")
    assert "backward.may_train lets align move no part of the model" in problem
    cells = dict(zip(table.rows()[0], table.rows()[3], strict=True))
    assert cells["term"] == "recon" and cells["vision"] == "masked" and cells["fusion"] not in ("masked", ".")


def test_a_part_that_the_mask_takes_from_all_terms_is_named() -> None:
    allowed = ("language", "fusion", "action")
    (problem,) = problems([table_of({"mask": dict.fromkeys(world.REACH, allowed)})])
    assert problem.startswith("vision gets no gradient from any term")
    assert "backward.may_train lets align, action, recon, state move only language, fusion, action" in problem


def test_only_the_named_terms_count() -> None:
    table = table_of({"only": ("align",)})
    assert table.terms == ("align",) and table.parts[4:] == ("align head",)
    found = problems([table])
    assert [line.split(" ")[0] for line in found] == ["fusion", "action"]
    assert "does the action term count" in found[1]


def test_phases_are_judged_together() -> None:
    first = table_of({"only": ("align", "recon", "state")})
    second = table_of({"only": ("action",), "frozen": ("vision", "language")})
    assert len(problems([first])) == 1 and problems([first])[0].startswith("action gets no gradient")
    assert problems([second]) == []
    assert problems([first, second]) == []


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model, loss = world.build()
    with torch.no_grad():
        next(iter(loss.terms["recon"].parameters())).fill_(float("nan"))
    (problem,) = problems([reach(model, loss, batch())])
    assert problem.startswith("term 'recon': its gradient in vision, language, fusion, recon head is NaN or")
