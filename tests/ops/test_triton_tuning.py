"""The launches of the Triton kernels that are measured, and how the fastest is kept."""

from __future__ import annotations

import json
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")

from test_triton import DEVICE, Case, assert_close, assert_same  # noqa: E402
from vwn.common.errors import UserError  # noqa: E402
from vwn.ops import triton as backend  # noqa: E402
from vwn.ops import triton_tuning as tuning  # noqa: E402

SHAPE = (2, 3, 40)
HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VWN_CACHE", str(tmp_path))
    monkeypatch.setenv("VWN_TUNE", "1")
    tuning._measured.cache_clear()
    yield
    tuning._measured.cache_clear()


def timed(monkeypatch, times) -> list[tuning.Launch]:
    """Each candidate takes the time it is given here, or does not run; the candidates that were asked."""
    asked = []

    def milliseconds(launch, *_):
        asked.append(launch)
        if isinstance(taken := times(launch), Exception):
            raise taken
        return taken

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return asked


def chosen(dtype=torch.float32, shape=SHAPE):
    return tuning.chosen(*shape, HERE, dtype)


def anew(*arguments, **options):
    """As a new process."""
    tuning._measured.cache_clear()
    return chosen(*arguments, **options)


@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (2, 3, 512), (4, 8, 2048), (4, 16, 33), (8, 64, 1024)])
def test_candidates_are_few_differ_and_begin_with_the_rule(m, n, d):
    found = tuning.candidates(n, d)
    assert found[0] == tuning.rule(n, d)
    assert len(set(found)) == len(found) <= 5
    sizes = [backend.tiling(m, n, d, launch) for launch in found]
    for launch, size in zip(found, sizes, strict=True):
        assert size["NC"] * size["S"] * size["BD"] >= d
        assert size["BD"] >= 16
        assert size["S"] <= launch.warps
        assert not launch.keep or size["R"] * d <= 32768 * launch.warps // 8
    if d > 500:
        assert len(found) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 300), (4, 16, 65)])
def test_each_candidate_is_right(m, n, d, dtype):
    case = Case(m, n, d, dtype, tokens=6, norm=False)
    read = Case(m, n, d, dtype, tokens=6, norm=False)
    for launch in tuning.candidates(n, d):
        new, x = backend.forward(case.state, case.z, *case.parameters, launch)
        assert_close(new, case.exact_forward()[0])
        read.state, read.z, read.write = new, None, None  # what is read is the rounded state
        assert_close(x, read.exact_forward()[1])
        if dtype == torch.float32:
            gradients = backend.backward(
                case.grad_state, case.grad_x, case.state, case.z, *case.parameters, True, launch
            )
            for actual, exact in zip(gradients, case.exact_backward(), strict=True):
                assert_close(actual, exact)


def test_the_fastest_is_launched(monkeypatch):
    wanted = tuning.candidates(*SHAPE[1:])[-1]
    timed(monkeypatch, lambda launch: 1.0 if launch == wanted else 2.0)
    assert chosen() == wanted != tuning.rule(*SHAPE[1:])
    tiling, seen = backend.tiling, []
    monkeypatch.setattr(
        backend, "tiling", lambda m, n, d, launch, *rest: seen.append(launch) or tiling(m, n, d, launch, *rest)
    )
    case = Case(*SHAPE)
    result = case.forward()
    case.backward()
    assert seen == [wanted, wanted]
    assert_same(result, backend.forward(case.state, case.z, *case.parameters, wanted))


def test_it_is_measured_once(monkeypatch, tmp_path):
    asked = timed(monkeypatch, lambda launch: float(launch.columns))
    first = chosen()
    assert asked == list(tuning.candidates(*SHAPE[1:]))
    timed(monkeypatch, lambda launch: -float(launch.columns))
    assert chosen() == anew() == first
    (file,) = tmp_path.glob("triton/*/launch.json")
    written = json.loads(file.read_text())
    assert written["launch"] == first._asdict()
    assert (written["of"]["m"], written["of"]["n"], written["of"]["d"]) == SHAPE
    assert set(written["milliseconds"].values()) == {float(launch.columns) for launch in asked}


def test_another_shape_dtype_or_code_is_measured_again(monkeypatch):
    asked = timed(monkeypatch, lambda launch: 1.0)
    whats = [chosen]
    whats += [lambda: chosen(torch.bfloat16), lambda: chosen(shape=(1, 3, 40)), lambda: chosen(shape=(2, 3, 41))]
    for number, what in enumerate(whats, 1):
        what()
        assert len(asked) == number * len(tuning.candidates(*SHAPE[1:]))
    monkeypatch.setattr(triton, "__version__", "0")
    anew()
    assert len(asked) == 5 * len(tuning.candidates(*SHAPE[1:]))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"launch": {"columns": 16}}'])
def test_a_damaged_file_is_measured_again(monkeypatch, tmp_path, damage):
    timed(monkeypatch, lambda launch: 1.0)
    first = chosen()
    (file,) = tmp_path.glob("triton/*/launch.json")
    file.write_text(damage)
    assert anew() == first
    assert json.loads(file.read_text())["launch"] == first._asdict()


def test_what_the_gpu_cannot_run_is_left_out(monkeypatch, tmp_path):
    from triton.runtime.errors import OutOfResources

    full = OutOfResources(300000, 232448, "shared memory")
    rule = tuning.rule(*SHAPE[1:])
    timed(monkeypatch, lambda launch: 1.0 if launch == rule else full)
    assert chosen() == rule
    (file,) = tmp_path.glob("triton/*/launch.json")
    assert (
        sorted(json.loads(file.read_text())["milliseconds"].values(), key=str).count(None)
        == len(tuning.candidates(*SHAPE[1:])) - 1
    )
    timed(monkeypatch, lambda launch: full)
    with pytest.raises(OutOfResources):
        chosen(torch.bfloat16)


@pytest.mark.parametrize("value", ["0", ""])
def test_unasked_nothing_is_measured_or_looked_up(monkeypatch, tmp_path, value):
    timed(monkeypatch, lambda launch: 2.0 if launch.keep else 1.0)
    assert chosen() != tuning.rule(*SHAPE[1:])
    monkeypatch.setenv("VWN_TUNE", value)
    assert chosen() == tuning.rule(*SHAPE[1:])
    monkeypatch.delenv("VWN_TUNE")
    assert chosen() == tuning.rule(*SHAPE[1:])


def test_what_cannot_be_done_is_said(monkeypatch):
    monkeypatch.setenv("VWN_TUNE", "yes")
    with pytest.raises(UserError, match="got 'yes'"):
        chosen()
    monkeypatch.setenv("VWN_TUNE", "1")
    if DEVICE == "cpu":
        with pytest.raises(UserError, match="measures on a GPU"):
            Case(*SHAPE).forward()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(UserError, match="run the model once before"):
            tuning.chosen(*SHAPE, torch.device("cuda", 0), torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu():
    assert chosen(torch.bfloat16, (2, 3, 1024)) in tuning.candidates(3, 1024)
