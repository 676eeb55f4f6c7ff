"""The console script `tutti` and `python -m tutti`: signals are obeyed before anything slow is imported."""

from tutti.cli.signals import end_at_once, obeyed, open_streams
from tutti.distributed.launcher import end_with_launcher


def main() -> None:
    """The command `tutti`."""
    open_streams()
    with obeyed(end_at_once):
        end_with_launcher()
        from tutti.cli.app import app

        app()
