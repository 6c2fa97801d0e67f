"""Files and folders that are complete whenever they exist."""

import pytest

from step_trl.files import atomic_write


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with atomic_write(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("earlier")
    with pytest.raises(KeyError), atomic_write(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_what_a_killed_process_left(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    with atomic_write(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "weights").touch()
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["weights"]
