"""Kimi-K2: DeepSeek-V3's layers, with more experts and half the heads, under a model_type of its own.

Its directories name code of theirs (`auto_map`), which is never run: they are read as the architecture they are.
"""

from tinsmith.model.families.family import Family

FAMILY = Family(title="Kimi-K2", model_types=("kimi_k2",), loads_as="deepseek_v3")
