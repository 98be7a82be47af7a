"""Which backend runs: what is asked for by name runs or raises, what is automatic says once what it took and why."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny import build, token_ids, vwn_config
from vwn import GeneralizedHyperConnection, ops
from vwn.common.errors import UserError
from vwn.ops import backends, compiled, library
from vwn.ops.weights import NormWeights, RoutingWeights

COMPILER = shutil.which("g++") or shutil.which("c++")
STATE, Z = torch.ones(3, 256), torch.ones(3, 64)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

READ = """
import torch
from vwn import GeneralizedHyperConnection
torch.manual_seed(0)
print(GeneralizedHyperConnection(6, 2, 3, backend="compiled").read(torch.randn(4, 9)).tolist())
"""


@pytest.fixture
def forget(monkeypatch, tmp_path) -> Iterator[Callable[[], None]]:
    """A cache of its own and nothing chosen yet; call it to start once more."""

    def clear() -> None:
        backends._choose.cache_clear()
        compiled._library.cache_clear()

    monkeypatch.setenv("VWN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    clear()
    yield clear
    clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> Callable[[str], Callable[[], int]]:
    """Make CXX a script of these lines, in front of the real compiler without optimisation; gives the count of runs."""

    def set_up(lines: str = "") -> Callable[[], int]:
        script, log = tmp_path / "cxx", tmp_path / "runs"
        log.touch()
        script.write_text(f'#!/bin/sh\necho >> "{log}"\n{lines}\nexec "{COMPILER}" "$@" -O0\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len(log.read_text().splitlines())

    return set_up


def read(backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (2, 3), (2, 5), (2, 2), (3, 5), (2, 3), (2,))
    weights = RoutingWeights(*(torch.randn(shape, generator=generator) for shape in shapes))  # type: ignore[arg-type]
    return ops.read(torch.randn(35, 6, generator=generator).to(dtype), weights, backend=backend)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The backends that the ops asked for."""
    names: list[str] = []

    def noted(name: str, device: torch.device, dtype: torch.dtype, slots: int) -> str:
        names.append(name)
        return backends.choose(name, device, dtype, slots)

    monkeypatch.setattr(library, "choose", noted)
    return names


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vwn.ops"]


def start() -> subprocess.Popen:
    """A process that reads by the compiled backend, and prints what came out."""
    return subprocess.Popen([sys.executable, "-c", READ], stdout=subprocess.PIPE, text=True)


# By name


def test_an_unknown_backend_is_refused():
    for ask in (
        lambda: read("cuda"),
        lambda: ops.check_backend("cuda"),
        lambda: ops.choose("cuda", torch.device("cpu"), torch.float32),
        lambda: GeneralizedHyperConnection(6, 2, 3, backend="cuda"),
        lambda: build(vwn_config()).set_connection_backend("cuda"),
    ):
        with pytest.raises(UserError, match="backend must be one of auto, reference, compiled, triton; got 'cuda'"):
            ask()


def test_an_unknown_dtype_is_refused_by_name_only(forget):
    state = torch.zeros(2, 3, dtype=torch.float8_e4m3fn)
    with pytest.raises(UserError, match=r"'compiled' cannot run here: .*float8_e4m3fn; use 'auto'"):
        ops.choose("compiled", state.device, state.dtype)
    assert ops.choose("auto", state.device, state.dtype) == "reference"


def test_other_devices(forget):
    with pytest.raises(UserError, match=r"'compiled' cannot run here: .*not on mps; use 'auto'"):
        ops.choose("compiled", torch.device("mps"), torch.float32)
    assert ops.choose("auto", torch.device("mps"), torch.float32) == "reference"


def test_a_compiler_that_is_not_there_is_named(forget, monkeypatch):
    missing = "no-such-compiler"
    monkeypatch.setenv("CXX", missing)
    with pytest.raises(UserError, match=f"'compiled' cannot run here: .*{missing}.*; use 'auto'") as error:
        read("compiled")
    assert "cache" not in str(error.value)


def test_no_compiler_at_all(forget, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"'compiled' cannot run here: there is no C\+\+ compiler .*CXX.*; use 'auto'"):
        read("compiled")


def test_a_compiler_that_fails_is_quoted_and_auto_says_once_why_it_fell_back(forget, compiler, caplog):
    runs = compiler('echo "In file included from here:" >&2; echo "x.cpp:1:2: error: no such luck" >&2; exit 1')
    quoted = r"write_read\.cpp: .*error: no such luck"
    with pytest.raises(UserError, match=rf"'compiled' cannot run here: .*{quoted}; use 'auto'"):
        read("compiled")
    count = runs()
    with caplog.at_level(logging.INFO, "vwn.ops"):
        first, second = read("auto"), read("auto")
    assert torch.equal(first, read("reference"))
    assert torch.equal(first, second)
    (message,) = said(caplog)
    assert re.search(rf"cpu, torch.float32: backend 'reference' \(not 'compiled': .*{quoted}", message)
    assert runs() == count, "it is not tried again with every call"


# Where the library is kept


def test_a_cache_that_cannot_be_written(forget, monkeypatch):
    monkeypatch.setenv("VWN_CACHE", str(Path(__file__) / "cache"))  # under a file there can be no folder
    with pytest.raises(UserError, match=r"'compiled' cannot run here: the cache in .* cannot be written .*VWN_CACHE"):
        read("compiled")
    assert torch.equal(read("auto"), read("reference"))


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_together_build_once(forget, compiler):
    runs = compiler("sleep 1")
    outputs = [process.communicate()[0] for process in [start(), start()]]
    assert runs() == 1
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("[[")


@pytest.mark.slow
@needs_compiler
def test_the_library_is_built_once_and_again_if_it_is_damaged(forget, compiler, monkeypatch, tmp_path, caplog):
    runs = compiler()
    with caplog.at_level(logging.INFO, "vwn.ops"):
        wanted = read("auto")
        for _ in range(2):
            read("auto")
            read("auto", torch.bfloat16)
    assert [m.split(" (")[0] for m in said(caplog)] == [
        f"virtual width on cpu, {dtype}: backend 'compiled'" for dtype in (torch.float32, torch.bfloat16)
    ]
    forget()
    assert torch.equal(read("compiled"), wanted)
    assert runs() == 1
    assert not list((tmp_path / "cache").rglob("*.partial"))
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")  # the process holds on to a library by its path
    for built in (tmp_path / "copy").rglob("write_read.so"):
        built.write_bytes(b"rubbish")
    monkeypatch.setenv("VWN_CACHE", str(tmp_path / "copy"))
    forget()
    assert torch.equal(read("compiled"), wanted)
    assert runs() == 2


def test_every_compiler_and_its_options_build_their_own_library(monkeypatch):
    folders = []
    monkeypatch.setattr(compiled, "load_or_build", lambda folder, load, build: folders.append(folder))
    for command in (["g++"], ["g++", "-O0"], ["clang++"]):
        compiled._load_or_build(command)
    assert len(set(folders)) == 3


@pytest.mark.slow
@needs_compiler
def test_a_compiler_without_openmp_will_do(forget, compiler):
    runs = compiler('case " $* " in *" -fopenmp "*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac')
    one = read("compiled")
    assert runs() == 2
    torch.set_num_threads(2)
    try:
        assert torch.equal(read("compiled"), one)
    finally:
        torch.set_num_threads(1)
    assert_close(one, read("reference"), rtol=1e-5, atol=1e-5)


# Connections and models


def connections_of(model: torch.nn.Module) -> list[GeneralizedHyperConnection]:
    return [module for module in model.modules() if isinstance(module, GeneralizedHyperConnection)]


@needs_compiler
@pytest.mark.parametrize("backend", ["reference", "compiled", "auto"])
def test_a_connection_runs_everything_on_its_backend(asked, backend):
    connection = GeneralizedHyperConnection(6, 2, 3, backend=backend)
    state, z = torch.randn(4, 9, requires_grad=True), torch.randn(4, 6)
    for run in (
        lambda: connection.read(state),
        lambda: connection.write(state, z),
        lambda: connection.write_read(state, z, connection)[1],
    ):
        run().sum().backward()
        assert asked == [backend] * 2
        asked.clear()


@needs_compiler
def test_a_models_backend_can_be_set(asked):
    model, ids = build(vwn_config("llama", 2, 3, num_mtp_modules=1)), token_ids()
    losses = {}
    for backend in ("auto", "reference", "compiled"):
        model.set_connection_backend(backend)
        assert {c.backend for c in connections_of(model)} == {backend}
        model.zero_grad()
        losses[backend] = model(ids, labels=ids).loss
        losses[backend].backward()
        assert set(asked) == {backend}
        asked.clear()
    assert torch.equal(losses["auto"], losses["compiled"])
    assert_close(losses["reference"], losses["compiled"], rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_backend_that_cannot_run_changes_nothing(forget, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = build(vwn_config())
    model.set_connection_backend("reference")
    with pytest.raises(UserError, match="'triton' cannot run here"):
        model.set_connection_backend("triton")
    assert {c.backend for c in connections_of(model)} == {"reference"}


# What does not fit


def op(name, connection, *arguments):
    """Call the op itself, past what makes its arguments fit."""
    return getattr(torch.ops.vwn, name)(*arguments, connection.backend, *[True] * name.endswith("backward"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, o: c.read(torch.randn(2, 5, 64)), "must be D' = n d = 256 wide and floating point, got (2, 5, 64)"),
        (lambda c, o: c.read(torch.randn(250)), "must be D' = n d = 256 wide"),
        (lambda c, o: c.read(torch.ones(2, 256, dtype=torch.long)), "floating point, got (2, 256) int64"),
        (lambda c, o: c.write(torch.randn(8, 3, 256), Z), "output must be (8, 3, 64)"),
        (lambda c, o: c.write(STATE, torch.randn(3, 32)), "output must be (3, 64)"),
        (lambda c, o: c.write_read(STATE, Z, o), "must be D' = n d = 96 wide"),
        (lambda c, o: ops.write_read(STATE, Z, c.weights, o.weights), "must be (16, 20) beside (3, 256) float32"),
        (lambda c, o: c.read(STATE, NormWeights(torch.ones(32))), "the norm's weight must be (64,)"),
        (lambda c, o: ops.write(STATE, Z, c.weights.to_read), "weights of B"),
        (lambda c, o: c.read(torch.randn(3, 256, device="meta")), "is on cpu; move one"),
        (lambda c, o: ops.read(STATE, c.weights._replace(slot_norm=None)), "dynamic routing needs"),
        (lambda c, o: ops.read(STATE, c.weights._replace(dynamic_alpha=torch.ones(()))), "dynamic_alpha must be"),
        (lambda c, o: ops.write(STATE, Z, c.weights._replace(scale_beta=None)), "of B"),
        (lambda c, o: ops.read(torch.randn(3, 9), RoutingWeights(torch.ones(3, 0), None)), "bias_alpha must be n x"),
        (lambda c, o: op("read", c, STATE.double(), *c.weights.to_read, None, 0.0), "not (16, 20) float32"),
        (lambda c, o: op("write", c, STATE, Z.half(), *c.weights), "not (3, 64) float16"),
        (lambda c, o: op("read", c, STATE, *c.weights, None, 0.0), "a read (to_read) has none"),
        (lambda c, o: ops.write(STATE, Z, RoutingWeights(*c.weights[:2], None, c.weights[3])), "as dynamic"),
        (lambda c, o: op("read_backward", c, Z[:1], STATE, *c.weights.to_read, None, 0.0), "gradient of X must be (3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    for backend in ("reference", "compiled", "triton"):
        c = GeneralizedHyperConnection(64, 4, 16, backend=backend)
        with pytest.raises(UserError, match=re.escape(message)):
            call(c, GeneralizedHyperConnection(64, 2, 3, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_other_derivatives_are_refused(backend):
    c = GeneralizedHyperConnection(8, 2, 3, backend=backend)
    state = torch.randn(2, 12, requires_grad=True)
    with pytest.raises(UserError, match="no forward-mode derivative"):
        torch.func.jvp(c.read, (state,), (state,))
    with pytest.raises(UserError, match=r"torch\.func has no derivative"):
        torch.func.grad(lambda x: c.read(x).sum())(state)
    (first,) = torch.autograd.grad(c.read(state).pow(2).sum(), state, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        first.sum().backward()
    torch.testing.assert_close(torch.vmap(c.read)(state), c.read(state))
