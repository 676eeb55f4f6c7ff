"""Pictures of the pages that Tutti makes, as readers see them: 1400, 800 and 400 px wide, light and dark.

python benchmarks/picture_pages.py runs/a [runs/b ...] [--search runs/a/tune/space/report.html] takes the
report of the first run in English and in Chinese, the live page of all of them, and the page of a search,
--height pixels from the top, into docs/pictures/pages: light, and at 800 px dark too. Needs Chromium. They
are there to be looked at before a release; no test compares them.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tables import prints_user_errors

from tutti.config.files import require_run
from tutti.report.chinese import Language
from tutti.report.live import serve_report
from tutti.runs.terminal import print_line

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from fixtures.browser import browser  # noqa: E402  (the tests' own)

WIDTHS, DARK_AT = (1400, 800, 400), 800


@contextmanager
def served(runs: list[Path], language: Language) -> Iterator[str]:
    """The address of the live report."""
    server = serve_report(runs, language=language)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--search", type=Path, help="the page of a search, as tutti tune wrote it")
    parser.add_argument("--height", type=int, default=2600, help="pixels of a page (default 2600)")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "pictures" / "pages")
    return parser.parse_args(given)


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0; every picture's bytes are printed."""
    arguments = parse(given)
    runs = [require_run(one) for one in arguments.runs]
    arguments.to.mkdir(parents=True, exist_ok=True)
    with browser() as page, served(runs, "en") as english, served(runs, "zh") as chinese:
        pages = {"live": f"{english}/", "report": f"{english}/0/", "report-zh": f"{chinese}/0/"}
        if arguments.search is not None:
            pages["search"] = arguments.search.resolve(strict=True).as_uri()
        for name, address in pages.items():
            for width in WIDTHS:
                for dark in (False, True) if width == DARK_AT else (False,):
                    page.look(width, dark=dark)
                    page.open(address)
                    path = arguments.to / f"{name}-{width}-{'dark' if dark else 'light'}.webp"
                    page.picture(path, height=arguments.height)
                    print_line(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
