"""What the alignment terms compare and what fits: values, gradients, floors, retrieval, learning."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.term_batches import (
    NO_MODEL,
    SPEC,
    as_double,
    make_batch,
    make_loss,
    make_model,
    plain_batch,
    plain_features,
)
from tutti.distributed.world import ONE_PROCESS
from tutti.models.vla import VLA
from tutti.objectives.term import TermValue
from tutti.objectives.terms.alignment import (
    ContrastiveConfig,
    ContrastiveTerm,
    EmbeddingTerm,
    SigmoidConfig,
    SigmoidTerm,
)
from tutti.objectives.terms.pair_labels import PairLabels, Said, fit, retrieval, text_pieces
from tutti.training.device import resolve_machine
from tutti.training.parallel.ddp import LossModule, Parallel
from tutti.training.validation import validate
from tutti.types import Batch, DataNeeds, Future, Observation

KINDS = ("contrastive", "sigmoid")
POSITIVES = ("task", "instruction", "soft")
PICTURES = ("now", "change", "goal")
MODES = [(k, t, p) for k in KINDS for t in POSITIVES for p in PICTURES]


def example(
    kind: str = "contrastive", positives: str = "task", pictures: str = "now"
) -> tuple[Any, Any, Batch]:
    """A small model, the term and windows of three instructions, two of which are one task; in float64."""
    model = make_model().double()
    bias = {"bias": -1.5} if kind == "sigmoid" else {}
    config = {"kind": kind, "positives": positives, "pictures": pictures, "offset": 2, "width": 16, **bias}
    term = make_loss(model, align=config).terms["align"].double().eval()
    batch = as_double(make_batch())
    texts = torch.tensor([[3, 4, 5, 6, 7, 1], [3, 4, 5, 9, 1, 1], [8, 2, 1, 1, 1, 1]])
    seen = replace(batch.observation, text=texts[batch.instruction_id])
    return model, term, replace(batch, observation=seen, task_id=batch.instruction_id // 2)


def cosine(one: list[int], other: list[int]) -> float:
    """Of the counts of tokens and of pairs of neighbours, by dictionaries."""
    counts = []
    for text in (one, other):
        pieces = [(token,) for token in text] + list(pairwise(text))
        counts.append({piece: pieces.count(piece) for piece in pieces})
    norms = [sum(n * n for n in c.values()) ** 0.5 for c in counts]
    return sum(n * counts[1].get(piece, 0) for piece, n in counts[0].items()) / (norms[0] * norms[1])


def by_hand(model: VLA, term: Any, batch: Batch, mode: tuple[str, str, str]) -> Tensor:
    """The loss by loops over rows and pairs, from the model's own encoders."""
    kind, positives, pictures = mode
    features = model(batch.observation)
    later = batch.futures[{"now": 2, "change": 2, "goal": "last"}[pictures]]
    ahead = model.vision(model.prepare(later.observation.images), later.observation.image_mask)
    per_view = model.vision.tokens_per_view
    rows, z, w, said = [], [], [], []
    for i in range(len(batch.window)):
        now_views = batch.observation.image_mask[i]
        later_views = later.observation.image_mask[i] & later.mask[i]
        views = {"now": now_views, "change": now_views & later_views, "goal": later_views}[pictures]
        if not views.any():
            continue
        tokens = views.repeat_interleave(per_view)
        now, then = features.vision.values[i, tokens].mean(0), ahead.values[i, tokens].mean(0)
        x = {"now": now, "change": then - now, "goal": then}[pictures]
        z.append(F.normalize(term.vision_head(x), dim=0))
        words = features.language.values[i, features.language.mask[i]].mean(0)
        w.append(F.normalize(term.language_head(words), dim=0))
        said.append(batch.observation.text[i, batch.observation.text_mask[i]].tolist())
        rows.append(i)
    n, ids, tasks = len(rows), batch.instruction_id[rows].tolist(), batch.tasks[rows].tolist()
    fits = [
        [
            {
                "task": float(tasks[i] == tasks[j]),
                "instruction": float(ids[i] == ids[j]),
                "soft": 1.0 if ids[i] == ids[j] else cosine(said[i], said[j]) ** 4,
            }[positives]
            for j in range(n)
        ]
        for i in range(n)
    ]
    assert n == (5 if pictures == "change" else 6) and 0 < sum(map(sum, fits)) < n * n
    scores = torch.stack([torch.stack([term.log_scale.exp() * (a @ b) for b in w]) for a in z])
    if kind == "sigmoid":
        logits = scores + term.bias + term.bias_start
        yes, no = logits.sigmoid().log(), (1 - logits.sigmoid()).log()
        u = torch.tensor(fits, dtype=torch.float64)
        return -(u * yes + (1 - u) * no).sum() / n
    total = torch.zeros((), dtype=torch.float64)
    for side in (scores, scores.T):
        for i in range(n):
            shares = [u / sum(fits[i]) for u in fits[i]]
            total = total - sum(q * side[i].log_softmax(0)[j] for j, q in enumerate(shares)) / n / 2
    return total


@pytest.mark.parametrize(("kind", "positives", "pictures"), MODES)
def test_value_and_gradient_are_those_of_the_formula(kind: str, positives: str, pictures: str) -> None:
    model, term, batch = example(kind, positives, pictures)
    parameters = [*model.vision.parameters(), *model.language.parameters(), *term.parameters()]
    expected = by_hand(model, term, batch, (kind, positives, pictures))
    found = term(model(batch.observation), batch, model).value
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted, own = (
        torch.autograd.grad(x, parameters, materialize_grads=True, allow_unused=True)
        for x in (expected, found)
    )
    largest = max(float(g.abs().max()) for g in wanted)
    assert largest > 1e-3
    assert all(float((a - b).abs().max()) < 1e-12 * max(1, largest) for a, b in zip(wanted, own, strict=True))


@pytest.mark.parametrize("pictures", PICTURES)
def test_it_asks_for_the_pictures_and_looks_once_more_at_most(pictures: str) -> None:
    model, term, batch = example(pictures=pictures)
    asked = {"now": (), "change": (2,), "goal": ("last",)}[pictures]
    assert term.needed == DataNeeds(futures=asked, labels=("text",))
    features, looks = model(batch.observation), []
    handle = model.vision.register_forward_hook(lambda *_: looks.append(1))
    term(features, batch, model)
    handle.remove()
    assert len(looks) == len(asked)
    still = make_loss(model, align={"pictures": pictures, "offset": 2, "stop_gradient": ["vision"]})
    value = still.terms["align"].double()(features, batch, model).value
    moved = torch.autograd.grad(value, list(model.vision.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pictures", ["change", "goal"])
def test_windows_whose_later_pictures_are_masked_take_no_part(kind: str, pictures: str) -> None:
    model, term, batch = example(kind, "soft", pictures)
    there = torch.tensor([True, True, True, True, False, False])
    futures = {k: replace(v, mask=there) for k, v in batch.futures.items()}
    masked = replace(batch, futures=futures)
    few = masked.first(4)
    found = [term(model(each.observation), each, model) for each in (masked, few)]
    assert found[0].value.item() == pytest.approx(found[1].value.item(), rel=1e-12)
    torch.testing.assert_close(found[0].metrics, found[1].metrics, rtol=1e-12, atol=0)
    assert term.rows(masked).tolist() == there.tolist()
    # The goal needs no present picture, a change does.
    seen = batch.observation.image_mask.clone()
    seen[0] = False
    blind = replace(masked, observation=replace(batch.observation, image_mask=seen))
    assert term.rows(blind).tolist() == [pictures == "goal", *there[1:].tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_below_two_tasks_nothing_can_be_told_apart(kind: str) -> None:
    for positives, skipped in (("task", 1), ("soft", 1), ("instruction", 0)):
        model, term, batch = example(kind, positives)
        batch = replace(batch, task_id=torch.zeros_like(batch.instruction_id))
        result = term(model(batch.observation), batch, model)
        assert result.metrics["align/skipped"] == skipped and (result.value == 0) == bool(skipped)
        gradients = torch.autograd.grad(result.value, list(term.parameters()), allow_unused=True)
        assert any(g is not None and g.any() for g in gradients) != bool(skipped)
        # Where no groups are known, each instruction is a task of its own.
        unknown = replace(batch, task_id=None)
        assert term(model(unknown.observation), unknown, model).metrics["align/skipped"] == 0


# --- how near texts are


def test_texts_are_as_near_as_their_tokens_and_neighbours() -> None:
    texts = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 9], [7, 6, 5, 0], [1, 2, 3, 4]])
    mask = torch.tensor([[True, True, True, False]] * 3 + [[True] * 4])
    mask[1, 3] = False
    pieces = text_pieces(texts, mask, torch.float64)
    near = pieces @ pieces.T
    torch.testing.assert_close(near.diagonal(), torch.ones(4, dtype=torch.float64))
    assert near[0, 1].item() == pytest.approx(1)  # what is masked does not count
    assert near[0, 2].item() == pytest.approx(3 / 5)  # the order does
    assert near[0, 3] == 0
    said = Said(instruction=torch.tensor([0, 1, 2, 3]), task=torch.arange(4), pieces=pieces)
    fits = fit("soft", said, said, torch.float64)
    assert fits[0].tolist() == pytest.approx([1, 1, (3 / 5) ** 4, 0]) and torch.equal(fits, fits.T)


# --- what can be reached


def test_labels_are_not_rounded_where_the_network_computes_in_fewer_bits() -> None:
    """Of 257 windows of one task bf16 would make 258: a share above 1, and reachable no number."""
    _, _, batch = example(positives="soft")
    pieces = text_pieces(batch.observation.text, batch.observation.text_mask, torch.float32)
    said = Said(instruction=batch.instruction_id, task=batch.tasks, pieces=pieces)
    near = fit("soft", said, said, torch.float32)
    large = Said(instruction=torch.zeros(257).long(), task=torch.zeros(257).long())
    everyone = torch.ones(257, dtype=torch.bool)
    labels = PairLabels.of("instruction", large, everyone, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fit("soft", said, said, torch.float32), near)
        assert bool((labels.by_task(labels.fits) == 1).all())


def plain_term(kind: str, positives: Any, width: int = 8) -> EmbeddingTerm:
    """The term with heads that change nothing, as sharp as the scale allows."""
    given: Any = {"positives": positives, "width": width, "temperature": 0.01}
    made = (
        ContrastiveTerm(ContrastiveConfig(**given), width, width, "align")
        if kind == "contrastive"
        else SigmoidTerm(SigmoidConfig(**given, bias=-50.0), width, width, "align")
    )
    with torch.no_grad():
        for head in (made.vision_head, made.language_head):
            head.weight.copy_(torch.eye(width))
            head.bias.zero_()
    return made.double().eval()


def told(ids: Tensor, task: Tensor, texts: Tensor | None = None) -> Batch:
    batch = replace(plain_batch(ids), task_id=task)
    text = ids[:, None] if texts is None else texts[ids]
    seen = replace(batch.observation, text=text, text_mask=torch.ones_like(text, dtype=torch.bool))
    return replace(batch, observation=seen)


def recognised(kind: str, positives: str, wordings: int = 5, windows: int = 2) -> TermValue:
    """The term of embeddings that are the task's own direction: 8 tasks x 5 wordings x 2 windows."""
    ids = torch.arange(8 * wordings * windows) % (8 * wordings)
    tasks = ids // wordings
    one_hot = F.one_hot(tasks, 8).double()[:, None]
    return plain_term(kind, positives)(plain_features(one_hot, one_hot), told(ids, tasks), NO_MODEL)


def test_a_recogniser_of_tasks_is_at_the_floor_of_tasks_and_at_what_wordings_allow() -> None:
    by_task, by_text = (recognised("contrastive", positives) for positives in ("task", "instruction"))
    assert by_task.metrics["align/floor"].item() == pytest.approx(log(10))
    assert by_task.metrics["align/above_floor"].item() == pytest.approx(0, abs=1e-9)
    assert by_task.metrics["align/accuracy"] == 1 and "align/reachable" not in by_task.metrics
    assert by_text.metrics["align/floor"].item() == pytest.approx(log(2))
    assert by_text.metrics["align/reachable"].item() == pytest.approx(log(10))
    assert by_text.value.item() == pytest.approx(log(10))
    assert by_text.metrics["align/accuracy"].item() == pytest.approx(1 / 5)
    yes_or_no = recognised("sigmoid", "instruction")
    assert yes_or_no.metrics["align/floor"] == 0
    entropy = -0.2 * log(0.2) - 0.8 * log(0.8)  # of a picture and a text of its task: 1 of 5 wordings fits
    assert yes_or_no.metrics["align/reachable"].item() == pytest.approx(10 * entropy)


IDS, TASK_OF = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4]), torch.tensor([0, 0, 0, 1, 1])
TEXTS = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 7], [9, 10, 11], [9, 12, 5]])


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_scores_that_know_the_task_alone_do_better_than_reachable(kind: str, positives: Any) -> None:
    """Found by descent over a score for each task and text. For soft labels the two directions of
    `contrastive` cannot both be at their best, so that `reachable` lies a little below."""
    batch = told(IDS, TASK_OF[IDS], TEXTS)
    with torch.no_grad():
        noise = torch.randn(8, 1, 8, dtype=torch.float64)
        metrics = plain_term(kind, positives)(plain_features(noise, noise), batch, NO_MODEL).metrics
    floor = metrics["align/floor"].item()
    bound = metrics["align/reachable"].item() if positives != "task" else floor
    said = Said.of(batch, positives, torch.float64)
    u = fit(positives, said, said, torch.float64)
    free = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)

    def value() -> Tensor:
        scores = free[batch.tasks]
        if kind == "sigmoid":
            return F.binary_cross_entropy_with_logits(scores, u, reduction="sum") / 8
        q = u / u.sum(dim=1, keepdim=True)
        return -(q * (scores.log_softmax(1) + scores.T.log_softmax(1))).sum() / 16

    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)
    least = value().item()
    assert floor <= bound + 1e-12 and bound <= least + 1e-9
    assert least == pytest.approx(
        bound, rel=0.02 if (kind, positives) == ("contrastive", "soft") else 1e-3, abs=1e-3
    )
    assert (bound - floor > 0.1) == (positives != "task")


# --- retrieval over all held-out windows


def test_retrieval_by_hand() -> None:
    """Wordings 0, 1 of task 0 and 2 of task 1; the picture of window 3 is taken for the other task's."""
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    rows = {
        "vision": torch.eye(3)[torch.tensor([0, 0, 1, 2, 2, 2])],
        "language": torch.eye(3)[ids],
        "present": torch.tensor([True] * 6),
        "instruction": ids,
        "task": torch.tensor([0, 0, 0, 0, 1, 1]),
    }
    found = retrieval(rows, "instruction")
    assert found == pytest.approx({"retrieval": 4 / 6, "retrieval_ceiling": 5 / 6, "retrieval_chance": 3 / 6})
    found = retrieval(rows, "task")
    assert found == pytest.approx({"retrieval": 5 / 6, "retrieval_ceiling": 1.0, "retrieval_chance": 4 / 6})
    without = {**rows, "present": torch.tensor([True] * 3 + [False] + [True] * 2)}
    assert retrieval(without, "task")["retrieval"] == 1
    assert retrieval({**rows, "task": torch.zeros_like(ids)}, "task") == {}
    pieces = {"pieces": F.normalize(torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1]]), dim=1)[ids]}
    assert retrieval({**rows, **pieces}, "soft")["retrieval"] == pytest.approx((2 + 1 / 4 + 0 + 2) / 6)


@pytest.mark.parametrize("positives", POSITIVES)
def test_validation_retrieves_among_all_held_out_windows_whatever_the_batches(positives: str) -> None:
    model, _, _ = example()
    loss = make_loss(model, align={"positives": positives, "width": 16}).double()
    whole = replace(as_double(make_batch(b=8)), task_id=make_batch(b=8).instruction_id // 2)
    parallel = Parallel(LossModule(model, loss), ONE_PROCESS)
    found = [
        validate(parallel, resolve_machine("cpu", 1, "fp32"), batches, progress=0.0, seed=0)
        for batches in ([whole], [whole.apply(lambda x, r=r: x[r]) for r in (slice(0, 3), slice(3, 8))])
    ]
    names = [f"valid/metric/align/retrieval{end}" for end in ("", "_ceiling", "_chance")]
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names])
    share, ceiling, chance = (found[0][name] for name in names)
    assert 0 <= share <= 1 and chance < ceiling <= 1
    assert (ceiling == 1) == (positives == "task")


# --- a world whose background names nothing


def flashes(seed: int, b: int = 24) -> Batch:
    """Noise with patches of three colours, the same now and later; later one more patch, in the colour that
    the instruction asks for. 3 tasks of 2 wordings."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (b,), generator=random)
    texts = torch.arange(2, 14).view(6, 2).repeat(1, 3)
    images = torch.randint(0, 120, (b, 2, 3, 32, 32), dtype=torch.uint8, generator=random)

    def paint(pictures: Tensor, row: int, colour: int, *, low: bool = False) -> None:
        x, y = (8 * torch.randint(0, 3, (2,), generator=random)).tolist()
        y = 24 if low else y  # free until later
        pictures[row, :, :, y : y + 8, x : x + 8] = 0
        pictures[row, :, colour, y : y + 8, x : x + 8] = 255

    for row in range(b):
        for colour in torch.randint(0, 3, (4,), generator=random).tolist():
            paint(images, row, colour)
    after = images.clone()
    for row in range(b):
        paint(after, row, int(ids[row]) // 2, low=True)

    def look(pictures: Tensor) -> Observation:
        return Observation(
            images=pictures,
            image_mask=torch.ones(b, 2, dtype=torch.bool),
            text=texts[ids],
            text_mask=torch.ones(b, 6, dtype=torch.bool),
            state=torch.zeros(b, SPEC.state_dim),
            state_mask=torch.ones(b, dtype=torch.bool),
        )

    return replace(
        plain_batch(ids),
        observation=look(images),
        futures={4: Future(observation=look(after), mask=torch.ones(b, dtype=torch.bool))},
        task_id=ids // 2,
    )


def learned(pictures: str, steps: int = 100) -> dict[str, float]:
    """Retrieval on windows that were not trained on."""
    model = make_model()
    term = make_loss(model, align={"pictures": pictures, "offset": 4, "width": 16}).terms["align"]
    optimizer = torch.optim.Adam([*model.parameters(), *term.parameters()], lr=3e-3)
    for step in range(steps):
        batch = flashes(step)
        optimizer.zero_grad()
        term(model(batch.observation), batch, model).value.backward()
        optimizer.step()
    with torch.no_grad():
        held_out = flashes(10_000, 120)
        found: TermValue = term.eval()(model.eval()(held_out.observation), held_out, model)
    assert isinstance(term, EmbeddingTerm)
    return term.joined(found.per_window)


def test_where_the_background_names_nothing_only_the_change_teaches() -> None:
    change, now = learned("change"), learned("now")
    assert change["retrieval_ceiling"] == 1 and change["retrieval"] > 0.95
    assert now["retrieval"] < now["retrieval_chance"] + 0.15 < 0.6
