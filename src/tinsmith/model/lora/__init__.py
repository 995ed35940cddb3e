"""The adapters' arithmetic in one group of linear layers, behind one protocol: a plain loop, segments in place."""

from tinsmith.model.lora.backend import LoraBackend, LoraPass, LoraWeights, Segment
from tinsmith.model.lora.loop import LoopLora
from tinsmith.model.lora.segments import SegmentsLora

__all__ = ["LoopLora", "LoraBackend", "LoraPass", "LoraWeights", "Segment", "SegmentsLora"]
