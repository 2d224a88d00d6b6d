"""What autograd keeps of one forward pass, in bytes, found by running the real modules on the meta device.

Nothing is computed and no memory is used: `saved_tensors_hooks` sees each tensor that the backward pass will want, and
each storage counts once. Two things do not run on the meta device and are replaced by what they keep: attention
kernels (query, key, value, output and one float a row), and routed experts (each token visits `top_k` of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llamafactory.model.attention import no_mask
from llamafactory.model.kernels.attention import Layout, attention
from llamafactory.model.kernels.decoder import Block, read_blocks
from llamafactory.model.kernels.mlp import mlp
from llamafactory.model.kernels.rotary import Rotation
from llamafactory.model.skeleton import decoder_blocks, transformer_of
from llamafactory.model.workload import Part, tokens_of

HEAP_LIMIT = 32 * 2**20
"""Bytes from which glibc maps a tensor by itself (its largest M_MMAP_THRESHOLD) and gives it back whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationTrace:
    """Bytes kept by one forward pass.

    Attributes:
        blocks: inside each decoder block, in order.
        outside: by embedding, final norm and everything else that is in no block.
        boundary: the input of one block, which is all that a recomputed block keeps.
        small: share of all these bytes in tensors below 32 MiB, which the C library takes from its heap.
        is_fused: the blocks went through `model.kernels`.
    """

    blocks: tuple[int, ...]
    outside: int
    boundary: int
    small: float = 1.0
    is_fused: bool = False

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self.blocks)

    def peak(self, every: int) -> int:
        """Most bytes alive at once, with every `every`-th block recomputed in the backward pass (0: none).

        The backward pass runs from the last block to the first: when it reaches a recomputed block, that block's
        bytes come back while those of the later blocks are gone.
        """
        kept = [self.boundary if is_recomputed(i, every) else size for i, size in enumerate(self.blocks)]
        alive = self.outside + sum(kept)
        most = alive
        for index in reversed(range(len(self.blocks))):
            most = max(most, alive + (self.blocks[index] if is_recomputed(index, every) else 0))
            alive -= kept[index]
        return most


def is_recomputed(index: int, every: int) -> bool:
    """Whether block `index` (from 0) is recomputed where every `every`-th one is; 0 recomputes none."""
    return bool(every) and index % every == every - 1


def trace_activations(
    model: nn.Module, *, rows: int, lengths: Sequence[Part], is_flat: bool, is_fused: bool = False
) -> ActivationTrace:
    """Runs the transformer stack once and adds up what autograd keeps.

    Args:
        model: on the meta device, in training mode (see `build_skeleton`).
        rows: rows of a padded batch; 1 for a flat one.
        lengths: tokens of each segment or prefix tree of a flat batch, or the width of a padded one as the only entry.
        is_flat: rows lie end to end, and attention gets `segment_lengths`.
        is_fused: blocks go through `model.kernels` where those apply.

    Raises:
        RuntimeError: the model's forward pass reads values, which the meta device does not have.
    """
    time = sum(map(tokens_of, lengths))
    stack: Any = transformer_of(model)
    recorder = _Recorder(model)
    ids = torch.zeros(rows, time, dtype=torch.long, device="meta")
    fused = read_blocks(base_of(model)) if is_flat and is_fused else None
    if fused is not None:
        with recorder.saving(), _MetaAttention(), torch.device("meta"):
            _run_fused(stack, ids, fused, tuple(lengths), recorder)
        return replace(recorder.result(), is_fused=True)
    options: dict[str, Any] = {"segment_lengths": tuple(lengths)} if is_flat else {}
    with _replaced_experts(model), recorder.watching(), _MetaAttention(), torch.device("meta"):
        stack(input_ids=ids, position_ids=ids, attention_mask=no_mask("meta"), use_cache=False, **options)
    return recorder.result()


def base_of(model: Any) -> Any:
    """The language model inside of peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _run_fused(stack: Any, ids: Tensor, blocks: Sequence[Block], parts: tuple[Part, ...], recorder: _Recorder) -> None:
    """What `kernels.decoder.decode` does, with every row of the last block."""
    embedded = stack.embed_tokens(ids)
    rotation = Rotation.of(*stack.rotary_emb(embedded, position_ids=ids))
    states = embedded[0]
    for index, (layer, block) in enumerate(zip(stack.layers, blocks, strict=True)):
        uses = getattr(layer.self_attn, "use_rope", True)
        layout = Layout(parts=parts, rotation=rotation if uses else None, rows=None)
        recorder.enter(index, states)
        states = mlp(attention(states, block[0], layout), block[1])
    recorder.leave()
    stack.norm(states)


class _Recorder:
    """Adds up saved storages, by the block that runs."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = decoder_blocks(model)
        tensors = [*model.parameters(), *model.buffers()]
        self._seen = {_address(tensor): tensor.untyped_storage() for tensor in tensors}
        self._sizes = [0] * len(self._blocks)
        self._outside = self._boundary = self._small = 0
        self._running: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees everything that autograd saves inside the block."""
        handles = []
        for index, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave))
        try:
            with self.saving():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Sees what autograd saves, without knowing of blocks."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def enter(self, index: int, hidden: Tensor) -> None:
        """A block starts, with this input."""
        self._running, self._boundary = index, hidden.nbytes

    def leave(self) -> None:
        """The last block is done."""
        self._running = None

    def result(self) -> ActivationTrace:
        total = self._outside + sum(self._sizes)
        return ActivationTrace(
            blocks=tuple(self._sizes),
            outside=self._outside,
            boundary=self._boundary,
            small=self._small / total if total else 1.0,
        )

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.enter(index, args[0] if args else kwargs["hidden_states"])

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.leave()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if _address(tensor) not in self._seen:
            self._seen[_address(tensor)] = storage  # kept, so that its address is not used again
            self._small += storage.nbytes() if storage.nbytes() < HEAP_LIMIT else 0
            if self._running is None:
                self._outside += storage.nbytes()
            else:
                self._sizes[self._running] += storage.nbytes()
        return tensor


def _address(tensor: Tensor) -> int:
    """Where the storage's record lies; on the meta device the data has no address."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class _MetaAttention(TorchFunctionMode):
    """Attention that keeps what the fused kernels keep; on the meta device torch would take it apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _KeptAttention.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _KeptAttention(torch.autograd.Function):
    """The memory of a fused attention kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Saves query, key, value, output and the log-sum-exp of each row; the output lies as kernels lay it."""
        batch, heads, time, _ = query.shape
        output = torch.empty(batch, time, heads, value.shape[-1], dtype=query.dtype, device="meta").transpose(1, 2)
        log_sums = torch.empty(batch, heads, time, dtype=torch.float32, device="meta")
        ctx.save_for_backward(query, key, value, output, log_sums, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Never reached: a trace makes no backward pass."""
        raise NotImplementedError


@contextmanager
def _replaced_experts(model: nn.Module) -> Iterator[None]:
    """Gives modules with stacked expert weights a forward pass that needs no routing values."""
    from peft.tuners.lora.layer import ParamWrapper

    wrapped: set[int] = set()
    with ExitStack() as stack:
        for module in model.modules():  # wrappers come before what they wrap
            inner: Any = module
            adapted: dict[str, nn.Module] = {}
            while isinstance(inner, ParamWrapper):
                adapted[inner.parameter_name] = inner
                inner = inner.base_layer
                wrapped.add(id(inner))
            if _is_experts(inner) and id(module) not in wrapped:
                stack.enter_context(_forward_of(module, _routed_forward(inner, adapted)))
        yield


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D weights, the way transformers 5 keeps them."""
    return all(
        isinstance(getattr(module, name, None), Tensor) and getattr(module, name).dim() == 3
        for name in ("gate_up_proj", "down_proj")
    )


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]  # on the instance; the class stays as it is
    try:
        yield
    finally:
        del module.forward


def _routed_forward(experts: Any, adapted: Mapping[str, nn.Module]) -> Callable[..., Tensor]:
    def weight(name: str) -> Tensor:
        base = getattr(experts, name)
        if name not in adapted:
            return base
        trained = [parameter for parameter in adapted[name].parameters() if parameter.requires_grad]
        return base + torch.stack([parameter.sum() for parameter in trained]).sum().to(
            base.dtype
        )  # peft adds to the whole weight

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down = weight("gate_up_proj"), weight("down_proj")
        width = hidden_states.shape[-1]
        chosen = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
        is_rows_out = gate_up.shape[-1] == width  # [experts, out, in] or [experts, in, out]
        inner = F.linear(chosen, gate_up[0] if is_rows_out else gate_up[0].T)
        gate, up = inner.chunk(2, dim=-1)
        outer = F.linear(F.silu(gate) * up, down[0] if is_rows_out else down[0].T)
        weighted = outer * top_k_weights.reshape(-1, 1).to(outer.dtype)
        return weighted.reshape(*top_k_index.shape, width).sum(dim=1)

    return cast("Callable[..., Tensor]", forward)
