"""The command `tutti evaluate`: a policy of this machine, or behind a server, plays a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutti.cli.commands import TrustCode
from tutti.config.files import require_run
from tutti.config.layers import check_keys
from tutti.errors import UserError


def evaluate(
    policy: Annotated[
        str | None,
        typer.Argument(
            help="A run's folder, a checkpoint's, or one of `tutti export`; none with --connect.",
            metavar="POLICY",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Such as evaluation.episodes=200.", metavar="[evaluation.KEY=VALUE ...]"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Keep it beside others, in RUN/evaluations/NAME.",
            show_default=False,
            metavar="NAME",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="The folder.", show_default="RUN/evaluation, or POLICY-evaluation", metavar="FOLDER"
        ),
    ] = None,
    *,
    redo: Annotated[bool, typer.Option("--redo", help="Play everything again.")] = False,
    trust_code: TrustCode = False,
    track: Annotated[
        bool, typer.Option("--track", help="Tell the trackers of the run's config: success, videos.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Compare with this evaluation or run.", metavar="FOLDER"),
    ] = None,
    connect: Annotated[
        str | None,
        typer.Option(
            "--connect", help="The policy of this server (openpi's protocol).", metavar="ws://HOST:PORT"
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", envvar="TUTTI_TOKEN", help="What that server asks for.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help="How the server calls a view, or the state.", metavar="VIEW=KEY"),
    ] = None,
) -> None:
    """Measures a policy: success in the simulator with intervals and controls; of a run, open-loop error too.

    Finished rollouts are kept, so more starts extend it: tutti evaluate runs/demo evaluation.episodes=50
    What would make them wrong needs a name: tutti evaluate runs/demo evaluation.weights=raw --name raw
    """
    given = overrides or []
    if connect is not None:
        given, policy = [policy, *given] if policy else given, None
    elif policy is None:
        raise UserError("Name a run, a checkpoint or an export, or a server: --connect ws://127.0.0.1:8000.")
    for override in given:
        if not override.startswith("evaluation."):
            raise UserError(
                f"'{override}': a trained policy is as it is; only keys of evaluation.* may change."
            )
    if policy is not None:
        require_run(Path(policy))
    if given and policy is not None and (Path(policy) / "config.yaml").is_file():
        check_keys(Path(policy) / "config.yaml", given)
    from tutti import pipeline
    from tutti.runs.judges.baseline import compare_with
    from tutti.runs.summary import print_evaluation

    if policy is None:
        assert connect is not None
        try:
            from tutti.runs.judges.remote import evaluate_remote
        except ModuleNotFoundError as error:
            raise UserError(
                f"--connect needs {error.name}. Install it: pip install 'tutti-vla[serve]'"
            ) from error
        folder = evaluate_remote(connect, given, to=to, token=token, keys=_pairs(key), redo=redo)
    else:
        folder = pipeline.evaluate(
            Path(policy),
            overrides=given,
            name=name,
            to=to,
            redo=redo,
            trust_code=trust_code,
            track=track,
        )
    compared = None if against is None else compare_with(folder, against)
    print_evaluation(folder, [] if compared is None else compared.lines())


def _pairs(given: list[str] | None) -> dict[str, str]:
    """The parts before and after the first "=" of each. Raises: UserError where there is none."""
    for one in given or []:
        if "=" not in one:
            raise UserError(f"--key {one}: expected VIEW=KEY, such as corner2_moved=observation/image.")
    return dict(one.split("=", 1) for one in given or [])
