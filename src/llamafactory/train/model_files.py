"""A model's part of a checkpoint: weights and tokenizer files, in a layout that plain peft and transformers load."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.data.saved_template import CHAT_TEMPLATE_NAME
from llamafactory.extras.files import give_usual_modes
from llamafactory.model.reference import ADAPTER, REWARD_ADAPTER
from llamafactory.model.valuehead import split_value_head
from llamafactory.train.checkpoint.tensors import frozen_storages, host_copy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerFast


class ModelFiles:
    """Writes a model and its tokenizer."""

    def __init__(
        self, policy: nn.Module, tokenizer: PreTrainedTokenizerFast, *, chat_template: str | None = None
    ) -> None:
        """Holds what is written; nothing is copied yet.

        Args:
            policy: the model that is trained.
            tokenizer: of the model.
            chat_template: Jinja that replaces the tokenizer's own chat template; None leaves that.
        """
        self._policy: Any = policy
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def write(self, folder: Path) -> None:
        """Writes the weights as they are now into an existing folder."""
        self._write(folder, None)

    def copy(self) -> Callable[[Path], None]:
        """Copies what training changes, and gives a function that writes the copy, for any thread."""
        state = host_copy(self._policy.state_dict(), frozen_storages(self._policy))
        self.make_tokenizer_files()
        return partial(self._write, state=state)

    def prepare(self, *, is_async: bool, is_writer: bool, for_checkpoint: bool = False) -> Callable[[Path], None]:
        """A function that writes the weights; every process must ask for it, and one of them calls it.

        Args:
            is_async: the function may be called while training goes on: it writes a copy.
            is_writer: whether this process calls it.
            for_checkpoint: leave out weights that are kept in shards, see `shards`, and write what a resume needs
                besides the model.
        """
        return self.copy() if is_async and is_writer else self.write

    def shards(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps in shards: weights by name, of which this process holds a part."""
        return {}

    def write_whole(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a model from whole weights that a checkpoint kept in shards."""
        raise ValueError("no checkpoint of this run keeps weights in shards")

    def _write(self, folder: Path, state: Mapping[str, Tensor] | None) -> None:
        model, state = split_value_head(self._policy, folder, state)
        options: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
        if hasattr(model, "peft_config"):
            options["selected_adapters"] = [
                name for name in model.peft_config if name not in (ADAPTER, REWARD_ADAPTER)
            ]
            model.save_pretrained(str(folder), save_embedding_layers=False, **options)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            model.save_pretrained(str(folder), **options)
        self._write_tokenizer(folder)

    def make_tokenizer_files(self) -> None:
        """Makes the tokenizer's files now, in the main thread; later calls of the writers only copy them."""
        self._tokenizer_files  # noqa: B018

    def _write_tokenizer(self, folder: Path) -> None:
        for name, content in self._tokenizer_files.items():
            (folder / name).write_bytes(content)
        give_usual_modes(folder)

    @cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        """A tokenizer does not change while it trains, so that its files are made once."""
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        if self._chat_template is not None:
            files[CHAT_TEMPLATE_NAME] = self._chat_template.encode()
        return files
