from __future__ import annotations

from pathlib import Path

from pulse.adapters.embedded.rotated_log import RotatedLog


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_disk_use_is_bounded_however_much_is_written(tmp_path: Path) -> None:
    with RotatedLog(tmp_path / "a.log", bytes_max=100, generations=2) as log:
        for _ in range(50):
            log.write(b"x" * 33)
    assert sizes(tmp_path) == {"a.log": 50, "a.log.1": 100, "a.log.2": 100}


def test_the_newest_output_is_kept_in_order(tmp_path: Path) -> None:
    with RotatedLog(tmp_path / "a.log", bytes_max=4, generations=2) as log:
        log.write(b"0123456789abcdefghij")
    kept = [(tmp_path / name).read_bytes() for name in ("a.log.2", "a.log.1", "a.log")]
    assert b"".join(kept) == b"89abcdefghij"


def test_one_write_may_be_larger_than_all_generations(tmp_path: Path) -> None:
    with RotatedLog(tmp_path / "a.log", bytes_max=10, generations=1) as log:
        log.write(b"x" * 1000)
    assert sizes(tmp_path) == {"a.log": 10, "a.log.1": 10}


def test_no_generations_means_one_file(tmp_path: Path) -> None:
    with RotatedLog(tmp_path / "a.log", bytes_max=10, generations=0) as log:
        log.write(b"x" * 25)
    assert sizes(tmp_path) == {"a.log": 5}


def test_a_later_run_appends(tmp_path: Path) -> None:
    for run in (b"first\n", b"second\n"):
        with RotatedLog(tmp_path / "a.log", bytes_max=100, generations=1) as log:
            log.write(run)
    assert (tmp_path / "a.log").read_bytes() == b"first\nsecond\n"


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    with RotatedLog(tmp_path / "log" / "a.log", bytes_max=100, generations=1):
        pass
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "log" / "a.log").stat().st_mode & 0o777 == 0o600
