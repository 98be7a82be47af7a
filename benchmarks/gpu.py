"""All that wants a GPU, by one command and within a time limit: ``python -m benchmarks.gpu --minutes 9``.

First the kernels are compiled, by several processes, for one after the other would take longer than all that follows.
Then come the tests and the benchmarks, the most wanted first, each in a process of its own and no longer than its share
of the time: one that fails takes no other with it. Each writes its JSON row by row, so what the time did not suffice
for is missing, and named, and nothing else; ``--steps`` runs that later.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import connections, rivals
from benchmarks.report import FOLDER, shapes
from benchmarks.rivals import Inputs

LEAST = 20.0
"""Seconds in which nothing worth starting is done."""


class Step(NamedTuple):
    """A command; ``name`` is what it is asked for by, and what its JSON is called by."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    share: float = 1.0
    """Of all the time, that it may take at most."""


WIDTHS = (2048, 4096)
"""Of the connections measured alone."""
TESTS = ("-q", "-n", "8", "tests/ops/test_triton_gpu.py", "tests/ops/test_triton.py")
DETERMINISTIC = (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),)  # the tests ask PyTorch for deterministic algorithms
TRAIN = ("train", "--backbone", "medium", "--steps", "200", "--eval-every", "200")
STEPS = (
    Step("compile", "benchmarks.gpu", ("--compile-only",), share=0.3),
    Step("tests", "pytest", TESTS, DETERMINISTIC, share=0.25),
    Step("connections", "benchmarks.connections", ("--widths", ",".join(map(str, WIDTHS))), share=0.3),
    Step("training_step", "benchmarks.training_step", ("--families", "dense", "--modes", "eager"), share=0.3),
    Step("training_step_compiled", "benchmarks.training_step", ("--families", "dense", "--modes", "compiled")),
    Step("decoding", "benchmarks.decoding"),
    Step("train_plain", "vwn.cli", TRAIN),
    Step("train_4x16", "vwn.cli", (*TRAIN, "--m", "4", "--n", "16")),
    Step("accuracy", "benchmarks.accuracy"),
    Step("memory", "benchmarks.memory"),
    Step("training_step_moe", "benchmarks.training_step", ("--families", "moe")),
)


def main() -> None:
    """Compile, run what there is time for, say what became of it."""
    options = _parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use; --device cpu --quick is a dry run")
    if options.compile_only:
        return compile_all(options.shapes or connections.SHAPES, options.processes)
    unknown = set(options.steps or ()) - {step.name for step in STEPS}
    if unknown:
        raise SystemExit(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STEPS)}")
    wanted = options.steps or [step.name for step in STEPS[options.device == "cpu" :]]  # a dry run compiles nothing
    steps = [step for step in STEPS if step.name in wanted and (options.data or step.module != "vwn.cli")]
    found = list(run_all(steps, options, run))
    print("\n" + "\n".join(found))
    raise SystemExit(any(not line.endswith(": done") for line in found))


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--minutes", type=float, default=9, help="after which nothing runs any more")
    p.add_argument("--steps", type=lambda text: text.split(","), help="only these, such as connections,memory")
    p.add_argument("--shapes", type=shapes, help="connections, such as 2x3,4x16, where a benchmark takes them")
    p.add_argument("--folder", type=Path, default=FOLDER / "results", help="of the JSON files")
    p.add_argument("--data", help="text for vwn train; without it, train_plain and train_4x16 are left out")
    p.add_argument("--commit", help="to record where there is no checkout to ask")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--quick", action="store_true", help="tiny sizes; with --device cpu a dry run in the interpreter")
    p.add_argument("--compile-only", action="store_true", help="only have the kernels in the caches on disk")
    p.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="that compile at a time")
    return p


def compile_all(wanted: list[tuple[int, int]], processes: int) -> None:
    """Have the kernels of the benchmarks in the caches on disk, ours and those that they are held against."""
    _, tokens, dtype, _ = connections.SIZES["cuda"]
    cases = [(m, n, width, tokens, dtype) for width in WIDTHS for m, n in wanted]
    start = time.monotonic()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_compile, case): case for case in cases}
        for done in as_completed(running):
            failed = done.exception() or done.result()
            m, n, width, *_, dtype = running[done]
            took = f"{time.monotonic() - start:.0f} s"
            print(f"({m}, {n}), {width}, {dtype}: {took}" + (f", but not {failed}" if failed else ""), flush=True)


def _compile(case: tuple[int, int, int, int, torch.dtype]) -> str:
    """Run everything once; what fails will fail again, where it is reported."""
    m, n, width, tokens, dtype = case
    device = torch.device("cuda")
    failed = []

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__})")

    some, few = (Inputs(m, n, width, count, dtype, device) for count in (tokens, 1))
    for rival in (*rivals.ours(some, "triton"), *rivals.paper(some), *rivals.plain(some)):
        attempt(rival.name, rival.both)
    for rival in rivals.ours(few, "triton"):
        attempt(f"{rival.name}, few tokens", torch.no_grad()(rival.run))
    torch.cuda.empty_cache()
    return ", ".join(failed)


def run_all(
    steps: list[Step], options: argparse.Namespace, run: Callable[[list[str], dict[str, str], float], int | None]
) -> Iterator[str]:
    """Run ``steps`` while there is time; a line on each.

    ``run``: as :func:`run`.
    """
    seconds = 60 * options.minutes
    end = time.monotonic() + seconds
    for step in steps:
        left = end - time.monotonic()
        if left < LEAST:
            yield f"{step.name}: no time left"
            continue
        command, environment = _command(step, options)
        limit = min(left, step.share * seconds)
        print(f"\n== {step.name}, for {limit:.0f} of {left:.0f} s: {' '.join(command[1:])}", flush=True)
        code = run(command, environment, limit)
        if code is None:
            yield f"{step.name}: stopped when its time was over; its JSON has what was measured by then"
        else:
            yield f"{step.name}: {'done' if code == 0 else f'failed, exit code {code}'}"


def run(command: list[str], environment: dict[str, str], seconds: float) -> int | None:
    """The exit code, or ``None`` if the command took too long, and was stopped with all that it had started."""
    process = subprocess.Popen(command, env=environment, cwd=FOLDER.parent, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(step: Step, options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", step.module, *step.arguments]
    environment = os.environ | dict(step.environment)
    if options.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    if step.module == "vwn.cli":
        return [*command, "--data", options.data, "--out", str(options.folder / step.name)], environment
    if options.shapes and step.module != "pytest":
        command += ["--shapes", ",".join(f"{m}x{n}" for m, n in options.shapes)]
    if step.module in ("pytest", "benchmarks.gpu"):
        return command, environment
    command += ["--device", options.device, "--out", str(options.folder / f"{step.name}-{options.device}.json")]
    command += ["--quick"] if options.quick else []
    command += ["--commit", options.commit] if options.commit else []
    if options.device == "cpu":
        command += ["--backend", "triton"]
    return command, environment


if __name__ == "__main__":
    main()
