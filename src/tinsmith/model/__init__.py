"""The frozen base model: loading a family, linear layers that adapters hook into, the layout of an adapter."""

from tinsmith.model import lean as lean  # before anything that imports transformers
from tinsmith.model.base import BaseModel, open_base
from tinsmith.model.context import ExpertAdapters, GradContext, OwnRoutes, PassContext
from tinsmith.model.frozen import FrozenMatrix
from tinsmith.model.inspect import HEAD, LinearInfo
from tinsmith.model.layout import RowLayout, init_row, shape_of
from tinsmith.model.loading import load_base, load_model, plain_shapes
from tinsmith.model.routes import Routes
from tinsmith.model.rows import MIN_ROWS, ROW_GRID, padded_rows

__all__ = [
    "HEAD",
    "MIN_ROWS",
    "ROW_GRID",
    "BaseModel",
    "ExpertAdapters",
    "FrozenMatrix",
    "GradContext",
    "LinearInfo",
    "OwnRoutes",
    "PassContext",
    "Routes",
    "RowLayout",
    "init_row",
    "load_base",
    "load_model",
    "open_base",
    "padded_rows",
    "plain_shapes",
    "shape_of",
]
