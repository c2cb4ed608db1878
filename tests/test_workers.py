"""Worker processes that open photos: the same set as without, and no process is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
from test_photos import contents, photo, shard, small, write_tar  # noqa: F401  (a fixture)

import data

ROOT = Path(__file__).parents[1]
HAS_PROC = Path("/proc/self/stat").exists()


def sources(folder):
    """Shards of everything that is dropped, one of them cut, and a folder of larger pictures."""
    for i in range(2):
        shard(folder / f"{i}.tar", 100 * i, 9 + i, 3 * i)
    files = [("1.jpg", photo(1)), ("1.jpg", photo(2)), ("1.txt", b"one"), ("2.txt", b"two")]
    files += [("3.png", photo(3, (300, 200), "PNG")), ("3.txt", b"\xff"), ("4.jpg", b"<html>")]
    files += [("4.txt", b"four"), ("1.jpg", photo(4)), ("1.txt", b"again"), ("5.jpg", photo(5))]
    path = write_tar(folder / "2.tar", files + [("5.txt", b"five"), ("6.jpg", photo(6))])
    path.write_bytes(path.read_bytes()[:-11000])
    (folder / "more").mkdir()
    for i in range(5):
        (folder / f"more/{i}.jpg").write_bytes(photo(i, (400, 300)))
        (folder / f"more/{i}.txt").write_text("large")
    return [str(folder / "*.tar"), str(folder / "more")]


def test_workers_make_the_same_set(small, tmp_path):  # noqa: F811
    """Order, losses and every byte on the disk are those of one process, with a tower too."""
    paths, tower = sources(tmp_path), ("vit_tiny_patch16_224", 16, "untrained")
    for workers in (0, 2):
        torch.manual_seed(0)
        options = {"workers": workers, "int8": True}
        made = data.prepare_photos(paths, tmp_path / f"set{workers}", 16, *tower, **options)
    assert len(made) == 25 and len(made.meta["dropped"]) == 5, made.meta["dropped"]
    assert contents(tmp_path / "set0") == contents(tmp_path / "set2")


def test_little_is_read_ahead():
    """However slow the consumer is: results come in order, few tasks are begun before them."""
    begun, tasks = [], count()
    with ThreadPoolExecutor(2) as pool:
        results = data.in_order(pool, 3, lambda task: begun.append(task) or task, tasks)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert next(tasks) == 8
    assert sorted(begun) == list(range(8))


def test_a_worker_that_dies_is_named():
    """As where memory runs out: one line instead of a wait for ever."""
    with pytest.raises(OSError, match="died: try fewer --workers"), data.helpers(1) as (run, _):
        list(run(os._exit, [3]))


def test_all_cores_but_one_are_used(monkeypatch, tmp_path):
    """One worker beside a tower on the CPU, none where a lone one would gain nothing."""
    seen = []

    def noted(workers):
        seen.append(workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "helpers", noted)
    monkeypatch.setattr(data, "open_tower", lambda *_: (torch.nn.Identity(), {"side": 16}))
    path = shard(tmp_path / "0.tar", 0, 2)
    for cores in (1, 2, 3, 8, 99):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=cores: n)
        for tower in (None, "vit_tiny_patch16_224"):
            with pytest.raises(KeyboardInterrupt):
                data.prepare_photos(path, tmp_path / "set", 16, tower)
    assert seen == [0, 0, 0, 1, 2, 1, 7, 1, 32, 1]


def descendants(group):
    """The processes of this session, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(session) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def until(condition, seconds=60):
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path, kill):
    """After kill -9 or Ctrl-C all workers end, and the same command makes the same set."""
    for i in range(40):
        shard(tmp_path / f"{i:02d}.tar", 100 * i, 60)
    command = [sys.executable, str(ROOT / "data.py"), "photos", str(tmp_path / "*.tar")]
    command += ["--workers", "2", "--size", "16", "--out"]
    set_, meta = str(tmp_path / "set"), tmp_path / "set/meta.json"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([*command, set_], start_new_session=True, **options)
    until(meta.exists)  # a shard is done, so the workers work
    assert len(descendants(parent.pid)) >= 4  # with the server that they come from
    if kill == signal.SIGINT:  # as a terminal does it: to all
        os.killpg(parent.pid, kill)
    else:
        parent.kill()
    told = parent.communicate(timeout=60)[1]
    until(lambda: not descendants(parent.pid), 20)
    assert "version" not in json.loads(meta.read_text())
    assert parent.returncode == (130 if kill == signal.SIGINT else -9)
    if kill == signal.SIGINT:
        assert "Traceback" not in told
        assert told.splitlines()[-1] == "interrupted: the same command continues"
    data.main([*command[2:-1], "--workers", "0", "--out", set_])
    data.main([*command[2:-1], "--workers", "0", "--out", str(tmp_path / "whole")])
    assert contents(set_) == contents(tmp_path / "whole")
