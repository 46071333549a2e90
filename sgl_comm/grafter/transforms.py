"""Transforms: functions of the user's that make the receiver's tensor of the senders' pieces, instead of layouts."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from sgl_comm.errors import SglCommError

Transform = Callable[..., Tensor]
"""``transform(pieces, extras, direction, rank, tags) -> Tensor``, called with keywords on each receiving rank.

``pieces``: every sending rank's tensor, in rank order, on the receiver's device. ``extras``: what each of them gave
with it. ``direction``: "b2t" or "t2b". ``rank``: the receiver's inside its side. ``tags``: the tensor's. The result has
the shape of the receiver's tensor.
"""


def load_transform(path: str) -> Transform:
    """The function at a dotted path, "package.module.function" (or "package.module:function").

    Raises:
        SglCommError: no such module or function.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SglCommError(
            f"grafter: got transform_path {path!r}: {error}; expected package.module.function"
        ) from error
    if not callable(function):
        raise SglCommError(
            f"grafter: got transform_path {path!r}, which is a {type(function).__name__}; expected a function"
        )
    return function


def check_transformed(transformed: object, shape: torch.Size) -> Tensor:
    """A transform's result, if it fits.

    Raises:
        SglCommError: it is no tensor, or of another shape than the receiver's.
    """
    if not isinstance(transformed, Tensor):
        raise SglCommError(f"the transform returned a {type(transformed).__name__}; expected a tensor of {list(shape)}")
    if transformed.shape != shape:
        raise SglCommError(f"the transform returned shape {list(transformed.shape)}; expected {list(shape)}")
    return transformed
