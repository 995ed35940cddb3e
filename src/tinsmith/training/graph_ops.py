"""The functions behind the names that a custom loss may call, and how large what they return can be.

One entry for each key of `wire.loss_ops.CALLS`. A size is worked out before the call, from shapes alone, so that a loss
which asks for too much is refused while nothing has been allocated. Numbers are Python's, and stay small.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.wire.loss_ops import CALLS

MAX_NUMBER = 2**63
MAX_EXPONENT = 64
MAX_CHUNKS = 64
HUGE = 2**62

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Size = Callable[[Args, Kwargs], int]


class GraphError(Exception):
    """A value that the call can't take; the message says which."""


@dataclass(frozen=True, slots=True)
class Function:
    """`size(args, kwargs)`: at least the elements of what `fn` returns; more where it costs more than its result."""

    fn: Callable[..., Any]
    size: Size


def broadcast_size(args: Args, kwargs: Kwargs) -> int:
    """Of an operation whose tensors are broadcast together, and of any that returns no more than it takes.

    An empty dimension counts as one: what is summed over it has elements all the same.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if kwargs:
        tensors += [arg for arg in kwargs.values() if isinstance(arg, Tensor)]
    if len(tensors) == 1:
        return _filled(tensors[0].shape)
    size = 1
    for dim in range(1, max((tensor.dim() for tensor in tensors), default=0) + 1):
        size *= max(1, *(tensor.shape[-dim] for tensor in tensors if tensor.dim() >= dim))
    return size


def _filled(shape: Sequence[int]) -> int:
    """Elements, were empty dimensions of length one."""
    return math.prod(max(1, length) for length in shape)


def _sorted_size(args: Args, kwargs: Kwargs) -> int:
    """Measured on 2^22 numbers: sorting costs as much as 45 exponentials."""
    return 48 * broadcast_size(args, kwargs)


def _product_size(args: Args, kwargs: Kwargs) -> int:
    one, other = _first_two(args, kwargs)
    if one.dim() == 0 or other.dim() == 0:
        return max(one.numel(), other.numel())
    return _filled(one.shape[:-1]) * max(one.shape[-1], _filled(other.shape))


def _outer_size(args: Args, kwargs: Kwargs) -> int:
    one, other = _first_two(args, kwargs)
    return one.numel() * other.numel()


def _first_two(args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor]:
    one, other = [*args, *kwargs.values()][:2]
    return one, other


def _joined_size(args: Args, kwargs: Kwargs) -> int:
    return sum(tensor.numel() for tensor in (args[0] if args else kwargs["tensors"]))


def _made_size(args: Args, kwargs: Kwargs) -> int:
    """Of `zeros(2, 3)`, `zeros((2, 3))`, `full((2, 3), x)`, with or without a tensor before."""
    given = args[1:] if args and isinstance(args[0], Tensor) else args
    sizes = given[0] if given and isinstance(given[0], tuple) else given
    if "size" in kwargs:
        sizes = kwargs["size"]
    return math.prod(max(0, int(size)) for size in (sizes if isinstance(sizes, tuple | list) else (sizes,)))


def _expanded_size(args: Args, kwargs: Kwargs) -> int:
    given = [*args[1:], *kwargs.values()]
    sizes = given[0] if given and isinstance(given[0], tuple) else given
    kept = [1] * len(sizes) + list(args[0].shape)
    pairs = zip(reversed(sizes), reversed(kept), strict=False)
    return math.prod(old if new == -1 else max(0, int(new)) for new, old in pairs)


def _ranged_size(args: Args, kwargs: Kwargs) -> int:
    numbers = dict(zip(("start", "end", "step"), args, strict=False)) | dict(kwargs)
    start, end, step = numbers.get("start", 0), numbers.get("end"), numbers.get("step") or 1
    if end is None:
        start, end = 0, start
    count = (end - start) / step
    return int(count) + 1 if 0 <= count < HUGE else (0 if count < 0 else HUGE)


def _padded_size(args: Args, kwargs: Kwargs) -> int:
    widths = args[1] if len(args) > 1 else kwargs["pad"]
    sizes = list(args[0].shape)
    for index, width in enumerate(widths if isinstance(widths, tuple) else (widths,)):
        dim = len(sizes) - 1 - index // 2
        if dim >= 0:
            sizes[dim] += max(0, width)
    return math.prod(sizes)


def _indexed_size(args: Args, kwargs: Kwargs) -> int:
    """Of `x[index]`: each tensor among the indices may multiply what is taken."""
    value, index = args
    if not isinstance(value, Tensor):
        return 1
    size = value.numel()
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, Tensor) and part.dtype != torch.bool:
            size *= max(1, part.numel())
    taken = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, Tensor)]
    if len(taken) == 1 and taken[0].dtype != torch.bool and isinstance(index, Tensor) and value.dim():
        size = taken[0].numel() * (value.numel() // max(1, value.shape[0]))
    return size


def _gathered_size(args: Args, kwargs: Kwargs) -> int:
    return max(broadcast_size([arg], {}) for arg in [*args, *kwargs.values()] if isinstance(arg, Tensor))


def _selected_size(args: Args, kwargs: Kwargs) -> int:
    tensors = [arg for arg in [*args, *kwargs.values()] if isinstance(arg, Tensor)]
    return math.prod(max(1, tensor.numel()) for tensor in tensors)


def _attribute(value: Any, name: str) -> Any:
    if isinstance(value, tuple) and name in ("values", "indices"):
        return value[("values", "indices").index(name)]
    if not isinstance(value, Tensor) or name in ("values", "indices"):
        raise GraphError(f"a {_kind(value)} has no {name}")
    readers: dict[str, Callable[[Tensor], Any]] = {
        "shape": lambda x: tuple(x.shape),
        "dtype": lambda x: x.dtype,
        "device": lambda x: x.device,
        "ndim": lambda x: x.ndim,
        "T": lambda x: x.t(),
        "mT": lambda x: x.mT,
    }
    return readers[name](value)


def _item(value: Any, index: Any) -> Any:
    if isinstance(value, tuple):
        if isinstance(index, int | slice):
            return value[index]
        raise GraphError("a tuple is indexed by an integer or a slice")
    sizes = value.shape
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, Tensor) and part.dtype != torch.bool:
            _check_index(part, max(sizes, default=0))
    return value[index]


def _along(method: str) -> Callable[..., Tensor]:
    fn = getattr(torch, method)

    def take(input: Tensor, dim: int, index: Tensor) -> Tensor:
        _check_index(index, input.shape[dim] if input.dim() else 1)
        result: Tensor = fn(input, dim, index)
        return result

    return take


def _check_index(index: Tensor, size: int) -> None:
    """Raises: GraphError: out of range; an accelerator would not come back from that."""
    if index.is_floating_point():
        raise GraphError("indices must be integers")
    if index.numel() and (int(index.min()) < -size or int(index.max()) >= size):
        raise GraphError(f"indices must lie in {-size}..{size - 1}")


def _to(input: Tensor, other: Any = None, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if isinstance(other, Tensor):
        return input.to(other.dtype)
    wanted = dtype or other
    return input.to(wanted) if isinstance(wanted, torch.dtype) else input


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    if not 0 < chunks <= MAX_CHUNKS:
        raise GraphError(f"chunks must lie in 1..{MAX_CHUNKS}")
    return tuple(torch.chunk(input, chunks, dim))


def _size(input: Tensor, dim: int | None = None) -> Any:
    return tuple(input.shape) if dim is None else input.shape[dim]


def _whole_division(fn: Callable[..., Any], *, is_always: bool = True) -> Callable[..., Any]:
    """`fn`, refusing integer divisors of 0 and -1: the least integer over -1 ends the process on some processors.

    is_always: it rounds even without a rounding mode.
    """

    def divide(one: Any, other: Any, **kwargs: Any) -> Any:
        is_float = any(isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point()) for x in (one, other))
        is_rounded = is_always or kwargs.get("rounding_mode") is not None
        if is_rounded and not is_float and (isinstance(one, Tensor) or isinstance(other, Tensor)):
            wrong = (other == 0) | (other == -1)
            if bool(wrong.any() if isinstance(wrong, Tensor) else wrong):
                raise GraphError("integers are not divided by 0 or -1 here: make them float first")
        return fn(one, other, **kwargs)

    return divide


def _power(one: Any, other: Any) -> Any:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if numbers and isinstance(one, int) and abs(other) > MAX_EXPONENT:
        raise GraphError(f"an integer is raised to powers up to {MAX_EXPONENT}")
    return one**other


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


_SIZES: Mapping[str, Size] = {
    **{f"torch.{name}": _product_size for name in ("matmul", "mm", "mv", "dot")},
    **{f".{name}": _product_size for name in ("matmul", "mm", "mv", "dot")},
    "operator.matmul": _product_size,
    **{f"{room}{name}": _sorted_size for room in ("torch.", ".") for name in ("sort", "topk", "median")},
    "operator.getitem": _indexed_size,
    "torch.outer": _outer_size,
    ".outer": _outer_size,
    **dict.fromkeys(("torch.stack", "torch.cat", "torch.concat"), _joined_size),
    **dict.fromkeys(("torch.zeros", "torch.ones", "torch.full", ".new_zeros", ".new_ones", ".new_full"), _made_size),
    **dict.fromkeys((".expand", "torch.broadcast_to"), _expanded_size),
    "torch.arange": _ranged_size,
    "torch.nn.functional.pad": _padded_size,
    **dict.fromkeys(("torch.gather", ".gather"), _gathered_size),
    **dict.fromkeys(("torch.index_select", ".index_select"), _selected_size),
}
_OWN: Mapping[str, Callable[..., Any]] = {
    "getattr": _attribute,
    "operator.getitem": _item,
    "operator.pow": _power,
    "operator.floordiv": _whole_division(operator.floordiv),
    "operator.mod": _whole_division(operator.mod),
    **{f"{room}gather": _along("gather") for room in ("torch.", ".")},
    **{f"{room}index_select": _along("index_select") for room in ("torch.", ".")},
    **{f"{room}chunk": _chunk for room in ("torch.", ".")},
    **{
        f"{room}{name}": _whole_division(getattr(torch, name), is_always=not name.startswith("div"))
        for room in ("torch.", ".")
        for name in ("fmod", "remainder", "floor_divide", "div", "divide")
    },
    ".to": _to,
    ".size": _size,
    "torch._C._linalg.linalg_vector_norm": torch.linalg.vector_norm,
    "torch._C._special.special_expit": torch.special.expit,
    "torch._C._special.special_log1p": torch.special.log1p,
    "torch.functional.norm": torch.norm,
}


def _find(key: str) -> Callable[..., Any]:
    """The function that a key names; the keys are ours, never a request's."""
    room, _, name = key.rpartition(".")
    rooms: dict[str, Any] = {
        "torch": torch, "": Tensor, "torch.nn.functional": F, "operator": operator, "math": math,
    }  # fmt: skip
    found: Callable[..., Any] = getattr(rooms[room], name)
    return found


FUNCTIONS: Mapping[str, Function] = {
    key: Function(_OWN[key] if key in _OWN else _find(key), _SIZES.get(key, broadcast_size)) for key in CALLS
}
