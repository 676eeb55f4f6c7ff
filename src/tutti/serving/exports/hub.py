"""Exports on a hub of models: pushed with their card, and pulled file by file against their checksums.

Only what export.json lists is sent or taken, so nothing else that lies beside it in a folder or a repository.
Nothing of it is run or unpickled.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tutti.serving.contents import read_model
from tutti.serving.exports.card import CARD
from tutti.storage.checkpoint import listed
from tutti.storage.files import explain_disk_errors, write_folder
from tutti.storage.manifest import EXPORT, Manifest
from tutti.storage.reading import MAX_BYTES
from tutti.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push_export(
    folder: Path | str, name: str, *, public: bool = False, message: str = "", endpoint: str | None = None
) -> str:
    """Writes an export and its card into the model repository OWNER/NAME in one commit, and makes it if it is
    not there, private unless `public`. Gives its address. The token is that of `hf auth login` or HF_TOKEN.

    Raises: UserError for another folder, a damaged file, a missing package or token, or what the hub says.
    """
    folder = Path(folder)
    if not (folder / EXPORT).is_file():
        raise UserError(
            f"{folder}: expected a folder of `tutti export` with {EXPORT}, found none.\n"
            "  cure: tutti export RUN --to FOLDER"
        )
    manifest = listed(folder)
    for file in manifest.files:
        manifest.check(file)
    names = [EXPORT, *manifest.files, *([CARD] if (folder / CARD).is_file() else [])]
    with _hub(name, endpoint) as api:
        from huggingface_hub import CommitOperationAdd

        address = api.create_repo(name, private=not public, exist_ok=True)
        api.create_commit(
            name,
            [CommitOperationAdd(path_in_repo=one, path_or_fileobj=folder / one) for one in names],
            commit_message=message or f"tutti export: {folder.resolve().name}",
        )
    return str(address)


def pull_export(
    name: str, to: Path | str, *, revision: str | None = None, endpoint: str | None = None
) -> Path:
    """The export of the model repository OWNER/NAME as the folder `to`, of a `revision` or of now.

    All files are of one commit. Sizes are compared with export.json before a file is fetched, its SHA-256
    after; the folder appears whole or not at all. Gives the folder.

    Raises: UserError if `to` exists, the repository holds no export or another file than it lists, a package
    is missing, or what the hub says.
    """
    to = Path(to)
    if to.exists():
        raise UserError(f"{to} exists. Give --to a folder that does not, or delete this one.")
    with explain_disk_errors(to, "the export"), write_folder(to) as folder:
        with _hub(name, endpoint) as api, tempfile.TemporaryDirectory(dir=to.absolute().parent) as place:
            info = api.model_info(name, revision=revision, files_metadata=True)
            sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}

            def fetch(file: str) -> None:
                got = api.hf_hub_download(name, file, revision=info.sha, cache_dir=place)
                shutil.copyfile(got, folder / file)

            if not 0 < sizes.get(EXPORT, 0) <= MAX_BYTES:
                raise UserError(
                    f"{name}: expected {EXPORT} of an export of Tutti, found {', '.join(sorted(sizes))[:200]}"
                    ".\n  cure: name a repository that `tutti push` has written."
                )
            fetch(EXPORT)
            manifest = Manifest.of(folder, EXPORT)
            for file, said in manifest.files.items():
                if sizes.get(file) != said["bytes"]:
                    raise UserError(
                        f"{name}: {file}: expected {said['bytes']:,} bytes as {EXPORT} lists, found "
                        f"{sizes.get(file, 'no such file')}.\n  cure: another --revision, or push it again."
                    )
            for file in manifest.files:
                fetch(file)
                manifest.check(file)
            if 0 < sizes.get(CARD, 0) <= MAX_BYTES:
                fetch(CARD)
        read_model(listed(folder), "raw", False)
    return to


@contextmanager
def _hub(name: str, endpoint: str | None) -> Iterator[HfApi]:
    """The client of the hub. Raises: UserError for whatever goes wrong with it."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name[:200]!r}: expected a repository's name, OWNER/NAME.")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError
    except ModuleNotFoundError as error:
        raise UserError(f"the hub needs {error.name}. Install it: pip install 'tutti-vla[hub]'") from error
    login = "hf auth login, or set HF_TOKEN"
    try:
        yield HfApi(endpoint=endpoint, library_name="tutti")
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(f"{name}: the hub asks for a token, and none is here.\n  cure: {login}") from error
    except Exception as error:  # its errors have no one base class: the network's are among them
        of_hub = HfHubHTTPError, LocalEntryNotFoundError, ConnectionError
        if isinstance(error, OSError) and not isinstance(error, of_hub):
            raise  # of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(str(error).split())[:300] or type(error).__name__
        cure = (
            f"{login} of one who may do this" if status in (401, 403) else "look at the name and the network"
        )
        raise UserError(f"{name}: {said}\n  cure: {cure}") from error
