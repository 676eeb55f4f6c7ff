"""Balancing by shares: lambdas that give each term the asked share of action's part of the update."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.objective import PRIMARY, Calibration, PhaseSpan, TermSize
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.types import UserError

log = logging.getLogger("tutti.objectives")


class SharesBalancingConfig(FrozenConfig):
    """`kind: shares`. lambda is the `weight` of a term, or what gives it the `share` that it asks for.

    No balancing method reliably beats tuned fixed lambdas (2201.04122, 2209.11379); a share says which.
    """

    kind: Literal["shares"] = "shares"
    start: Literal["warmup"] | NonNegativeInt = Field(
        default="warmup",
        description="Updates before the parts of the update are measured; warmup: training.schedule.warmup.",
    )
    steps: PositiveInt = Field(
        default=50, description="Updates of a measurement; at most a quarter of what is left of a phase."
    )
    again: Literal["never", "phase"] | PositiveInt = Field(
        default="phase", description="Measure again: never, in each phase, or after so many updates of one."
    )

    def build(self, schedules: Mapping[str, WeightSchedule], shares: Collection[str] = ()) -> SharesBalancing:
        """The balancing of terms with these schedules, which are shares for the terms named in `shares`.

        Raises: UserError if there are shares and no action term, or action itself has one.
        """
        return SharesBalancing(schedules, self, shares)


class SharesBalancing(Balancing):
    """lambda_i = share_i(progress) lambda_action(progress) b_i for a term with a share; its weight otherwise.

        b_i = |U_action| / |U_i|    over S_i, the parameters that both terms move

    U_i is the raw term's part of the update (training/optim/update_parts.py). Two measurements give b:

    1. before the first update, from its batches: plain gradients d L_i / d theta in place of U. A term that
       has nothing to learn from in them is measured on the next batches.
    2. in a window of updates after the warm-up: the ratio of the medians of |U_action| and |U_i| over its
       second half; the first fills the momenta. `again` opens further windows. An update that is left out
       (training.gradients.non_finite: skip) is not measured.

    Between measurements b does not change. A term that is not active in a window, or moves nothing that
    action moves, keeps its b, 1 if it has none yet, with a warning if it counts in that phase. A window is
    never longer than a quarter of what is left of its phase; there is none where action or all terms with a
    share do not count.

    Source: ours. Norms of gradients at initialisation mislead (why GradNorm, 1711.02257, goes on measuring),
    and norms of gradients are not what AdamW or Muon make of them.
    """

    def __init__(
        self,
        schedules: Mapping[str, WeightSchedule],
        config: SharesBalancingConfig,
        shares: Collection[str] = (),
    ) -> None:
        super().__init__(schedules)
        self.config, self.shares = config, frozenset(shares)
        if self.shares and (PRIMARY not in self.names or PRIMARY in self.shares):
            raise UserError(
                f"A share is relative to '{PRIMARY}', which must be a term that has a weight itself; "
                f"the objective has {', '.join(self.names)}, with shares for {', '.join(sorted(shares))}. "
                "Give the terms weights instead."
            )
        self.windows: tuple[range, ...] = ()
        self._phases: tuple[PhaseSpan, ...] = ()
        self._asked: tuple[str, ...] = ()
        self._deadline = 0
        self._all_measured = False  # as the host knows it: to read it from the device, it would have to wait
        self._news: tuple[int, dict[str, float], list[float]] | None = None
        if not self.shares:
            return  # nothing to keep in a checkpoint
        self.factor = nn.Buffer(torch.ones(len(self.names), dtype=torch.float64))
        self.measured = nn.Buffer(torch.zeros(len(self.names), dtype=torch.bool))
        # Rows are updates of the window; of each term its own size, and that of action beside it.
        unknown = torch.full((config.steps, len(self.names), 2), torch.nan, dtype=torch.float64)
        self.sizes = nn.Buffer(unknown)

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        shared = [name for name in values if name in self.shares]
        return dict.fromkeys(values, 1.0) | (self.by_name(self.factor, shared) if shared else {})

    def weight(self, name: str, progress: float) -> float:
        own = super().weight(name, progress)
        return own * super().weight(PRIMARY, progress) if name in self.shares else own

    def before_run(self, phases: Sequence[PhaseSpan], warmup: int) -> None:
        counted = {name for phase in phases for name in phase.terms if not self.schedules[name].is_zero}
        self._asked = tuple(name for name in self.names if name in self.shares & counted)
        wait = warmup if self.config.start == "warmup" else self.config.start
        self._phases, windows = tuple(phases), list[range]()
        for phase in phases:
            if PRIMARY not in phase.terms or not set(self._asked) & set(phase.terms):
                continue
            begin = phase.start + wait if phase.restarts else max(phase.start, wait)
            every = self.config.again if isinstance(self.config.again, int) else phase.end
            for start in range(begin, phase.end, every):
                length = min(self.config.steps, every, math.ceil((phase.end - start) / 4))
                windows.append(range(start, start + length))
        self.windows = tuple(windows[: 1 if self.config.again == "never" else None])
        self._deadline = self.windows[0].start if self.windows else wait + 1

    def unmeasured(self, step: int) -> tuple[str, ...]:
        if self._all_measured or not self._asked or step >= max(self._deadline, 1):
            return ()
        known = dict(zip(self.names, self.measured.tolist(), strict=True))
        missing = [name for name in self._asked if not known[name]]
        self._all_measured = not missing
        return (PRIMARY, *missing) if missing else ()

    def after_load(self) -> None:
        self._all_measured = False

    @torch.no_grad()
    def observe_gradients(self, sizes: Mapping[str, TermSize]) -> None:
        """Sets b from the gradients of one update's batches. Raises: UserError if action has none."""
        main = sizes[PRIMARY]
        if main.anywhere == 0 and main.value != 0:
            raise UserError(_no_reference("on the batches of the first update"))
        # No actions in these batches; or what will stop the update itself, or leave it out.
        if main.anywhere == 0 or not all(math.isfinite(one.anywhere) for one in sizes.values()):
            return
        before = self.factor.tolist()
        for name in sizes.keys() - {PRIMARY}:
            one, place = sizes[name], self.names.index(name)
            if one.own > 0 and one.primary > 0:
                self.factor[place] = one.primary / one.own
            elif one.anywhere == 0 and one.value == 0:
                continue  # nothing to learn from in these batches
            else:
                log.warning("balancing: %s", _no_size(name, "moves nothing that action moves", 1.0))
            self.measured[place] = True
        ratios = {name: one.own / one.primary for name, one in sizes.items() if one.primary > 0}
        self._news = (0, ratios, before)

    @property
    def observes(self) -> Collection[str]:
        return (PRIMARY, *self._asked)

    def window(self, step: int) -> range | None:
        return next((window for window in self.windows if step in window), None)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Forgets the last window where one begins, and sets b where one has ended.

        Raises: UserError if action had no part in the updates of a window.
        """
        # Before the update: what an update does to buffers is undone where it is left out.
        if any(step == window.stop for window in self.windows):
            self._freeze(next(phase.terms for phase in self._phases if phase.start < step <= phase.end))
        if any(step == window.start for window in self.windows):
            self.sizes.fill_(torch.nan)

    @torch.no_grad()
    def observe_updates(self, row: int, sizes: Mapping[str, TermSize]) -> None:
        for column, which in enumerate(("own", "primary")):
            numbers = {name: getattr(one, which) for name, one in sizes.items()}
            self.sizes[row, :, column] = self.in_order(numbers, self.sizes)

    def _freeze(self, counted: Collection[str]) -> None:
        """Sets b of the terms that were measured, and warns of the others among those that `counted`."""
        sizes, before = self.sizes.cpu(), self.factor.tolist()
        main = sizes[:, self.names.index(PRIMARY), 0]
        updates = int(main.isfinite().sum())
        if not updates:
            log.warning("balancing: no update of the window was made, so all lambdas stay as they are")
            return
        if not bool((main > 0).any()):
            raise UserError(_no_reference("in the updates that were to be measured"))
        ratios = {PRIMARY: 1.0}
        for name in self._asked:
            place = self.names.index(name)
            own, primary = sizes[sizes[:, place].isfinite().all(1), place].unbind(1)
            both = (own > 0) & (primary > 0)
            if not bool(both.any()):
                why = "moved nothing that action moves" if len(own) else "was not active"
                if name in counted:
                    log.warning("balancing: %s", _no_size(name, why, before[place]))
                continue
            # `quantile` has the middle of two as median; `median` would take the lower one.
            own, primary = own[both].quantile(0.5), primary[both].quantile(0.5)
            self.factor[place] = primary / own
            ratios[name] = float(own / primary)
        self._news = (updates, ratios, before)

    def take_news(self, progress: float) -> Calibration | None:
        if self._news is None:
            return None
        (updates, ratios, before), self._news = self._news, None
        after = dict(zip(self.names, self.factor.tolist(), strict=True))
        values = {"calibration/updates": float(updates)}
        names = [name for name in self._asked if name in ratios]
        width = max(map(len, ("term", *names)))
        lines = [f"  {'term':<{width}}  share   size before  lambda"]
        for name in names:
            share = Balancing.weight(self, name, progress)
            size = share * before[self.names.index(name)] * ratios[name]
            now = self.weight(name, progress) * after[name]
            values |= {f"calibration/size/{name}": size, f"calibration/lambda/{name}": now}
            lines.append(f"  {name:<{width}}  {share:<6.3g}  {size:<11.3g}  {now:.4g}")
        source = f"{updates} updates" if updates else "the gradients of the first batch"
        head = f"balancing: lambdas from {source}; size: relative to {PRIMARY}'s part, over what both move"
        weights = [f"objective.{name}.weight={_raw(self.schedules[name], after[name])}" for name in names]
        tail = f"  the same without a measurement: {' '.join(weights)}"
        return Calibration(table="\n".join([head, *lines, tail]), values=values)


def _raw(schedule: WeightSchedule, factor: float) -> str:
    """The weight that a share stands for, as it is written on the command line."""
    if schedule.schedule == "constant" and not schedule.warmup:
        return f"{schedule.start * factor:.4g}"
    given = schedule.model_dump(exclude_defaults=True)
    given |= {key: f"{given[key] * factor:.4g}" for key in ("start", "end") if key in given}
    return "'{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}'"


def _no_size(name: str, why: str, factor: float) -> str:
    told = f"'{name}' {why} while it was measured, so its lambda stays its share times {factor:.4g}. "
    return told + f"Give it a weight (objective.{name}.weight) if it is meant to learn by itself."


def _no_reference(when: str) -> str:
    return (
        f"the term '{PRIMARY}' had no gradient {when}, and shares are relative to it.\n  expected: it moves "
        "parameters of the model\n  cure: let it (backward.may_train, objective.action.stop_gradient), or "
        "give the other terms weights (objective.<term>.weight) instead of shares"
    )
