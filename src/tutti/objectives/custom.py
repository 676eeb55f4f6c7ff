"""A term of the user's own, named in the config as `package.module:Class`."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tutti.objectives.schedule import Weight
from tutti.objectives.term import Boundary, Model, Term
from tutti.types import UserError


class CustomTermConfig(BaseModel):
    """`kind: custom`. The class is called as `Class(model, **options, name=..., stop_gradient=...)`.

    It must be a `tutti.objectives.term.Term`; the last two arguments are for its `super().__init__`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["custom"] = "custom"
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:Class")
    options: dict[str, Any] = {}
    weight: Weight = 1.0
    stop_gradient: tuple[Boundary, ...] = ()

    def build(self, model: Model, name: str) -> Term:
        """The term called `name`. Raises UserError, naming the target, if it cannot be had or is no Term."""
        key = f"objective.extra.{name}.target"
        module_name, class_name = self.target.split(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(
                f"{key} is '{self.target}', but '{module_name}' cannot be imported: {error}. Install it, or "
                f"run with its folder on PYTHONPATH (PYTHONPATH=. for a file beside you)."
            ) from error
        term_class = getattr(module, class_name, None)
        if not (isinstance(term_class, type) and issubclass(term_class, Term)):
            have = sorted(
                n
                for n, v in vars(module).items()
                if isinstance(v, type) and issubclass(v, Term) and v is not Term
            )
            found = "no such name" if term_class is None else f"{term_class!r}"
            raise UserError(
                f"{key} is '{self.target}': expected a subclass of tutti.objectives.term.Term, found "
                f"{found}. Terms in {module.__file__}: {', '.join(have) or 'none'}."
            )
        try:
            term = term_class(model, **self.options, name=name, stop_gradient=self.stop_gradient)  # pyright: ignore[reportCallIssue]
        except TypeError as error:
            raise UserError(
                f"{key}: {self.target} does not accept options {sorted(self.options)}: {error}. It is called "
                f"as {class_name}(model, **options, name=..., stop_gradient=...)."
            ) from error
        return term
