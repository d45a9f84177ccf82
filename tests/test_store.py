"""Files that are whole or not there, and broken ones that are explained."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bootcli.config import DistillConfig, to_dict
from bootcli.errors import BootError, UsageError
from bootcli.store.artifact import find_artifact, load_student, save_student
from bootcli.store.checkpoint import checkpoints, load_newest, save_checkpoint
from bootcli.store.files import TEMPORARY, atomic_file, atomic_folder, read_json, write_json
from bootcli.store.rundir import RunDir, default_run, newest_run
from bootcli.store.tensors import read_tensors, write_tensors

# ---- atomic writing


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"

    def fail(error: type[BaseException]) -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(RuntimeError):
        fail(RuntimeError)
    assert list(path.parent.iterdir()) == []
    with atomic_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def fail() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / text).write_text(text)
        assert [p.name for p in path.iterdir()] == [text], "an old folder is replaced, not mixed"
    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder_is_moved_onto_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Windows refuses, even where the other one is empty."""
    replace = Path.replace

    def as_on_windows(self: Path, target: Path) -> Path:
        if target.is_dir():
            raise PermissionError(13, "Access is denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", as_on_windows)
    path = tmp_path / "out"
    path.mkdir()
    for text in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / text).write_text(text)
        assert [p.name for p in path.iterdir()] == [text]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    with atomic_folder(tmp_path / "b"):
        pass
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o755


# ---- JSON


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, None], "b": {"c": "ä"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids="abcde")
def test_broken_json_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BootError, match=r"a\.json"):
        read_json(path)
    with pytest.raises(BootError, match="Cannot read"):
        read_json(tmp_path / "missing.json")


# ---- tensors


def test_tensors_round_trip(tmp_path: Path) -> None:
    path, shared = tmp_path / "a.safetensors", torch.arange(6.0)
    tensors = {"a": shared, "b": shared, "c": shared.reshape(2, 3).T, "d": torch.tensor(3, dtype=torch.int64)}
    write_tensors(path, tensors, {"step": 3})
    again, header = read_tensors(path)
    assert header == {"step": 3}
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def raw(header: Mapping[str, object], body: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(**change: object) -> dict[str, object]:
    return {"__metadata__": {"bootcli": "{}"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **change}}


def meta(text: str) -> bytes:
    return raw({"__metadata__": {"bootcli": text}})


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


DAMAGED = {
    "empty": b"",
    "text": b"not a safetensors file",
    "pickle": pickle.dumps({"bootcli": Bomb()}),
    "cut off": raw(entry(), b"\0\0"),
    "too long": raw(entry(), b"\0" * 8),
    "header of 2^63 bytes": raw({}, length=2**63),
    "header of 99 MB": raw({}, length=99_000_000),
    "offsets outside": raw(entry(data_offsets=[0, 2**40]), b"\0" * 4),
    "offsets backwards": raw(entry(data_offsets=[4, 0]), b"\0" * 4),
    "shape that overflows": raw(entry(shape=[2**62, 4]), b"\0" * 4),
    "unknown type": raw(entry(dtype="F7"), b"\0" * 4),
    "no metadata": raw({}),
    "foreign metadata": raw({"__metadata__": {"format": "pt"}}),
    "metadata not JSON": meta("{"),
    "metadata not an object": meta("[]"),
    "metadata nested without end": meta("[" * 100_000),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_tensors_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BootError, match=r"a\.safetensors (is damaged|was not written by bootcli)"):
        read_tensors(path)
    assert list(tmp_path.iterdir()) == [path], "nothing was executed"


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="does not exist"):
        read_tensors(tmp_path / "a.safetensors")


# ---- checkpoints


def test_checkpoints_keep_the_newest(tmp_path: Path) -> None:
    for step in (1, 20, 3):
        save_checkpoint(tmp_path, step, {"a": torch.tensor(float(step))}, {"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003.safetensors", "step-00000020.safetensors"]
    tensors, facts = load_newest(tmp_path)
    assert (float(tensors["a"]), facts) == (20.0, {"step": 20})
    with pytest.raises(BootError, match="No checkpoint"):
        load_newest(tmp_path / "missing")


# ---- run folders


def test_run_folder_refuses_what_it_must_not_replace(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.check_free(overwrite=False)
    run.path.mkdir()
    (run.path / ".lock").touch()  # of a process that was killed before its first file
    run.check_free(overwrite=False)
    run.create(DistillConfig(seed=3), keep=False)
    assert run.config() == DistillConfig(seed=3)
    run.check_free(overwrite=True)
    with pytest.raises(UsageError, match="not empty"):
        run.check_free(overwrite=False)
    run.config_file.rename(run.path / "other.json")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        run.check_free(overwrite=True)
    with pytest.raises(BootError, match="not a run folder"):
        run.config()


@pytest.mark.parametrize("content", ['{"_class_name": "UNet2DModel", "sample_size": 8}', "[]", "{"], ids="abc")
def test_a_folder_of_another_program_is_not_a_run(tmp_path: Path, content: str) -> None:
    """A flat diffusers folder has a config.json too."""
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "samples").mkdir()
    with pytest.raises(UsageError, match=r"config\.json is not a run's"):
        RunDir(tmp_path).check_free(overwrite=True)


def test_a_run_of_another_version_is_overwritten(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**to_dict(DistillConfig()), "stepz": 3})
    RunDir(tmp_path).check_free(overwrite=True)


def test_a_config_of_another_version_is_a_broken_file(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"stepz": 3})
    with pytest.raises(BootError, match="stepz") as caught:
        RunDir(tmp_path).config()
    assert not isinstance(caught.value, UsageError)


def test_the_log_forgets_what_will_be_written_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.trim(0)
    for step in (1, 2, 3):
        run.log({"step": step})
    run.log({"step": 2, "parts": {"judge": float("nan")}, "residual_bins": (0.5, float("inf"))})
    known = json.loads(run.log_file.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert known == {"step": 2, "parts": {"judge": None}, "residual_bins": [0.5, None]}
    with run.log_file.open("a") as file:
        file.write('{"step": 2, "loss"')
    run.trim(2)
    assert [json.loads(line)["step"] for line in run.log_file.read_text().splitlines()] == [1, 2, 2]


def test_newest_run_is_the_one_started_last(tmp_path: Path) -> None:
    for missing in (tmp_path / "runs", tmp_path):
        with pytest.raises(UsageError, match="No run"):
            newest_run(missing)
    for age, name in enumerate(["b", "a", "c"]):
        write_json(tmp_path / name / "config.json", {})
        os.utime(tmp_path / name / "config.json", (1000 - age, 1000 - age))
    (tmp_path / "not-a-run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "b"


def test_default_runs_do_not_collide(tmp_path: Path) -> None:
    first = default_run("owner/some-model", tmp_path)
    assert first.is_dir(), "taken"
    assert first.parent == tmp_path
    assert first.name.startswith("some-model-")
    assert default_run("owner/some-model", tmp_path) != first


# ---- students


def test_a_student_round_trip(tiny_run: Path, tmp_path: Path) -> None:
    """Loaded, saved and loaded again, it draws the same, from a folder, a student folder or a file."""
    first = load_student(tiny_run)
    weights = dict(first.student.named_parameters())
    path = tmp_path / "copy.safetensors"
    save_student(path, first.student, weights, first.family, first.config, first.step)
    again = load_student(path)
    assert (again.config, again.step, again.family) == (first.config, first.step, "ddpm")
    assert (again.student.head, again.student.t_min) == (first.student.head, first.student.t_min)
    assert all(torch.equal(a, b) for a, b in zip(
        first.student.state_dict().values(), again.student.state_dict().values(), strict=True
    ))  # fmt: skip
    assert again.student.teacher.net is again.student.net, "held once"
    assert not any(p.requires_grad for p in again.student.parameters())
    assert not again.student.training
    assert find_artifact(tiny_run / "student") == find_artifact(tiny_run) == first.path


def test_a_student_is_not_filled_before_its_weights_come(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory, no time for numbers that are thrown away; and no hold on the file, which another may replace."""
    filled: list[torch.Tensor] = []

    def fill(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        filled.append(tensor)
        return tensor

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", fill)
    student = load_student(tiny_run).student
    real = sum(tensor.numel() for tensor in filled if not tensor.is_meta)
    assert real <= sum(p.numel() for p in student.time_branch.parameters()), "all of the network"
    assert sum(p.numel() for p in student.net.parameters()) > real
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    tensors, header = read_tensors(find_artifact(tiny_run))
    path = tmp_path / "written_over.safetensors"
    write_tensors(path, tensors, header)
    kept = load_student(path).student
    size = path.stat().st_size
    with path.open("rb+") as stream:
        stream.write(bytes(size))
    assert all(torch.equal(p, tensors[name]) for name, p in kept.named_parameters())
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    write_tensors(tmp_path / "halves.safetensors", halves, header)
    half = load_student(tmp_path / "halves.safetensors").student
    assert all(torch.equal(p, halves[name].float()) for name, p in half.named_parameters())
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_things_made_from_a_student_go_to_its_run(tiny_run: Path, tmp_path: Path) -> None:
    for named in (tiny_run, tiny_run / "student", tiny_run / "student" / "student.safetensors"):
        assert load_student(named).home == tiny_run
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    best.parent.mkdir(parents=True)
    shutil.copy(find_artifact(tiny_run), best)
    assert load_student(best).home == tmp_path / "run"
    alone = tmp_path / "mine.safetensors"
    shutil.copy(find_artifact(tiny_run), alone)
    assert load_student(alone).home == tmp_path


def test_a_run_without_a_student_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="does not exist"):
        load_student(tmp_path / "missing")
    with pytest.raises(BootError, match="no student"):
        load_student(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(BootError) as caught:
        load_student(tmp_path)
    assert "--resume" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"family": "nonsense"},
        {"family": None},
        {"head": "arms"},
        {"t_min": "early"},
        {"teacher": 5},
        {"teacher": {"unet": {"block_out_channels": [8, 8]}, "scheduler": {}, "card": {}}},
        {"config": []},
        {"config": {"steps": "many"}},
        {"step": None},
    ],
    ids=repr,
)
def test_a_student_with_a_wrong_header_is_refused(tiny_run: Path, tmp_path: Path, change: dict[str, object]) -> None:
    tensors, header = read_tensors(find_artifact(tiny_run))
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {**header, **change})
    with pytest.raises(BootError) as caught:
        load_student(path)
    assert caught.value.exit_code == 1


def test_a_student_of_a_version_with_more_settings_is_read(tiny_run: Path, tmp_path: Path) -> None:
    tensors, header = read_tensors(find_artifact(tiny_run))
    config = to_dict(load_student(tiny_run).config)
    config = {**config, "wings": 2, "boot": {**config["boot"], "feathers": True}}  # type: ignore[dict-item]
    write_tensors(tmp_path / "a.safetensors", tensors, {**header, "config": config})
    assert load_student(tmp_path / "a.safetensors").config == load_student(tiny_run).config


def test_a_student_with_wrong_weights_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    tensors, header = read_tensors(find_artifact(tiny_run))
    path, name = tmp_path / "a.safetensors", "net.conv_in.weight"
    for wrong in (None, torch.zeros(3)):
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        write_tensors(path, changed | ({name: wrong} if wrong is not None else {}), header)
        with pytest.raises(BootError, match="does not describe a student"):
            load_student(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(BootError, match="not written by bootcli"):
        load_student(path)


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.locked():
        assert run.is_locked()
        with pytest.raises(UsageError, match="is being trained by another process"), RunDir(run.path).locked():
            pass
        with pytest.raises(BootError, match="it is being trained"):
            find_artifact(run.path)
        write_json(run.config_file, {})
    assert [file.name for file in run.path.iterdir()] == ["config.json"]
    assert not run.is_locked()
    with pytest.raises(BootError, match="holds no student") as error:
        find_artifact(run.path)
    assert "--resume" in error.value.hint
    with RunDir(tmp_path / "nothing").locked():
        pass
    assert not (tmp_path / "nothing").exists(), "a new folder that stays empty goes away"


def test_commands_take_the_newest_run_that_has_a_student(tmp_path: Path) -> None:
    for age, name in enumerate(["unfinished", "newer", "older"]):
        write_json(tmp_path / name / "config.json", {})
        os.utime(tmp_path / name / "config.json", (1000 - age, 1000 - age))
    assert newest_run(tmp_path, with_student=True) == tmp_path / "unfinished", "which says what is missing"
    for name in ("newer", "older"):
        RunDir(tmp_path / name).student.parent.mkdir()
        RunDir(tmp_path / name).student.touch()
    assert newest_run(tmp_path, with_student=True) == tmp_path / "newer"
    assert newest_run(tmp_path) == tmp_path / "unfinished"


def test_overwriting_empties_what_a_link_leads_to(tmp_path: Path) -> None:
    """Checkpoints of the earlier run on another disk are not taken for those of the new one."""
    run, disk = RunDir(tmp_path / "run"), tmp_path / "disk"
    save_checkpoint(disk, 900, {"x": torch.zeros(1)}, {}, keep=2)
    (disk / ".bootcli-abc.safetensors").touch()
    run.path.mkdir()
    run.checkpoints.symlink_to(disk)
    run.create(DistillConfig(teacher="fashion"), keep=False)
    assert run.checkpoints.is_symlink()
    assert not any(disk.iterdir())
    (disk / ".bootcli-abc.safetensors").touch()  # of a process that was killed as it wrote
    run.create(DistillConfig(teacher="fashion"), keep=True)
    assert not any(disk.iterdir())


def test_the_state_just_written_stays(tmp_path: Path) -> None:
    for step in (800, 900, 4):
        path = save_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {}, keep=2)
        assert path.is_file()
    assert len(checkpoints(tmp_path)) == 2
    path.unlink()
    save_checkpoint(tmp_path, 1000, {"x": torch.zeros(1)}, {}, keep=2)
    (tmp_path / "step-00001000.safetensors").write_bytes(b"cut off")
    with pytest.raises(BootError, match="is damaged") as error:
        load_newest(tmp_path)
    assert "goes on from step-00000900" in error.value.hint


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.scores_file.write_bytes(b'{"step": 1, "fid": 2.0}\n\xff\xfe\n[1]\n{"step": 2, "fi')
    assert run.scores() == [{"step": 1, "fid": 2.0}]
    run.trim(1)
    assert run.scores_file.read_text() == '{"step": 1, "fid": 2.0}\n'


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new.txt").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert [file.name for file in (tmp_path / "real").iterdir()] == ["new.txt"]


def test_what_was_there_comes_back_where_the_new_folder_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name.startswith(TEMPORARY):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "out"):
        pass
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["out", "out/old.txt"]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    """And a part of a larger one, alone."""
    whole = torch.arange(12.0).reshape(4, 3)
    write_tensors(tmp_path / "a.safetensors", {"all": whole, "again": whole, "part": whole[1:3], "row": whole.T}, {})
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["all"], whole)
    assert torch.equal(tensors["again"], whole)
    assert torch.equal(tensors["part"], whole[1:3])
    assert torch.equal(tensors["row"], whole.T)
    write_tensors(tmp_path / "b.safetensors", {"part": whole[1:3]}, {})
    assert torch.equal(read_tensors(tmp_path / "b.safetensors")[0]["part"], whole[1:3])
    assert (tmp_path / "b.safetensors").stat().st_size < 200
