"""The tests of pre-trained towers and VLMs with several versions of transformers, beside this environment.

python benchmarks/transformers_versions.py 5.9.0 5.15.0 5.18.0 5.24.0 installs each, with the tokenizers and
the hub that it asks for, into a folder of its own below .versions (pip install --target: this environment
stays as it is), runs the tests with it, and writes benchmarks/results/transformers_versions.md. It needs a
package index; minutes a version.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from tables import RESULTS, Table, prints_user_errors, publish

from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"
TESTS = (
    *(f"unit/test_{name}.py" for name in ("models_towers", "models_vlm", "decoders_pi0", "terms_next_token")),
    *(f"integration/test_{name}.py" for name in ("towers_trained", "init_folder", "own_robot_page")),
    *(f"integration/test_{name}.py" for name in ("cotraining", "ranks_vlm")),
)
OWN = ("transformers", "tokenizers", "huggingface", "httpx", "httpcore")
"""Packages whose pins are not those of constraints.txt: a version asks for its own."""
REFUSED = "needs transformers 5.15 or later"
"""What Tutti says of Qwen's VLMs where the version is too old for them."""


def installed(version: str) -> Path:
    """The folder of a version; what is there is kept. Raises: UserError if pip cannot install it."""
    folder = FOLDER / version
    if not (folder / "transformers").is_dir():
        pins = FOLDER / "constraints.txt"
        FOLDER.mkdir(exist_ok=True)
        kept = (one for one in (ROOT / "constraints.txt").read_text().splitlines() if not one.startswith(OWN))
        pins.write_text("\n".join(kept) + "\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--target",
            str(folder),
            "-c",
            str(pins),
        ]
        if subprocess.run([*command, f"transformers=={version}"], check=False).returncode:
            raise UserError(f"pip could not install transformers {version}; its words stand above.")
    return folder


def counts_with(version: str) -> Counter[str]:
    """How many tests passed, failed, were skipped, or failed since Qwen's VLMs were refused."""
    report = FOLDER / f"{version}.xml"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join(map(str, (installed(version), ROOT / "src")))
    command = ["pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run(
        [sys.executable, "-m", *command, *(f"tests/{one}" for one in TESTS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if not report.exists():
        raise UserError(f"The tests with transformers {version} did not run; their words stand above.")
    found: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        told = [one for one in case if one.tag in ("failure", "error", "skipped")]
        words = "".join((one.get("message") or "") + (one.text or "") for one in told)
        kind = "skipped" if any(one.tag == "skipped" for one in told) else "failed" if told else "passed"
        found["refused" if kind == "failed" and REFUSED in words else kind] += 1
    return found


@prints_user_errors
def main() -> int:
    """The table; 1 if a test failed in any version, but for Qwen where it is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", help="such as 5.18.0")
    found = {version: counts_with(version) for version in parser.parse_args().versions}
    kinds = ("passed", "refused", "failed", "skipped")
    rows = tuple((version, *(str(one[kind]) for kind in kinds)) for version, one in found.items())
    notes = (
        f"Python {sys.version.split()[0]}; the tests: {', '.join(TESTS)}. Refused: of the VLMs of Qwen, for "
        "which Tutti says that they need transformers 5.15 or later.",
    )
    heads = ("transformers", "passed", "refused (Qwen)", "failed", "skipped")
    table = Table(title="Tests of towers and VLMs by version", heads=heads, rows=rows)
    publish(RESULTS / "transformers_versions", "Versions of transformers", (table,), notes, dict(found))
    return int(any(one["failed"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
