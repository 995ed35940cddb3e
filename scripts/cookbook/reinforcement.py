"""Recipes that learn from rewards."""

from __future__ import annotations

from scripts.cookbook.outcome import Judge, agreeing, refused, rises, said, trained
from scripts.cookbook.recipe import (
    GRADER,
    IS,
    LOG,
    MODEL_IS,
    NO_THOUGHT,
    PLAIN,
    REWARD,
    STUDENT,
    TEACHER,
    TIMEOUT_S,
    Recipe,
    recipe,
)


def math_rl(name: str, *args: str, judge: Judge, timeout_s: float = TIMEOUT_S) -> Recipe:
    return Recipe(name, recipe("math_rl.train"), (MODEL_IS, *args, *LOG), judge, timeout_s=timeout_s)


SMALL = ("groups_per_batch=2", "group_size=2", "max_tokens=16", "max_steps=1")
REINFORCEMENT = (
    math_rl(
        "math_rl arithmetic",
        *(NO_THOUGHT, "env=arithmetic", IS, "groups_per_batch=32", "group_size=8", "max_tokens=6", "max_steps=16"),
        *("learning_rate=2e-3", "save_every=8"),
        judge=agreeing(rises(16, REWARD, 3, 0.3)),
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
        judge=agreeing(trained(2, REWARD)),
    ),
    *(
        math_rl(f"math_rl {env}", f"env={env}", IS, *SMALL, judge=agreeing(trained(1, REWARD)))
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
        agreeing(trained(1, REWARD)),
    ),
    Recipe(
        "rl_numerics_check",
        recipe("rl_numerics_check.train"),
        (f"model_name={STUDENT}", "groups_per_batch=2", "group_size=2", "max_tokens=32", "max_steps=1", *LOG),
        agreeing(trained(1, REWARD)),
    ),
    Recipe(
        "guess_number",
        recipe("multiplayer_rl.guess_number.train"),
        (MODEL_IS, NO_THOUGHT, "batch_size=2", "group_size=2", "max_tokens=8", "eval_every=0", "max_steps=1", *LOG),
        agreeing(trained(1, REWARD)),
    ),
    Recipe(
        "twenty_questions",
        recipe("multiplayer_rl.twenty_questions.train"),
        (
            *(MODEL_IS, NO_THOUGHT, "batch_size=2", "group_size=2", "num_epochs=1", "max_tokens=8"),
            *("eval_every=0", "max_steps=1", *LOG),
        ),
        agreeing(trained(1, REWARD)),
    ),
    Recipe(
        "text_arena",
        recipe("multiplayer_rl.text_arena.train"),
        (
            *(MODEL_IS, NO_THOUGHT, "batch_size=2", "num_train_datapoints=8", "num_test_datapoints=2", "max_tokens=8"),
            *("eval_every=1", "max_steps=1", *LOG),
        ),
        agreeing(trained(1, REWARD)),
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
        agreeing(trained(1, REWARD)),
        after="rubric generate_data",
    ),
    Recipe(
        "rubric prometheus",
        recipe("rubric.prometheus_experimental"),
        (
            *(f"model_name={TEACHER}", f"grader_llm_name={GRADER}", IS, "groups_per_batch=2", "train_group_size=2"),
            *("max_tokens=8", "max_steps=1", "eval_every=0", *LOG),
        ),
        agreeing(trained(1, REWARD)),
    ),
    Recipe("rubric debug_env", recipe("rubric.debug_env"), (), said("Extracted Score:")),
    Recipe(
        "forecasting",
        recipe("forecasting.train"),
        (
            *(MODEL_IS, "renderer_name=qwen3", "data_path={work}/forecasts.csv", "groups_per_batch=2", "group_size=2"),
            *("validation_group_size=1", "max_validation_questions=2", "max_tokens=16", "max_steps=1", *LOG),
        ),
        agreeing(trained(1, REWARD)),
    ),
    Recipe(
        "forecasting data",
        recipe("forecasting.data"),
        ("--data-path={work}/forecasts.csv",),
        said("train: 32 examples", "validation: 16 examples"),
    ),
)
