"""The shared workspace: where a job may work."""

import os
from pathlib import Path

DIRECTORY_MODE = 0o2775  # what one job's group made, another's may change


class WorkspaceError(ValueError):
    """A path that a job may not work in; the sentence says why."""


def resolve(root: Path, relative: str) -> Path:
    """Return the real path of `relative` below `root`, links followed.

    It need not exist. Raises `WorkspaceError` when it lies outside or can be no directory.
    """
    real_root = root.resolve()
    try:
        path = (real_root / relative).resolve()
    except (OSError, RuntimeError):  # a loop of links is a RuntimeError before Python 3.13
        raise WorkspaceError(f"{relative!r} cannot be followed") from None
    if not path.is_relative_to(real_root):
        raise WorkspaceError(f"{relative!r} leaves the workspace")
    existing = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not existing.is_dir():
        raise WorkspaceError(f"{relative!r} is no directory")
    return path


def prepare(root: Path, relative: str) -> Path:
    """Resolve a directory and make it, with its parents, so that agents may write there."""
    path = resolve(root, relative)
    missing = [part for part in (path, *path.parents) if not part.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        directory.chmod(DIRECTORY_MODE)
    return path
