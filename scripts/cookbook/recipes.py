"""The table of recipes: every module of the cookbook that can be run, how it is run here, and what is a good end.

Those that can't be run offline stand in ABSENT, by name and with the reason. A module of the installed cookbook that is
in neither table is a bad verdict of its own (`unlisted`), so that none is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.cookbook.outcome import Judge, falls, refused, resumed, rises, said, trained

MODEL = "Qwen/Qwen3-8B"
PLAIN = "Qwen/Qwen3.5-9B-Base"
STUDENT, TEACHER, GRADER = "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.6-35B-A3B"
NAMES = (MODEL, PLAIN)
WIDE_NAMES = (STUDENT, TEACHER, GRADER)  # some recipes ask these for more than the shipped model's 2048 positions

RECIPES_PACKAGE, SCRIPTS_PACKAGE = "tinker_cookbook.recipes", "tinker_cookbook.scripts"
OWN = Path(__file__).parent / "client"
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """module: below tinker_cookbook, or a script of ours that uses the cookbook. In `args`, {log} is the recipe's log
    directory, {runs} the one of all, {work} the offline directory; {state} and {sampler} are the last checkpoints of
    the recipe called `after`, and {adapter} what it downloaded, so that it runs first.
    kill_at: kill the process once so many steps are logged, then run it again with `again` added, which wins.
    """

    name: str
    module: str | Path
    args: tuple[str, ...]
    judge: Judge
    stdin: str = ""
    timeout_s: float = TIMEOUT_S
    after: str = ""
    kill_at: int = 0
    again: tuple[str, ...] = ()


def recipe(path: str) -> str:
    return f"{RECIPES_PACKAGE}.{path}"


MODEL_IS = f"model_name={MODEL}"
NO_THOUGHT = "renderer_name=qwen3_disable_thinking"
LOG = ("log_path={log}", "behavior_if_log_dir_exists=delete")
IS = "loss_fn=importance_sampling"
REWARD, NLL = "env/all/reward/total", "train_mean_nll"

SUPERVISED = (
    Recipe(
        "sl_loop",
        recipe("sl_loop"),
        (MODEL_IS, "batch_size=8", "max_steps=12", "max_length=256", "save_every=5", "learning_rate=1e-3", LOG[0]),
        resumed(falls(12, NLL, 3, 1.0), NLL, 2),
        kill_at=8,
    ),
    Recipe(
        "sl_basic",
        recipe("sl_basic"),
        (f"model_name={PLAIN}", "max_steps=2", LOG[0]),
        trained(2, NLL),
    ),
    Recipe(
        "chat_sl",
        recipe("chat_sl.train"),
        (MODEL_IS, "dataset=no_robots", "batch_size=16", "max_steps=16", "learning_rate=1e-3", "save_every=8", *LOG),
        falls(16, NLL, 4, 1.0),
    ),
    Recipe(
        "chat_sl tulu3",
        recipe("chat_sl.train"),
        (MODEL_IS, "dataset=tulu3", "batch_size=16", "max_steps=2", "eval_every=0", *LOG),
        trained(2, NLL),
    ),
    Recipe(
        "chat_sl resume",
        recipe("chat_sl.train"),
        (
            *(MODEL_IS, "dataset={work}/alike.jsonl", "batch_size=4", "max_steps=16", "lr_schedule=constant"),
            *("learning_rate=1e-3", "save_every=0", "rolling_save_every=6", "rolling_ttl_seconds=3600", *LOG),
        ),
        resumed(falls(16, NLL, 3, 1.0), NLL, 2),
        kill_at=11,
        again=("behavior_if_log_dir_exists=resume",),
    ),
    Recipe(
        "chat_sl sweep",
        recipe("chat_sl.sweep"),
        (
            *("recipe=sft", f"base.{MODEL_IS}", "base.dataset=no_robots", "base.batch_size=16", "base.eval_every=0"),
            *("training_budget_examples=32", "learning_rates=[1e-4,1e-3]", "lora_ranks=[4]", "sweep_dir={log}"),
        ),
        said("Best config per rank", "Recommendations written to"),
    ),
    Recipe(
        "chat_sl sweep analyze",
        recipe("chat_sl.sweep.analyze"),
        ("--local-dir={runs}/chat_sl_sweep", "--output-dir={log}", "--no-plots"),
        said("models:"),
        after="chat_sl sweep",
    ),
    Recipe(
        "prompt_distillation create_data",
        recipe("prompt_distillation.create_data"),
        ("output_file={log}/lang.jsonl",),
        said("Saved data to"),
    ),
    Recipe(
        "prompt_distillation",
        recipe("prompt_distillation.train"),
        (MODEL_IS, "file_path={work}/alike.jsonl", "batch_size=8", "max_steps=2", "max_length=512", *LOG),
        trained(2, NLL),
    ),
    Recipe(
        "distillation off_policy",
        recipe("distillation.off_policy_reasoning"),
        (
            *(MODEL_IS, "batch_size=4", "max_steps=2", "max_length=512", "buffer_size=16", "max_prompts=32"),
            *("eval_every=0", *LOG),
        ),
        trained(2, NLL),
    ),
    Recipe(
        "decisions forecasting",
        recipe("decisions.forecasting"),
        (MODEL_IS, "data_path={work}/forecasts.csv", "batch_size=4", "max_steps=2", *LOG),
        trained(2, "step"),
    ),
)

PREFERENCES = (
    *(
        Recipe(
            f"dpo {dataset}",
            recipe("preference.dpo.train"),
            (MODEL_IS, f"dataset={dataset}", "batch_size=4", "max_steps=2", "max_length=512", *LOG),
            trained(2, "dpo_loss"),
        )
        for dataset in ("hhh", "helpsteer3", "ultrafeedback")
    ),
    Recipe(
        "shorter",
        recipe("preference.shorter.train"),
        (MODEL_IS, NO_THOUGHT, "batch_size=2", "group_size=2", "max_tokens=16", "eval_every=0", "max_steps=2", *LOG),
        trained(2, REWARD),
    ),
    Recipe(
        "rlhf_pipeline",
        recipe("preference.rlhf.rlhf_pipeline"),
        (
            *(f"base_model={MODEL}", "short_name=tiny", "batch_size=4", "max_length=512", "max_steps=2"),
            *("rl_max_tokens=8", "rl_group_size=2", "eval_every=2", "save_every=2"),
        ),
        said("Writing metrics", never=("Traceback",)),
        timeout_s=600,
    ),
)


def math_rl(name: str, *args: str, judge: Judge, timeout_s: float = TIMEOUT_S) -> Recipe:
    return Recipe(name, recipe("math_rl.train"), (MODEL_IS, *args, *LOG), judge, timeout_s=timeout_s)


SMALL = ("groups_per_batch=2", "group_size=2", "max_tokens=16", "max_steps=1")
REINFORCEMENT = (
    math_rl(
        "math_rl arithmetic",
        *(NO_THOUGHT, "env=arithmetic", IS, "groups_per_batch=32", "group_size=8", "max_tokens=6", "max_steps=24"),
        *("learning_rate=2e-3", "save_every=12"),
        judge=rises(24, REWARD, 3, 0.2),
        timeout_s=900,
    ),
    math_rl(
        "math_rl stable_reinforce",
        *("env=arithmetic", "groups_per_batch=2", "group_size=2", "max_steps=1"),
        judge=refused("stable_reinforce", "importance_sampling"),
    ),
    math_rl(
        "math_rl asynchronous",
        *("env=arithmetic", IS, "groups_per_batch=4", "group_size=4", "max_steps=3", "max_steps_off_policy=2"),
        judge=trained(3, REWARD),
    ),
    math_rl(
        "math_rl streamed",
        *("env=arithmetic", "loss_fn=ppo", "groups_per_batch=4", "group_size=4", "max_steps=2"),
        *("stream_minibatch_config.groups_per_batch=4", "stream_minibatch_config.num_minibatches=2"),
        judge=trained(2, REWARD),
    ),
    *(
        math_rl(f"math_rl {env}", f"env={env}", IS, *SMALL, judge=trained(1, REWARD))
        for env in ("math", "polaris", "deepmath", "gsm8k")
    ),
    *(
        Recipe(
            f"rl_loop {loss}",
            recipe("rl_loop"),
            (MODEL_IS, f"loss_fn={loss}", "batch_size=4", "group_size=4", "max_steps=2", "max_tokens=16", LOG[0]),
            trained(2, "reward/total"),
        )
        for loss in ("importance_sampling", "cispo", "gspo")
    ),
    Recipe(
        "rl_basic",
        recipe("rl_basic"),
        (
            *(f"model_name={PLAIN}", "max_tokens=16", "max_steps=1", LOG[0]),
            "dataset_builder=tinker_cookbook.recipes.math_rl.math_env:Gsm8kDatasetBuilder",
            *(
                "dataset_builder.batch_size=4",
                "dataset_builder.group_size=2",
                "dataset_builder.renderer_name=role_colon",
            ),
            f"dataset_builder.model_name_for_tokenizer={PLAIN}",
        ),
        trained(1, REWARD),
    ),
    Recipe(
        "rl_numerics_check",
        recipe("rl_numerics_check.train"),
        (f"model_name={STUDENT}", "groups_per_batch=2", "group_size=2", "max_tokens=32", "max_steps=1", *LOG),
        trained(1, REWARD),
    ),
    Recipe(
        "guess_number",
        recipe("multiplayer_rl.guess_number.train"),
        (MODEL_IS, NO_THOUGHT, "batch_size=2", "group_size=2", "max_tokens=8", "eval_every=0", "max_steps=1", *LOG),
        trained(1, REWARD),
    ),
    Recipe(
        "twenty_questions",
        recipe("multiplayer_rl.twenty_questions.train"),
        (
            *(MODEL_IS, NO_THOUGHT, "batch_size=2", "group_size=2", "num_epochs=1", "max_tokens=8"),
            *("eval_every=0", "max_steps=1", *LOG),
        ),
        trained(1, REWARD),
    ),
    Recipe(
        "text_arena",
        recipe("multiplayer_rl.text_arena.train"),
        (
            *(MODEL_IS, NO_THOUGHT, "batch_size=2", "num_train_datapoints=8", "num_test_datapoints=2", "max_tokens=8"),
            *("eval_every=1", "max_steps=1", *LOG),
        ),
        trained(1, REWARD),
    ),
    Recipe(
        "text_arena play",
        recipe("multiplayer_rl.text_arena.play"),
        (MODEL_IS, NO_THOUGHT, "checkpoint_path={sampler}", "mode=eval", "num_games=2"),
        said("Wins:"),
        after="text_arena",
    ),
    Recipe(
        "rubric generate_data",
        recipe("rubric.generate_data"),
        (),
        said("Generated test dataset"),
    ),
    Recipe(
        "rubric",
        recipe("rubric.train"),
        (
            *(f"model_name={TEACHER}", f"grader_llm_name={GRADER}", IS, "groups_per_batch=2", "train_group_size=2"),
            *("max_tokens=8", "max_steps=1", "eval_every=0", *LOG),
        ),
        trained(1, REWARD),
        after="rubric generate_data",
    ),
    Recipe(
        "rubric prometheus",
        recipe("rubric.prometheus_experimental"),
        (
            *(f"model_name={TEACHER}", f"grader_llm_name={GRADER}", IS, "groups_per_batch=2", "train_group_size=2"),
            *("max_tokens=8", "max_steps=1", "eval_every=0", *LOG),
        ),
        trained(1, REWARD),
    ),
    Recipe("rubric debug_env", recipe("rubric.debug_env"), (), said("Rubric")),
    Recipe(
        "forecasting",
        recipe("forecasting.train"),
        (
            *(MODEL_IS, "renderer_name=qwen3", "data_path={work}/forecasts.csv", "groups_per_batch=2", "group_size=2"),
            *("validation_group_size=1", "max_validation_questions=2", "max_tokens=16", "max_steps=1", *LOG),
        ),
        trained(1, REWARD),
    ),
    Recipe(
        "forecasting data",
        recipe("forecasting.data"),
        ("--data-path={work}/forecasts.csv",),
        said("train: 32 examples", "validation: 16 examples"),
    ),
)

DISTILLATION = (
    Recipe(
        "distillation on_policy",
        recipe("distillation.on_policy_distillation"),
        (
            *(MODEL_IS, f"teacher_model={TEACHER}", "groups_per_batch=2", "group_size=2", "max_tokens=16"),
            *("max_steps=2", "compute_post_kl=True", "lora_rank=16", *LOG),
        ),
        trained(2, "teacher_kl"),
    ),
    Recipe(
        "distillation multi_teacher",
        recipe("distillation.on_policy_multi_teacher"),
        (
            *(MODEL_IS, f"deepmath_teacher_model={TEACHER}", f"tulu3_teacher_model={STUDENT}", "max_tokens=16"),
            *("deepmath_groups_per_batch=2", "tulu3_groups_per_batch=2", "group_size=2", "max_steps=2", "lora_rank=16"),
            *LOG,
        ),
        trained(2, "teacher_kl"),
    ),
    *(
        Recipe(
            f"sdft {name}",
            recipe("sdft.train"),
            (MODEL_IS, *args, "groups_per_batch=4", "max_tokens=8", "max_steps=2", "eval_every=0", *LOG),
            trained(2, "sdft/num_datums"),
        )
        for name, args in (
            ("forward", ("dataset=sciknoweval",)),
            ("reverse", ("dataset=sciknoweval", "reverse=True")),
            ("toolalpaca", ("dataset=toolalpaca", "teacher_sync_every=1")),
        )
    ),
    Recipe(
        "sdft benchmark",
        recipe("sdft.benchmark"),
        (
            *(MODEL_IS, "dataset=science", "data_dir={work}/arrow", "log_root={log}", "lora_rank=16", "max_tokens=16"),
            *("groups_per_batch=4", "max_steps=1", "sft_batch_size=4", "sft_max_steps=1", "eval_every=0"),
            "behavior_if_log_dir_exists=delete",
        ),
        said(never=("Traceback",)),
    ),
    Recipe(
        "sdft run_continual_learning",
        recipe("sdft.run_continual_learning"),
        (
            *(MODEL_IS, "data_dir={work}/arrow", "log_root={log}", "lora_rank=16", "batch_size=4", "max_tokens=8"),
            *("methods=sft,sdft_topk", "learning_rates=1e-3"),
        ),
        said("EXPERIMENT COMPLETE", never=("Traceback",)),
    ),
)

SAMPLING = (
    Recipe(
        "decisions demo",
        recipe("decisions.demo"),
        (f"--model_name={MODEL}",),
        said('"billing"', '"cookbook"'),
        stdin="Why was I charged twice?\n\n",
    ),
    Recipe(
        "true_thinking_score",
        recipe("true_thinking_score.run_small_experiment"),
        (),
        said("Total problems: 3", never=("Failed on problem",)),
        timeout_s=600,
    ),
    Recipe(
        "true_thinking_score analyze",
        recipe("true_thinking_score.analyze"),
        ("dataset=gsm8k", "n_problems=2", "max_tokens=64", "log_path={log}"),
        said(never=("Traceback",)),
    ),
)

WEIGHTS = (
    Recipe("weights", OWN / "weights.py", ("{log}", "{log}/base", MODEL), said("weights agree")),
    Recipe(
        "scripts merge_tinker_adapter",
        f"{SCRIPTS_PACKAGE}.merge_tinker_adapter_to_hf_model",
        ("--tinker-adapter-path={adapter}", "--hf-model={runs}/weights/base", "--output-path={log}/merged"),
        said(never=("Traceback",)),
        after="weights",
    ),
    Recipe(
        "scripts copy_checkpoint",
        f"{SCRIPTS_PACKAGE}.copy_checkpoint",
        ("--source-path={state}", "--output-kind=training"),
        said("training_path: tinker://"),
        after="chat_sl",
    ),
    Recipe(
        "scripts save_audit_log",
        f"{SCRIPTS_PACKAGE}.save_audit_log",
        ("--once", "--backfill-days=1", "--output-dir={log}"),
        said("Wrote"),
    ),
    Recipe(
        "scripts test_tool_calling_e2e",
        f"{SCRIPTS_PACKAGE}.test_tool_calling_e2e",
        (f"--model={MODEL}",),
        said("Passed:", never=("Error -",)),
    ),
)

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
    recipe("audio.emotion.prepare_data"): HEARS,
    recipe("audio.emotion.evaluate"): HEARS,
    recipe("audio.emotion.rl_train"): HEARS,
    recipe("audio.emotion.sl_train"): HEARS,
    recipe("chat_sl.sweep.launch_all"): "starts chat_sl.sweep for eighteen fixed models and logs to Weights & Biases",
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
