"""Virtual width in torchtitan, in one process: the model, its start, its loss, its names and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import vwn

pytest.importorskip("torchtitan", reason="torchtitan is not installed: vwn[titan]")

from torchtitan.components.optimizer import ParamGroupConfig

from processes import Processes
from vwn.cost import model_cost
from vwn.hf import VirtualWidthForCausalLM
from vwn.titan import Backbone, VirtualWidth, hf_config
from vwn.titan.initialisation import ROWS, _draw
from vwn.titan.model import check_parallelism, model_config
from vwn.titan.state_dict_adapter import from_transformers, hf_name, to_transformers
from vwn.titan.trainer import adamw, loss_config, model_spec, rate_factors

SIZES = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, attention="sdpa",
)  # fmt: skip
WIDTHS = [
    dict(m=2, n=3, num_mtp_modules=2),
    dict(m=2, n=4, embedding="factorised", carry_constraint="doubly_stochastic"),
    dict(m=3, n=3, dynamic=False, num_mtp_modules=1),
    dict(m=1, n=2, embedding="replicated", reduce="sum", carry_constraint="identity"),
]


def build(width, **sizes):
    backbone, width = Backbone(**SIZES | sizes), VirtualWidth(**width)
    config = model_config(backbone, width)
    config.seed = 3
    model = config.build()
    model.verify_module_protocol()
    model.init_states()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return backbone, width, model


@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_logits_and_loss_are_those_of_the_transformers_model(width):
    backbone, width, model = build(width)
    theirs = VirtualWidthForCausalLM(hf_config(backbone, width)).eval()
    theirs.load_state_dict(to_transformers(model.state_dict()))
    back = from_transformers(theirs.state_dict())
    assert back.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(back[name], value), name

    ids = torch.randint(0, 61, (2, 17))
    expected = theirs(ids, labels=ids, output_mtp_logits=True, num_items_in_batch=32)
    given = model(ids[:, :-1], positions=torch.arange(16).expand(2, 16))
    heads = given if width.num_mtp_modules else [given]
    torch.testing.assert_close(heads[0], expected.logits[:, :-1], rtol=0, atol=2e-5)
    for k, (logits, further) in enumerate(zip(heads[1:], expected.mtp_logits, strict=True), 1):
        torch.testing.assert_close(logits[:, :-k], further[:, : 16 - k], rtol=0, atol=2e-5)
    loss, _ = loss_config(backbone, width).build()(given, ids[:, 1:], torch.tensor(32))
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)


def test_experts_route_as_in_mixtral(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # in which the engine computes experts
    backbone, width, model = build(dict(m=2, n=3), num_experts=4)
    theirs = VirtualWidthForCausalLM(hf_config(backbone, width)).eval()
    theirs.load_state_dict(to_transformers(model.state_dict()))
    ids = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=2e-5)
    assert from_transformers(theirs.state_dict()).keys() == model.state_dict().keys()


def rates(groups, names):
    """Parameter name -> its learning rate and weight decay."""
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("layers", [2, 10])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_parameter_groups_are_those_of_vwn_train(width, layers):
    backbone, width, model = build(width, num_hidden_layers=layers)
    theirs = VirtualWidthForCausalLM(hf_config(backbone, width))
    theirs.load_state_dict(to_transformers(model.state_dict()))
    names = {id(p): name for name, p in theirs.named_parameters()}

    def ours(**options):
        options = {"rate_factors": rate_factors(backbone, width), "implementation": "for-loop"} | options
        (optimizer,) = adamw(0.1, 0.3, **options).build(model_parts=[model])
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]
        return {hf_name(name): rate for name, rate in rates(optimizer.param_groups, names).items()}

    expected = rates(vwn.parameter_groups(theirs, 0.1, 0.3), names)
    assert ours() == expected
    assert len({rate for rate, _ in expected.values()}) > 1
    equal = {"rate_factors": dict.fromkeys(("table", "routing", "reduce"), 1), "implementation": "for-loop"}
    assert {rate for rate, _ in ours(**equal).values()} == {0.1}
    own = ours(param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.5})])
    assert {rate for rate, _ in own.values()} == {0.5}
    expansion = ours(rate_factors={"expansion": 0.5})
    assert [name for name, (rate, _) in expansion.items() if rate != 0.1] == [
        n for n in names.values() if "expand" in n
    ]
    model.tok_embeddings = None  # as on a later stage of a pipeline
    assert ours() == {name: rate for name, rate in expected.items() if "embed_tokens" not in name}


def test_documents_of_a_window_are_kept_apart_in_what_mtp_predicts():
    backbone, width, model = build(dict(m=2, n=3, num_mtp_modules=1))
    ids = torch.randint(0, 61, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    given = model(ids[:, :-1], positions=positions)
    loss = loss_config(backbone, width).build()
    changed = ids.clone()
    changed[0, 5] = (
        changed[0, 5] + 1
    ) % 61  # the label at position 4, which is 3's further target, in another document
    both = [loss(given, x[:, 1:], torch.tensor(8), positions=positions)[0] for x in (ids, changed)]
    main = [torch.nn.functional.cross_entropy(given[0][0], x[0, 1:]) for x in (ids, changed)]
    torch.testing.assert_close(both[0] - both[1], main[0] - main[1])


def test_a_start_does_not_depend_on_how_it_is_cut():
    whole = torch.empty(2 * ROWS + 10, 3)
    _draw(whole, "key", 2.0)
    again, other = torch.empty_like(whole), torch.empty_like(whole)
    _draw(again, "key", 2.0)
    _draw(other, "other", 2.0)
    assert torch.equal(whole, again)
    assert not torch.equal(whole, other)
    assert not torch.equal(whole[:10], whole[ROWS : ROWS + 10])
    assert whole.std().item() == pytest.approx(2.0, rel=0.05)


def start(width, **sizes):
    config = model_config(Backbone(**SIZES | sizes), VirtualWidth(**width))
    config.seed = 0
    model = config.build()
    model.init_states()
    return model


@pytest.mark.parametrize("experts", [0, 4])
def test_the_start_is_that_of_the_paper_and_of_the_presets(experts):
    model = start({"m": 2, "n": 3, "num_mtp_modules": 1}, num_experts=experts)
    a = model.layers["1"].connections[0].bias_alpha
    assert torch.equal(a, torch.cat([torch.eye(3)[:, :2], torch.eye(3)], dim=1))
    assert model.tok_embeddings.table.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.lm_head.weight.std().item() == pytest.approx(24**-0.5, rel=0.1)
    ends = (".wo.weight", "w2_EDF" if experts else "w2.weight")
    outputs = {name for name, p in model.named_parameters() if p.ndim > 1 and not p.any() and "connections" not in name}
    assert outputs == {name for name, _ in model.named_parameters() if name.endswith(ends)}
    assert len(outputs) == 2 * 3
    for how, share in (("depth", 4**-0.5), ("config", 1)):
        model = start({}, num_experts=experts, output_init=how)
        for name in outputs & dict(model.named_parameters()).keys():
            assert model.get_parameter(name).std().item() == pytest.approx(share * 24**-0.5, rel=0.1), name


def parallelism(**changes):
    fields = dict.fromkeys(
        ("pipeline_parallel_degree", "context_parallel_degree", "expert_parallel_degree", "tensor_parallel_degree"), 1
    )
    return SimpleNamespace(**fields | {"spmd_backend": "partial_dtensor"} | changes)


@pytest.mark.parametrize(
    ("changes", "sizes", "width", "sentence"),
    [
        ({"pipeline_parallel_degree": 2}, {}, {"num_mtp_modules": 1}, "no multi-token prediction in a pipeline"),
        ({"context_parallel_degree": 2}, {}, {}, "has not been tried"),
        ({"spmd_backend": "full_dtensor"}, {}, {}, "'partial_dtensor', got 'full_dtensor'"),
        ({"expert_parallel_degree": 2}, {}, {}, "does not divide the backbone.num_experts = 0"),
        ({"expert_parallel_degree": 4}, {"num_experts": 6}, {}, "does not divide the backbone.num_experts = 6"),
    ],
)
def test_a_parallelism_that_is_not_carried_is_refused(changes, sizes, width, sentence):
    backbone, width = Backbone(**SIZES | sizes), VirtualWidth(**width)
    with pytest.raises(vwn.UserError, match=re.escape(sentence)):
        check_parallelism(parallelism(**changes), backbone, width)


@pytest.mark.parametrize(
    ("sizes", "width", "sentence"),
    [
        ({}, {"m": 5, "n": 5}, "m = 5 does not divide the hidden size 24"),
        ({}, {"m": 2, "n": 3, "reduce": "identity"}, "needs n = m"),
        ({"num_attention_heads": 5}, {}, "does not divide hidden_size = 24"),
        ({"num_key_value_heads": 3}, {}, "does not divide num_attention_heads = 4"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, {}, "from 1 to num_experts = 2"),
        ({}, {"num_mtp_modules": -1}, "must be 0 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, width, sentence):
    with pytest.raises(vwn.UserError, match=re.escape(sentence)):
        model_config(Backbone(**SIZES | sizes), VirtualWidth(**width))


def test_experts_are_not_converted_while_training():
    spec = model_spec(Backbone(**SIZES | {"num_experts": 4}), VirtualWidth())
    with pytest.raises(vwn.UserError, match=r"vwn\.titan\.export"):
        spec.state_dict_adapter(spec.model, None).to_hf({})


def test_parameters_and_flops_are_counted_on_the_transformers_model():
    backbone, width = Backbone(**SIZES), VirtualWidth(m=2, n=3)
    config = model_config(backbone, width)
    parameters, flops = config.get_nparams_and_flops(model := config.build(), 16)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert flops == model_cost(hf_config(backbone, width), sequence_length=16).training_flops_per_token


def mixed_precision_step():
    """One step of a model that is sharded over one process with bfloat16 for its parameters."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from vwn.titan.parallelize import parallelize

    dist.init_process_group("gloo")
    _, _, model = build(WIDTHS[0])
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    dims = SimpleNamespace(
        tp_enabled=False, ep_enabled=False, dp_replicate_enabled=False, pp_enabled=False, ep=1,
        get_mesh=lambda names: mesh, get_optional_mesh=lambda names: None,
    )  # fmt: skip
    training = SimpleNamespace(
        mixed_precision_param="bfloat16", mixed_precision_reduce="float32", enable_cpu_offload=False
    )
    parallelize(
        model, parallel_dims=dims, training=training, ac_config=None, dump_folder="",
        parallelism=SimpleNamespace(fsdp_reshard_after_forward="default", enable_fsdp_symm_mem=False),
        compile_config=SimpleNamespace(enable=False, components=[]),
    )  # fmt: skip
    dtypes = {}
    block = next(iter(model.layers.values()))
    block.connections[1].read.register_forward_hook(
        lambda read, args, x: dtypes.update(state=args[0].dtype, routing=read.connection.bias_alpha.dtype)
    )
    block.attention_norm.register_forward_hook(lambda norm, args, out: dtypes.update(backbone=norm.weight.dtype))
    ids = torch.randint(0, 61, (2, 16))
    sum(x.float().square().mean() for x in model(ids, positions=torch.arange(16).expand(2, 16))).backward()
    assert dtypes == {"state": torch.bfloat16, "routing": torch.float32, "backbone": torch.bfloat16}, dtypes
    assert all(p.grad is not None and p.grad.full_tensor().abs().max() > 0 for p in block.connections.parameters())
    dist.destroy_process_group()


def test_mixed_precision_leaves_the_routing_in_float32(tmp_path):
    with Processes(mixed_precision_step, world=1, shim=False, log=tmp_path / "log") as processes:
        assert processes.wait() == [0], processes.said()
