"""The sweep over methods: all on the same data, two experiments that do not mix, and a reason for whatever cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.running.filling import with_environment
from lightning_modules.running.methods import import_methods
from lightning_modules.running.requirements import lacking
from results.aggregator import names
from results.common import methods
from sweeps.runner import checked_sweep, expansion, preflight, prepare
from sweeps.runner.errors import SweepError
from sweeps.runner.identity import Identifier
from sweeps.runner.impossible import methods_that_cannot

SWEEP = Path("sweeps/methods.yaml")
PROFILES = ("demo", "paper")


def options(words: list[str]) -> dict[str, str]:
    """Key -> value that counts in the end; configurations come before what stands beside them."""
    return {key.removeprefix("--"): value for key, _, value in (word.partition("=") for word in words[1:])}


def of_cell(method: str, compare: str = "recipe", **variables: str) -> list[str]:
    return with_environment(["fit", f"--method={method}", f"--compare={compare}", "--seed_everything=0"], variables)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_in_the_list_of_methods(profile: str) -> None:
    listed = [cell.parameters["method"] for cell in checked_sweep.load("methods").cells()]
    for name in methods.methods(profile):
        assert name in listed, f"sweeps/profiles/{profile}/{name}.yaml is new: add the line `- {name}` to {SWEEP}"
    for name in listed:
        assert (Path("sweeps/profiles") / profile / f"{name}.yaml").is_file(), (
            f"{SWEEP} names {name}, which has no profile"
        )


def test_every_method_has_a_family_and_a_name_in_the_table() -> None:
    for cell in checked_sweep.load("methods").cells():
        name = cell.parameters["method"]
        assert names.family(name) != names.OTHER_FAMILY, f"add {name} to FAMILIES in results/aggregator/names.py"
        assert name in names.METHODS, f"add {name} to METHODS in results/aggregator/names.py"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_method_gets_the_same_data_split_and_held_out_images_whatever_its_profile_says(profile: str) -> None:
    found = set()
    for name in methods.methods(profile):
        words = options(of_cell(name, PROFILE=profile))
        found.add((words["data.init_args.datasets"], words["data.init_args.holdout"]))
    ((datasets, holdout),) = found
    assert json.loads(datasets) == methods.datasets(profile)
    assert float(holdout) > 0


def test_data_that_the_user_names_replaces_the_shared_one() -> None:
    words = of_cell("ulsad", PROFILE="demo", DATASET="visa", DATA_ROOT="/data/visa")
    places = [n for n, word in enumerate(words) if word.startswith("--data.init_args.datasets=")]
    assert json.loads(words[places[-1]].partition("=")[2])[0]["root"] == "/data/visa"


def test_recipe_leaves_backbone_and_image_size_to_the_profiles_and_matched_does_not() -> None:
    recipe, matched = (options(of_cell("uniad", compare, PROFILE="paper")) for compare in ("recipe", "matched"))
    assert not [key for key in recipe if key.startswith("model.")]
    with_backbone = {options(of_cell(name, "matched", PROFILE="paper")).get("model.init_args.backbone.name")
                     for name in ("uniad", "padim", "rad", "dfr")}  # fmt: skip
    assert with_backbone == {matched["model.init_args.backbone.name"]}
    assert matched["model.init_args.image_size"] == "256"


def test_a_backbone_for_all_is_refused_where_each_method_is_to_have_its_own() -> None:
    with pytest.raises(SystemExit, match="COMPARE=matched"):
        of_cell("uniad", PROFILE="demo", BACKBONE="resnet18.tv_in1k")
    with pytest.raises(SystemExit, match="COMPARE=longer is about"):
        of_cell("uniad", "longer", PROFILE="demo", BACKBONE="resnet18.tv_in1k")
    words = options(of_cell("uniad", "matched", PROFILE="demo", BACKBONE="resnet18.tv_in1k"))
    assert words["model.init_args.backbone.name"] == "resnet18.tv_in1k"


def test_a_mistyped_method_or_experiment_is_named_with_what_there_is() -> None:
    with pytest.raises(SystemExit, match="Did you mean 'uniad'"):
        of_cell("unaid", PROFILE="demo")
    with pytest.raises(SystemExit, match="allowed: recipe, matched, longer"):
        of_cell("uniad", "recipes", PROFILE="demo")
    with pytest.raises(SystemExit, match="--method=NAME"):
        with_environment(["fit", "--compare=recipe"], {})


def test_without_a_method_the_arguments_stay_as_they_are() -> None:
    words = ["fit", "--config", "a.yaml", "--x=1"]
    assert with_environment(words, {}) == words


def test_compare_and_setting_choose_one_experiment_of_the_same_file() -> None:
    sweep = prepare.chosen(checked_sweep.load("methods"), {"COMPARE": "matched", "SETTING": "per_category"})
    for cell in sweep.cells():
        assert (cell.parameters["compare"], cell.parameters["data.init_args.setting"]) == ("matched", "per_category")
    with pytest.raises(SweepError, match=r"COMPARE is 'both'. Allowed: recipe, matched"):
        prepare.chosen(sweep, {"COMPARE": "both"})
    with pytest.raises(SweepError, match=r"has no parameter data.init_args.setting"):
        prepare.chosen(checked_sweep.load("patchcore"), {"SETTING": "unified"})


def test_several_methods_are_chosen_with_one_condition() -> None:
    cells = checked_sweep.load("methods").cells()
    chosen = expansion.select(cells, ["method=uniad,patchcore"], SWEEP)
    assert sorted(cell.parameters["method"] for cell in chosen) == ["patchcore", "uniad"]
    with pytest.raises(SweepError, match="method=unaid"):
        expansion.select(cells, ["method=uniad,unaid"], SWEEP)


def test_a_list_that_is_one_value_is_not_taken_apart() -> None:
    cells = [expansion.Cell({"levels": "4,3"}), expansion.Cell({"levels": "4"})]
    assert expansion.select(cells, ["levels=4,3"], SWEEP) == cells[:1]


def test_the_experiments_have_different_cells_and_each_methods_code_counts_alone() -> None:
    found: dict[str, Any] = {}
    for compare in methods.COMPARES:
        variables = {"PROFILE": "demo", "COMPARE": compare}
        sweep = prepare.chosen(checked_sweep.load("methods"), variables)
        identifier = Identifier(sweep, variables, [])
        for name in ("uniad", "padim") if compare != "longer" else ("uniad",):
            (cell,) = expansion.select(sweep.cells(), [f"method={name}"], SWEEP)
            found[compare, name] = identifier.describe(cell, None)
    assert len({json.dumps(value, default=str) for value in found.values()}) == 5
    assert found["recipe", "uniad"]["code"] != found["recipe", "padim"]["code"]
    assert found["recipe", "uniad"]["configs"] == found["matched", "uniad"]["configs"]
    assert found["recipe", "uniad"]["shared"] != found["matched", "uniad"]["shared"]


@pytest.mark.parametrize("profile", PROFILES)
def test_methods_that_cannot_have_the_matched_backbone_say_why(profile: str) -> None:
    sweep = prepare.chosen(checked_sweep.load("methods"), {"COMPARE": "matched"})
    reasons = methods_that_cannot(sweep.cells(), {"PROFILE": profile})
    assert {"dinomaly", "dinomaly2", "inp_former"} <= set(reasons)
    assert all("vision transformer" in reason or "its own trunk" in reason for reason in reasons.values())
    own = {name for name, method in import_methods().items() if not method.has_backbone}
    assert own == {name for name, reason in reasons.items() if "its own trunk" in reason}
    assert not methods_that_cannot(checked_sweep.load("methods").cells(), {"PROFILE": profile})


def test_longer_is_the_recipe_with_three_times_the_training_of_every_method_that_trains() -> None:
    once = {name for name, method in import_methods().items() if method.recipe.max_epochs == 1}
    for name in once:
        with pytest.raises(methods.CannotError, match="not for longer: it goes over the images once"):
            methods.shared(name, "longer", "demo")
    for name in sorted({*methods.methods("demo")} - once):
        trainer = yaml.safe_load(methods.profile(name, "demo").read_text(encoding="utf-8"))["trainer"]
        longer = methods.shared(name, "longer", "demo")
        recipe = methods.shared(name, "recipe", "demo")
        assert {key: longer[key] for key in recipe} == recipe
        more = {key.removeprefix("trainer."): value for key, value in longer.items() if key.startswith("trainer.")}
        assert more
        assert {key: value / trainer[key] for key, value in more.items()} == dict.fromkeys(more, 3), name
    cells = prepare.chosen(checked_sweep.load("methods"), {"COMPARE": "longer"}).cells()
    assert set(methods_that_cannot(cells, {"PROFILE": "demo"})) == once
    with pytest.raises(SweepError, match=r"paper.yaml has no longer.*Use PROFILE=demo"):
        methods_that_cannot(cells, {"PROFILE": "paper"})


def test_a_folder_of_pictures_that_is_missing_is_a_reason(tmp_path: Path) -> None:
    model = {
        "class_path": "lightning_modules.destseg.DeSTSeg",
        "init_args": {"backbone": {"name": "resnet18.tv_in1k", "weights": "random"}},
    }
    for folder, reason in ((tmp_path / "no_such", "no_such"), (tmp_path, "")):
        anomalies = {"source": "dtd", "folder": str(folder)}
        found = lacking({"model": model, "data": {"init_args": {"anomalies": anomalies}}}) or ""
        assert reason in found
        assert bool(found) == bool(reason)


def test_a_broken_file_of_shared_options_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SHARED", tmp_path)
    with pytest.raises(ValueError, match="no comparison of profile demo"):
        methods.shared("uniad", "recipe", "demo")
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({"shared": {}, "matched": {"shared": {}, "canot": {}}}))
    with pytest.raises(ValueError, match=r"unknown key 'canot'. Did you mean 'cannot'"):
        methods.shared("uniad", "recipe", "demo")
    (tmp_path / "demo.yaml").write_text(
        yaml.safe_dump({"shared": {}, "matched": {"shared": {}}, "longer": {"own": {}}})
    )
    with pytest.raises(methods.CannotError, match=r"demo.yaml says under longer, own nothing of uniad"):
        methods.shared("uniad", "longer", "demo")
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({"shared": {}, "matched": {"shared": {}}, "longer": 3}))
    with pytest.raises(ValueError, match=r"longer is 3; it is a mapping with own and cannot"):
        methods.shared("uniad", "longer", "demo")


def test_a_method_that_the_matched_backbone_does_not_suit_is_left_out_with_the_constructors_words() -> None:
    """The probe builds the model with random weights and fetches nothing."""
    sweep = prepare.chosen(checked_sweep.load("methods"), {"COMPARE": "matched"})
    variables = {"PROFILE": "demo"}
    cells = expansion.select(sweep.cells(), ["method=uniad,padim"], SWEEP)
    check = preflight.Check.__new__(preflight.Check)
    check._sweep, check._cells, check._variables = sweep, cells, variables
    question = check._question()
    for group in question:
        group["cells"] = [
            [
                place,
                parameters,
                [*arguments, "--model.init_args.backbone.levels=[9]"] if parameters["method"] == "padim" else arguments,
            ]
            for place, parameters, arguments in group["cells"]
        ]
    reasons = {
        cell.parameters["method"]: reason for cell, reason in zip(cells, preflight._lacking(question), strict=True)
    }
    assert reasons["uniad"] is None
    assert "level" in reasons["padim"]
