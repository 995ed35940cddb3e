"""All recipes, in the order in which they run, and the modules of the cookbook that can't be run here.

Those stand in ABSENT, by name and with the reason. A module of the installed cookbook that is neither run nor in ABSENT
is a bad verdict of its own (`unlisted`), so that none is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from scripts.cookbook.recipe import SCRIPTS_PACKAGE, recipe
from scripts.cookbook.reinforcement import REINFORCEMENT
from scripts.cookbook.supervised import DISTILLATION, PREFERENCES, SUPERVISED
from scripts.cookbook.tools import SAMPLING, WEIGHTS

RECIPES = (*SUPERVISED, *PREFERENCES, *REINFORCEMENT, *DISTILLATION, *SAMPLING, *WEIGHTS)

SANDBOX = "runs model-written programs in containers (docker, SandboxFusion or Modal)"
SEES = "shows the model pictures; bases that see are not served"
HEARS = "plays the model sound, for a model that needs renderers not published; bases that hear are not served"
ABSENT = {
    recipe("code_rl.train"): SANDBOX,
    recipe("code_rl.lcb_utils"): "no recipe: the program that code_rl starts inside its sandbox",
    recipe("harbor_rl.scripts.eval_harbor_rl"): SANDBOX,
    recipe("harbor_rl.scripts.train_terminal_bench"): SANDBOX,
    recipe("distillation.on_policy_distillation_harbor_multi_turn"): SANDBOX,
    recipe("search_tool.train"): "asks a Chroma server, and an embedding service on the network",
    recipe("search_tool.offline_eval"): "asks a Chroma server, and an embedding service on the network",
    recipe("verifiers_rl.train"): "its environments are packages from a hub of their own",
    recipe("verifiers_rl.evaluate"): "its environments are packages from a hub of their own",
    recipe("vlm_classifier.train"): SEES,
    recipe("vlm_classifier.eval"): SEES,
    recipe("vlm_classifier.eval_sweep"): SEES,
    recipe("vlm_classifier.sweep"): SEES,
    recipe("audio.asr.rl_train"): HEARS,
    recipe("audio.asr.sl_train"): HEARS,
    recipe("audio.medical_asr.train"): HEARS,
    recipe("audio.emotion.prepare_data"): "downloads 36 GB of recordings and converts them with ffmpeg",
    recipe("audio.emotion.evaluate"): HEARS,
    recipe("audio.emotion.rl_train"): HEARS,
    recipe("audio.emotion.sl_train"): HEARS,
    recipe(
        "chat_sl.sweep.launch_all"
    ): "starts 240 runs of 781 steps, for 13 fixed models, which log to Weights & Biases",
    f"{SCRIPTS_PACKAGE}.get_access_token": "asks the vendor's own server for a token, whatever the base URL",
    f"{SCRIPTS_PACKAGE}.inkling.sample_audio": HEARS,
    f"{SCRIPTS_PACKAGE}.inkling.sample_vision": SEES,
    f"{SCRIPTS_PACKAGE}.inkling.sample_reasoning": "its model needs renderers that are not published",
}


STARTS = re.compile(r"^if __name__ == .__main__.:", re.MULTILINE)


def runnable(package: Path) -> Iterator[str]:
    """Every module below recipes/ and scripts/ of an installed cookbook that can be started as a program."""
    for path in sorted([*package.glob("recipes/**/*.py"), *package.glob("scripts/**/*.py")]):
        if not path.name.endswith("_test.py") and STARTS.search(path.read_text()):
            yield ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__main__")


def unlisted(package: Path) -> list[str]:
    """Modules that can be started and are in neither table. A package's own command line counts as the package."""
    known = {str(entry.module) for entry in RECIPES} | ABSENT.keys()
    return [module for module in runnable(package) if module not in known and module.removesuffix(".cli") not in known]


def missing(package: Path) -> list[str]:
    """Modules of the tables that the installed cookbook lacks."""
    names = [str(entry.module) for entry in RECIPES if isinstance(entry.module, str)] + list(ABSENT)
    places = [package.parent.joinpath(*name.split(".")) for name in names]
    return [
        name
        for name, place in zip(names, places, strict=True)
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file())
    ]
