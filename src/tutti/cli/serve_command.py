"""The command `tutti serve`: a trained policy answers robots over the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tutti.cli.commands import TrustCode
from tutti.config.files import require_run
from tutti.errors import UserError
from tutti.runs.terminal import print_line

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    policy: Annotated[
        Path,
        typer.Argument(help="A run's folder, a checkpoint's, or one of `tutti export`.", metavar="POLICY"),
    ],
    *,
    host: Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0: all.")] = LOCAL[0],
    port: Annotated[int, typer.Option("--port", help="0: any that is free.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="TUTTI_TOKEN", help="What clients must send.", show_default="none"),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", "-i", help="Where a client sends none.", metavar="TEXT"),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="What a client's key is: a view, state or instruction; may be given again.",
            metavar="KEY=VIEW",
        ),
    ] = None,
    robot: Annotated[
        str | None, typer.Option("--robot", help="Of those in the training.", show_default="the only one")
    ] = None,
    weights: Annotated[Literal["ema", "raw"], typer.Option("--weights")] = "ema",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    clients: Annotated[int, typer.Option("--clients", help="At once.", min=1, max=4096)] = 64,
    megabytes: Annotated[
        float, typer.Option("--max-message", help="MiB of a message.", min=0.01, max=1024)
    ] = 16.0,
    batch: Annotated[
        int, typer.Option("--batch", help="Waiting requests computed at once.", min=1, max=256)
    ] = 1,
    page: Annotated[
        bool, typer.Option("--page", help="A page for people at /: what comes in and goes out.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Serves a policy by openpi's websocket protocol, so that openpi's clients drive it.

    Only this machine can reach it unless --host says otherwise; then give --token, or TUTTI_TOKEN.
    See docs/how-to/serving.md.
    """
    require_run(policy)
    try:
        from tutti.serving.server import PolicyServer, ServerLimits
    except ModuleNotFoundError as error:
        raise UserError(
            f"tutti serve needs {error.name}. Install it: pip install 'tutti-vla[serve]'"
        ) from error
    from tutti.report.served_page import served_page
    from tutti.serving.factory import CheckpointPolicyFactory
    from tutti.serving.front_door import FrontDoor
    from tutti.serving.policy import Policy

    factory = CheckpointPolicyFactory(policy, weights, trust_code=trust_code)
    loaded = Policy.load(
        factory.path, weights, embodiment=robot, device=device, trust_code=trust_code, warn=False
    )
    own = loaded.robot()
    server = PolicyServer(
        loaded,
        host=host,
        port=port,
        token=token,
        front_door=FrontDoor(own.spec, _pairs(names or []), instruction, own.needs_state),
        limits=ServerLimits(clients=clients, message=round(megabytes * 2**20), batch=batch),
        fingerprint=factory.fingerprint,
        page=served_page if page else None,
    )
    if host not in LOCAL and not token:
        print_line(f"! {host}: everyone who reaches this address may drive the policy; --token asks for one")

    def started(address: str) -> None:
        views = ", ".join(loaded.spec.views)
        print_line(f"policy {factory.path}, {loaded.spec.horizon} actions at {loaded.spec.fps:g} a second")
        print_line(f"listening on {address}; views {views}; Ctrl-C ends it")
        if page:
            print_line(f"page for people {address.replace('ws:', 'http:')}/")

    server.run(started)
    print_line(f"served {server.traffic.summary()}")


def _pairs(names: list[str]) -> dict[str, str]:
    """Raises: UserError for what is no KEY=VIEW."""
    for one in names:
        if not all(one.partition("=")[::2]):
            raise UserError(f"--name {one}: expected KEY=VIEW, such as cam0=front or arm/q=state.")
    return dict(one.split("=", 1) for one in names)
