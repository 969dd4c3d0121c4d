"""RoPE whose frequencies depend on the sequence's length: dynamic NTK scaling, LongRoPE.

The full forward of a rollout rotates all its tokens by the frequencies of its length. Transformers' modules
choose them by the last position of each pass. But a pass may hold the prompt alone, a completion up to its
last measured token, or several completions; and dynamic scaling keeps the frequencies of the longest
sequence so far. Here, therefore, each call of a module

- finds the module as it was at load, and
- has the last position of the whole sequence appended to its positions: the module's own code then chooses
  the frequencies of that length. The rotation of the added position is dropped.

Dimensions: B rows, T tokens.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shopr1_service.engine.lm_head import UnsupportedModelError, trunk_of


class LengthDependentRope:
    """The RoPE modules of a model whose frequencies depend on the sequence's length.

    The lengths with the same frequencies form an interval. Used from one thread at a time.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = [_ScaledRope(module) for module in modules]
        self._representatives: dict[int, int] = {}
        self._by_digest: dict[bytes, int] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LengthDependentRope | None":
        """Take control of the model's length-dependent RoPE; None if it has none.

        Raises:
            UnsupportedModelError: its frequencies cannot be controlled.
        """
        modules = _length_dependent(model)
        if not modules:
            return None
        rope = cls(modules)
        try:
            rope.representative(1)
        except Exception as error:  # an architecture may raise anything
            names = ", ".join(sorted({type(module).__name__ for module in modules}))
            message = f"the RoPE of {names} depends on the sequence's length in an unknown way: {error!r}"
            raise UnsupportedModelError(message) from error
        return rope

    def representative(self, num_tokens: int) -> int:
        """One length for all that have the frequencies of this one."""
        if num_tokens not in self._representatives:
            with self.pinned(num_tokens), torch.inference_mode():
                rotations = b"".join(module.rotations() for module in self._modules)
            digest = hashlib.blake2b(rotations).digest()
            self._representatives[num_tokens] = self._by_digest.setdefault(digest, num_tokens)
        return self._representatives[num_tokens]

    def is_shared(self, num_tokens: int) -> bool:
        """Whether sequences of another length have the same frequencies."""
        return self.representative(num_tokens) in map(self.representative, (num_tokens - 1, num_tokens + 1))

    @contextmanager
    def pinned(self, num_tokens: int) -> Iterator[None]:
        """Use the frequencies of sequences of this length in the block's forwards."""
        for module in self._modules:
            module.num_tokens = num_tokens
        try:
            yield
        finally:
            for module in self._modules:
                module.num_tokens = None


class _ScaledRope:
    """One RoPE module under control.

    Attributes:
        num_tokens: the sequence's length; None: up to the last position of the call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.num_tokens: int | None = None
        self._module = module
        self._buffers = {
            name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)
        }
        self._attributes = {name: value for name, value in vars(module).items() if name[0] != "_"}
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def rotations(self) -> bytes:
        """The rotations of position 1, which tell frequencies and scales apart."""
        device = next(self._module.buffers()).device
        position_1_1 = torch.ones((1, 1), dtype=torch.long, device=device)
        kinds = self._module.rope_type
        calls = [{"layer_type": kind} for kind in kinds] if isinstance(kinds, dict) else [{}]
        outputs = [self._module(torch.zeros(1, device=device), position_1_1, **options) for options in calls]
        return b"".join(part.cpu().numpy().tobytes() for output in outputs for part in _parts(output))

    def _before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ANN401
        self._reset()
        if self.num_tokens is None:
            return args, kwargs
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._extended(kwargs["position_ids"])}
        x, position_ids, *rest = args
        return (x, self._extended(position_ids), *rest), kwargs

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:  # noqa: ANN401
        if self.num_tokens is None:
            return output
        parts = tuple(part[..., :-1, :] for part in _parts(output))
        return parts[0] if isinstance(output, Tensor) else parts

    def _extended(self, position_ids_B_T: Tensor) -> Tensor:
        last_B_1 = torch.full_like(position_ids_B_T[..., :1], (self.num_tokens or 1) - 1)
        return torch.cat([position_ids_B_T, last_B_1], dim=-1)

    def _reset(self) -> None:
        """Forget longer sequences: the frequencies in the buffers, their length, and what came later."""
        now = vars(self._module)
        for name in [name for name in now if name[0] != "_" and name not in self._attributes]:
            del now[name]
        now.update(self._attributes)
        for name, (buffer, values) in self._buffers.items():
            setattr(self._module, name, buffer.copy_(values))


def has_length_dependent_rope(model: PreTrainedModel) -> bool:
    """Whether longer sequences are rotated by other frequencies."""
    return bool(_length_dependent(model))


def _length_dependent(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose frequencies transformers updates in each pass (`dynamic_rope_update`)."""
    return [
        module
        for module in trunk_of(model).modules()
        if any("dynamic" in kind or kind == "longrope" for kind in _kinds(module))
    ]


def _kinds(module: nn.Module) -> list[str]:
    """The module's kinds of RoPE: one, or one for each kind of layers. HunYuan's differ from its config's."""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return [name for name in names if isinstance(name, str)]


def _parts(output: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Cosine and sine [B, T, …], or complex numbers of both."""
    return (output,) if isinstance(output, Tensor) else tuple(output)
