"""transformers, told to ask nobody; and models of a hub by name, fetched only where the user has said so."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from types import ModuleType

from tutti.errors import UserError

HUB = "hf:"
DOWNLOAD = "TUTTI_DOWNLOAD"
"""Set in the environment by `tutti --download`, so that all processes of the command know."""
WANTED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""The files of a model that are read: no code, nothing pickled."""
OLDEST = (5, 9)
"""The first transformers whose parts have the names of `FACTS`; pyproject.toml asks for it."""


@cache
def hub_folder(name: str, key: str) -> Path:
    """The folder of the model NAME of Hugging Face's hub.

    Raises: UserError if it is not in the cache and may not be fetched, or cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise UserError(
            f"{key}.path is {HUB}{name[:200]}.\n  expected: {HUB}OWNER/NAME, or the path of a folder"
        )
    may = os.environ.get(DOWNLOAD) == "1"
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(
            f"{key}.path is {HUB}{name}, which needs huggingface_hub ({error}).\n  cure: pip install "
            "'tutti-vla[pretrained]'"
        ) from error
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = (
        not may
    )  # a constant of its import, which transformers is told to be offline by
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=[*WANTED], local_files_only=not may)
    except Exception as error:  # its errors have no one base class: the network's are among them
        why = (
            f"cannot be fetched ({str(error).splitlines()[0][:200]})" if may else "is not in the local cache"
        )
        cure = f"tutti --download ..., which fetches it, or: hf download {name}"
        if may:
            cure = f"look at the name and the network, or name a folder in {key}.path"
        raise UserError(f"{key}.path is {HUB}{name}, which {why}.\n  cure: {cure}") from error
    finally:
        constants.HF_HUB_OFFLINE = before
    return Path(found)


def transformers(key: str) -> ModuleType:
    """The library, told to ask nobody. Raises: UserError if it is not installed, or too old."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before its first import, which reads it
    try:
        import transformers as library
    except ImportError as error:
        raise UserError(
            f"{key}.kind is pretrained, which needs transformers ({error}).\n  cure: pip install "
            "'tutti-vla[pretrained]'"
        ) from error
    if tuple(map(int, library.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"{key}.kind is pretrained, and the installed transformers is {library.__version__}.\n  "
            f"expected: {oldest} or later, whose parts have other names\n  "
            f"cure: pip install 'transformers>={oldest},<6'"
        )
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library
