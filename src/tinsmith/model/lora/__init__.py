"""The adapters' arithmetic in one group of linear layers, behind one protocol: a plain loop, segments in place."""

from tinsmith.model.lora.backend import ExpertWeights, LoraBackend, LoraPass, LoraWeights, Segment
from tinsmith.model.lora.experts import NO_ADAPTERS, ExpertLora
from tinsmith.model.lora.loop import LoopLora
from tinsmith.model.lora.masked import masked
from tinsmith.model.lora.segments import SegmentsLora

__all__ = [
    "NO_ADAPTERS",
    "ExpertLora",
    "ExpertWeights",
    "LoopLora",
    "LoraBackend",
    "LoraPass",
    "LoraWeights",
    "Segment",
    "SegmentsLora",
    "masked",
]
