"""The suites by name, a suite of the user's own, and a suite fitted to what a policy was trained on."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import ValidationError

from tutti.errors import UserError, near_miss
from tutti.plugin import CustomConfig
from tutti.suites.environment import Suite
from tutti.suites.gym import ALOHA, PUSHT
from tutti.suites.libero.suite import LIBERO
from tutti.suites.metaworld.suite import METAWORLD
from tutti.types import DataSpec

# Pyright takes no class variable for a property of a protocol; a test asks isinstance.
SUITES: dict[str, Suite] = {suite.name: cast(Suite, suite) for suite in (*METAWORLD, *LIBERO, PUSHT, *ALOHA)}
CURE = "For data of another robot: evaluation.suite=none measures the open-loop error of a run alone."
REQUIRED = (
    *("name", "state_dim", "action_dim", "tasks", "views"),
    *("image_size", "max_decisions", "fps", "fingerprint", "make", "instructions"),
)
"""What a suite of the user's own must say."""


class CustomSuite(CustomConfig[Suite]):
    """A suite of the user's own: `kind: package.module:Class`, a class that derives from `Suite`."""

    base: ClassVar[type] = Suite
    key: ClassVar[str] = "suite"


def find_suite(suite: str | CustomSuite) -> Suite:
    """The suite of this name, or of the user's own class.

    Raises:
        UserError: there is none, or the class does not say what a suite must.
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            known = f"Known: {', '.join(SUITES)}; or {{kind: package.module:Class}}."
            raise UserError(f"suite: {suite!r} is not a suite. {known}{near_miss(suite, SUITES)}")
        return SUITES[suite]
    built = suite.build()
    missing = [name for name in REQUIRED if getattr(type(built), name) is getattr(Suite, name)]
    if missing:
        raise UserError(
            f"suite: {suite.kind} does not say {', '.join(missing)}. tutti.suites.Suite tells what each is."
        )
    return built


def robot_of(spec: DataSpec, suite: Suite) -> str | None:
    """Which of several robots a policy acts as in a suite: that of its name; None where there is one.

    Raises: UserError if none has this name.
    """
    if len(spec.embodiments) == 1:
        return None
    if suite.robot not in spec.embodiments:
        raise UserError(
            f"The suite {suite.name} moves the robot {suite.robot}, but the policy was trained on "
            f"{', '.join(spec.embodiments)}. Name the data set's robot so by data.sources.embodiment."
        )
    return suite.robot


def fit_suite(suite: Suite, spec: DataSpec, image_size: int | None = None) -> Suite:
    """The suite with the views that a policy was trained on, in its order, at `image_size` (that of the
    recording).

    `spec.views` may carry a data set's prefix, as "observation.images.right". Of several robots the policy is
    asked to act as that of the suite.

    Raises UserError, with all that differs: the actions a second, the sizes of state and action, or a view
    that the simulator does not have; or where that robot is none of several.
    """
    if (robot := robot_of(spec, suite)) is not None:
        spec = spec.alone(robot)
    views = tuple(view.rsplit(".", 1)[-1] for view in spec.views)
    sizes = {
        "actions a second": (f"{spec.fps:g}", f"{suite.fps:g}"),
        "numbers of a state": (spec.state_dim, spec.state_dim and suite.state_dim),  # 0: it needs none
        "numbers of an action": (spec.action_dim, suite.action_dim),
    }
    differ = [f"{what}: the policy has {a}, the suite {b}" for what, (a, b) in sizes.items() if a != b]
    try:
        fitted = suite.with_changes(views=views, image_size=image_size or suite.image_size)
    except (ValidationError, UserError) as error:
        fitted = suite
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        differ.append(said.removeprefix("Value error, "))
    if differ:
        lines = "".join(f"\n  {line}" for line in differ)
        robot = ", ".join(spec.embodiments)
        raise UserError(f"The policy (of {robot}) does not fit the suite {suite.name}.{lines}\n{CURE}")
    return fitted
