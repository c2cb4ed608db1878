"""Threads that open photos: the same set with any number, and a kill at any time loses nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
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
    """Order, losses and every byte on the disk are those of one thread, with a tower too."""
    paths, tower = sources(tmp_path), ("vit_tiny_patch16_224", 16, "untrained")
    for workers in (1, 2, 7):
        torch.manual_seed(0)
        options = {"workers": workers, "int8": True}
        made = data.prepare_photos(paths, tmp_path / f"set{workers}", 16, *tower, **options)
    assert len(made) == 25 and len(made.meta["dropped"]) == 5, made.meta["dropped"]
    assert contents(tmp_path / "set1") == contents(tmp_path / "set2") == contents(tmp_path / "set7")


@pytest.mark.parametrize("workers", [1, 8])
def test_little_is_read_ahead(monkeypatch, tmp_path, workers):
    """However slow the consumer is: samples come in order, few files are read before them."""
    begun, entries, before = [], data.entries, threading.active_count()
    monkeypatch.setattr(data, "entries", lambda path: (begun.append(x) or x for x in entries(path)))
    path, dropped = shard(tmp_path / "0.tar", 0, 300), Counter()
    samples = data.read_samples(path, dropped, [16], workers)
    for i in range(200):
        key, _, caption = next(samples)
        assert (key, caption) == (f"{i:05d}", f"photo number {i}")
        assert len(begun) <= 2 * (i + 65)
    samples.close()
    assert threading.active_count() == before


def test_photos_are_opened_at_once(monkeypatch, tmp_path):
    """So many at a time, while the ones before are used."""
    gate, decode, dropped = threading.Barrier(3), data.decode_image, Counter()

    def waiting(raw):
        gate.wait(60)  # for two more; the broken barrier would be an error
        return decode(raw)

    monkeypatch.setattr(data, "decode_image", waiting)
    path = shard(tmp_path / "0.tar", 0, 66)
    assert len(list(data.read_samples(path, dropped, [16], 3))) == 66 and not dropped


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
def test_a_kill_loses_nothing(tmp_path, kill):
    """After kill -9 or Ctrl-C no process is left, and the same command makes the same set."""
    for i in range(40):
        shard(tmp_path / f"{i:02d}.tar", 100 * i, 60)
    command = [sys.executable, str(ROOT / "data.py"), "photos", str(tmp_path / "*.tar")]
    command += ["--workers", "2", "--size", "16", "--out"]
    set_, meta = str(tmp_path / "set"), tmp_path / "set/meta.json"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([*command, set_], start_new_session=True, **options)
    until(meta.exists)  # a shard is done, so the workers work
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
    data.main([*command[2:-1], "--out", set_])
    data.main([*command[2:-1], "--workers", "1", "--out", str(tmp_path / "whole")])
    assert contents(set_) == contents(tmp_path / "whole")
