"""The command line as a user meets it: what works, and one sentence with exit code 2 for what does not."""

import io
import json
import lzma
import shlex
import shutil
import subprocess
import sys

import pytest

from runs import run_vwn
from vwn.cli import COMMANDS, arguments, main, parse
from vwn.common.version import __version__ as vwn_version

SMALL = ["--backbone", "nano", "--window", "32", "--batch-size", "4", "--max-valid-tokens", "256", "--steps", "4"]


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: run_vwn(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "--out", out, "--data", text, "--m", "4", "--n", "6", "--mtp", "1", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vwn", *map(str, arguments)])
        main()
    return out


def test_train_and_generate(run, checkpoint):
    assert json.loads((checkpoint / "run.json").read_text())["command"].startswith("vwn train --out")
    code, out, _ = run("generate", checkpoint, "--prompt", "sea ", "--max-new-tokens", "8")
    assert code == 0
    assert out.startswith("sea ")
    assert run("generate", checkpoint, "--prompt", "sea ", "--max-new-tokens", "8")[1] == out
    assert run("generate", checkpoint, "--prompt", "sea ", "--max-new-tokens", "8", "--seed", "1")[1] != out
    code, greedy, _ = run("generate", checkpoint / "checkpoint-4", "--prompt", "sea ", "--temperature", "0")
    assert code == 0
    assert greedy.startswith("sea ")


@pytest.mark.slow
def test_the_tokenizer_of_a_run_is_loaded_without_asking_for_trust(checkpoint):
    code = "import sys; from vwn.data import load_tokenizer; print(load_tokenizer(sys.argv[1]).eos_token)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout == "<|endoftext|>\n", done.stdout + done.stderr


def test_cost_as_table_and_json(run):
    code, out, _ = run("cost", "--backbone", "small", "--arms", "plain", "2x3", "8x64")
    assert code == 0
    assert "2x3" in out
    code, out, _ = run("cost", "--backbone", "small", "--arms", "plain", "2x3", "--json")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["plain", "2x3"]
    assert rows[1]["flops_per_token"] > rows[0]["flops_per_token"]


def test_a_backbone_from_a_config_file(run, tmp_path, text):
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "backbone")
    some = [*SMALL[2:], "--data", text, "--learning-rate", "0.01", "--m", "2", "--n", "3"]
    code, _, err = run("train", "--out", tmp_path / "run", "--backbone", tmp_path / "backbone", *some)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["backbone"]["model_type"] == "qwen3"


BAD = {
    "missing data": (["--data", "nowhere.txt"], "nowhere.txt"),
    "empty data": (["--data", "{tmp}/empty.txt"], "empty"),
    "unknown kind of file": (["--data", "{tmp}/text.doc"], "text.doc"),
    "text shorter than a window": (["--data", "{tmp}/short.txt"], "window"),
    "not UTF-8": (["--data", "{tmp}/latin.txt"], "latin.txt"),
    "damaged archive": (["--data", "{tmp}/broken.txt.xz"], "broken.txt.xz"),
    "m does not divide": (["--m", "5", "--n", "10"], "m = 5 does not divide the hidden size 64"),
    "fewer slots than segments": (["--m", "4", "--n", "2"], "n = 2 slots are fewer than m = 4"),
    "m without n": (["--m", "4"], "both --m and --n"),
    "norm at a fractional ratio": (["--m", "2", "--n", "3", "--reduce-norm", "rms_norm"], "integer r"),
    "unknown preset": (["--backbone", "huge"], "unknown backbone 'huge'"),
    "no such config": (["--backbone", "./nowhere/config.json"], "unknown backbone './nowhere/config.json'"),
    "unknown tokenizer": (["--tokenizer", "bpe:many"], "bpe:many"),
    "learning rate": (["--learning-rate", "0"], "--learning-rate must be positive"),
    "seed": (["--seed", "-1"], "--seed must be from 0"),
    "decay": (["--weight-decay", "nan"], "--weight-decay must be finite"),
    "clipping": (["--max-grad-norm", "-1"], "--max-grad-norm must be finite"),
    "beta": (["--beta1", "1.5"], "--beta1 must be"),
    "end of the schedule": (["--final-learning-rate", "5"], "--final-learning-rate must be from 0 to 1"),
    "warm-up": (["--warmup-steps", "9"], "--warmup-steps must be from 0 to 4"),
    "validation tokens": (["--max-valid-tokens", "0"], "--max-valid-tokens must be at least 1"),
    "window of two": (["--window", "2", "--mtp", "1"], "--window must be at least mtp + 2 = 3"),
    "loss weight": (["--mtp-loss-weight", "-1"], "--mtp-loss-weight must be finite"),
    "width options without a width": (["--static"], "give --m and --n with them"),
    "batch larger than the text": (["--batch-size", "100000"], "fewer than one batch"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "accumulation": (["--gradient-accumulation", "3"], "must divide --batch-size"),
    "model smaller than the tokenizer": (["--backbone", "{tmp}/narrow"], "knows 20 tokens"),
    "model shorter than the window": (["--backbone", "{tmp}/brief"], "knows 16 positions"),
    "layers that are no sums": (
        ["--backbone", "{tmp}/post-norm", "--m", "2", "--n", "4", "--embedding", "factorised"],
        "cannot be widened",
    ),
    "no model at all": (["--backbone", "{tmp}/odd"], "odd"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, text):
    from transformers import LlamaConfig, OpenAIGPTConfig

    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty.txt").write_text("")
    (tmp / "text.doc").write_text("some text")
    (tmp / "short.txt").write_text("too short")
    (tmp / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (tmp / "broken.txt.xz").write_bytes(lzma.compress(b"some text " * 100)[:-20])
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaConfig(**sizes, vocab_size=20, bos_token_id=None, eos_token_id=None).save_pretrained(tmp / "narrow")
    LlamaConfig(**sizes, vocab_size=300, max_position_embeddings=16).save_pretrained(tmp / "brief")
    OpenAIGPTConfig(vocab_size=300, n_embd=64, n_layer=1, n_head=2).save_pretrained(tmp / "post-norm")
    (tmp / "odd").mkdir()
    (tmp / "odd" / "config.json").write_text('{"model_type": "no such model"}')
    return tmp


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_train_gets_one_sentence(run, tmp_path, text, bad_files, case):
    given, expected = BAD[case]
    given = [argument.replace("{tmp}", str(bad_files)) for argument in given]
    arguments = ["train", "--out", tmp_path / "run", "--data", text, *SMALL, "--learning-rate", "0.01"]
    code, _, err = run(*arguments, *given)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("vwn: ")
    assert expected in last
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_resuming_takes_what_was_not_given_from_the_record(run, checkpoint):
    before = (checkpoint / "result.json").read_text()
    code, out, err = run("train", "--out", checkpoint, "--resume")
    assert code == 0, err
    assert "validation loss" in out
    assert (checkpoint / "result.json").read_text() == before
    for given, said in {"--steps=9": "--steps 4, not", "--seed=5": "--seed 0, not", "--static": "without --st"}.items():
        assert said in run("train", "--out", checkpoint, "--resume", given)[2]


def test_a_wide_model_is_no_backbone(run, checkpoint, tmp_path, text):
    arguments = ["--out", tmp_path / "run", "--data", text, *SMALL[2:], "--learning-rate", "0.01"]
    code, _, err = run("train", *arguments, "--backbone", checkpoint)
    assert code == 2
    assert "virtual-width model already" in err


def test_an_unexpected_error_is_one_line_too(run, monkeypatch):
    monkeypatch.setattr("vwn.cost.cost_table", lambda *_: 1 / 0)
    code, _, err = run("cost")
    assert code == 1
    assert err.strip() == "vwn: ZeroDivisionError: division by zero (unexpected; VWN_DEBUG=1 shows where)"
    monkeypatch.setenv("VWN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("cost")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--out", "x", "--widht", "3"], "vwn train has no option --widht"),
        (["train", "--out", "x", "--lr", "1e-3"], "did you mean --learning-rate?"),
        (["train", "--out", "x", "--stesp=3"], "did you mean --steps?"),
        (["compare", "--out", "x", "--stream", "y"], "vwn compare has no option --stream"),
        (["trian"], "did you mean train?"),
        (["fly"], "there is no command 'fly'; the commands are train, compare"),
        (["train"], "--out"),
        (["train", "--out", "x", "--steps", "many"], "vwn train --help"),
        (["train", "--out", "x", "--tokenizer", "bpe"], "bpe:SIZE"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_typing_errors_name_the_way_out(run, arguments, expected):
    code, _, err = run(*arguments)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


def test_help_names_every_option_and_no_other(run):
    assert run()[:2] == run("--help")[:2] == run("help")[:2]
    assert run("--version")[1] == f"vwn {vwn_version}\n"
    for name, command in COMMANDS.items():
        code, text, _ = run(name, "--help")
        assert code == 0
        assert run("help", name)[1] == text
        assert f"vwn {command.examples[0]}" in text
        shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        positional = {option.name for option in command.options if option.positional}
        assert sorted(shown) == sorted(f"--{o.name}" for o in command.options if not o.positional)
        assert all(f"--{o}" in shown[: len(command.first)] for o in command.first if o not in positional)
        assert not set(command.hidden) & {word.removeprefix("--") for word in shown}
        assert "None" not in text
        assert "`" not in text
    train = run("train", "--help")[1]
    assert "large         12 layers, width 768" in train
    assert "--steps INT             Optimiser steps. [1000]" in train


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_parsed(name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "wide").mkdir(parents=True)
    (tmp_path / "runs" / "wide" / "run.json").write_text('{"config": {"optim.steps": 7}}')
    monkeypatch.chdir(tmp_path)
    for example in COMMANDS[name].examples:
        parse(name, shlex.split(example)[1:])


def test_names_of_the_python_config_are_taken_too():
    for name in ("train", "compare"):
        given = parse(name, ["--out", "x", "--num-mtp-modules=2", "--no-dynamic"])
        assert (given.width.mtp, given.width.static) == (2, True)
        assert not parse(name, ["--out", "x", "--dynamic"]).width.static


def test_options_that_help_shows_are_those_that_are_parsed():
    for name, command in COMMANDS.items():
        for option in command.options:
            given = [f"--{option.name}"] if option.switch else [f"--{option.name}=1"]
            assert option.positional or arguments(name, given)


def test_help_needs_no_torch():
    code = (
        "import sys; from vwn.cli import main; sys.argv = ['vwn', 'train', '--help']; main();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_prompts_from_standard_input(run, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("sea \n\nwave"))
    code, out, _ = run("generate", checkpoint, "--max-new-tokens", "4", "--temperature", "0")
    assert code == 0
    sea, wave = (
        run("generate", checkpoint, "--prompt", p, "--max-new-tokens", "4", "--temperature", "0")[1]
        for p in ("sea ", "wave")
    )
    assert out == sea + wave


def test_a_tokenizer_for_a_checkpoint_without_one(run, tmp_path, checkpoint):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("checkpoint-*", "tokenizer*", "special_tokens*"))
    given = ["--prompt", "sea ", "--max-new-tokens", "4", "--temperature", "0"]
    code, _, err = run("generate", bare, *given)
    assert code == 2
    assert "--tokenizer" in err
    assert run("generate", bare, *given, "--tokenizer", "bytes")[1] == run("generate", checkpoint, *given)[1]


def test_generate_refusals(run, tmp_path, checkpoint):
    for given, expected in (
        ([tmp_path / "nowhere", "--prompt", "a"], "no checkpoint at"),
        ([tmp_path, "--prompt", "a"], "holds no model"),
        ([checkpoint, "--prompt", ""], "empty"),
        ([checkpoint, "--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        ([checkpoint, "--prompt", "a", "--top-p", "2"], "--top-p must be"),
        ([checkpoint, "--prompt", "a", "--temperature", "nan"], "--temperature must be"),
        ([checkpoint, "--prompt", "a", "--seed", "99999999999999999999"], "--seed must be"),
    ):
        code, _, err = run("generate", *given)
        assert code == 2
        assert expected in err
        assert "Traceback" not in err


def test_generate_from_a_damaged_checkpoint(run, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run("generate", tmp_path / "copy", "--prompt", "a")
    assert code == 2
    assert "damaged" in err
    assert "Traceback" not in err


def test_cost_refusals(run):
    assert "MxN" in run("cost", "--arms", "plain", "wide")[2]
    assert "does not divide" in run("cost", "--arms", "3x6")[2]
    assert "--window must be at least 1" in run("cost", "--window", "0")[2]
    assert "--vocab-size must be at least 1" in run("cost", "--vocab-size", "-5")[2]


@pytest.mark.slow
def test_import_needs_torch_only():
    code = (
        "import sys, vwn; vwn.GeneralizedHyperConnection(8, 2, 3);"
        "assert not {'transformers', 'datasets', 'tyro'} & set(sys.modules), 'too much';"
        "vwn.VirtualWidthForCausalLM; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
