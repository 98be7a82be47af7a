"""What of the Triton kernels only a GPU shows: CUDA graphs, wide states, the compiler."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from transformers import LlamaConfig

from triton_cases import Case, assert_all_close, assert_close, assert_same
from vwn import ops
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.nn.ngram import hash_ngrams

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("half", ["write", "read"])
@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_wide_states_against_float64(m, n, width, half, dtype):
    """A write or a read alone, so that nothing is rounded on the way; the mixes take the coefficients in TF32."""
    c = Case(m, n, width // m, dtype, tokens=600, write=half == "write", read=half == "read", norm=False)
    relative = 1e-4 if dtype == torch.float32 else 1e-3
    for actual, exact in zip(c.forward(), c.exact_forward(), strict=True):
        if exact is not None:
            assert_close(actual, exact, relative=relative)
    grad_state = half == "write"
    assert_all_close(c.backward(grad_state), c.exact_backward(grad_state), relative=relative)
    assert_same(c.backward(), c.backward())


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_norm_of_wide_states_against_float64(m, n):
    c = Case(m, n, 1024 // m, tokens=40)
    assert_all_close(c.forward(), c.exact_forward(), relative=1e-4)
    assert_all_close(c.backward(), c.exact_backward(), relative=1e-4)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_tiles_that_were_measured_to_be_fastest(m, n):
    torch.use_deterministic_algorithms(False)  # which has the first taken unmeasured
    c = Case(m, n, 1024 // m, tokens=600)
    assert_all_close(c.forward(), c.exact_forward(), relative=1e-4)
    assert_all_close(c.backward(), c.exact_backward(), relative=1e-4)
    assert_same(c.backward(), c.backward())


def test_the_hash_of_ngrams_is_that_of_a_cpu():
    ids = torch.randint(0, 2**31, (3, 1000))
    assert torch.equal(hash_ngrams(ids.cuda(), 4, 99_991).cpu(), hash_ngrams(ids, 4, 99_991))


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
