"""The numbers of a data set and the digests of its episodes: read once, then mapped by every process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from tutti.data.episodes import KEPT_FROM, Episodes, EpisodeStore
from tutti.storage.arrays import Arrays, kept, packed, stamp, unpacked
from tutti.types import LABELS

_FORMAT = 1
"""Raised when a reader gives other numbers for the same files."""
_DIGEST, _PRESENT = "digest of ", "present "


def read_once(
    store: EpisodeStore,
    read: Callable[[], None],
    *,
    path: Path,
    home: Path | None,
    asked: tuple[object, ...],
    episodes: tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]],
    arrays: Sequence[str],
    texts: Sequence[str] = (),
) -> None:
    """Gives a store the attributes that `read` sets: `arrays`, and `texts`, which are tuples of texts; and
    its `episodes`, of these numbers, first rows and lengths.

    A large data set is read by one process: it writes them, and the digests of the episodes, to an index
    below `home`, the folder of caches, and all others map that. It is of the names, sizes and times of all
    files at `path` and of what was `asked`; of others it is written anew (`kept`).

    Raises: UserError as `read`.
    """

    def named() -> None:
        store.episodes = Episodes(*episodes, store.instruction_of[episodes[1]], store.instructions)

    def make() -> Arrays:
        read()
        named()
        digests = store.number_digests | store.recorded_digests()
        written = {name: packed(getattr(store, name)) for name in texts}
        own = {name: getattr(store, name) for name in arrays}
        own |= {_PRESENT + label: rows for label, rows in store.present.items()}
        return own | written | {_DIGEST + name: many for name, many in digests.items()}

    if home is None or store.spec.num_frames < KEPT_FROM:
        read()
        named()
        return
    key = repr((_FORMAT, type(store).__name__, str(path.resolve()), *arrays, *texts, *asked))
    folder = home / "index" / hashlib.sha256(key.encode()).hexdigest()[:24]
    found = kept(folder, stamp(path), make)
    own = vars(store)
    own |= {name: found[name] for name in arrays}
    own |= {name: unpacked(found[name]) for name in texts}
    digests = {name.removeprefix(_DIGEST): many for name, many in found.items() if name.startswith(_DIGEST)}
    own["number_digests"] = {name: digests.pop(name) for name in ("states", "actions")}
    store.known_digests = digests
    own["present"] = {label: found[_PRESENT + label] for label in LABELS}
    named()
