"""A model's files: plain libraries load them, a copy is that of its moment, and no helper model is among them."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamafactory.model.adapters import full, lora
from llamafactory.model.patches.peft_future_warning import without_future_warning
from llamafactory.model.reference import ADAPTER, REWARD_ADAPTER
from llamafactory.model.valuehead import ValueHead, add_value_head, load_value_head
from llamafactory.train.model_files import ModelFiles

IDS = torch.tensor([[5, 9, 2, 44, 17]])
KINDS = ("lora", "lora with embeddings", "lora with a value head", "full", "full, tied", "full with a value head")


def base(tiny_config: Any, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(**changes), dtype=torch.float32)


def policy_of(kind: str, tiny_config: Any) -> Any:
    model = base(tiny_config, tie_word_embeddings="tied" in kind)
    if kind.startswith("lora"):
        more = {"additional_target": ("embed_tokens",)} if "embeddings" in kind else {}
        model = lora.apply(model, lora.Options(lora_rank=4, **more), adapters=(), trainable=True)
    else:
        model = full.apply(model, full.Options(), adapters=(), trainable=True)
    return add_value_head(model) if "value head" in kind else model


def train(policy: Any, seed: int) -> None:
    """Moves everything that is trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def outputs(policy: Any, head: Any = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    model = getattr(policy, "pretrained_model", policy)
    head = getattr(policy, "v_head", head)
    with torch.no_grad():
        found = model(input_ids=IDS, output_hidden_states=True)
        return found.logits.clone(), None if head is None else head(found.hidden_states[-1][0]).clone()


def loaded(folder: Path, tiny_config: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What plain transformers and peft make of the files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if kind.startswith("lora"):
        model: Any = PeftModel.from_pretrained(base(tiny_config), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = None
    if "value head" in kind:
        head = ValueHead(model.config.hidden_size)
        load_value_head(head, folder)
    return outputs(model, head)


def same(one: Any, other: Any) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_libraries_load_the_weights_of_the_moment_that_was_copied(kind, tiny_config, tokenizer, tmp_path):
    policy = policy_of(kind, tiny_config)
    train(policy, 1)
    files = ModelFiles(policy, tokenizer)
    before, write_copy = outputs(policy), files.prepare(is_async=True, is_writer=True)
    train(policy, 2)  # training goes on while the copy is not yet written
    after = outputs(policy)
    assert not same(before, after)
    for name in ("copied", "now"):
        (tmp_path / name).mkdir()
    writer = threading.Thread(target=write_copy, args=(tmp_path / "copied",))
    writer.start()
    writer.join()
    files.write(tmp_path / "now")
    with without_future_warning():
        assert same(loaded(tmp_path / "copied", tiny_config, kind), before)
        assert same(loaded(tmp_path / "now", tiny_config, kind), after)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("copied", "now")]
    assert names[0] == names[1]
    assert "README.md" not in names[0]  # the card is ours, and comes at the end
    assert same(outputs(policy), after)  # writing changes nothing


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_copied_and_written_at_once_are_the_same_bytes(kind, tiny_config, tokenizer, tmp_path):
    files = ModelFiles(policy_of(kind, tiny_config), tokenizer)
    for name, write in (("copied", files.copy()), ("now", files.write)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    for path in (tmp_path / "copied").iterdir():
        assert path.read_bytes() == (tmp_path / "now" / path.name).read_bytes(), path.name


def test_a_copy_takes_no_memory_for_what_is_not_trained(tiny_config, tokenizer):
    policy = policy_of("lora", tiny_config)
    state = ModelFiles(policy, tokenizer).copy().keywords["state"]  # type: ignore[attr-defined]
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    assert all(state[name].data_ptr() == parameter.data_ptr() for name, parameter in frozen.items())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(state[name].data_ptr() != parameter.data_ptr() for name, parameter in trained.items())


def test_adapters_of_the_reference_and_of_a_reward_model_are_not_written(tiny_config, tokenizer, tmp_path):
    policy = policy_of("lora", tiny_config)
    train(policy, 1)
    for name in ("alone", "beside"):
        (tmp_path / name).mkdir()
    ModelFiles(policy, tokenizer).write(tmp_path / "alone")
    with without_future_warning():
        for name in (ADAPTER, REWARD_ADAPTER):
            policy.load_adapter(str(tmp_path / "alone"), adapter_name=name, is_trainable=False)
    ModelFiles(policy, tokenizer).copy()(tmp_path / "beside")
    assert sorted(p.name for p in (tmp_path / "beside").iterdir()) == sorted(
        p.name for p in (tmp_path / "alone").iterdir()
    )
    weights = load_file(tmp_path / "beside" / "adapter_model.safetensors")
    assert not [name for name in weights if ADAPTER in name or REWARD_ADAPTER in name]


def test_the_tokenizer_is_the_same_and_has_the_template_of_training(tiny_config, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    text = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    for name, template in (("own", None), ("given", text)):
        (tmp_path / name).mkdir()
        ModelFiles(policy_of("lora", tiny_config), tokenizer, chat_template=template).write(tmp_path / name)
    talk = [{"role": "user", "content": "wörd 12 <|im_end|>"}]
    for name, template in (("own", tokenizer.chat_template), ("given", text)):
        read = AutoTokenizer.from_pretrained(tmp_path / name)
        assert read("wörd 12 <|im_end|>\n").input_ids == tokenizer("wörd 12 <|im_end|>\n").input_ids
        assert read.chat_template == template
        assert read.apply_chat_template(talk, tokenize=False) == tokenizer.apply_chat_template(
            talk, tokenize=False, chat_template=template
        )


def test_files_of_the_tokenizer_are_made_once_and_not_by_the_writer(tiny_config, tokenizer, tmp_path, monkeypatch):
    made: list[str] = []
    save = type(tokenizer).save_pretrained

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        made.append(threading.current_thread().name)
        return save(self, *args, **options)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", noted)
    files = ModelFiles(policy_of("lora", tiny_config), tokenizer)
    for number in range(2):
        write, folder = files.copy(), tmp_path / str(number)
        folder.mkdir()
        writer = threading.Thread(target=write, args=(folder,), name="writer")
        writer.start()
        writer.join()
    assert made == ["MainThread"]
    assert (tmp_path / "1" / "tokenizer.json").is_file()


def test_only_the_process_that_writes_makes_a_copy(tiny_config, tokenizer):
    files = ModelFiles(policy_of("lora", tiny_config), tokenizer)
    assert files.prepare(is_async=True, is_writer=False) == files.write
    assert files.prepare(is_async=False, is_writer=True) == files.write
    assert files.shards() == {}
    with pytest.raises(ValueError, match="keeps weights in shards"):
        files.write_whole(Path(), {})


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_this_user_wants(tiny_config, tokenizer, tmp_path, mask):
    before = os.umask(mask)
    try:
        ModelFiles(policy_of("lora with a value head", tiny_config), tokenizer).write(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {name for name in modes if name.endswith(".safetensors")} == {
        "adapter_model.safetensors", "value_head.safetensors",
    }  # fmt: skip
    assert set(modes.values()) == {0o666 & ~mask}
