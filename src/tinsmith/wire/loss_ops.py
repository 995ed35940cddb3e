"""The operations that a custom loss may call, each with the arguments that it takes. Names alone; no torch.

`training.graph_ops` has a function for each key of CALLS and for no other name. What isn't listed doesn't exist:
nothing that draws random numbers, changes a tensor in place, leaves torch, or makes many tensors of one.

A signature is a line of `name:kind` words; `?` after a kind: may be left out or None; `*` before a name: any number of
them, or one tuple; `a|b`: two names of one argument. The kinds:

    t  a tensor                       v  a tensor or a number             n  a number
    i  an integer                     b  true or false, written out       d  a dimension, or several
    z  a size                         l  several tensors                  x  an index: integers, slices, tensors
    y  a dtype, or a value's dtype    w  the device of a value            o  a dtype, or a value to be like
    a  the name of an attribute       r  a reduction                      m  a rounding mode
    p  the order of a norm            g  a tensor or a tuple              -  only the default, and dropped
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "values", "indices")
DTYPES = ("float32", "float64", "int64", "int32", "bool")
NO_EFFECT = (None, False, 3, "constant")  # defaults that torch.fx writes out: of inplace, out, _stacklevel, mode
WORDS: Mapping[str, tuple[str, ...]] = {
    "a": ATTRIBUTES,
    "r": ("none", "mean", "sum"),
    "m": ("floor", "trunc"),
    "p": ("fro",),
}


@dataclass(frozen=True, slots=True)
class Param:
    names: tuple[str, ...]
    kind: str
    is_required: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """`rest`: the kind of the arguments after `params`, if any number of them may follow."""

    params: tuple[Param, ...]
    rest: str | None = None

    def named(self, name: str) -> Param | None:
        return next((param for param in self.params if name in param.names), None)


def _each(names: str, line: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), line)


_UNARY = (
    "abs neg negative exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sigmoid tanh relu sin cos erf "
    "sign floor ceil trunc isnan isfinite isinf logical_not bitwise_not"
)
_BINARY = (
    "multiply mul pow fmod remainder floor_divide true_divide maximum minimum eq ne lt le gt ge logical_and logical_or "
    "logical_xor bitwise_and bitwise_or bitwise_xor logaddexp atan2 xlogy clamp_min clamp_max"
)
_ALONG = "amax amin argmax argmin logsumexp all any"
_BOTH: Mapping[str, str] = {  # torch.NAME(x, ...) and x.NAME(...)
    **_each(_UNARY, "input:t"),
    **_each(_BINARY, "input:v other|exponent|min|max:v"),
    **_each("add sub subtract", "input:v other:v alpha:n?"),
    **_each("div divide", "input:v other:v rounding_mode:m?"),
    **_each(_ALONG, "input:t dim:d? keepdim:b?"),
    **_each("sum mean", "input:t dim:d? keepdim:b? dtype:y?"),
    **_each("prod cumsum", "input:t dim:i? keepdim:b? dtype:y?"),
    **_each("std var", "input:t dim:d? unbiased:b? keepdim:b? correction:n?"),
    **_each("max min", "input:t dim|other:v? keepdim:b?"),
    **_each("softmax log_softmax", "input:t dim:i dtype:y?"),
    **_each("clamp clip", "input:t min:v? max:v?"),
    **_each("matmul mm mv dot outer", "input:t other|mat2|vec|tensor|vec2:t"),
    **_each("unsqueeze select", "input:t dim:i index:i?"),
    **_each("tril triu", "input:t diagonal:i?"),
    "nan_to_num": "input:t nan:n? posinf:n? neginf:n?",
    "lerp": "input:t end:t weight:v",
    "masked_fill": "input:t mask:t value:v",
    "reshape": "input:t *shape:z",
    "flatten": "input:t start_dim:i? end_dim:i?",
    "squeeze": "input:t dim:d?",
    "transpose": "input:t dim0:i dim1:i",
    "permute": "input:t *dims:z",
    "t": "input:t",
    "flip": "input:t *dims:z",
    "roll": "input:t shifts:d dims:d?",
    "narrow": "input:t dim:i start:i length:i",
    "chunk": "input:t chunks:i dim:i?",
    "diff": "input:t",
    "gather": "input:t dim:i index:t",
    "index_select": "input:t dim:i index:t",
    "sort": "input:t dim:i? descending:b?",
    "topk": "input:t k:i dim:i? largest:b? sorted:b?",
    "median": "input:t",
    "count_nonzero": "input:t dim:d?",
    "clone": "input:t",
    "detach": "input:t",
    "numel": "input:t",
}
_TORCH: Mapping[str, str] = {
    "where": "condition:t input:v other:v",
    "stack": "tensors:l dim:i?",
    "cat": "tensors:l dim:i?",
    "concat": "tensors:l dim:i?",
    "rsub": "input:v other:v alpha:n?",
    "arange": "start|end:n end:n? step:n? dtype:y? device:w?",
    "zeros": "*size:z dtype:y? device:w?",
    "ones": "*size:z dtype:y? device:w?",
    "full": "size:d fill_value:n dtype:y? device:w?",
    "zeros_like": "input:t dtype:y? device:w?",
    "ones_like": "input:t dtype:y? device:w?",
    "full_like": "input:t fill_value:n dtype:y? device:w?",
    "scalar_tensor": "s:n dtype:y? device:w?",
    "broadcast_to": "input:t size:d",
    "functional.norm": "input:t p:p? dim:d? keepdim:b? out:-? dtype:y?",
    "_C._linalg.linalg_vector_norm": "input:t ord:n? dim:d? keepdim:b? dtype:y?",
    "_C._special.special_expit": "input:t",
    "_C._special.special_log1p": "input:t",
}
_METHODS: Mapping[str, str] = {
    **_each("float double long int bool contiguous dim", "input:t"),
    "size": "input:t dim:i?",
    "view": "input:t *shape:z",
    "expand": "input:t *size:z",
    "expand_as": "input:t other:t",
    "view_as": "input:t other:t",
    "type_as": "input:t other:t",
    "to": "input:t other|dtype:o? dtype:y? device:w?",
    "norm": "input:t p:p? dim:d? keepdim:b? dtype:y?",
    "new_zeros": "input:t *size:z dtype:y? device:w?",
    "new_ones": "input:t *size:z dtype:y? device:w?",
    "new_full": "input:t size:d fill_value:n dtype:y? device:w?",
}
_PAIRWISE = "input:t target:t size_average:-? reduce:-? reduction:r? weight:-?"
_FUNCTIONAL: Mapping[str, str] = {  # of torch.nn.functional
    **_each("relu silu", "input:t inplace:-?"),
    "logsigmoid": "input:t",
    "softplus": "input:t beta:n? threshold:n?",
    "gelu": "input:t",
    "elu": "input:t alpha:n? inplace:-?",
    "leaky_relu": "input:t negative_slope:n? inplace:-?",
    "hardtanh": "input:t min_val:n? max_val:n? inplace:-?",
    **_each("softmax log_softmax", "input:t dim:i _stacklevel:-? dtype:y?"),
    **_each("mse_loss l1_loss", _PAIRWISE),
    "smooth_l1_loss": f"{_PAIRWISE} beta:n?",
    "huber_loss": "input:t target:t reduction:r? delta:n? weight:-?",
    "kl_div": "input:t target:t size_average:-? reduce:-? reduction:r? log_target:b?",
    "binary_cross_entropy_with_logits": (
        "input:t target:t weight:-? size_average:-? reduce:-? reduction:r? pos_weight:-?"
    ),
    "pad": "input:t pad:d mode:-? value:n?",
}
_OPERATORS: Mapping[str, str] = {
    **_each("neg pos abs invert", "a:v"),
    **_each("add sub mul truediv floordiv mod pow eq ne lt le gt ge and_ or_ xor", "a:v b:v"),
    "matmul": "a:t b:t",
    "getitem": "a:g b:x",
}
_MATH: Mapping[str, str] = {
    **_each("sqrt exp log log2 log10 log1p expm1 floor ceil fabs tanh", "x:n"),
    "pow": "x:n y:n",
}
ALIASES: Mapping[str, str] = {  # other names that torch.fx gives to the same functions, by release
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch._C._nn.softplus": "torch.nn.functional.softplus",
    "torch._C._nn.gelu": "torch.nn.functional.gelu",
    "torch._C._nn.silu": "torch.nn.functional.silu",
    "torch.norm": "torch.functional.norm",
    "torch.linalg.vector_norm": "torch._C._linalg.linalg_vector_norm",
    "torch.special.expit": "torch._C._special.special_expit",
    "torch.special.log1p": "torch._C._special.special_log1p",
    "builtins.getattr": "getattr",
    "torch.absolute": "torch.abs",
    "torch.concatenate": "torch.cat",
}


def _parse(line: str) -> Signature:
    params: list[Param] = []
    rest: str | None = None
    for word in line.split():
        names, _, kind = word.partition(":")
        if names.startswith("*"):
            rest = kind
        else:
            params.append(Param(tuple(names.split("|")), kind[0], not kind.endswith("?")))
    return Signature(tuple(params), rest)


CALLS: Mapping[str, Signature] = {
    key: _parse(line)
    for key, line in {
        **{f"torch.{name}": line for name, line in {**_BOTH, **_TORCH}.items()},
        **{f".{name}": line for name, line in {**_BOTH, **_METHODS}.items()},
        **{f"torch.nn.functional.{name}": line for name, line in _FUNCTIONAL.items()},
        **{f"operator.{name}": line for name, line in _OPERATORS.items()},
        **{f"math.{name}": line for name, line in _MATH.items()},
        "getattr": "a:g name:a",
    }.items()
}
