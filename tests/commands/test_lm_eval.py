"""Tasks by lm-eval on local files: scores by hand, lm-eval's own definitions, its command line, refusals."""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vwn.hf  # noqa: F401 - registers the Auto classes
from conftest import perturb
from vwn.cli import main
from vwn.commands.evaluation import TASKS
from vwn.commands.evaluation.config import EvalConfig
from vwn.commands.evaluation.rows import load_rows
from vwn.commands.evaluation.run import evaluate_checkpoint, tasks_table
from vwn.common.errors import UserError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask  # noqa: E402 - it need not be there
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from vwn.commands.evaluation.harness import load_tasks, run_tasks, scores  # noqa: E402

NAMES = ("lambada", "piqa", "arc_easy", "openbookqa", "hellaswag", "blimp")
SUBSETS = [row["task"] for row in load_yaml(TASKS / "blimp.yaml", resolve_func=False)["task"]]
WINDOW = 160  # longer than every row here, in bytes

LAMBADA = [
    {"context": "He read the letter to the end, folded it and said:\n\n\"I know", "continuation": "nothing"},
    {"context": "Élise looked out to the sea, and out to the\u2028sea", "continuation": "again"},
    {"context": "the", "continuation": "the"},
]  # fmt: skip
PIQA = [
    {"query": "Question: How to open a jar?\n", "choices": ["turn the lid", "heat the shelf with a fan"], "gold": 0},
    {"query": "Question: table\n", "choices": ["is for shoes that are very, very old", "is for plates"], "gold": 1},
    {"query": "Question: to dry a shirt\n", "choices": ["hang it in the sun", "bury it"], "gold": 0},
]  # fmt: skip
FOUR = [
    {"query": "Question: What of these is hot?", "choices": ["ice", "a glacier in May", "the sun", "shade"], "gold": 2},
    {"query": "A cook is in a kitchen. She", "choices": ["flies.", "cuts an onion.", "is a lid.", "ünder."], "gold": 1},
]  # fmt: skip


def packed(path: Path, rows) -> None:
    path.write_bytes(lzma.compress("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n"))


def minimal_pairs(subset: str) -> list[dict]:
    good, bad = f"The {subset.split('_')[0]}s know it.", f"The {subset[:9]} know it"
    return [{"sentence_good": good, "sentence_bad": f"{bad} {i}.", "UID": subset} for i in range(2)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Rows of our own in files like those of the six sets, compressed and not."""
    folder = tmp_path_factory.mktemp("evals")
    packed(folder / "lambada_openai.jsonl.xz", LAMBADA)
    packed(folder / "piqa.jsonl.xz", PIQA)
    packed(folder / "arc_easy.jsonl.xz", FOUR)
    packed(folder / "openbook_qa.jsonl.xz", FOUR[1:])
    (folder / "hellaswag.jsonl").write_text("\n".join(json.dumps(row) for row in FOUR[::-1]))
    with tarfile.open(folder / "blimp.tar.xz", "w:xz") as tar:
        for subset in SUBSETS:
            data = "\n".join(json.dumps(row) for row in minimal_pairs(subset)).encode()
            member = tarfile.TarInfo(f"{subset}.jsonl")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def checkpoint(finished, tmp_path_factory) -> Path:
    """A trained model, sharpened so that no two of its scores are alike, saved with its tokenizer."""
    run, _ = finished
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    perturb(AutoModelForCausalLM.from_pretrained(run.out), scale=0.05).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run.out).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def found(model, checkpoint, data_dir):
    """All tasks on all rows, as lm-eval returns them."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return run_tasks(model, tokenizer, load_tasks(NAMES, data_dir), window=WINDOW, batch_size=4)


@torch.no_grad()
def log_likelihood(model, context: str, answer: str) -> tuple[float, bool]:
    """Of an answer's bytes, straight from the logits, one context at a time; and whether greedy decoding gives it."""
    before, after = list(context.encode()) or [256], list(answer.encode())
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
    rows = logits.log_softmax(-1)
    targets = torch.tensor(after)
    return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())


def asked(task: str, rows) -> list[tuple[str, list[str], int]]:
    """Context, answers and the right one, as lm-eval's documentation and the papers of the sets have them."""
    if task == "lambada_openai":
        return [(row["context"], [" " + row["continuation"]], 0) for row in rows]
    if task.startswith("blimp"):
        return [("", [" " + row["sentence_good"], " " + row["sentence_bad"]], 0) for row in rows]
    end = {"piqa": "Answer:", "arc_easy": "\nAnswer:"}.get(task, "")
    return [(row["query"] + end, [" " + choice for choice in row["choices"]], row["gold"]) for row in rows]


ROWS = {"lambada_openai": LAMBADA, "piqa": PIQA, "arc_easy": FOUR, "openbookqa": FOUR[1:], "hellaswag": FOUR[::-1]} | {
    f"blimp::{s}": minimal_pairs(s) for s in (SUBSETS[0], SUBSETS[-1])
}


@pytest.mark.parametrize("task", ROWS)
def test_scores_by_hand(task: str, model, found) -> None:
    """Every row's log-likelihoods and verdicts, then the task's mean and its standard error."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metrics = {"acc": [], "acc_norm": [], "logs": []}
    for sample, (context, answers, gold) in zip(samples, asked(task, ROWS[task]), strict=True):
        logs, greedy = zip(*(log_likelihood(model, context, answer) for answer in answers), strict=True)
        assert [tuple(arguments) for arguments in sample["arguments"]] == [(context, answer) for answer in answers]
        measured, was_greedy = zip(*(response[0] for response in sample["resps"]), strict=True)
        assert measured == pytest.approx(logs, rel=1e-5)
        assert was_greedy == greedy
        per_letter = np.array(logs) / [len(answer) - 1 for answer in answers]
        metrics["acc"].append(float(greedy[0] if task == "lambada_openai" else int(np.argmax(logs)) == gold))
        metrics["acc_norm"].append(float(int(np.argmax(per_letter)) == gold))
        metrics["logs"].append(logs[0])
        assert sample["acc"] == metrics["acc"][-1]
        if "acc_norm" in sample:
            assert sample["acc_norm"] == metrics["acc_norm"][-1]
    result = found["results"][task]
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in result:
            values = metrics[metric]
            assert result[f"{metric},none"] == pytest.approx(np.mean(values))
            if len(values) > 1:
                error = np.std(values, ddof=1) / math.sqrt(len(values))
                assert result[f"{metric}_stderr,none"] == pytest.approx(error)
    if task == "lambada_openai":
        assert result["perplexity,none"] == pytest.approx(math.exp(-np.mean(metrics["logs"])), rel=1e-5)


def test_rows_tell_the_verdicts_apart(found) -> None:
    """Else the equality of verdicts would say nothing."""
    assert len({v["acc,none"] for name, v in found["results"].items() if name.startswith("blimp::")}) > 1
    others = [found["results"][name] for name in ("piqa", "arc_easy", "openbookqa", "hellaswag")]
    assert len({row["acc,none"] for row in others}) > 1
    assert any(row["acc,none"] != row["acc_norm,none"] for row in others)


def test_blimp_is_the_mean_of_its_67_subsets(found) -> None:
    blimp = scores(found)["blimp"]
    assert len(blimp["subsets"]) == len(SUBSETS) == 67
    assert next(iter(blimp["subsets"])) == SUBSETS[0]
    means = [subset["scores"]["acc"]["value"] for subset in blimp["subsets"].values()]
    assert blimp["scores"]["acc"]["value"] == pytest.approx(np.mean(means))
    assert blimp["n"] == 134
    assert all(subset["n"] == 2 for subset in blimp["subsets"].values())


# A row of the hub's data sets, and the same row as the local files have it.
HUB_ROWS = {
    "lambada/lambada_openai": (
        {"text": "He said no , and no was what he"},
        {"context": "He said no , and no was what", "continuation": "he"},
    ),
    "piqa/piqa": (
        {"goal": "Open a jar.", "sol1": "turn it", "sol2": "eat it", "label": 0},
        {"query": "Question: Open a jar.\n", "choices": ["turn it", "eat it"], "gold": 0},
    ),
    "arc/arc_easy": (
        {"question": "What is hot?", "choices": {"text": ["ice", "sun"], "label": ["A", "B"]}, "answerKey": "B"},
        {"query": "Question: What is hot?", "choices": ["ice", "sun"], "gold": 1},
    ),
    "openbookqa/openbookqa": (
        {"question_stem": "Fog is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "A"},
        {"query": "Fog is", "choices": ["wet", "dry"], "gold": 0},
    ),
    "hellaswag/hellaswag": (
        {"query": "Cooking: He", "choices": ["cuts.", "flies."], "label": 0},  # after its own preprocessing
        {"query": "Cooking: He", "choices": ["cuts.", "flies."], "gold": 0},
    ),
    "blimp/adjunct_island": (
        {"sentence_good": "He did it.", "sentence_bad": "He it did."},
        {"sentence_good": "He did it.", "sentence_bad": "He it did."},
    ),
}  # fmt: skip


def requests_of(task_fields: dict, row: dict) -> tuple[list, int | None]:
    """What a task asks of a model about a row, and the number of the right answer."""
    rows = datasets.Dataset.from_list([row])
    keep = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "target_delimiter")
    config = {key: task_fields[key] for key in keep if key in task_fields}
    config |= {"task": "it", "test_split": "test", "num_fewshot": 0, "custom_dataset": lambda **_: {"test": rows}}
    task = ConfigurableTask(config=config)
    doc = task.test_docs()[0]
    made = task.construct_requests(doc, task.doc_to_text(doc), metadata=("it", 0, 1))
    if config["output_type"] == "loglikelihood":
        return [made.args], None
    return [request.args for request in made], task.doc_to_target(doc)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_tasks_are_defined_as_in_lm_eval(name: str) -> None:
    """The same requests and the same metrics as its own task files, which read from the hub."""
    hub_row, row = HUB_ROWS[name]
    own = "blimp" if name.startswith("blimp") else name.split("/")[1]
    theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{name}.yaml", resolve_func=False)
    ours = load_yaml(TASKS / f"{own}.yaml", resolve_func=False)
    assert requests_of(ours, row) == requests_of(theirs, hub_row)
    assert ours["metric_list"] == theirs["metric_list"]


def test_the_blimp_group_is_that_of_lm_eval() -> None:
    theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "blimp" / "_blimp.yaml", resolve_func=False)
    ours = load_yaml(TASKS / "blimp.yaml", resolve_func=False)
    assert {f"blimp_{row['task']}" for row in ours["task"]} == set(theirs["task"])
    assert all(row["dataset_kwargs"]["name"] == f"blimp/{row['task']}" for row in ours["task"])
    assert ours["aggregate_metric_list"] == theirs["aggregate_metric_list"]


def test_printed_and_written(checkpoint, data_dir, found, tmp_path, capfd, monkeypatch) -> None:
    out = tmp_path / "tasks.json"
    tasks = ["--tasks", "piqa", "lambada", "--data-dir", str(data_dir), "--limit", "2", "--window", str(WINDOW)]
    monkeypatch.setattr(sys, "argv", ["vwn", "eval", str(checkpoint), *tasks, "--out", str(out)])
    monkeypatch.chdir(tmp_path)  # no repository, of which git would complain past Python's own streams
    main()
    written = json.loads(out.read_text())
    printed = capfd.readouterr()
    assert "not a git repository" not in printed.err
    assert printed.out == tasks_table(written) + "\n"
    assert set(written["tasks"]) == {"piqa", "lambada_openai"}
    first = [sample["acc_norm"] for sample in found["samples"]["piqa"] if sample["doc_id"] < 2]
    piqa = written["tasks"]["piqa"]
    assert piqa["n"] == 2
    assert piqa["scores"]["acc_norm"]["value"] == np.mean(first)
    assert set(piqa["scores"]) == {"acc", "acc_norm"}
    assert written["versions"]["lm_eval"] == lm_eval.__version__
    assert (written["limit"], written["truncated_requests"]) == (2, 0)
    assert "text" not in written


@pytest.mark.slow
def test_contexts_that_are_cut_are_counted_and_answers_are_not_cut(model, checkpoint, data_dir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lengths = sorted(len(f"{row['context']} {row['continuation']}".encode()) for row in LAMBADA)
    for window, cut in ((lengths[2] - 1, 0), (lengths[2] - 2, 1), (lengths[1] - 2, 2)):  # the last token is not read
        assert run_tasks(model, tokenizer, load_tasks(["lambada"], data_dir), window=window)["truncated"] == cut
    with pytest.raises(UserError, match=r"longest answer has 8 tokens, and the model takes 7 at a time"):
        run_tasks(model, tokenizer, load_tasks(["lambada"], data_dir), window=7)


def test_unusable_files(tmp_path) -> None:
    fields = ["query", "choices", "gold"]
    row = {"query": "q", "choices": ["a", "b"], "gold": 1}
    with pytest.raises(UserError, match=r"there is no .*piqa\.jsonl\.xz nor .*piqa\.jsonl;"):
        load_rows("piqa", fields, tmp_path)
    with pytest.raises(UserError, match=r"--metadata"):
        load_rows("piqa", fields)
    file = tmp_path / "piqa.jsonl.xz"
    packed(file, [row])
    assert load_rows("piqa", fields, str(tmp_path), version=1.0)["test"].to_list() == [row]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"piqa\.jsonl\.xz is not a complete \.xz file"):
        load_rows("piqa", fields, tmp_path)
    for bad, sentence in [
        ([row, row | {"gold": 2}], r"line 2 of .* has gold = 2"),
        ([row, {"query": "q"}], r"line 2 of .* is not a JSON object with query, choices, gold"),
        ([], r"is empty"),
    ]:
        packed(file, bad)
        with pytest.raises(UserError, match=sentence):
            load_rows("piqa", fields, tmp_path)
    (tmp_path / "blimp.tar.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"blimp\.tar\.xz is not a complete \.xz file"):
        load_rows("blimp/wh_island", ["sentence_good"], tmp_path)
    with tarfile.open(tmp_path / "blimp.tar.xz", "w:xz"):
        pass
    with pytest.raises(UserError, match=r"holds no wh_island\.jsonl"):
        load_rows("blimp/wh_island", ["sentence_good"], tmp_path)


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (("piqa", "squad"), r"unknown task 'squad'; there are arc_easy, blimp"),
        (("hellaswag",), r"there is no .*hellaswag"),
    ],
)
def test_tasks_are_checked_before_the_model_is_loaded(tasks, sentence, tmp_path, monkeypatch) -> None:
    packed(tmp_path / "piqa.jsonl.xz", PIQA)
    monkeypatch.setattr("vwn.commands.evaluation.run.load_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=sentence):
        evaluate_checkpoint(EvalConfig("nowhere", tasks=tasks, data_dir=tmp_path))


def test_without_lm_eval_there_is_one_sentence(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("vwn.common.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[eval\]'"):
        evaluate_checkpoint(EvalConfig("nowhere", tasks=("piqa",), data_dir=tmp_path))


@pytest.mark.slow
def test_lm_evals_own_command_line_gives_the_same(checkpoint, data_dir, found, tmp_path) -> None:
    """Offline, in a process that imports us and is lm-eval's own otherwise."""
    command = [
        *(sys.executable, "-c", "import vwn.hf, runpy; runpy.run_module('lm_eval', run_name='__main__')", "run"),
        *("--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={checkpoint},max_length={WINDOW}"),
        *("--include_path", str(TASKS), "--tasks", "lambada,piqa"),
        *("--metadata", json.dumps({"data_dir": str(data_dir)}), "--output_path", str(tmp_path), "--log_samples"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "DISABLE_MULTIPROC": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    for task in ("lambada_openai", "piqa"):
        for metric, value in found["results"][task].items():
            if metric.endswith(",none") and "stderr" not in metric:
                assert results[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
