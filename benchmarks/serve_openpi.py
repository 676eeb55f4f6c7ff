"""The real openpi-client drives a Tutti policy: the bits of `Policy.predict`, in every form of a picture.

    python -m venv /tmp/openpi
    /tmp/openpi/bin/pip install --no-deps openpi-client==0.1.2 numpy==1.26.4 msgpack==1.2.4 \\
        websockets==15.0.1 typing_extensions dm-tree pillow==12.0.0
    python benchmarks/serve_openpi.py /tmp/openpi/bin/python [--policy FOLDER]

openpi-client needs numpy below 2, so it has an environment of its own. Without --policy a small policy with
random weights is served. Writes results/serve_openpi.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
COUNT = 100
TEXT = "open the tap"
TOKEN = "sesame"


def drive(address: str, folder: Path) -> dict[str, Any]:
    """In the environment of openpi-client: everything that its users do. Gives what was found."""
    import importlib.metadata

    from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

    policy = websocket_client_policy.WebsocketClientPolicy(address, api_key=TOKEN)
    data = np.load(folder / "observations.npz")
    views = [name for name in data.files if name.startswith("view")]
    forms: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "uint8, channels last": lambda picture: picture,
        "uint8, channels first": lambda picture: picture.transpose(2, 0, 1),
        "float32 in [0, 1]": lambda picture: (picture / 255).astype(np.float32),
        "convert_to_uint8 of a float": lambda picture: image_tools.convert_to_uint8(
            np.minimum((picture + 0.5) / 255, 1.0)
        ),
        "resize_with_pad to its own size": lambda picture: image_tools.resize_with_pad(
            picture, *picture.shape[:2]
        ),
        "Fortran order": np.asfortranarray,
    }
    equal = dict.fromkeys(forms, 0)
    for number, (name, form) in zip(range(COUNT), list(forms.items()) * COUNT, strict=False):
        pictures = {str(data["names"][place]): form(data[view][number]) for place, view in enumerate(views)}
        answer = policy.infer({"images": pictures, "state": data["state"][number], "prompt": TEXT})
        equal[name] += int(np.array_equal(answer["actions"], data["actions"][number]))
        assert answer["actions"].dtype == np.float32 and answer["server_timing"]["infer_ms"] > 0

    def error_of(observation: Any) -> str:
        try:
            policy.infer(observation)
        except RuntimeError as error:
            return str(error).split("\n")[1]
        return ""

    good = {str(data["names"][place]): data[view][0] for place, view in enumerate(views)}
    good.update({"state": data["state"][0], "prompt": TEXT})
    errors = [
        error_of({name: value for name, value in good.items() if name != lacking})
        for lacking in (str(data["names"][0]), "state", "prompt")
    ]
    errors += [error_of({**good, "state": np.zeros(99)}), error_of({**good, "prompt": np.array(["a"])})]
    survived = np.array_equal(policy.infer(good)["actions"], data["actions"][0])
    broker = action_chunk_broker.ActionChunkBroker(policy, 3)
    rows = [broker.infer(good)["actions"] for _ in range(4)]
    broken = np.array_equal(rows, [*data["actions"][0][:3], data["actions"][0][0]])
    try:
        websocket_client_policy.WebsocketClientPolicy(address, api_key="wrong")
        refused = ""
    except Exception as error:
        refused = str(error)
    return {
        "openpi-client": importlib.metadata.version("openpi-client"),
        "numpy": np.__version__,
        "observations": COUNT,
        "equal to the last bit": sum(equal.values()),
        **{f"equal, {name}": count for name, count in equal.items()},
        "errors that came as a sentence": sum(map(bool, errors)),
        "of wrong observations": len(errors),
        "the connection went on after them": survived,
        "ActionChunkBroker gives the rows of the chunk": broken,
        "a wrong key": refused,
        "metadata": sorted(policy.get_server_metadata()),
        "the errors": errors,
    }


def measure(python: Path, given: Path | None) -> dict[str, Any]:
    """Serves the policy and lets the other environment drive it."""
    from random_policy import observations, random_policy

    from tutti.serving.policy import Policy

    with tempfile.TemporaryDirectory() as place:
        folder = given or random_policy(Path(place) / "step-000001")
        policy = Policy.load(folder, warn=False)
        seen = observations(policy.spec, 2 * COUNT)[::2]  # those of one size, so that they are an array
        chunks = [policy.predict(one["images"], one["state"], TEXT) for one in seen]
        np.savez(
            Path(place) / "observations.npz",
            names=np.array(policy.spec.views),
            state=np.stack([one["state"] for one in seen]),
            actions=np.stack(chunks),
            **{
                f"view{number}": np.stack([one["images"][view] for one in seen])
                for number, view in enumerate(policy.spec.views)
            },
        )
        command = [sys.executable, "-m", "tutti", "serve", str(folder), "--port", "0", "--token", TOKEN]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            server.stdout.readline()
            address = server.stdout.readline().split("listening on ")[1].split(";")[0]
            try:
                driver = [str(python), __file__, "--drive", address, "--folder", place]
                done = subprocess.run(driver, stdout=subprocess.PIPE, text=True, check=True)
            finally:
                server.terminate()
            last = server.stdout.read().strip()
    return {**json.loads(done.stdout), "the server's last line": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", type=Path, nargs="?")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--drive")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.drive:
        print(json.dumps(drive(options.drive, options.folder)))
        return
    found = measure(options.python, options.policy)
    (RESULTS / "serve_openpi.json").write_text(json.dumps(found, indent=1) + "\n")
    long = ("metadata", "the errors", "the server's last line")
    rows = "".join(f"| {name} | {value} |\n" for name, value in found.items() if name not in long)
    (RESULTS / "serve_openpi.md").write_text(f"| | |\n|---|---|\n{rows}")
    print(rows)


if __name__ == "__main__":
    main()
