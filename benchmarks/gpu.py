"""All that wants a GPU, by one command and within a time limit: ``python -m benchmarks.gpu --minutes 9``.

First every kernel is compiled, by as many processes as are worth it, for one after the other would take longer than all
that follows. Then come the tests of the kernels and the benchmarks, the most wanted first, each in a process of its
own: one that fails takes no other with it. Each writes its JSON row by row, so what the time did not suffice for is
missing, and named, and nothing else; ``--steps`` runs that later.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import connections, rivals
from benchmarks.report import FOLDER, shapes
from benchmarks.rivals import Inputs, Rival

LEAST = 20.0
"""Seconds in which nothing worth starting is done."""


class Step(NamedTuple):
    """A command; ``name`` is what it is asked for by, and what its JSON is called by."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


TESTS = ("-q", "-x", "tests/test_triton.py", "tests/test_triton_gpu.py")
STEPS = (
    Step("tests", "pytest", TESTS),
    Step("accuracy", "benchmarks.accuracy"),
    Step("connections", "benchmarks.connections"),
    Step("training_step", "benchmarks.training_step", ("--families", "dense", "--modes", "eager")),
    Step("training_step_compiled", "benchmarks.training_step", ("--families", "dense", "--modes", "compiled")),
    Step("memory", "benchmarks.memory"),
    Step("scaling", "benchmarks.scaling"),
    Step("connections_tuned", "benchmarks.connections", (), (("VWN_TUNE", "1"),)),
    Step("training_step_moe", "benchmarks.training_step", ("--families", "moe")),
    Step("mtp_decoding", "benchmarks.mtp_decoding"),
)


def main() -> None:
    """Compile, run what there is time for, say what became of it."""
    options = _parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use; --device cpu --quick is a dry run")
    unknown = set(options.steps or ()) - {step.name for step in STEPS}
    if unknown:
        raise SystemExit(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STEPS)}")
    end = time.monotonic() + 60 * options.minutes
    if options.device == "cuda" and not options.quick:
        compile_all(options.shapes or connections.SHAPES, options.processes)
    found = list(run_all([s for s in STEPS if s.name in (options.steps or [s.name])], options, end, subprocess.run))
    print("\n" + "\n".join(found))
    raise SystemExit(any(not line.endswith(": done") for line in found))


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--minutes", type=float, default=9, help="after which nothing runs any more")
    p.add_argument("--steps", type=lambda text: text.split(","), help="only these, such as connections,memory")
    p.add_argument("--shapes", type=shapes, help="connections, such as 2x3,4x16, where a benchmark takes them")
    p.add_argument("--folder", type=Path, default=FOLDER / "results", help="of the JSON files")
    p.add_argument("--commit", help="to record where there is no checkout to ask")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--quick", action="store_true", help="tiny sizes; with --device cpu a dry run in the interpreter")
    p.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="that compile at a time")
    return p


def compile_all(wanted: list[tuple[int, int]], processes: int) -> None:
    """Have the kernels of :mod:`benchmarks.connections` in the caches on disk, ours and those of others."""
    widths, tokens, dtype, _ = connections.SIZES["cuda"]
    cases = [(m, n, width, tokens, dtype) for width in widths for m, n in wanted]
    start = time.monotonic()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for case, failed in zip(cases, pool.map(_compile, cases), strict=True):
            print(f"compiled {case[:3]}" + (f", but not {failed}" if failed else ""), flush=True)
    print(f"in {time.monotonic() - start:.0f} s")


def _compile(case: tuple[int, int, int, int, torch.dtype]) -> str:
    """Run everything once; what fails will fail again, where it is reported."""
    m, n, width, tokens, dtype = case
    device = torch.device("cuda")
    inputs, few = Inputs(m, n, width, tokens, dtype, device), Inputs(m, n, width, 1, dtype, device)
    failed = []
    for rival in (*rivals.ours(inputs, "triton"), *rivals.paper(inputs), *rivals.plain(inputs)):
        try:
            rival.both()
        except Exception as error:
            failed.append(f"{rival.name} ({type(error).__name__})")
    with torch.no_grad():
        for rival in rivals.ours(few, "triton"):
            _decode(rival)
    return ", ".join(failed)


def _decode(rival: Rival) -> None:
    if rival.name != "reference":
        rival.run()


def run_all(
    steps: list[Step], options: argparse.Namespace, end: float, run: Callable[..., subprocess.CompletedProcess]
) -> Iterator[str]:
    """Run ``steps`` until the time ``end``; a line on each."""
    for step in steps:
        left = end - time.monotonic()
        if left < LEAST:
            yield f"{step.name}: no time left"
            continue
        command, environment = _command(step, options)
        print(f"\n== {step.name}, {left:.0f} s left: {' '.join(command[1:])}", flush=True)
        try:
            code = run(command, env=environment, timeout=left, cwd=FOLDER.parent).returncode
        except subprocess.TimeoutExpired:
            yield f"{step.name}: stopped when the time was over; its JSON has what was measured by then"
        else:
            yield f"{step.name}: {'done' if code == 0 else f'failed, exit code {code}'}"


def _command(step: Step, options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", step.module, *step.arguments]
    environment = os.environ | dict(step.environment)
    if options.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "VWN_TUNE": "0"}
    if step.module == "pytest":
        return command, environment
    command += ["--device", options.device, "--out", str(options.folder / f"{step.name}-{options.device}.json")]
    command += ["--quick"] if options.quick else []
    command += ["--commit", options.commit] if options.commit else []
    if options.shapes:
        command += ["--shapes", ",".join(f"{m}x{n}" for m, n in options.shapes)]
    if options.device == "cpu":
        command += ["--backend", "triton"]
    return command, environment


if __name__ == "__main__":
    main()
