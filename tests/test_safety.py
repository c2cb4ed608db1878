"""A run that can't be lost: damaged files, two processes, bad numbers, Ctrl-C, a full disk."""

import csv
import ctypes
import errno
import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from test_photos import SOUND, write_tar

import data
import sample
import train


@pytest.fixture
def copy(micro_run, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(micro_run, tmp_path / "run")


@pytest.fixture
def command(micro_flags, copy):
    return [*micro_flags, "--save_every", "2", "--out", str(copy)]


def ended(capsys, call, arguments, code=2):
    """What a command that ends with this exit code says: the last line."""
    program = mock.patch.object(sys, "argv", [f"{call.__module__}.py"])
    with program, pytest.raises(SystemExit) as stop:
        call(arguments)
    told = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in told
    return told.splitlines()[-1]


def forget(folder, stage):
    """The run as before this stage."""
    for path in folder.glob(f"{stage}*"):
        path.unlink()
    (folder / "model.safetensors").unlink()


def interrupted(monkeypatch, command, folder, stage="decode", step=5):
    """The run, broken off in this step of a stage that it has to make again."""
    forget(folder, stage)

    def dies(trainer, update=train.Trainer.update):
        if trainer.step + 1 == step:
            raise GeneratorExit  # nothing of ours catches it
        return update(trainer)

    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(train.Trainer, "update", dies)
        train.main(command)


def assert_same_ending(ours, theirs, stage="decode"):
    for name in (f"{stage}.safetensors", "model.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert (ours / f"{stage}.csv").read_bytes() == (theirs / f"{stage}.csv").read_bytes()
    assert not list(ours.glob("*.tmp")) and not list(ours.glob("*.partial*"))


def cut(raw):
    return raw[: len(raw) // 2]


def flip(raw, bit=None):
    bit = len(raw) * 4 if bit is None else bit
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


DAMAGE = {"truncated": cut, "flipped": flip, "empty": lambda raw: b""}
DAMAGED = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)

# ------------------------------------------------------------------------------------- checkpoints


@DAMAGED
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    monkeypatch, capsys, micro_run, command, copy, damage
):
    """The last two are kept; a damaged newest one costs the steps since the other, nothing else."""
    interrupted(monkeypatch, command, copy)
    newest, older = copy / "decode.partial", copy / "decode.partial.old"
    assert sorted(copy.glob("*.partial*")) == [newest, older]
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    train.main(command)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged" in printed and "; step 2 of 6" in printed
    assert_same_ending(copy, micro_run)


def test_a_kill_just_behind_a_stage_leaves_no_checkpoint(micro_run, command, copy):
    """Weights were saved, their checkpoints not yet deleted: the next run does it."""
    (copy / "vae.partial").write_bytes(b"")
    train.main(command)
    assert bytes_of(copy).keys() == bytes_of(micro_run).keys()


@DAMAGED
def test_two_damaged_checkpoints_start_the_stage_again(
    monkeypatch, capsys, micro_run, command, copy, damage
):
    """Even then nothing is lost but time."""
    interrupted(monkeypatch, command, copy)
    for path in copy.glob("*.partial*"):
        path.write_bytes(damage(path.read_bytes()))
    train.main(command)
    assert "; step 0 of 6" in capsys.readouterr().out
    assert_same_ending(copy, micro_run)


@DAMAGED
@pytest.mark.parametrize("name", ["decode.safetensors", "cache.safetensors", "model.safetensors"])
def test_damaged_weights_are_named(capsys, micro_run, command, copy, damage, name):
    """One line with the file and what to do; doing it gives the same weights again."""
    path = copy / name
    path.write_bytes(damage(path.read_bytes()))
    line = ended(capsys, train.main, command)
    assert line.startswith("train.py: ") and str(path) in line and "delete the file" in line
    if name == "model.safetensors":
        line = ended(capsys, sample.main, ["a circle", "--run", str(copy)])
        assert line.startswith("sample.py: ") and str(path) in line
    path.unlink()
    train.main(command)
    ours, theirs = load_file(copy / "model.safetensors"), load_file(micro_run / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize(
    "name, later",
    [
        ("clip", ["cache", "understand", "generate", "tune", "decode"]),
        ("vae", ["cache", "decode"]),
        ("understand", ["generate", "tune"]),
        ("generate", ["tune"]),
    ],
)
def test_what_was_made_with_other_weights_is_refused(capsys, micro_run, command, copy, name, later):
    """A stage that is trained anew and comes out otherwise needs the later ones anew: each is
    named, and nothing that does not depend on it is."""
    tensors, facts = train.load_weights(copy / f"{name}.safetensors")
    first = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[first] = tensors[first] * 1.01
    train.save_weights(copy / f"{name}.safetensors", tensors, facts)
    for stage in later:
        line = ended(capsys, train.main, command)
        assert line.startswith(f"train.py: {copy}/{stage}.safetensors was made with {name} ")
        assert line.endswith(": delete it and the later stages")
        (copy / f"{stage}.safetensors").unlink()
    train.main(command)
    ours, theirs = load_file(copy / "model.safetensors"), load_file(micro_run / "model.safetensors")
    assert not torch.equal(ours[first], theirs[first])


def test_weights_from_before_this_note_are_read(command, copy):
    """Stages of an older version, which say nothing of what they were made with and lack a setting
    that came later, are kept."""
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*.safetensors")}
    for path in before:
        tensors, facts = train.load_weights(path)
        facts.pop("built_on")
        del facts["config"]["target"]
        train.save_weights(path, tensors, facts)
        before[path] = path.stat().st_mtime_ns
    train.main(command)
    assert before == {path: path.stat().st_mtime_ns for path in copy.glob("*.safetensors")}


def test_weights_put_together_from_others_are_refused(capsys, command, copy):
    """model.safetensors stays from before while a stage's file is replaced."""
    tensors, facts = train.load_weights(copy / "decode.safetensors")
    train.save_weights(copy / "decode.safetensors", {k: t * 2 for k, t in tensors.items()}, facts)
    line = ended(capsys, train.main, command)
    assert line.startswith(f"train.py: {copy}/model.safetensors was made with decode ")


@pytest.mark.parametrize("name", ["features.npy", "latents.npy"])
@pytest.mark.parametrize("damage", [cut, lambda raw: b"", lambda raw: b"x" + raw, None])
def test_a_damaged_cache_is_named(capsys, command, copy, damage, name):
    """A cut, empty, foreign or missing cache ends the stage that reads it with one line."""
    forget(copy, "decode")
    path = copy / name
    raw = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(raw))
    assert str(path) in ended(capsys, train.main, command)


def test_no_bit_flips_unseen(tmp_path):
    """Any flipped bit of a checkpoint is found, whether in names, settings or numbers."""
    tensors = {"a.weight": torch.randn(3, 4), "half": torch.randn(5).half(), "one": torch.ones(())}
    path, facts = tmp_path / "x.safetensors", {"version": train.VERSION, "config": {"lr": 1e-3}}
    train.save_weights(path, tensors, facts)
    raw, loaded = path.read_bytes(), train.load_weights(path)
    assert loaded[1] == facts and all(torch.equal(loaded[0][n], t) for n, t in tensors.items())
    for bit in range(0, len(raw) * 8):
        path.write_bytes(flip(raw, bit))
        try:
            found = train.load_weights(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        assert found[1] == facts and found[0].keys() == tensors.keys()  # as spaces in the header
        assert all(torch.equal(found[0][n], t) for n, t in tensors.items())


def test_weights_of_other_settings_are_named(capsys, tmp_path):
    """Weights of a version of the code with other settings are refused by their names."""
    config = {**train.asdict(train.Config()), "colour": 3}
    facts = {"version": train.VERSION, "config": config, "words": []}
    train.save_weights(tmp_path / "model.safetensors", {}, facts)
    assert "['colour']" in ended(capsys, sample.main, ["x", "--run", str(tmp_path)])


def torch_state(path):
    """What a checkpoint in the middle of a stage holds."""
    raw = path.read_bytes()
    state = torch.load(train.io.BytesIO(raw[32:]), weights_only=True)
    return {n: v for n, v in state.items() if n not in ("seconds", "metadata")}


# ------------------------------------------------------------------------------- two in one folder


def test_a_second_run_is_refused(capsys, command, copy, tmp_path):
    """While a process works in a folder, another gets one line and exit code 2; then it may."""
    with data.lock(copy):
        assert f"{copy} is in use by another process" in ended(capsys, train.main, command)
    train.main(command)
    with data.lock(tmp_path / "set"):
        for arguments in (["shapes", "--count", "9"], ["photos", str(tmp_path)]):
            line = ended(capsys, data.main, [*arguments, "--out", str(tmp_path / "set")])
            assert f"{tmp_path / 'set'} is in use by another process" in line
    data.main(["shapes", "--count", "9", "--out", str(tmp_path / "set")])


def test_a_lock_dies_with_its_process(tmp_path):
    """What a killed process held is free: the lock is the operating system's, not a file's."""
    script = f"import data, os; held = data.lock({str(tmp_path)!r}); os.kill(os.getpid(), 9)"
    root = Path(train.__file__).parent
    assert subprocess.run([train.sys.executable, "-c", script], cwd=root).returncode == -9
    with data.lock(tmp_path):
        pass


# -------------------------------------------------------------------------------- numbers gone bad


def poison(monkeypatch, steps, value=torch.nan, where="loss"):
    """Loss, or gradient alone, is not finite at these steps."""
    original = train.Trainer.loss

    def bad(trainer, batch):
        loss, parts = original(trainer, batch)
        if trainer.step not in steps:
            return loss, parts
        if where == "loss":
            return loss * value, parts
        loss.register_hook(lambda gradient: gradient * value)
        return loss, parts

    monkeypatch.setattr(train.Trainer, "loss", bad)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_step_is_skipped_and_counted(monkeypatch, command, copy, where, value):
    """Weights and optimisers stay as they were, the log counts it, later steps go on."""
    forget(copy, "tune")  # on which no other stage builds
    poison(monkeypatch, {2}, value, where)
    seen = []

    def watched(trainer, update=train.Trainer.update):
        tensors = [*trainer.trained.values()]
        for optimizer in trainer.optimizers:
            tensors += [t for s in optimizer.state.values() for t in s.values()]
        before = [t.detach().clone() for t in tensors]
        values = update(trainer)
        seen.append(bool(before) and all(map(torch.equal, before, tensors)))
        return values

    monkeypatch.setattr(train.Trainer, "update", watched)
    train.main(command)
    assert seen == [False, False, True, False, False, False]
    rows = list(csv.DictReader(open(copy / "tune.csv")))
    assert [row["skipped"] for row in rows] == ["0.0", "1.0"]
    assert all(t.isfinite().all() for t in load_file(copy / "tune.safetensors").values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_five_bad_steps_stop_the_run(monkeypatch, capsys, command, copy, where):
    """Step, rate and rows are named, and the checkpoints from before stay as they were."""
    forget(copy, "decode")
    command += ["--decode_steps", "60", "--lr", "0.01"]
    for path in copy.glob("*.safetensors"):  # other settings: a run from the start
        path.unlink()
    poison(monkeypatch, {*range(24, 40)}, where=where)
    trainers = []
    original = train.Trainer.__init__
    monkeypatch.setattr(
        train.Trainer, "__init__", lambda t, *a: original(t, *a) or trainers.append(t)
    )
    line = ended(capsys, train.main, command)
    assert "stage decode" in line and "not finite since step 25 " in line
    assert "rate 1.0e-02" in line and str(trainers[-1].draw(24)[1].tolist()) in line
    states = [torch_state(path) for path in copy.glob("decode.partial*")]
    assert sorted(state["step"] for state in states) == [26, 28]
    for state in states:
        assert all(t.isfinite().all() for t in state["trained"].values())
    assert not (copy / "decode.safetensors").exists()
    assert "since step 25 " in ended(capsys, train.main, command)  # deterministic
    monkeypatch.undo()
    train.main(command)  # had it been the machine, all is well again
    assert load_file(copy / "decode.safetensors")


def test_weights_that_overflow_are_not_saved(monkeypatch, capsys, command, copy):
    """A finite gradient that ruins the weights all the same doesn't replace a checkpoint."""
    forget(copy, "decode")

    def ruins(trainer, update=train.Trainer.update):
        values = update(trainer)
        if trainer.step == 4:
            next(iter(trainer.trained.values())).data[0] = torch.nan
        return values

    monkeypatch.setattr(train.Trainer, "update", ruins)
    assert "weights not finite since step 4 " in ended(capsys, train.main, command)
    assert torch_state(copy / "decode.partial")["step"] == 2


# ------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("stage", ["clip", "decode"])
def test_ctrl_c_finishes_the_step_and_saves(monkeypatch, capsys, micro_run, command, copy, stage):
    """Exit code 130, a checkpoint of that step, and the command that continues, which does."""
    forget(copy, stage)
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started us behind an &

    def pressed(trainer, update=train.Trainer.update):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", pressed)
        line = ended(capsys, train.main, command, 130)
    assert torch_state(copy / f"{stage}.partial")["step"] == 3
    said, again = line.split(": ", 1)
    assert shlex.split(again) == ["python", "train.py", *command]
    assert signal.getsignal(signal.SIGINT) is before
    train.main(shlex.split(again)[2:])
    assert_same_ending(copy, micro_run, stage)


def test_ctrl_c_outside_of_steps(monkeypatch, capsys, command, copy, tmp_path):
    """In stage cache and while preparing it stops at once; the same command continues.

    sample.py promises nothing of the kind.
    """

    def pressed(*_):
        raise KeyboardInterrupt

    forget(copy, "cache")
    with monkeypatch.context() as patch:
        patch.setattr(train, "fill_cache", pressed)
        assert shlex.join(command) in ended(capsys, train.main, command, 130)
        patch.setattr(data, "draw_scenes", pressed)
        line = ended(capsys, data.main, ["shapes", "--out", str(tmp_path / "set")], 130)
        assert line == "interrupted: the same command continues"
        patch.setattr(sample, "find_run", pressed)
        assert ended(capsys, sample.main, ["a circle"], 130) == "interrupted"


# --------------------------------------------------------------------------------------- full disk


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def tiny(tmp_path):
    """A disk of one megabyte; only the superuser can make it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    gc.collect()  # maps of its files
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_while_preparing(capsys, tiny, tmp_path):
    """One line; when there is room again, the same command gives the same set."""
    command = ["shapes", "--count", "100", "--out"]
    line = ended(capsys, data.main, [*command, str(tiny / "set")])
    assert line.startswith("data.py: ") and "No space left" in line
    subprocess.run(["mount", "-o", "remount,size=20m", str(tiny)], check=True)
    data.main([*command, str(tiny / "set")])
    data.main([*command, str(tmp_path / "set")])
    assert bytes_of(tiny / "set") == bytes_of(tmp_path / "set")


@pytest.mark.parametrize("stage", ["vae", "cache", "decode"])
def test_a_full_disk_while_training(capsys, micro_run, command, tiny, stage):
    """One line that names the file; old files whole; with room, the same weights in the end."""
    run = tiny / "run"
    subprocess.run(["mount", "-o", "remount,size=99m", str(tiny)], check=True)
    shutil.copytree(micro_run, run)
    forget(run, stage)
    for path in run.glob("*.csv" if stage == "decode" else "*.npy"):
        path.unlink()
    command = [*command[:-1], str(run)]
    used = sum(path.stat().st_size for path in run.iterdir())
    subprocess.run(["mount", "-o", f"remount,size={used // 1024 + 200}k", str(tiny)], check=True)
    before = bytes_of(run)
    line = ended(capsys, train.main, command)
    assert "No space left" in line and f"cannot write {run}" in line
    after = bytes_of(run)
    assert all(after[name] == before[name] for name in before) and not list(run.glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=99m", str(tiny)], check=True)
    train.main(command)
    ours, theirs = load_file(run / "model.safetensors"), load_file(micro_run / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_write_leaves_the_old_file(tmp_path, error):
    """For those who can't mount: the error names the file, nothing half-written is left."""
    path = tmp_path / "file"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError(error, os.strerror(error))

    with pytest.raises(OSError, match=f"cannot write {path}: .*{os.strerror(error)}"):
        data.write_whole(path, fails)
    assert bytes_of(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("where", ["out", "out/below", "file"])
def test_what_cannot_be_written_is_named(monkeypatch, capsys, micro_run, micro_flags, tiny, where):
    """A read-only folder, and a file in the folder's place, end in one line that names them."""
    (tiny / "out").mkdir()
    (tiny / "file").write_text("x")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    out = str(tiny / where)
    for call, arguments in (
        (train.main, [*micro_flags, "--out", out]),
        (data.main, ["shapes", "--count", "9", "--out", out]),
        (sample.main, ["a circle", "--run", str(micro_run), "--out", f"{out}/x.png"]),
    ):
        assert str(tiny) in ended(capsys, call, arguments)


# ------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_bits(micro_run, micro_flags, tmp_path):
    """Two runs of one seed agree in every file bit for bit, and so do pictures of theirs."""
    train.main([*micro_flags, "--out", str(tmp_path / "run")])
    ours, theirs = bytes_of(tmp_path / "run"), bytes_of(micro_run)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".safetensors"):  # seconds and the folder's name are in the header
            a, b = load_file(tmp_path / "run" / name), load_file(micro_run / name)
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        else:
            assert ours[name] == theirs[name], name
    for run in (tmp_path / "run", micro_run):
        prompts = ["a red circle", "two squares"]
        sample.main([*prompts, "--run", str(run), "--out", str(tmp_path / f"{run.name}.png")])
    pictures = [path.read_bytes() for path in tmp_path.glob("*.png")]
    assert len(pictures) == 2 and pictures[0] == pictures[1]


# -------------------------------------------------------------------------------------------- soak


class Allocated(ctypes.Structure):
    """glibc's mallinfo2: what is in use, whatever the process keeps of what was freed."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in "arena o s n mapped us fs used free keep".split()
    ]


LIBC = ctypes.CDLL(None)
GAUGED = hasattr(LIBC, "mallinfo2") and Path("/proc/self/fd").exists()
gauged = pytest.mark.skipif(not GAUGED, reason="needs Linux with glibc 2.33")


def footprint():
    """(bytes in use, open files) of this process.

    Not the resident size: train.py lets glibc keep what is freed, and a leak would hide there.
    """
    gc.collect()
    LIBC.mallinfo2.restype = Allocated
    heap = LIBC.mallinfo2()
    # what Python holds in small blocks of its own
    small = 64 * sys.getallocatedblocks()
    return heap.used + heap.mapped + small, len(os.listdir("/proc/self/fd"))


def assert_flat(capsys, title, before, after):
    """Less than 2 MB more are in use, and no more files are open; prints both."""
    (early, files), (late, more) = before, after
    with capsys.disabled():
        print(
            f"\n{title}: {early / 1e6:.1f} MB {(late - early) / 1e6:+.2f}, {more - files:+d} files"
        )
    assert late - early < 2e6 and more <= files


@gauged
def test_the_footprint_sees_a_leak(tmp_path):
    """What stays is seen to a megabyte, large or small, and so is a file."""
    memory, files = footprint()
    held = [torch.ones(2**17) for _ in range(100)], [bytearray(2000) for _ in range(10_000)]
    with open(tmp_path / "x", "w"):
        more, opened = footprint()
    assert opened == files + 1 and 71e6 < more - memory < 76e6 and held


@pytest.mark.long
@gauged
@pytest.mark.parametrize("stage", train.STAGES[:2] + train.STAGES[3:])
def test_training_is_flat(monkeypatch, capsys, command, copy, stage):
    """Memory and open files after 500 steps are those after 100, with checkpoints and strips."""
    seen = {}

    def watched(trainer, update=train.Trainer.update):
        if trainer.step in (100, 499):
            seen[trainer.step] = footprint()
        return update(trainer)

    monkeypatch.setattr(train.Trainer, "update", watched)
    run = train.Run(train.parse_config([*command, f"--{stage}_steps", "500", "--compile", "off"]))
    run.model.load_state_dict(load_file(copy / "model.safetensors"))
    train.train_stage(run, stage)
    assert_flat(capsys, f"{stage}, steps 100 to 499", *seen.values())


@pytest.mark.long
@gauged
@pytest.mark.parametrize("kind", ["shapes", "photos"])
def test_preparing_is_flat(monkeypatch, capsys, tmp_path, kind):
    """Memory and open files after 20,000 images are those after 4,000."""
    seen, write = [], data.write_json
    files = [(f"{i}.{end}", x) for i in range(1000) for end, x in (("jpg", SOUND), ("txt", b"x"))]
    shards = [write_tar(tmp_path / f"{i}.tar", files) for i in range(20 * (kind == "photos"))]
    monkeypatch.setattr(data, "write_json", lambda *a: seen.append(footprint()) or write(*a))
    if shards:
        data.prepare_photos(shards, tmp_path / "set")
    else:
        data.prepare_shapes(tmp_path / "set", 20_000)
    assert_flat(capsys, f"preparing {kind}, images 4,000 to 20,000", seen[3], seen[19])
