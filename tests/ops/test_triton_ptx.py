"""The Triton kernels as compiled for an H100, run without one (benchmarks/ptx), against float64 and to the bit.

They run in a process of their own, where Triton's interpreter is off. All tests of the interpreter run so, in about a
quarter of an hour, with ``VWN_PTX=1 python -m pytest tests/ops/test_triton.py``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import ptx

INSIDE = os.environ.get("VWN_PTX") == "1"
SHAPES = ["2-3-2048-bfloat16", "4-8-2048-bfloat16", "4-16-2048-bfloat16", "8-64-4096-bfloat16"]
SHAPES += ["2-3-300-float32", "3-7-384-float16", "8-64-320-float32"]

if not INSIDE:

    @pytest.fixture(scope="module", autouse=True)
    def _tools():
        if importlib.util.find_spec("triton") is None:
            pytest.skip("there is no Triton to compile with")
        tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/ptxas"
        if not tool.exists():
            pytest.skip("this Triton cannot compile for NVIDIA's GPUs")
        if reason := ptx.unavailable():
            pytest.skip(reason)

    @pytest.mark.slow
    @pytest.mark.parametrize("which", ["machine", *SHAPES])
    def test_compiled(which):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", which]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "PYTEST" not in k}
        result = subprocess.run(
            command, env=environment | {"VWN_PTX": "1"}, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
        assert " passed" in result.stdout
        assert "skipped" not in result.stdout

else:
    import triton
    import triton.language as tl

    from test_triton import Case, assert_half_is_exact, assert_same
    from vwn.ops import triton as backend

    @pytest.fixture(autouse=True)
    def _nan_in_fresh_memory():
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    def fresh(shape: str, **options: object) -> Case:
        m, n, width, dtype = shape.split("-")
        case = Case(int(m), int(n), int(width) // int(m), getattr(torch, dtype), tokens=20, **options)
        case.programs = 2
        return case

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("half", ["write", "read"])
    def test_each_half_against_float64(shape, half):
        c = fresh(shape, write=half == "write", read=half == "read", norm=False)
        assert_half_is_exact(c)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_both_with_a_norm_are_as_each_half_to_the_bit(shape):
        ptx.launches.clear()
        c = fresh(shape)
        new, _ = backend.forward(c.state, c.z, c.write, None, None)
        _, x = backend.forward(new, None, None, c.read, c.norm)
        together = c.forward()
        assert_same(together, [new, x])
        through, *of_read = backend.backward(None, c.grad_x, new, None, None, c.read, c.norm, True, programs=2)
        given = c.grad_state + through, None, c.state, c.z, c.write, None, None, True
        gradients = c.backward()
        assert_same(gradients, [*backend.backward(*given, programs=2), *of_read])
        # what is rounded in between bounds this, not the kernels
        bound = 1e-4 if c.dtype == torch.float32 else 8 * torch.finfo(c.dtype).eps
        exact = [*c.exact_forward(), *c.exact_backward()]
        for a, e in zip([*together, *gradients], exact, strict=True):
            assert (a - e).norm() <= bound * e.norm()
        few = [t[:5] for t in (c.grad_state, c.grad_x, c.state, c.z)]
        assert_same(backend.forward(*few[2:], *c.parameters), [t[:5] for t in together])
        assert_same(backend.backward(*few, *c.parameters, False), [t[:5] for t in gradients[:2]])
        assert {"pack", "boundary", "boundary_backward", "sums"} <= {name for name, _ in ptx.launches}
        assert any(name == "over_rows" for name, _ in ptx.launches) == (c.write.n == 64)

    # The machine itself

    @triton.jit
    def reversed_through_memory(x, y, BLOCK: tl.constexpr, WAIT: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(x + i, i.to(tl.float32))
        if WAIT:
            tl.debug_barrier()
        tl.store(y + i, tl.load(x + BLOCK - 1 - i))

    @triton.jit
    def filled(x, COUNT: tl.constexpr, STRIDE: tl.constexpr):
        tl.store(x + tl.program_id(0) * STRIDE + tl.arange(0, COUNT), 1.0)

    @triton.jit
    def multiplied(a, b, c, ROWS: tl.constexpr, K: tl.constexpr, J: tl.constexpr):
        i, k, j = tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, J)
        product = tl.dot(tl.load(a + i[:, None] * K + k), tl.load(b + k[:, None] * J + j), input_precision="tf32x3")
        tl.store(c + i[:, None] * J + j, product)

    def test_machine_sees_a_missing_barrier():
        x, y = torch.zeros(512), torch.zeros(512)
        reversed_through_memory[(1,)](x, y, BLOCK=512, WAIT=True, num_warps=4)
        assert torch.equal(y, torch.arange(512).flip(0).float())
        with pytest.raises(ptx.MachineError, match="depend on the order of threads"):
            reversed_through_memory[(1,)](x.zero_(), y, BLOCK=512, WAIT=False, num_warps=4)

    def test_machine_counts_bank_conflicts():
        """Rows of 16 bytes that are 128 bytes apart, or side by side."""
        text = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, {shift}; st.shared.v4.b32 [%r2], {{%r1, %r1, %r1, %r1}}; ret;"
        for shift, rows in ((4, 4), (7, 32)):
            body = ".visible .entry f()\n{\n" + text.format(shift=shift) + "\n}\n"
            program = ptx.decoded(body, "f", ptx.opcodes())
            assert ptx.run(program, 1, 4096, [], (1, 1, 1), []) == rows

    def test_machine_sees_what_is_outside():
        x = torch.zeros(128)
        filled[(2,)](x, COUNT=64, STRIDE=64)
        assert x.eq(1).all()
        with pytest.raises(ptx.MachineError, match=r"filled: write outside of all tensors at 0x.* in: .*st\.global"):
            filled[(3,)](x, COUNT=64, STRIDE=64)

    def test_machine_sees_programs_that_share():
        with pytest.raises(ptx.MachineError, match="another program writes what is touched"):
            filled[(2,)](torch.zeros(128), COUNT=64, STRIDE=32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("i", "k", "j", "warps"), [(16, 32, 16, 1), (64, 64, 64, 4), (128, 32, 32, 4)])
    def test_machine_multiplies(i, k, j, warps, dtype):
        a, b, c = torch.randn(i, k).to(dtype), torch.randn(k, j).to(dtype), torch.empty(i, j)
        multiplied[(1,)](a, b, c, ROWS=i, K=k, J=j, num_warps=warps)
        torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)
