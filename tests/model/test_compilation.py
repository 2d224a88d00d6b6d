"""Compiled blocks give the loss and gradients of the same blocks uncompiled, and lengths make no new graphs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory.data.collate import collate_flat, collate_padded
from llamafactory.extras.errors import ConfigError
from llamafactory.hparams.train import TrainConfig
from llamafactory.model import attention, compilation
from llamafactory.model.adapters import lora
from llamafactory.model.checkpointing import recompute_blocks
from llamafactory.model.compilation import compile_blocks, require_compiler
from llamafactory.train.logprob import supervised_nll
from llamafactory.train.tuner import run_exp

pytestmark = [  # of torch's own compiler: it looks at .grad of tensors that are no leaves, and uses what it deprecates
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

LENGTHS = ((7, 9), (12, 3, 5), (30,), (4, 4, 4, 4), (1, 9, 8), (17, 2), (5, 6, 7, 8, 9, 10))
PLAN = SimpleNamespace(fused_head=True, loss_chunk_rows=7, fused_blocks=False)
COLLATE = {"flat": collate_flat, "padded": lambda rows: collate_padded(rows, pad_id=0)}


@pytest.fixture(autouse=True)
def _no_graphs_before():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


def num_graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def build(config, *, full=False, every=0):
    torch.manual_seed(0)
    name = attention.register()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name, dtype=torch.float32)
    if not full:
        model = lora.apply(model, lora.Options(lora_rank=4), adapters=(), trainable=True)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    recompute_blocks(model, every)
    return model.train()


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = supervised_nll(model, batch, PLAN)
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_equal_on_all_lengths(config, layout, make_examples, train, **kind):
    stock, compiled = build(config, **kind), build(config, **kind)
    assert compile_blocks(compiled, train) == config.num_hidden_layers
    first = 0
    for lengths in LENGTHS:
        batch = COLLATE[layout](make_examples(lengths))
        expected, found = loss_and_gradients(stock, batch), loss_and_gradients(compiled, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
        assert found[1].keys() == expected[1].keys()
        whole = torch.stack([value.norm() for value in expected[1].values()]).norm()
        for key, value in expected[1].items():
            assert (found[1][key] - value).norm() < 1e-5 * whole, key
        first = first or num_graphs()
    return first, num_graphs()


@pytest.mark.parametrize(
    ("layout", "every"),
    [("flat", 0), pytest.param("flat", 1, marks=pytest.mark.long), pytest.param("padded", 0, marks=pytest.mark.long)],
)
def test_graphs_are_shared_by_blocks_and_lengths(layout, every, tiny_config, make_examples):
    config = tiny_config()
    train = TrainConfig(torch_compile_backend="eager")
    first, last = assert_equal_on_all_lengths(config, layout, make_examples, train, every=every)
    assert 1 <= first <= 8
    assert last <= (2 if layout == "padded" else 1) * first  # a batch of a single padded row has graphs of its own


@pytest.mark.long
@pytest.mark.parametrize(("layout", "full"), [("flat", False), ("padded", True)])
def test_inductor_gives_the_same_loss_and_gradients(layout, full, tiny_config, make_examples):
    first, last = assert_equal_on_all_lengths(
        tiny_config(), layout, make_examples, TrainConfig(torch_compile=True), full=full
    )
    assert 1 <= first <= last <= (1 if layout == "flat" else 2) * first


def test_generation_stays_as_it_is(tiny_config):
    stock, compiled = build(tiny_config(), full=True).eval(), build(tiny_config(), full=True).eval()
    compile_blocks(compiled, TrainConfig(torch_compile_backend="eager"))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompt = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(stock.generate(prompt, **options), compiled.generate(prompt, **options))
    assert num_graphs() == 0


def test_a_missing_compiler_is_an_error_before_the_weights(monkeypatch):
    train = TrainConfig(torch_compile=True)
    require_compiler(train, "cpu")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"torch_compile[\s\S]*needs a C\+\+ compiler[\s\S]*install g\+\+"):
        require_compiler(train, "cpu")
    require_compiler(TrainConfig(torch_compile_backend="eager"), "cpu")
    monkeypatch.setattr(compilation, "is_installed", lambda name: False)
    with pytest.raises(ConfigError, match="needs triton, which is not installed"):
        require_compiler(train, "cuda")


def test_an_unknown_backend_names_those_of_torch():
    with pytest.raises(ConfigError, match=r"torch has no such backend[\s\S]*aot_eager[\s\S]*did you mean 'inductor'"):
        require_compiler(TrainConfig(torch_compile_backend="inducto"), "cpu")


def test_a_model_without_blocks_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="finds no blocks in Linear"):
        compile_blocks(model, TrainConfig(torch_compile=True))


@pytest.mark.long
def test_a_compiled_run_trains_as_an_uncompiled_one(train_config, tmp_path, capsys):
    options = {"max_steps": 3, "save_strategy": "no", "fused_kernels": False}
    plain = run_exp(train_config(**options, output_dir=str(tmp_path / "plain")))
    found = run_exp(train_config(**options, torch_compile_backend="eager", output_dir=str(tmp_path / "compiled")))
    assert num_graphs() > 0
    assert found.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-5)
    assert "compiled_blocks = True: block by block, once for all lengths" in capsys.readouterr().err


def test_beside_fused_blocks_a_warning_says_that_nothing_is_compiled(train_config, capsys):
    run_exp(train_config(max_steps=1, save_strategy="no", torch_compile=True))
    said = capsys.readouterr().err
    assert "torch_compile has no effect: blocks run through the fused CPU functions" in said
    assert "fused_kernels: false" in said
    assert num_graphs() == 0
