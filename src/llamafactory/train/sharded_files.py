"""A model whose weights are spread over the processes, as the files of a plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.model.valuehead import split_value_head
from llamafactory.train.companions import language_model
from llamafactory.train.model_files import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerFast

    from llamafactory.train.sharding import ShardedModel


def model_files(
    sharded: ShardedModel | None,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    *,
    chat_template: str | None,
) -> ModelFiles:
    """What writes the model, whether or not it is spread over processes."""
    if sharded is None:
        return ModelFiles(policy, tokenizer, chat_template=chat_template)
    return ShardedModelFiles(sharded, policy, tokenizer, chat_template=chat_template)


_HEAD, _INNER = "v_head.", "pretrained_model."


class ShardedModelFiles(ModelFiles):
    """Gathers weights in the first process, which writes them as any model; or leaves them to shards."""

    def __init__(
        self,
        model: ShardedModel,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat_template: str | None = None,
    ) -> None:
        """Holds what is written; nothing is copied yet."""
        super().__init__(policy, tokenizer, chat_template=chat_template)
        self._model = model

    def prepare(self, *, is_async: bool, is_writer: bool, for_checkpoint: bool = False) -> Callable[[Path], None]:
        """See `ModelFiles`; gathering makes a copy, so that the function may always be called later."""
        leaves_out = for_checkpoint and self._model.keeps_weights_sharded
        state = self._model.state()
        if leaves_out:
            state = {name: tensor for name, tensor in state.items() if name.startswith(_HEAD)}
        whole = self._model.gather(state)
        if is_writer:
            self.make_tokenizer_files()
        return partial(self._write_rest if leaves_out else self._write, state=whole)

    def shards(self) -> Mapping[str, Tensor]:
        """The language model's weights by name, tied ones once; empty where checkpoints hold whole weights."""
        if not self._model.keeps_weights_sharded:
            return {}
        first = self._model.first_names()
        return {
            name.removeprefix(_INNER): tensor
            for name, tensor in self._model.state().items()
            if not name.startswith(_HEAD) and first.get(name, name) == name
        }

    def write_whole(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a language model from whole weights that were kept in shards, with its config."""
        model: Any = language_model(self._policy)
        model.save_pretrained(str(folder), state_dict=dict(weights))

    def _write_rest(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Everything but the language model's weights."""
        model, _ = split_value_head(self._policy, folder, state)
        model.save_pretrained(str(folder), state_dict={})
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        self._write_tokenizer(folder)
