"""Choosing adapters for a task: the scores are those of each adapter alone, and the base model stays as it is."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bank_tools import replace_adapter, save_bank_of
from guilomo import GuilomoError
from guilomo.adapters import Selection, adapters_in, attached, describe, draw_shots, mixture_of, score_shots, select
from guilomo.evaluation import evaluate
from guilomo.tasks import Task, TaskConfig, build_task
from tiny_runs import write_rows

OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"r": 2},
    "b": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "c": {"r": 3, "lora_alpha": 30},
    "d": {"r": 1, "target_modules": ["lm_head"]},
    "e": {"r": 2, "use_rslora": True},
}


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(llama_folder).double()


@pytest.fixture(scope="module")
def bank(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return adapters_in(save_bank_of(llama, tmp_path_factory.mktemp("bank"), OPTIONS))


def _task(colours: Path, tokenizer_folder: Path, kind: str, **options: Any) -> Task:
    source = colours / "colours.txt" if kind == "lm" else colours
    settings = {"kind": kind, "source": str(source), "name": "colours", "max_length": 64, **options}
    return build_task(TaskConfig(**settings), AutoTokenizer.from_pretrained(tokenizer_folder))


@pytest.fixture(scope="module")
def task(colours: Path, llama_folder: Path) -> Task:
    return _task(colours, llama_folder, "causal_lm")


def test_a_bank_is_a_folder_of_adapters(bank: dict[str, Path], tmp_path: Path) -> None:
    assert list(bank) == list(OPTIONS)
    with pytest.raises(GuilomoError, match=r"bank = .*Put one adapter into each"):
        adapters_in(tmp_path)


def test_scores_are_those_of_each_adapter_alone(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    found = select(llama, bank, task, 12, by="accuracy", count=2, seed=3, batch_size=5)
    shots = draw_shots(task, 12, 3)
    assert len(found.examples) == 12
    assert found.data_hash == task.data_hash
    for candidate in found.candidates:
        model = PeftModel.from_pretrained(copy.deepcopy(llama), candidate.folder)
        single = evaluate(model, shots, "train", batch_size=1)
        mean = sum(loss / n for loss, n in zip(single.row_loss, single.row_tokens, strict=True)) / 12
        assert candidate.accuracy == single.metrics["accuracy"].value
        assert candidate.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert len({candidate.perplexity for candidate in found.candidates}) == 5
    order = sorted(found.candidates, key=lambda c: (-c.accuracy, c.perplexity))
    assert found.chosen == [c.name for c in order][:2]
    by_perplexity = select(llama, bank, task, 12, by="perplexity", count=3, seed=3, batch_size=5)
    assert by_perplexity.chosen == [c.name for c in sorted(found.candidates, key=lambda c: c.perplexity)][:3]
    assert [c.perplexity for c in by_perplexity.candidates] == [c.perplexity for c in found.candidates]
    assert {c.accuracy for c in by_perplexity.candidates} == {None}


def test_the_mixture_of_the_one_selected_scores_as_it_did(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    """One expert has gate 1: the mixture is PEFT's model of that adapter, and so are its numbers."""
    found = select(llama, bank, task, 12, by="perplexity", count=1, seed=3, batch_size=5)
    mixture = mixture_of(copy.deepcopy(llama), found.folders, train="all")
    (chosen,) = (c for c in found.candidates if c.name == found.chosen[0])
    scored = score_shots(mixture, draw_shots(task, 12, 3), True, 5)
    assert scored.perplexity == pytest.approx(chosen.perplexity, rel=1e-9)
    model = PeftModel.from_pretrained(copy.deepcopy(llama), chosen.folder)
    assert scored.accuracy == evaluate(model, draw_shots(task, 12, 3), "train").metrics["accuracy"].value


def test_perplexity_weighs_examples_alike(llama: nn.Module, llama_folder: Path, tmp_path: Path) -> None:
    """Also where their answers differ in length; pooled tokens would give another number."""
    rows = [{"id": str(i), "type": "gen", "input": f"{i}?", "answer": "red " * (1 + 2 * i)} for i in range(10)]
    write_rows(tmp_path / "colours.train.jsonl", rows[:8])
    write_rows(tmp_path / "colours.test.jsonl", rows[8:])
    shots = draw_shots(_task(tmp_path, llama_folder, "causal_lm"), 6, 0)
    per_row = [math.log(score_shots(llama, draw_one(shots, i), False, 4).perplexity) for i in range(6)]
    assert score_shots(llama, shots, False, 4).perplexity == pytest.approx(math.exp(sum(per_row) / 6), rel=1e-6)
    pooled = evaluate(llama, shots, "train").metrics["perplexity"].value
    assert score_shots(llama, shots, False, 4).perplexity != pytest.approx(pooled, rel=1e-3)


def draw_one(task: Task, row: int) -> Task:
    changed = copy.copy(task)
    changed.train = [task.train[row]]
    changed.examples = {**task.examples, "train": [task.examples["train"][row]]}
    return changed


@pytest.mark.parametrize("by", ["rocket", "accuracy", "perplexity", "random"])
def test_the_order_of_the_bank_does_not_matter_and_runs_repeat(
    llama: nn.Module, bank: dict[str, Path], task: Task, by: str
) -> None:
    backwards = dict(reversed(bank.items()))
    first = select(llama, bank, task, 8, by=by, count=2, pool=4)
    assert select(llama, backwards, task, 8, by=by, count=2, pool=4) == first
    assert len(set(first.chosen)) == 2
    assert Selection.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    if by == "rocket":
        assert set(first.chosen) <= set(first.pool)
        assert len(first.similarities) == 6
        assert all(c.rank_sum for c in first.candidates)


def test_random_depends_on_the_seed_only(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    drawn = [select(llama, bank, task, by="random", count=2, seed=seed).chosen for seed in range(8)]
    assert len({tuple(names) for names in drawn}) > 1
    assert drawn[0] == select(llama, bank, task, by="random", count=2, seed=0).chosen


def test_manual(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    found = select(llama, bank, task, by="manual", names=["c", "a"])
    assert found.chosen == ["c", "a"]
    assert list(found.folders) == ["c", "a"]
    assert found.examples == []
    mixture = mixture_of(copy.deepcopy(llama), found.folders)
    assert mixture.peft_config["default"].expert_names == ["c", "a"]


def test_a_selection_knows_the_adapters_it_looked_at(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    """By their content: a copy has the same digest."""
    scored = select(llama, bank, task, 4, by="perplexity", count=1)
    digests = {candidate.name: candidate.digest for candidate in scored.candidates}
    assert len({*digests.values()} - {None}) == 5
    found = select(llama, bank, task, by="manual", names=["c", "a"])
    assert {c.name: c.digest for c in found.candidates if c.digest} == {name: digests[name] for name in ("a", "c")}


def test_the_chosen_are_found_where_the_bank_is_now(
    llama: nn.Module, bank: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    found = select(llama, bank, task, by="manual", names=["c", "a"])
    moved = {name: shutil.copytree(folder, tmp_path / name) for name, folder in bank.items()}
    assert found.in_bank(moved, "") == {name: moved[name] for name in ("c", "a")}
    assert found.in_bank({}, "") == found.folders
    replace_adapter(moved["b"])
    assert found.in_bank(moved, "") == {name: moved[name] for name in ("c", "a")}
    replace_adapter(moved["a"])
    with pytest.raises(GuilomoError, match=rf"Adapter 'a' in {moved['a']} is not the one .* Restore it, or pray\."):
        found.in_bank(moved, "pray")


def test_a_selection_without_digests_is_none(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    content = select(llama, bank, task, by="manual", names=["c"]).to_dict()
    for candidate in content["candidates"]:
        del candidate["digest"]
    with pytest.raises(GuilomoError, match=r"a chosen adapter has no digest.*guilomo bank select"):
        Selection.from_dict(content)


def test_the_base_model_is_as_before_and_never_copied(
    llama: nn.Module, bank: dict[str, Path], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.requires_grad_(True)
    llama.train()
    tensors = {n: (t.data_ptr(), t.clone()) for n, t in llama.state_dict().items()}
    modules, attributes = [id(m) for m in llama.modules()], set(vars(llama))
    flags = [(p.requires_grad, m.training) for m in llama.modules() for p in m.parameters(recurse=False)]
    assert all(all(flag) for flag in flags)
    sizes = []

    def counting(model: nn.Module, *args: Any) -> Any:
        sizes.append(sum(1 for n, _ in model.named_parameters() if ".lora_" not in n))
        return score_shots(model, *args)

    monkeypatch.setattr("guilomo.adapters.selection.score_shots", counting)
    select(llama, bank, task, 4, count=2)
    assert sizes == [len(list(llama.parameters()))] * 5
    assert [id(m) for m in llama.modules()] == modules
    assert set(vars(llama)) == attributes
    assert flags == [(p.requires_grad, m.training) for m in llama.modules() for p in m.parameters(recurse=False)]
    for name, tensor in llama.state_dict().items():
        pointer, value = tensors[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, value)


def test_a_trained_head_does_not_stay_behind(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / str(seed))
    head = base.classifier
    with attached(base, tmp_path / "0"):
        assert base.classifier is not head
    assert base.classifier is head
    with pytest.raises(ZeroDivisionError), attached(base, tmp_path / "0"):
        _ = 1 / 0
    assert base.classifier is head
    task = _task(colours, bert_folder, "classification")
    both = select(base, adapters_in(tmp_path), task, 20, count=1)
    for name in ("0", "1"):
        alone = select(base, {name: tmp_path / name}, task, 20, count=1)
        (scored,) = (c for c in both.candidates if c.name == name)
        assert (scored.accuracy, scored.perplexity) == (alone.candidates[0].accuracy, alone.candidates[0].perplexity)


def test_shots(task: Task, colours: Path, bert_folder: Path, llama_folder: Path) -> None:
    shots = draw_shots(task, 7, 1)
    assert [row["example"] for row in shots.train] == [example.id for example in shots.examples["train"]]
    assert {row["example"] for row in shots.train} <= {row["example"] for row in task.train}
    assert shots.train == draw_shots(task, 7, 1).train
    assert shots.train != draw_shots(task, 7, 2).train
    classes = draw_shots(_task(colours, bert_folder, "classification"), 10, 0)
    assert sorted({row["labels"] for row in classes.train}) == [0, 1]
    text = _task(colours, llama_folder, "lm", max_length=16)
    assert len(draw_shots(text, 2, 0).train) == 2
    for k in (0, len(task.train) + 1):
        with pytest.raises(GuilomoError, match=rf"k = {k} .*1 to {len(task.train)}"):
            draw_shots(task, k, 0)


def test_plain_text_has_a_perplexity_only(
    llama: nn.Module, bank: dict[str, Path], colours: Path, llama_folder: Path
) -> None:
    text = _task(colours, llama_folder, "lm", max_length=16)
    assert len(select(llama, bank, text, 4, by="perplexity", count=2).chosen) == 2
    with pytest.raises(GuilomoError, match=r"no right answers.*by='perplexity'"):
        select(llama, bank, text, 4, by="accuracy", count=2)


def test_free_answers_are_generated(llama: nn.Module, bank: dict[str, Path], colours: Path, llama_folder: Path) -> None:
    free = _task(colours, llama_folder, "causal_lm", text_column="input", answer_column="answer")
    assert not any(example.choices for example in free.examples["train"])
    found = select(llama, {"a": bank["a"]}, free, 3, by="accuracy", count=1)
    assert found.candidates[0].accuracy is not None


def test_progress(llama: nn.Module, bank: dict[str, Path], task: Task) -> None:
    seen: list[tuple[int, int, str]] = []
    select(llama, bank, task, 4, count=2, progress=lambda *what: seen.append(what))
    assert seen == [(i + 1, 5, name) for i, name in enumerate(OPTIONS)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": "rockets"}, r"by = 'rockets'.*Did you mean 'rocket'"),
        ({"count": 6}, r"count = 6.*from 1 to 5"),
        ({"count": 0}, r"count = 0.*from 1 to 5"),
        ({"by": "manual"}, r"names = None.*by='manual'"),
        ({"names": ["a"]}, r"names = \['a'\].*by='manual'"),
        ({"by": "manual", "names": ["f"]}, r"names = 'f'.*one of a, b"),
        ({"by": "manual", "names": ["a", "a"]}, r"names = \['a', 'a'\].*different"),
        ({"pool": 1, "count": 2}, r"count = 2.*from 1 to 1, the adapters in the pool"),
    ],
)
def test_mistakes(llama: nn.Module, bank: dict[str, Path], task: Task, options: dict[str, Any], says: str) -> None:
    with pytest.raises(GuilomoError, match=says):
        select(llama, bank, task, 4, progress=lambda *what: pytest.fail("scored first"), **options)


def test_an_adapter_of_another_model_is_refused_before_anything_is_scored(
    llama: nn.Module, bank: dict[str, Path], task: Task, tmp_path: Path, bert_folder: Path
) -> None:
    other = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(bert_folder), LoraConfig(target_modules=["query"])
    )
    other.save_pretrained(tmp_path / "bert")
    with pytest.raises(GuilomoError, match=r"adapter 'z': module = 'bert\."):
        select(
            llama,
            {**bank, "z": tmp_path / "bert"},
            task,
            4,
            count=2,
            progress=lambda *what: pytest.fail("scored first"),
        )


def test_what_is_no_selection(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}", json.dumps({"candidates": [{"nam": 1}], "similarities": []})):
        (tmp_path / "s.json").write_text(content, encoding="utf-8")
        with pytest.raises(GuilomoError, match="selection"):
            Selection.load(tmp_path / "s.json")
    with pytest.raises(GuilomoError, match="cannot be read"):
        Selection.load(tmp_path / "nowhere.json")


def test_describe(bank: dict[str, Path], tmp_path: Path) -> None:
    found = describe(bank["b"], "b")
    assert (found["kind"], found["ranks"], found["scales"], found["modules"]) == ("LORA", [4], [2.0, 2.0], 4)
    assert found["parameters"] == 2 * 4 * (32 + 32) + 2 * 4 * (48 + 32)
    assert found["problem"] is None
    json.dumps(found)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "is not the configuration" in describe(tmp_path / "broken", "broken")["problem"]
