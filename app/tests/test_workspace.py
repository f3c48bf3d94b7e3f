"""A job stays inside the workspace, whatever path it names and whatever lies on the way."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_jobs.workspace import WorkspaceError, prepare, resolve


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    (base / "outside").mkdir()
    (base / "workspace-2").mkdir()
    root = base / "workspace"
    (root / "a" / "b").mkdir(parents=True)
    (root / "file").touch()
    for name, target in {
        "out": "../outside",
        "etc": "/etc",
        "sibling": "../workspace-2",
        "dangling": "../outside/new",
        "in": "a/b",
        "loop": "loop",
        "up": "a/b/../../..",
    }.items():
        (root / name).symlink_to(target)
    return root


parts = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "b",
        "new",
        "file",
        "out",
        "etc",
        "sibling",
        "dangling",
        "in",
        "loop",
        "up",
    ]
)


@given(st.lists(parts, max_size=6).map("/".join))
def test_no_path_leaves_the_workspace(root: Path, relative: str) -> None:
    try:
        path = resolve(root, relative)
    except WorkspaceError:
        return
    assert path == Path(os.path.realpath(root / relative))
    assert path.is_relative_to(root)


@pytest.mark.parametrize(
    "relative",
    [
        "..",
        "/",
        "/etc",
        "a/../..",
        "out",
        "out/x",
        "etc",
        "sibling",
        "dangling",
        "up",
        "in/../../..",
    ],
)
def test_what_leads_out_is_refused(root: Path, relative: str) -> None:
    with pytest.raises(WorkspaceError, match="leaves the workspace"):
        resolve(root, relative)


@pytest.mark.parametrize("relative", ["file", "file/below", "loop", "loop/x"])
def test_what_can_be_no_directory_is_refused(root: Path, relative: str) -> None:
    with pytest.raises(WorkspaceError, match=r"is no directory|cannot be followed"):
        resolve(root, relative)


@pytest.mark.parametrize(
    ("relative", "below"),
    [(".", ""), ("a", "a"), ("in", "a/b"), ("in/new", "a/b/new"), ("x/y", "x/y")],
)
def test_what_lies_inside_is_found(root: Path, relative: str, below: str) -> None:
    assert resolve(root, relative) == root / below


def test_a_root_that_is_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert resolve(tmp_path / "link", "a") == root / "a"


def test_a_new_directory_is_made_for_the_whole_group(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        made = prepare(tmp_path, "new/deep/er")
    finally:
        os.umask(mask)
    for directory in (made, made.parent, made.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o2775


def test_a_directory_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o750)
    prepare(tmp_path, "mine")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o750
    prepare(tmp_path, ".")
