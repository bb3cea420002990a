"""Files and folders appear whole or not at all, are ordinary, and leave nothing beside them."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sinkprune.files import whole_file, whole_folder, write_whole


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_file_is_replaced_with_the_mode_of_the_umask_and_nothing_beside_it(tmp_path, umask):
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, "new ✓")
    assert path.read_bytes() == "new ✓".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_failed_writer_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), whole_file(path) as part:
        part.write_text("ne")
        raise RuntimeError("half-way")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("kind", ["folder", "symbolic link", "dangling symbolic link", "FIFO", "device"])
def test_what_is_no_regular_file_is_refused_by_its_kind_and_stays(tmp_path, kind):
    path, goal = tmp_path / "out", tmp_path / "goal"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    else:
        if kind == "symbolic link":
            goal.write_text("kept")
        path.symlink_to(goal)
    before = path.lstat()
    with pytest.raises(FileExistsError, match=rf"is a {kind.removeprefix('dangling ')}; expected a regular"):
        write_whole(path, b"x")
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert goal.read_text() == "kept" if kind == "symbolic link" else not goal.exists()


def test_a_folder_appears_whole_with_the_modes_of_the_umask(tmp_path, umask):
    folder = tmp_path / "out"
    with whole_folder(folder) as part:
        (part / "inner").mkdir()
        private = os.open(part / "inner" / "weights", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(private, b"w")
        os.close(private)
        assert not folder.exists()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "inner").stat().st_mode) == 0o750
    assert stat.S_IMODE((folder / "inner" / "weights").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_there_is_replaced_only_when_asked(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()

    def never(found: Path) -> None:
        raise FileExistsError(f"{found.name} stays")

    for replaceable, message in ((None, "exists; choose another path"), (never, "out stays")):
        with pytest.raises(FileExistsError, match=message), whole_folder(folder, replaceable):
            pytest.fail("refused before anything is written")
    with whole_folder(folder, lambda found: None) as part:
        (part / "new").touch()
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_another_wrote_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(FileExistsError), whole_folder(folder) as part:
        (part / "mine").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert os.listdir(folder) == ["theirs"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replaced_folder_is_never_away_where_the_kernel_can_exchange(tmp_path, monkeypatch, exchange):
    from sinkprune import files

    if not exchange:

        def unknown(*_):
            raise OSError(38, "not implemented")

        monkeypatch.setattr(files, "_rename", unknown)
    folder = tmp_path / "out"
    with whole_folder(folder) as part:
        (part / "0").touch()
    for number in range(1, 4):
        with whole_folder(folder, lambda found: None) as part:
            (part / str(number)).touch()
        assert os.listdir(folder) == [str(number)] and os.listdir(tmp_path) == ["out"]


KILLED = """
import os, sys
from sinkprune.files import whole_file, whole_folder
with whole_folder(sys.argv[1] + "/out") as part, whole_file(sys.argv[1] + "/plan.json") as file:
    (part / "weights").touch()
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    started = set(os.listdir(tmp_path))
    assert len(started) == 2
    write_whole(tmp_path / "plan.json", "{}")
    with whole_folder(tmp_path / "out"):
        pass
    assert set(os.listdir(tmp_path)) == started | {"plan.json", "out"}
    writer.kill()
    writer.communicate()
    write_whole(tmp_path / "plan.json", "{}")
    with whole_folder(tmp_path / "out", lambda found: None):
        pass
    assert set(os.listdir(tmp_path)) == {"plan.json", "out"}
