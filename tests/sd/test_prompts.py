"""Prompts of a run: encoded once and ahead, drawn in shuffled epochs, of any size of image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_sd import teacher as sd
from bootcli_sd.teacher import SDTeacher, load
from diffusers import DiffusionPipeline
from PIL import Image

from bootcli.conditions import PromptPool
from bootcli.deck import Deck
from bootcli.errors import BootError, UsageError
from bootcli.pipelines import defaults
from bootcli.pipelines import distill as pipeline
from bootcli.pipelines.distill import distill
from bootcli.pipelines.estimate import dry_run
from bootcli.pipelines.evaluate import evaluate
from bootcli.pipelines.events import Encoded, Event, Stepped, Warned
from bootcli.pipelines.export import export
from bootcli.pipelines.sample import sample
from bootcli.pipelines.settings import resolve_config, resume_config
from bootcli.prompts import Prompt, Prompts
from bootcli.store.rundir import RunDir
from bootcli.teachers.view import TeacherView
from tests.training.short import EVERYTHING, build, config_of

from .conftest import MakeFolder


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(folder: Path, prompts: Path, out: Path, **settings: object) -> list[Event]:
    base = {"teacher": str(folder), "prompts": str(prompts), "steps": 3, "batch_size": 4, "device": "cpu"}
    base |= {"preview_teacher_steps": 2, "watch.every": 0}
    return list(distill(resolve_config({**base, **settings}, {}, {}), out))


def losses(events: Sequence[Event]) -> list[float]:
    return [event.report.loss for event in events if isinstance(event, Stepped)]


def test_a_second_run_loads_no_text_encoder(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    prompts = write(tmp_path / "prompts.txt", "a red shoe\tblue", "a green coat", "a hat" + " and a hat" * 9)
    first = run(folder, prompts, tmp_path / "first", guidance_scale=3.0)
    assert [(event.done, event.total) for event in first if isinstance(event, Encoded)] == [(3, 4), (4, 4)]
    (warned,) = [event.message for event in first if isinstance(event, Warned)]
    assert warned.startswith("1 of 3 prompts are longer than the teacher reads, and are cut, the first of them: a hat")

    def refuse(*args: object) -> None:
        raise AssertionError("the text encoder is loaded")

    monkeypatch.setattr(sd, "load_pairs", refuse)
    second = run(folder, prompts, tmp_path / "second", guidance_scale=3.0)
    assert losses(first) == losses(second)
    assert not [event for event in second if isinstance(event, Encoded)]
    assert warned in [event.message for event in second if isinstance(event, Warned)]
    with pytest.raises(AssertionError, match="is loaded"):
        run(folder, write(tmp_path / "others.txt", "a red shoe"), tmp_path / "third", guidance_scale=3.0)


def test_what_embeddings_depend_on(make_folder: MakeFolder) -> None:
    folder = make_folder()
    known = load(folder).fingerprint()
    assert known == load(folder).fingerprint()
    (folder / "vae" / "note.txt").write_text("of no concern")
    assert load(folder).fingerprint() == known
    weights = folder / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = load(folder).fingerprint()
    assert other != known
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("24", "16"))
    assert load(folder).fingerprint() not in (known, other)


def test_half_precision_is_harmless(make_folder: MakeFolder) -> None:
    """The teacher's x_0 from embeddings on disk differs by no more than half precision rounds."""
    teacher = load(make_folder())
    texts = ["a red shoe", "a green coat"]
    pool = PromptPool(teacher, Prompts(map(Prompt, texts)), None, guided=False)
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):  # which training computes in, and must not get into the file
        stored = pool.rows(torch.arange(2))
    exact = teacher.condition(texts)
    assert stored.tensors["text"].dtype == torch.float32
    assert (exact.tensors["text"] - stored.tensors["text"]).abs().max() < 1e-3
    ours, theirs = (TeacherView(teacher).x0(x, t, cond) for cond in (stored, exact))
    other = TeacherView(teacher).x0(x, t, exact.rows(torch.tensor([1, 0])))
    assert (ours - theirs).abs().max() < 1e-3 * (other - theirs).abs().max()


def test_parts_that_training_does_not_need_are_let_go(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[bool, bool]] = []
    predict = SDTeacher.predict

    def watched(self: SDTeacher, net: Any, *args: Any) -> Any:
        if net.training or torch.is_grad_enabled():  # an update
            held.append((self._text is not None, self._vae is not None))
        return predict(self, net, *args)

    monkeypatch.setattr(SDTeacher, "predict", watched)
    run(make_folder(), write(tmp_path / "prompts.txt", "a shoe", "a coat"), tmp_path / "run", preview_every=1)
    assert len(held) >= 3
    assert set(held) == {(False, False)}


@pytest.mark.parametrize("objective", ["boot", "kd"])
def test_every_prompt_is_drawn_once_before_any_again(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """Over all parts of all updates, stored paths too; the same however batches are split, and after a resume."""
    prompts = write(tmp_path / "prompts.txt", *(f"number {i}" for i in range(24)))
    settings: dict[str, object] = {**EVERYTHING, "objective": objective, "prompts": str(prompts), "batch_size": 16}
    settings |= {"kd.buffer": 32, "replay.buffer": 32, "kd.reuse": 2, "replay.reuse": 2, "steps": 4}
    take = Deck.take
    taken: list[int] = []
    monkeypatch.setattr(Deck, "take", lambda self, n: (rows := take(self, n), taken.extend(rows.tolist()))[0])
    teacher = load(make_folder())
    straight = build(teacher, config_of(**settings))[1]
    whole = [report.loss for report in straight.run()]
    drawn = list(taken)
    assert len(drawn) == straight.drawn > 48
    assert all(sorted(drawn[start : start + 24]) == list(range(24)) for start in range(0, len(drawn) - 24, 24))
    taken.clear()
    assert len(list(build(teacher, config_of(**settings, **{"optimizer.accumulation": 2}))[1].run())) == 4
    assert taken == drawn
    taken.clear()
    stopped = build(teacher, config_of(**settings))[1]
    begun = stopped.run()
    next(begun)
    next(begun)
    tensors, facts = stopped.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = build(teacher, config_of(**settings))[1]
    resumed.load_state(tensors, json.loads(json.dumps(facts)))
    assert [report.loss for report in resumed.run()] == whole[2:]
    assert taken == drawn


def test_portions_are_ready_before_they_are_drawn(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PORTION", 20)
    rows, late = PromptPool.rows, []

    def watched(self: PromptPool, index: torch.Tensor) -> Any:
        late.append(len(self.embeddings.missing(index)))
        return rows(self, index)

    monkeypatch.setattr(PromptPool, "rows", watched)
    prompts = write(tmp_path / "prompts.txt", *(f"number {i}" for i in range(500)))
    events = run(make_folder(), prompts, tmp_path / "run", steps=20)
    assert not any(late)
    kinds = [type(event) for event in events if isinstance(event, Encoded | Stepped)]
    turns = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    assert turns == [Encoded, Stepped] * (len(turns) // 2)
    assert len(turns) >= 4, "not all at once"
    assert sum(event.total for event in events if isinstance(event, Encoded) and event.done == event.total) < 250
    more = list(distill(resume_config(tmp_path / "run", {"steps": 23}, {}, {}), tmp_path / "run", resume=True))
    assert len(losses(more)) == 3
    assert not any(late)


def test_no_prompt_is_encoded_that_the_run_does_not_draw(make_folder: MakeFolder, tmp_path: Path) -> None:
    def encoded(events: list[Event]) -> int:
        return sum(event.total for event in events if isinstance(event, Encoded) and event.done == event.total)

    prompts = write(tmp_path / "prompts.txt", *(f"number {i}" for i in range(300)))
    first = run(make_folder(), prompts, tmp_path / "run", steps=3, batch_size=4)
    assert encoded(first) <= 3 * 4 + pipeline.PREVIEWS + 1, "and what nobody asked for, beside what is shown"
    more = list(distill(resume_config(tmp_path / "run", {"steps": 5}, {}, {}), tmp_path / "run", resume=True))
    assert 0 < encoded(more) <= 2 * 4


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_size(make_folder: MakeFolder, tmp_path: Path, xl: bool) -> None:
    prompts = write(tmp_path / "prompts.txt", "a red shoe", "a green coat")
    blocks = {"down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3, "block_out_channels": (8, 8, 8, 16)}
    folder = make_folder(xl=xl) if xl else make_folder(unet=blocks)  # 20x12 latents cannot be halved three times
    events = run(folder, prompts, tmp_path / "run", resolution=(40, 24), steps=2)
    assert len(losses(events)) == 2
    drawn = sample(tmp_path / "run")
    assert Image.open(drawn.files[0]).size == (40, 24)
    assert Image.open(sample(tmp_path / "run", num_images=1, teacher_steps=1).files[0]).size == (40, 24)
    other = sample(tmp_path / "run", num_images=1, resolution=(32, 32))
    assert Image.open(other.files[0]).size == (32, 32)
    assert other.output == tmp_path / "run" / "samples" / "32x32"
    (square,) = sample(tmp_path / "run", num_images=1, resolution=(32, 32), teacher_steps=1).files
    assert Image.open(square).size == (32, 32)
    exported = export(tmp_path / "run", format="diffusers")
    assert exported.max_abs_difference < 1e-4
    made = DiffusionPipeline.from_pretrained(exported.output)
    made.set_progress_bar_config(disable=True)
    assert list(made.unet.config.sample_size) == [12, 20]
    size = {"height": 24, "width": 40} if xl else {}
    assert ("height=24, width=40" in (exported.output / "README.md").read_text()) == xl
    assert made("a red shoe", num_inference_steps=1, guidance_scale=1, **size).images[0].size == (40, 24)
    result = evaluate(tmp_path / "run", metrics=("paired",), num_images=2, resolution=(24, 16))
    assert result["resolution"] == (24, 16)
    with pytest.raises(UsageError, match="multiples of 8 pixels"):
        sample(tmp_path / "run", resolution=(12, 16))


def test_a_dry_run_stores_as_many_paths_as_the_run(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the size asked for, not of the teacher's own: fewer of the larger ones fit."""
    monkeypatch.setattr(defaults, "STORED_BYTES", 100_000)
    settings = {"teacher": str(make_folder()), "prompts": str(write(tmp_path / "prompts.txt", "a shoe")), "steps": 1}
    config = resolve_config({**settings, "resolution": (64, 32), "device": "cpu", "watch.every": 0}, {}, {})
    list(distill(config, tmp_path / "run"))
    stored = RunDir(tmp_path / "run").config()
    assert dry_run(config).config["kd"]["buffer"] == stored.kd.buffer  # type: ignore[index]


def test_features_of_another_size_are_no_reference(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Known before the first update, not at the first score."""
    folder = make_folder(unet={"sample_size": 16})  # draws 32 pixels, which those features read
    prompts = write(tmp_path / "prompts.txt", "a shoe")
    (folder / "features").mkdir()
    (folder / "features" / "config.json").write_text('{"same_as": "fashion-colour-cnn-64"}')
    words = {"teacher": str(folder), "prompts": str(prompts), "steps": 1, "device": "cpu"}
    for more in ({"watch.patience": 3}, {"watch.reference": "teacher"}):
        config = resolve_config(words | more | {"resolution": (64, 64), "watch.every": 1}, {}, {})
        with pytest.raises(UsageError, match=r"watch\.(patience|reference)"):
            list(distill(config, tmp_path / "run"))


def test_seeds_of_prompts(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Wherever prompts take turns, the image of one with a seed comes from that; the others from their own."""
    lines = ['{"prompt": "a shoe", "seed": 5}', '{"prompt": "a coat"}']
    run(make_folder(), write(tmp_path / "own.jsonl", *lines), tmp_path / "run", steps=1)
    plain = Prompts([Prompt("a shoe"), Prompt("a coat")])
    turns = sample(tmp_path / "run", num_images=4, output=tmp_path / "turns")
    asked = [Image.open(file).text for file in turns.files]  # type: ignore[attr-defined]
    assert [text["seed"] for text in asked] == ["5", "1", "5", "3"]
    assert [text["prompt"] for text in asked] == ["a shoe", "a coat"] * 2
    assert [file.stem for file in turns.files] == ["000000", "000001", "000002", "000003"]
    shoe = sample(tmp_path / "run", num_images=1, seed=5, prompts=Prompts([Prompt("a shoe")]))
    same = [Image.open(shoe.files[0]).tobytes() == Image.open(file).tobytes() for file in turns.files]
    assert same == [True, False, True, False]
    others = sample(tmp_path / "run", prompts=plain)
    assert len(others.files) == 2
    assert Image.open(others.files[1]).tobytes() == Image.open(turns.files[1]).tobytes()
    folders = {shoe.output, others.output, sample(tmp_path / "run", prompts=Prompts(reversed(list(plain)))).output}
    assert len(folders) == 3
    assert others.output.name.startswith("2-prompts-")
    numbers = [
        evaluate(tmp_path / "run", metrics=("paired",), num_images=2, prompts=str(source))
        for source in (tmp_path / "own.jsonl", write(tmp_path / "plain.txt", "a shoe", "a coat"))
    ]
    assert numbers[0]["prompts"] == {"source": str(tmp_path / "own.jsonl"), "count": 2}
    assert numbers[0]["student"] != numbers[1]["student"]


def test_a_run_goes_on_with_the_prompts_it_began_with(make_folder: MakeFolder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(make_folder(), write(tmp_path / "prompts.txt", "a shoe", "a coat"), out, steps=1)
    kept = out / "prompts.jsonl"
    kept.write_text(kept.read_text().replace("coat", "boat"))
    with pytest.raises(BootError, match=r"prompts\.jsonl is not what this run began with"):
        list(distill(resume_config(out, {"steps": 2}, {}, {}), out, resume=True))
    kept.write_text(kept.read_text().replace("boat", "coat"))
    assert list(distill(resume_config(out, {"steps": 2}, {}, {}), out, resume=True))
