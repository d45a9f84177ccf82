"""Teachers from the Hugging Face hub: only the files a family needs, and errors that say the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bootcli.errors import BootError
from bootcli.teachers.family import TeacherFamily, readers_of

CARD = ("*.json", "README.md")
"""Small files that show which family a repository belongs to; fetched first."""


def fetch(hub_id: str, families: Sequence[TeacherFamily]) -> tuple[TeacherFamily, Path]:
    """Download a teacher, or find it in the cache.

    Args:
        hub_id: ``owner/name``.
        families: the candidates; of several, the first look at the small files must leave exactly one.

    Raises `BootError` without network, for a missing or gated repository, and for one that no family reads.
    """
    folder = _download(hub_id, CARD)
    readers, broken = (list(families), []) if len(families) == 1 else readers_of(folder, families)
    if len(readers) != 1:
        accepted = [f"{family.name}: {line}" for family in families for line in family.accepts]
        several = f"Say which family: {' or '.join(f'{family.name}:{hub_id}' for family in readers)}"
        raise BootError(
            f"{'No' if not readers else 'More than one'} installed teacher family reads {hub_id}.",
            several if readers else "\n".join(["Accepted:", *accepted, *broken]),
        )
    family = readers[0]
    for weights in family.hub_weights or ((),):
        folder = _download(hub_id, (*CARD, *family.hub_files, *weights))
        has_some = any(any(folder.glob(pattern)) for pattern in weights)
        if has_some if family.complete is None else family.complete(folder):
            break
    return family, folder


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise BootError(f"{hub_id} is gated: its terms must be accepted first.", _token(hub_id)) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        message = f"The hub has no repository {hub_id}, or it is private; nor is there such a folder here."
        raise BootError(message, "Check the name. " + _token(hub_id)) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(hub_id) from error
    except Exception as error:  # the classes of a broken connection belong to whatever library the hub client uses
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the local disk
        raise BootError(f"Cannot download {hub_id}: {error}.", _local(hub_id)) from error


def _unreachable(hub_id: str) -> BootError:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return BootError(
            f"{hub_id} is not in the local cache, and HF_HUB_OFFLINE forbids downloading it.",
            f"Unset HF_HUB_OFFLINE once to fetch it. {_local(hub_id)}",
        )
    return BootError(
        f"Cannot reach the hub for {hub_id}, and it is not in the local cache.",
        "Check the network; once fetched it works offline (HF_HUB_OFFLINE=1 does not even ask). " + _local(hub_id),
    )


def _token(hub_id: str) -> str:
    return f"With access on https://huggingface.co/{hub_id}, set HF_TOKEN to your token. {_local(hub_id)}"


def _local(hub_id: str) -> str:
    return f"Or fetch the folder elsewhere and name it: --teacher ./{hub_id.rpartition('/')[2]}"
