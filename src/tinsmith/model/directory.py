"""The configuration of a model directory, as transformers is to understand it.

A directory may give a known architecture a name of its own, and point at code to go with it. No code of a directory is
ever run; where a family says which architecture it is, that one's configuration is made from the same file.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tinsmith.errors import UnsupportedError, echo
from tinsmith.model.families import FAMILIES

FOREIGN = ("auto_map", "model_type")  # what the directory says of its own code, and its name


def read_config(path: str | Path) -> PretrainedConfig:
    """
    Raises:
        UnsupportedError: it names no architecture that transformers has.
        OSError, ValueError: there is no config.json, or it says what can't be.
    """
    given, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
    known = {name: family.loads_as for family in FAMILIES if family.loads_as for name in family.model_types}
    model_type = str(given.get("model_type", ""))
    loads_as = known.get(model_type)
    if loads_as is None:
        if model_type not in CONFIG_MAPPING:
            raise UnsupportedError(
                f"{path}: transformers {transformers.__version__} has no architecture {echo(model_type)}, and code "
                "that comes with a model isn't run here"
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return config
    own = {name: value for name, value in given.items() if name not in FOREIGN}
    return AutoConfig.for_model(loads_as, **own)
