"""The random generators of every process as plain tensors: torch, the device's, NumPy's and Python's."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

Tensors: TypeAlias = dict[str, torch.Tensor]


class Generators:
    """The state of this process's generators at one moment; cheap to take, before it is known whether it is needed."""

    def __init__(self) -> None:
        """Takes the states, without waiting for a device."""
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._numpy = cast("tuple[Any, ...]", np.random.get_state(legacy=True))  # noqa: NPY002
        self._python = random.getstate()

    def tensors(self) -> Tensors:
        """The states; sizes and dtypes are the same in every process."""
        _, keys, position, has_gauss, gauss = self._numpy
        version, words, pending = self._python
        found = {
            "torch": self._torch,
            "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
            "python": torch.tensor(words, dtype=torch.int64),
            "python_rest": torch.tensor([version, float("nan") if pending is None else pending], dtype=torch.float64),
        }
        return found if self._cuda is None else {**found, "cuda": self._cuda}


def of_all_ranks(accelerator: Accelerator, own: Generators) -> Tensors:
    """The states of every process, named `<rank>.<generator>`; all processes must call it together."""
    tensors = own.tensors()
    if accelerator.num_processes == 1:
        return {f"0.{name}": tensor for name, tensor in tensors.items()}
    found: Tensors = {}
    for name, tensor in tensors.items():
        gathered = cast("torch.Tensor", accelerator.gather(tensor[None].to(accelerator.device)))
        found |= {f"{rank}.{name}": row.cpu().clone() for rank, row in enumerate(gathered)}
    return found


def restore(tensors: Tensors, rank: int) -> bool:
    """Puts the generators of `rank` back.

    Returns:
        False where the checkpoint has no such rank: then this process keeps the states that its seed gave it.
    """
    prefix = f"{rank}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not own:
        return False
    torch.set_rng_state(own["torch"])
    position, has_gauss, gauss = own["numpy_rest"].tolist()
    keys = own["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    version, pending = own["python_rest"].tolist()
    random.setstate((int(version), tuple(own["python"].tolist()), None if pending != pending else pending))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    return True
