"""What of the Triton kernels only a GPU shows: CUDA graphs, wide states, the compiler."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from transformers import LlamaConfig

from test_triton import Case, assert_close, assert_half_is_exact, assert_same
from vwn import ops
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.ops import triton as backend

SHAPES = [(2, 3), (4, 8), (4, 16), (8, 64)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_decoding_is_captured_in_a_cuda_graph(m, n):
    c = Case(m, n, 256, torch.bfloat16, tokens=3)

    @torch.no_grad()
    def step():
        return ops.write_read(c.state, c.z, c.write, c.read, c.norm, backend="triton")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        c.state.copy_(torch.randn_like(c.state))
        c.z.copy_(torch.randn_like(c.z))
        expected = step()
        graph.replay()
        assert_same(captured, expected)


@pytest.mark.parametrize("half", ["write", "read"])
@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_wide_states_against_float64(m, n, width, half):
    c = Case(m, n, width // m, torch.bfloat16, tokens=600, write=half == "write", read=half == "read", norm=False)
    assert_half_is_exact(c)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_norm_of_wide_states_against_float64(m, n):
    c = Case(m, n, 1024 // m, tokens=40, write=False)
    for actual, exact in zip(c.backward(), c.exact_backward(), strict=True):
        assert_close(actual, exact, relative=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_wide_states_to_the_bit(m, n, width, dtype):
    """Twice the same, and the same as a write and a read apart."""
    c = Case(m, n, width // m, dtype, tokens=600)
    new, x = c.forward()
    assert_same(c.forward(), [new, x])
    separate, none = backend.forward(c.state, c.z, c.write, None, None)
    assert none is None
    assert_same([new, x], [separate, backend.forward(separate, None, None, c.read, c.norm)[1]])
    gradients = c.backward()
    assert_same(c.backward(), gradients)
    through, *of_read = backend.backward(None, c.grad_x, new, None, None, c.read, c.norm, True)
    rest = backend.backward(c.grad_state + through, None, c.state, c.z, c.write, None, None, True)
    assert_same(gradients, [*rest, *of_read])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_the_same_compiled_and_not(checkpointing):
    torch.manual_seed(0)
    backbone = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=backbone, m=2, n=3, num_mtp_modules=0)).cuda()
    model.set_connection_backend("triton")
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(128, (2, 64), device="cuda")
    losses = []
    for run in (model.train(), torch.compile(model.train())):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, compiled in zip(*losses, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-4)
