"""Recipes and options: what is read, coerced, refused, and written again."""

import dataclasses

import pytest
import yaml
from transformers import TrainingArguments

from cdfast.command_line import parse_command_line
from cdfast.config import (
    STAGES,
    ConfigError,
    Recipe,
    StageRecipe,
    from_dict,
    load_recipe,
    override,
    recipe_files,
    to_dict,
)
from cdfast.terms import weighted_terms

SHIPPED = sorted(recipe_files())
# Fields that have no option of their own; `compare` is also a flag.
NOT_ON_COMMAND_LINE = ("description", "arguments", "stages", "stage", "compare", "architecture")


def recipe(**options):
    """A small recipe with a stage of each kind."""
    values = {"name": "four", "teacher": "t", "student": "s", "data": ["d.json"]}
    return from_dict(Recipe, {**values, "stages": [{"stage": s} for s in STAGES], **options})


def stage(changed, kind):
    return next(s for s in changed.stages if s.stage == kind)


def weights(changed, name):
    return {s.stage: getattr(s, name) for s in changed.stages}


# -- shipped recipes -------------------------------------------------------------------------------


def test_the_documented_recipes_are_shipped():
    assert {"miniature", "compodistill-2b", "compodistill-2b-official"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_says_what_it_is(name):
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.description
    assert loaded.stages


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_runs_once_its_checkpoints_and_data_are_given(name):
    loaded = load_recipe(name)
    given = {} if loaded.data else {"data": ["x.json"]}
    if loaded.teacher is None and any(s.needs_teacher for s in loaded.stages):
        given["teacher"] = "folder"
    if not loaded.student:
        given["student"] = "folder"
    override(loaded, given).check_runnable()


@pytest.mark.parametrize("name", SHIPPED)
def test_written_recipe_reads_as_the_same(name, tmp_path):
    loaded = override(load_recipe(name), {"adam_epsilon": "1e-8", "max_steps": 3, "layers": "all"})
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(to_dict(loaded), sort_keys=False))
    assert load_recipe(str(path)) == loaded


def test_command_line_without_a_recipe():
    """The miniature, unless it names models or data of one's own."""
    assert parse_command_line([])[0].name == "miniature"
    assert parse_command_line(["--max-steps", "3"])[0].name == "miniature"
    for option in ("--teacher", "--student", "--data"):
        assert parse_command_line([option, "x"])[0].name == "compodistill"
    assert parse_command_line(["miniature", "--student", "x"])[0].name == "miniature"


def test_variants_of_the_miniature_resolve():
    loaded = load_recipe("miniature")
    assert "sft" in loaded.compare
    for name, options in loaded.compare.items():
        variant = override(loaded, {**options, "name": name})
        variant.check_runnable()
        assert variant.name == name
        changed = {f.name for f in dataclasses.fields(Recipe)} - {"name"}
        assert any(getattr(variant, f) != getattr(loaded, f) for f in changed)
    sft = override(loaded, loaded.compare["sft"])
    assert sft.taf is False
    assert not any(s.needs_teacher for s in sft.stages)


def test_official_recipe_differs_from_the_papers_in_the_alignment_and_p_s_only():
    paper, official = (
        to_dict(load_recipe("compodistill-2b")),
        to_dict(load_recipe("compodistill-2b-official")),
    )
    changed = {k for k in paper if paper[k] != official[k]}
    assert changed == {"name", "description", "preset", "student_projector"}


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [*dataclasses.fields(Recipe), *dataclasses.fields(StageRecipe)],
    ids=lambda f: f.name,
)
def test_every_field_says_what_it_is(field):
    text = field.metadata["help"]
    assert text.endswith(".")
    assert len(text) > 10 or field.name in ("seed", "lora_r", "lora_alpha")


def test_help_prints_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_command_line(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in ("--teacher", "--kl-weight", "--alignment-weight", "--resume", "--dry-run"):
        assert name in text
    own = {f.name for f in dataclasses.fields(Recipe) if f.name not in NOT_ON_COMMAND_LINE}
    own |= {f.name for f in dataclasses.fields(StageRecipe) if f.name not in NOT_ON_COMMAND_LINE}
    assert [n for n in sorted(own) if f"--{n.replace('_', '-')}" not in text] == []


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, where, nearest",
    [
        ({"techer": "x"}, "recipe", "teacher"),
        ({"stages": [{"stage": "dft", "max_step": 3}]}, r"recipe.stages\[0\]", "max_steps"),
        ({"stages": [{"stage": "pre-train"}]}, "stage", "pretrain"),
        ({"arguments": {"save_stepz": 3}}, "arguments", "save_steps"),
        ({"stages": [{"arguments": {"adam_betta2": 0.9}}]}, "arguments", "adam_beta2"),
        ({"turns": "dialog"}, "turns", "dialogue"),
        ({"preset": "offical"}, "preset", "official"),
        ({"dtype": "bfloat"}, "dtype", "bfloat16"),
        ({"teacher_dtype": "float-16"}, "teacher_dtype", "float16"),
        ({"on_error": "raises"}, "on_error", "raise"),
        ({"student_projector": "mpl"}, "student_projector", "mlp"),
        ({"evaluate": "minature"}, "evaluate", "miniature"),
    ],
    ids=lambda v: v.replace("\\", "") if isinstance(v, str) else "in",
)
def test_unknown_key_or_choice_is_refused_with_the_nearest(values, where, nearest):
    with pytest.raises(ConfigError, match=rf"^{where}: .*Did you mean '{nearest}'\?"):
        from_dict(Recipe, values)


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("--techer", "teacher"),
        ("--max-step", "max_steps"),
        ("--kl_wieght", "kl_weight"),
        ("--dft.max-step", "max_steps"),
        ("--save-stepz", "save_steps"),
        ("--dtf.max-steps", "dft|dpt"),
        ("--objektive", "objective"),
    ],
)
def test_unknown_option_is_refused_with_the_nearest(option, nearest):
    with pytest.raises(ConfigError, match=rf"is unknown. Did you mean '({nearest})'\?"):
        parse_command_line(["miniature", option, "3"])


def test_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'miniature'.*YAML file"):
        load_recipe("minature")


def test_a_stage_the_recipe_does_not_have():
    with pytest.raises(ConfigError, match="'miniature' has no stage 'pretrain'"):
        parse_command_line(["miniature", "--pretrain.max-steps", "3"])


def test_argument_without_an_option():
    with pytest.raises(ConfigError, match="unexpected argument 'again'"):
        parse_command_line(["miniature", "--resume", "again"])


@pytest.mark.parametrize(
    "text", ["a: [1", "- a\n- b\n", "just words"], ids=["broken", "list", "text"]
)
def test_file_that_is_no_recipe(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine.yaml: .*(no valid YAML|expected a mapping)"):
        load_recipe(str(path))


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, want",
    [
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", "1", 1.0),
        ("muon_learning_rate", "none", None),
        ("muon_learning_rate", "2e-2", 0.02),
        ("max_steps", "1e3", 1000),
        ("max_steps", 7.0, 7),
        ("lora", "true", True),
        ("lora", "False", False),
        ("turns_mix", ["0", "2", "1"], [0, 2, 1]),
        ("turns_mix", 5, [5]),
        ("lr_scheduler_type", "linear", "linear"),
    ],
    ids=str,
)
def test_values_take_the_type_of_their_field(name, text, want):
    for changed in (
        override(recipe(), {name: text}),
        from_dict(Recipe, {"stages": [{name: text}]}),
    ):
        got = getattr(changed.stages[-1], name)
        assert got == want
        assert type(got) is type(want)


@pytest.mark.parametrize(
    "name, text, kind",
    [
        ("max_steps", "1.5", "int"),
        ("max_steps", "inf", "int"),
        ("max_steps", True, "int"),
        ("learning_rate", "fast", "float"),
        ("learning_rate", "nan", "float"),
        ("learning_rate", None, "float"),
        ("lora", "yes", "bool"),
        ("lora", 1, "bool"),
        ("turns_mix", ["0", "x"], "int"),
        ("lr_scheduler_type", {"a": 1}, "str"),
        ("arguments", "bf16", "dict"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(name, text, kind):
    with pytest.raises(ConfigError, match=rf"stages\[0\].{name}.*: expected {kind}; got"):
        from_dict(Recipe, {"stages": [{"stage": "dft", name: text}]})


def test_variant_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match=r"recipe.compare.sft: expected dict; got 3"):
        from_dict(Recipe, {"compare": {"sft": 3}})


def test_lists_and_flags_on_the_command_line():
    line = (
        "miniature --data a.json b.json --taf false --resume --image-root x --unshifted-kl-mask "
        "--learning_rate=3e-4 --max-steps -1 --compare sft"
    )
    changed, flags = parse_command_line(line.split())
    assert changed.data == ["a.json", "b.json"]
    assert changed.image_root == ["x"]
    assert changed.taf is False
    assert changed.unshifted_kl_mask is True
    assert {(s.learning_rate, s.max_steps) for s in changed.stages} == {(3e-4, -1)}
    assert flags.compare == ["sft"]
    assert flags.resume
    assert not flags.overwrite
    assert not flags.dry_run


def test_options_of_the_dry_run():
    _, flags = parse_command_line(
        ["--dry-run", "--dry-run-samples", "5", "--dry-run-json", "a.json"]
    )
    assert (flags.dry_run_samples, str(flags.dry_run_json)) == (5, "a.json")
    _, flags = parse_command_line(["--dry-run"])
    assert (flags.dry_run_samples, flags.dry_run_json) == (None, None)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dry-run-samples", "5"], "expected --dry-run beside it"),
        (["--dry-run-json", "a.json"], "expected --dry-run beside it"),
        (["--dry-run", "--dry-run-samples", "-1"], "expected a number of records.*'-1'"),
        (["--dry-run", "--dry-run-samples", "few"], "expected a number of records.*'few'"),
    ],
)
def test_wrong_options_of_the_dry_run_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        parse_command_line(arguments)


def test_no_argument_means_the_miniature():
    assert parse_command_line([])[0] == load_recipe("miniature")
    assert parse_command_line(["--seed", "3"])[0] == override(load_recipe("miniature"), {"seed": 3})
    assert parse_command_line(["--list"])[0] is None


# -- stages ----------------------------------------------------------------------------------------


NONE = dict.fromkeys(STAGES, 0.0)


def test_default_weights_of_the_stages():
    assert weights(recipe(), "lm_weight") == {**dict.fromkeys(STAGES, 1.0), "preference": 0}
    assert weights(recipe(), "kl_weight") == {**NONE, "dpt": 1, "dft": 1}
    assert weights(recipe(), "alignment_weight") == {**NONE, "dft": 1}
    assert weights(recipe(), "preference_weight") == {**NONE, "preference": 1}


@pytest.mark.parametrize("name", ["hidden_weight", "visual_kl_weight", "relation_weight"])
def test_losses_of_other_systems_are_off_and_stay_out_of_stages_without_a_teacher(name):
    assert weights(recipe(), name) == dict.fromkeys(STAGES, 0.0)
    changed = override(recipe(), {name: 0.5, "kl_weight": 0, "alignment_weight": 0})
    assert weights(changed, name) == {**NONE, "dpt": 0.5, "dft": 0.5}
    without = override(changed, {"teacher": "none", "taf": False})
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"Give --teacher PATH, or --{option} 0."):
        without.check_runnable()


SYSTEMS = ["", "-sft", "-llavadi", "-llava-kd", "-llava-mod", "-official"]


def test_miniatures_of_all_systems_have_equal_steps_and_mixes():
    found = {system: load_recipe(f"miniature{system}").stages for system in SYSTEMS}
    schedules = {
        system: [(s.max_steps, s.batch_size, s.turns_mix, s.learning_rate) for s in stages]
        for system, stages in found.items()
    }
    assert all(sum(steps for steps, *_ in s) == 520 for s in schedules.values())
    # The preference stage stands for the last 40 steps.
    preferring = schedules.pop("-llava-mod")
    assert [steps for steps, *_ in preferring] == [20, 200, 260, 40]
    assert found["-llava-mod"][-1].stage == "preference"
    photos = [s.max_steps for s in load_recipe("miniature-photos").stages]
    assert photos == [20, 600, 280, 20]
    want = schedules[""]
    assert all(schedule == want for schedule in schedules.values())
    assert [rest for _, *rest in preferring[:3]] == [rest for _, *rest in want[:3]]


def test_recipes_of_the_systems_have_their_losses():
    def terms(name):
        return [(s.stage, weighted_terms(s)) for s in load_recipe(name).stages]

    distilled = "LM 1 + KL 1 + visual KL 1 + relation 0.5"
    for prefix, suffix in (("", "-2b"), ("miniature-", "")):
        kd = terms(f"{prefix}llava-kd{suffix}")[:3]
        assert kd == [("dpt", distilled), ("sft", "LM 1"), ("dft", distilled)]
        di = terms(f"{prefix}llavadi{suffix}")[:2]
        assert di == [("pretrain", "LM 1"), ("dft", "LM 1 + KL 1 + hidden-state 1")]
        mod = terms(f"{prefix}llava-mod{suffix}")
        assert mod[:2] == [("pretrain", "LM 1"), ("dft", "KL 1")]
        assert mod[-1] == ("preference", "preference 1")
        assert load_recipe(f"{prefix}llava-mod{suffix}").stages[-1].preference_beta == 0.1
        assert load_recipe(f"{prefix}llava-mod{suffix}").kl_objective == "soft_ce"
        assert load_recipe(f"{prefix}llavadi{suffix}").hidden_objective == "mse"


def test_unprefixed_weight_stays_out_of_stages_without_that_loss():
    given = {"kl_weight": 0.5, "alignment_weight": "3", "lm_weight": 2, "preference_weight": 4}
    changed = override(recipe(), given)
    assert weights(changed, "kl_weight") == {**NONE, "dpt": 0.5, "dft": 0.5}
    assert weights(changed, "alignment_weight") == {**NONE, "dft": 3}
    assert weights(changed, "lm_weight") == {**dict.fromkeys(STAGES, 2.0), "preference": 0}
    assert weights(changed, "preference_weight") == {**NONE, "preference": 4}


def test_pairs_are_the_data_of_one_loss_alone():
    with pytest.raises(ConfigError, match=r"stage 1 \(dft\): expected no other loss .*kl_weight"):
        from_dict(Recipe, {"stages": [{"stage": "dft", "preference_weight": 1}]})
    with pytest.raises(ConfigError, match=r"Give --preference.hidden-weight 0"):
        from_dict(Recipe, {"stages": [{"stage": "preference", "hidden_weight": 0.5}]})
    with pytest.raises(ConfigError, match=r"preference_beta: .*expected more than 0; got 0"):
        from_dict(Recipe, {"stages": [{"stage": "preference", "preference_beta": 0}]})
    both = {"stage": "preference", "lm_weight": 0.1}
    assert from_dict(Recipe, {"stages": [both]}).stages[0].pairs
    assert [s.stage for s in recipe().stages if s.pairs] == ["preference"]


def test_prefixed_option_goes_to_that_kind_of_stage_alone():
    changed, _ = parse_command_line(
        ["miniature", "--dft.max-steps", "9", "--dft.kl-weight=0.25", "--dpt.alignment-weight", "2"]
    )
    before = load_recipe("miniature")
    assert [(s.stage, s.max_steps) for s in changed.stages] == [
        (s.stage, 9 if s.stage == "dft" else s.max_steps) for s in before.stages
    ]
    assert [s.kl_weight for s in changed.stages] == [
        0.25 if s.stage == "dft" else s.kl_weight for s in before.stages
    ]
    assert changed.stages[0].alignment_weight == 2.0


def test_prefix_wins_over_an_unprefixed_option_given_before():
    changed = override(recipe(), {"learning_rate": "1e-3", "dft.learning_rate": "1e-5"})
    want = {**dict.fromkeys(STAGES, 1e-3), "dft": 1e-5}
    assert weights(changed, "learning_rate") == want


def test_override_leaves_its_argument_alone():
    before = recipe(arguments={"save_steps": 5})
    again = recipe(arguments={"save_steps": 5})
    override(before, {"save_steps": 7, "dft.logging_steps": 2, "kl_weight": 0.5, "seed": 4})
    assert before == again


# -- TrainingArguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, want",
    [
        ("bf16", "true", True),
        ("save_steps", "50", 50),
        ("adam_epsilon", "1e-6", 1e-6),
        ("save_strategy", "no", "no"),
        ("eval_strategy", "steps", "steps"),
        ("report_to", "none", "none"),
        ("tf32", "none", None),
        ("run_name", "12", "12"),
        ("lr_scheduler_kwargs", "{num_decay_steps: 3}", {"num_decay_steps": 3}),
        ("label_names", "[a, b]", ["a", "b"]),
    ],
    ids=str,
)
def test_training_arguments_pass_through_with_their_type(name, text, want, tmp_path):
    option = f"--{name.replace('_', '-')}"
    changed, _ = parse_command_line(["miniature", option, text])
    got = changed.arguments[name]
    assert got == want
    assert isinstance(got, (type(want), float))
    # And TrainingArguments takes it.
    TrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, **changed.arguments})
    staged, _ = parse_command_line(["miniature", f"--dpt.{name}", text])
    assert staged.stages[0].arguments[name] == want
    assert staged.arguments == load_recipe("miniature").arguments


def test_flag_of_training_arguments_without_a_value():
    assert parse_command_line(["miniature", "--bf16"])[0].arguments["bf16"] is True


def test_yaml_words_in_arguments_are_read_as_the_field_means_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("arguments: {save_strategy: no, adam_epsilon: 1e-8, bf16: no}\n")
    want = {"save_strategy": "no", "adam_epsilon": 1e-8, "bf16": False}
    assert load_recipe(str(path)).arguments == want


@pytest.mark.parametrize(
    "name, text, kind", [("save_steps", "often", "float"), ("bf16", "1", "bool")]
)
def test_training_argument_of_another_type_is_refused(name, text, kind):
    with pytest.raises(ConfigError, match=f"arguments.{name}: expected {kind}; got '{text}'"):
        parse_command_line(["miniature", f"--{name}", text])


def test_an_argument_asked_for_wins_over_that_of_a_stage():
    recipe = load_recipe("miniature")
    assert any(stage.arguments.get("save_strategy") == "no" for stage in recipe.stages) or (
        recipe.arguments.get("save_strategy") == "no"
    )
    asked = override(recipe, {"save_strategy": "steps"})
    assert asked.arguments["save_strategy"] == "steps"
    assert not any("save_strategy" in stage.arguments for stage in asked.stages)


def test_training_argument_that_is_broken_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"arguments.report_to: expected text or YAML; got '\[a'"):
        parse_command_line(["miniature", "--report-to", "[a"])


# -- check_runnable --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student": ""}, "student: expected a checkpoint; got none. Give --student"),
        ({"stages": []}, "stages: expected at least one; got none"),
        ({"teacher": None}, r"teacher: stage 3 \(dpt\) distils.*got none. Give --teacher"),
        ({"data": []}, r"data: stage 1 \(pretrain\) has none.*--pretrain.data"),
        (
            {"teacher": None, "stages": [{"stage": "sft"}]},
            "taf: needs a teacher, whose adapter it fetches. Give --taf false",
        ),
    ],
    ids=["student", "stages", "teacher", "data", "taf"],
)
def test_what_a_run_needs_is_named_when_it_is_missing(options, message):
    recipe().check_runnable()
    with pytest.raises(ConfigError, match=message):
        recipe(**options).check_runnable()


def test_data_of_a_stage_stands_for_the_recipes():
    staged = [{"stage": s, "data": ["x.json"]} for s in STAGES]
    recipe(data=[], stages=staged).check_runnable()


def test_no_teacher_is_needed_where_no_stage_distils():
    options = {"kl_weight": 0, "alignment_weight": 0, "taf": False, "teacher": "none"}
    options |= {"preference.preference_weight": 0, "preference.lm_weight": 1}
    changed = override(recipe(), options)
    assert changed.teacher is None
    changed.check_runnable()


def test_the_largest_image_is_that_of_the_image_reader():
    from cdfast.images import MAX_PIXELS

    assert Recipe().max_pixels == MAX_PIXELS
