"""What a model says of the evaluation rows: one line a row, made in chunks by all ranks, in the order of the rows.

What a line is belongs to a `Predictor`; this file shares the rows out, writes the file, and adds up scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llamafactory.extras import log
from llamafactory.extras.errors import LlamaFactoryError
from llamafactory.train.agreement import agree
from llamafactory.train.logprob import unwrap_peft
from llamafactory.train.predictions_file import PredictionsFile
from llamafactory.train.signals import StopRequest, StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

Line = Mapping[str, Any]
_BATCHES = 4
"""Batches of each rank between two writes."""
_SECONDS_BETWEEN_LINES = 20.0


class Predictor(Protocol):
    """Makes the lines of rows."""

    @property
    def num_rows(self) -> int:
        """Rows of all evaluation sets together."""
        ...

    def lines(self, rows: Sequence[int]) -> list[Line]:
        """The line of each of these rows."""
        ...

    def scores(self, lines: Iterable[Line]) -> dict[str, float]:
        """What all lines, in order, are worth: names that begin with `eval`; empty where nothing is scored."""
        ...

    def made_of(self) -> dict[str, Any]:
        """What decides the lines, besides the weights; JSON-able."""
        ...


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of a run.

    Attributes:
        predictor: makes the lines.
        policy: the model, as it is saved.
        language_model: the part of it that is run, whose forward passes a signal may stop.
        accelerator: of the run.
        batch_size: rows that a rank puts into the model together.
        stop: says when a signal asked to stop.
        starts_afresh: whether a file that is there is replaced.
        in_evaluation: whether the predictions' scores belong to every evaluation.
        is_written: whether the run ends with the file.
    """

    predictor: Predictor
    policy: nn.Module
    language_model: nn.Module
    accelerator: Accelerator
    batch_size: int
    stop: StopRequest
    starts_afresh: bool
    in_evaluation: bool
    is_written: bool

    def score(self) -> dict[str, float]:
        """The scores of all rows under the weights as they are now; the same on all ranks."""
        return self.predictor.scores(line for _, lines in self._chunks(0) for line in lines)

    def write(self, folder: Path) -> dict[str, float]:
        """Writes what the file lacks.

        Returns:
            The scores of the whole file, and under `predict_runtime` and `predict_samples_per_second` what this
            process took for the rows that it made.

        Raises:
            LlamaFactoryError: the file that is there was made of something else.
            StopSignal: a signal asked to stop; the lines so far are in the file.
        """
        started, num_rows = time.monotonic(), self.predictor.num_rows

        def open_file() -> PredictionsFile:
            made_of = {"weights": weights_digest(self.policy), **self.predictor.made_of()}
            batching = {"batch_size": self.batch_size, "num_processes": self.accelerator.num_processes}
            return PredictionsFile(
                folder, made_of, num_rows=num_rows, starts_afresh=self.starts_afresh, batching=batching
            )

        file, (done,) = self._on_main(open_file, lambda opened: [opened.num_lines])
        for start, lines in self._chunks(done):
            if file is not None:
                file.write(start, lines)
        _, (scores,) = self._on_main(lambda: file, lambda opened: [self.predictor.scores(opened.lines())])
        seconds = time.monotonic() - started
        values: dict[str, float] = {**scores, "predict_runtime": round(seconds, 4)}
        if done < num_rows:
            values["predict_samples_per_second"] = round((num_rows - done) / seconds, 3)
        return values

    def _chunks(self, done: int) -> Iterator[tuple[int, list[Line]]]:
        """The first row of each chunk and its lines, on every rank; chunks begin where they always do."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        size, num_rows = self.batch_size * ranks * _BATCHES, self.predictor.num_rows
        said = time.monotonic()
        for start in range(done - done % size, num_rows, size) if done < num_rows else ():
            rows = range(start, min(start + size, num_rows))
            with _evaluating(self.policy), self._watched(), torch.no_grad(), self.accelerator.autocast():
                own = self.predictor.lines(rows[rank::ranks])
            shares = self._gathered(own)
            yield start, [shares[place % ranks][place // ranks] for place in range(len(rows))]
            if number := agree(self.accelerator, self.stop.signal)[0]:
                raise StopSignal(number)
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                log.info(f"predictions: {rows.stop:,} of {num_rows:,} rows")
                said = time.monotonic()

    def _gathered(self, own: list[Line]) -> list[list[Line]]:
        if self.accelerator.num_processes == 1:
            return [own]
        from accelerate.utils import gather_object

        return gather_object([own])

    def _on_main(self, work: Callable[[], Any], tell: Callable[[Any], list[Any]]) -> tuple[Any, list[Any]]:
        """Does something in the first process and tells the others; an error there is an error everywhere."""
        made: Any = None
        told: Any = []
        fault: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                made = work()
                told = tell(made)
            except (LlamaFactoryError, OSError) as error:
                fault = error
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            sent: list[Any] = [told, str(fault) if fault else None]
            told, text = broadcast_object_list(sent)
            if text and fault is None:
                raise LlamaFactoryError(text)
        if fault is not None:
            raise fault
        return made, told

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Lets a signal stop a single process before any forward pass; ranks agree between chunks."""
        if self.accelerator.num_processes > 1:
            yield
            return
        handle = unwrap_peft(self.language_model).register_forward_pre_hook(lambda *_: self.stop.check())
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def weights_digest(model: nn.Module) -> str:
    """Sha256 of all weights, quantised ones among them: their names, types, shapes and bytes.

    A tensor is copied to the CPU while it is read, one at a time.
    """
    digest = sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
