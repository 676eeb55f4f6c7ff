"""The suites by name, and a suite fitted to what a policy was trained on."""

from __future__ import annotations

from tutti.errors import UserError
from tutti.suites.environment import Suite
from tutti.suites.metaworld.suite import METAWORLD_8
from tutti.types import DataSpec

SUITES: dict[str, Suite] = {suite.name: suite for suite in (METAWORLD_8,)}
CURE = "For data of another robot: evaluation.suite=none measures the open-loop error alone."


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

    Raises UserError: the policy was trained at another rate than the suite acts at, on other sizes, or on a
    view that the simulator does not have.
    """
    if abs(spec.fps - suite.fps) > 1e-6:
        raise UserError(
            f"The policy was trained at {spec.fps:g} actions a second, {suite.name} takes {suite.fps:g}. "
            "Record the data with the suite's action repeat, or evaluate on a suite of the data's rate. "
            f"{CURE}"
        )
    if spec.action_dim != suite.action_dim:
        raise UserError(
            f"The policy gives {spec.action_dim} action values, but {suite.name} takes {suite.action_dim}. "
            f"{CURE}"
        )
    views = tuple(view.rsplit(".", 1)[-1] for view in spec.views)
    return suite.with_changes(views=views, image_size=image_size or suite.image_size)
