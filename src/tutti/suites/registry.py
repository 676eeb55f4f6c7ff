"""The suites by name, and a suite fitted to what a policy was trained on."""

from __future__ import annotations

from pydantic import ValidationError

from tutti.errors import UserError
from tutti.suites.environment import Suite
from tutti.suites.metaworld.suite import METAWORLD_8, THREE_GOALS
from tutti.types import DataSpec

SUITES: dict[str, Suite] = {suite.name: suite for suite in (METAWORLD_8, THREE_GOALS)}
CURE = "For data of another robot: evaluation.suite=none measures the open-loop error of a run alone."


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"suite: {name!r} is not a suite. Known: {', '.join(SUITES)}.")
    return SUITES[name]


def fit_suite(suite: Suite, spec: DataSpec, image_size: int | None = None) -> Suite:
    """The suite with the views that a policy was trained on, in its order, at `image_size` (that of the
    recording).

    `spec.views` may carry a data set's prefix, as "observation.images.right".

    Raises UserError, with all that differs: the actions a second, the sizes of state and action, or a view
    that the simulator does not have.
    """
    views = tuple(view.rsplit(".", 1)[-1] for view in spec.views)
    sizes = {
        "actions a second": (f"{spec.fps:g}", f"{suite.fps:g}"),
        "numbers of a state": (spec.state_dim, spec.state_dim and suite.state_dim),  # 0: it needs none
        "numbers of an action": (spec.action_dim, suite.action_dim),
    }
    differ = [f"{what}: the policy has {a}, the suite {b}" for what, (a, b) in sizes.items() if a != b]
    try:
        fitted = suite.with_changes(views=views, image_size=image_size or suite.image_size)
    except ValidationError as error:
        fitted = suite
        differ.append(error.errors()[0]["msg"].removeprefix("Value error, "))
    if differ:
        lines = "".join(f"\n  {line}" for line in differ)
        robot = ", ".join(spec.embodiments)
        raise UserError(f"The policy (of {robot}) does not fit the suite {suite.name}.{lines}\n{CURE}")
    return fitted
