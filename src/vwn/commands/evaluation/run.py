"""`vwn eval`: measure a checkpoint and write down what came out."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from vwn.commands.evaluation.config import EvalConfig
from vwn.commands.evaluation.text import load_text, measure_text
from vwn.common.extras import require_packages
from vwn.common.files import write_json
from vwn.common.provenance import provenance
from vwn.data.tokenizer import load_checkpoint_tokenizer
from vwn.hf.loading import load_model, positions_of
from vwn.training.directory import locate, run_record


def evaluate_checkpoint(config: EvalConfig) -> dict[str, Any]:
    """Measure losses on a text and scores on tasks, and write them to ``config.out`` if that is given.

    Returns:
        ``text``, see :func:`~vwn.commands.evaluation.text.measure_text`; ``tasks``, see
        :func:`~vwn.commands.evaluation.harness.scores`, with its ``truncated_requests`` and ``limit``; ``checkpoint``,
        ``params``, and the command and versions.

    Raises:
        UserError: no checkpoint, no text, an unknown task, a missing file, or lm-eval is not installed.
    """
    config.check()
    tasks: Any = None
    if config.tasks:
        require_packages("vwn eval --tasks", "lm_eval")
        from vwn.commands.evaluation.harness import load_tasks, run_tasks, scores

        assert config.data_dir is not None
        tasks = load_tasks(config.tasks, config.data_dir)
    source = locate(config.checkpoint)
    record = run_record(source)
    needs_tokenizer = tasks is not None or config.data is not None
    tokenizer = load_checkpoint_tokenizer(source, config.tokenizer) if needs_tokenizer else None
    text = load_text(source, config.data, record, tokenizer) if config.measures_text else None
    model = load_model(source, tokenizer)
    result: dict[str, Any] = {
        "checkpoint": str(source),
        "params": sum(p.numel() for p in model.parameters()),
        **provenance(),
    }
    if text is not None:
        window = config.window or record.get("config", {}).get("corpus.window")
        result["text"] = measure_text(model, text, window, config.stride, config.max_tokens, config.batch_size)
    if tasks is not None:
        found = run_tasks(model, tokenizer, tasks, config.limit, config.window, config.batch_size)
        result["versions"]["lm_eval"] = version("lm_eval")
        result |= {"tasks": scores(found), "truncated_requests": found["truncated"], "limit": config.limit}
        result["tasks_window"] = config.window or positions_of(model)[0]
    if config.out is not None:
        write_json(config.out, result)
    return result


def text_line(result: dict[str, Any]) -> str:
    """Return one line about the losses on a text."""
    t = result["text"]
    further = "".join(f", next-{k[5:]}-token {v:.4f}" for k, v in t.items() if k.startswith("loss_"))
    bits = f", {t['bits_per_byte']:.4f} bits per byte" if t["bits_per_byte"] is not None else ""
    return (
        f"{result['checkpoint']} on {t['data']}: loss {t['loss']:.4f} nats per token{further}, perplexity "
        f"{t['perplexity']:.4g}{bits}, over {t['tokens']:,} tokens in windows of {t['window']}"
    )


def tasks_table(result: dict[str, Any]) -> str:
    """Return the scores with their standard errors, one line each; a group's subsets are in the JSON only."""
    lines = [f"{'task':<16} {'rows':>7}  {'metric':<12} {'value':>10}   standard error"]
    for name, task in result["tasks"].items():
        for metric, score in task["scores"].items():
            error = "" if score["stderr"] is None else f"± {_figure(score['stderr'])}"
            value = _figure(score["value"])
            lines.append(f"{name:<16} {task['n']:>7,}  {metric:<12} {value:>10}   {error}".rstrip())
    if result["truncated_requests"]:
        lines.append(
            f"{result['truncated_requests']:,} contexts were cut at their beginning: they are longer than the window"
        )
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"  # a perplexity can be huge
