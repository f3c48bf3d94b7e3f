"""A job stays inside the workspace, whatever path it names and whatever lies on the way."""

import os
import stat
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_jobs.settings import WorkspaceMode
from claude_jobs.workspace import WorkspaceError, job_directory, locate, prepare, resolve


def make_tree(base: Path) -> Path:
    """Make a workspace with links that stay inside and links that lead out."""
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("base"))


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


@given(st.lists(parts.filter(lambda part: part != ".."), max_size=6).map("/".join))
@settings(deadline=None)
def test_what_is_made_is_what_was_resolved(relative: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        root = make_tree(Path(base))
        try:
            expected = resolve(root, relative)
        except WorkspaceError:
            with pytest.raises(WorkspaceError):
                prepare(root, relative)
        else:
            assert prepare(root, relative) == expected
            assert expected.is_dir()
        assert not any((Path(base) / "outside").iterdir())
        assert not any((Path(base) / "workspace-2").iterdir())


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


@pytest.mark.parametrize(
    ("mode", "asked", "directory"),
    [
        (WorkspaceMode.SHARED, ".", "."),
        (WorkspaceMode.SHARED, "sub/dir", "sub/dir"),
        (WorkspaceMode.PER_JOB, ".", "jobs/the-id"),
        (WorkspaceMode.PER_JOB, "sub/dir", "jobs/the-id/sub/dir"),
    ],
)
def test_a_job_gets_the_directory_that_the_mode_says(
    mode: WorkspaceMode, asked: str, directory: str
) -> None:
    assert job_directory(mode, "the-id", asked) == directory


def test_a_place_stays_what_it_was_though_a_link_is_put_in_its_way(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    (root / "a/file").touch()
    with locate(root, ("a", "file")) as place:
        (root / "a").rename(root / "moved")
        (root / "a").symlink_to("../outside")
        os.close(os.open(place.name, os.O_WRONLY | os.O_TRUNC, dir_fd=place.directory))
        os.close(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=place.directory))
    assert (root / "moved/new").exists()
    assert not any((tmp_path / "outside").iterdir())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    before = psutil.Process().num_fds()
    for path in ("a/b", "a/b/x/y", "in/../..", "up", "loop", "out/x", "file/x", "in/new", "."):
        for make in (False, True):
            try:
                with locate(root, path.split("/"), make_parents=make) as place:
                    place.remove_made()
            except (WorkspaceError, OSError):
                pass
    assert psutil.Process().num_fds() == before
    assert not (root / "a/b/x").exists()
