"""Models by their name on the Hugging Face hub: weights and JSON, through its cache, never code."""

from __future__ import annotations

import re
from pathlib import Path

PATTERNS = ["*.safetensors", "*.json"]
_NAME = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_name(source: str | Path) -> bool:
    """Whether ``source`` reads as ``org/name`` or ``org/name@revision``, and is nothing on this disk."""
    return isinstance(source, str) and bool(_NAME.fullmatch(source)) and not Path(source).exists()


def fetched(source: str, revision: str | None = None) -> Path:
    """The folder of the hub's cache that holds a model; what is missing of it is downloaded.

    Files of ``PATTERNS`` at the repository's top are taken, nothing else: no code, no pickles.

    Args:
        source: ``org/name``, or ``org/name@revision``.
        revision: a branch, tag or commit; None: that in ``source``, or the main branch.

    Raises:
        FileNotFoundError: no such model or revision, no access, or no network and not in the cache; the
            message says what was looked for, and where.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    match = _NAME.fullmatch(source)
    assert match is not None
    name, revision = match["id"], revision or match["revision"]
    looked = f"{name}{f' at {revision}' if revision else ''}: no such local folder"
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=["*/*"])
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{looked}, and no name that a model on the hub can have") from error
    except Exception as error:  # errors of HTTP, of the network, of the hub: several families of them
        raise FileNotFoundError(f"{looked}; {_why(error)} (cache: {constants.HF_HUB_CACHE})") from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{looked}, and on the hub it has no config.json")
    return folder


def name_of_cached(folder: Path) -> str | None:
    """``org/name@commit`` of a folder in the hub's cache; None for any other."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"


def _why(error: Exception) -> str:
    """What went wrong on the hub's side, in some words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        IncompleteSnapshotError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for kind, words in (
        (GatedRepoError, "on the hub it is gated, and access was not granted: log in with 'hf auth login'"),
        (RepositoryNotFoundError, "the hub has no such model, or it is private: log in with 'hf auth login'"),
        (RevisionNotFoundError, "the hub has the model, but no such revision"),
        (IncompleteSnapshotError, "the hub's cache holds a part of it, and the rest can't be downloaded now"),
    ):
        if isinstance(error, kind):
            return words
    if constants.HF_HUB_OFFLINE:
        return "not in the hub's cache, and HF_HUB_OFFLINE forbids looking further"
    reason = str(error.__cause__ or error).strip().splitlines()[:1] or [type(error).__name__]
    return f"not in the hub's cache, and {constants.ENDPOINT} does not answer: {reason[0]}"
