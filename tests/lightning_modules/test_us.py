"""Uninformed Students' stages: teachers before students, the maps' scale after them, and what a record says of both."""

from functools import partial

import numpy as np
import pytest
import torch

from lightning_modules.us import US, TeacherConfig
from models.backbones import BackboneConfig

BACKBONE = {"name": "test_efficientnet.r160_in1k", "levels": [4], "weights": "random", "padding": "default"}
ARGUMENTS = {
    "backbone": BACKBONE,
    "image_size": 32,
    "patch_sizes": [17, 33],
    "students": 2,
    "widths": {17: [3, 4, 4, 4], 33: [3, 4, 4, 4]},
    "teacher": {"steps": 5, "batch_size": 4},
    "optimizer": {"lr": 0.01},
}


def configured(project, method: str = "us", holdout: float = 0.2, **options):
    return project.use("us.US", data={"holdout": holdout}, **ARGUMENTS | options)


@pytest.fixture
def make(project):
    """A project of US with further arguments of its model; 10 training images and 2 held out."""
    return partial(configured, project)


@pytest.fixture
def trained(trained_once):
    return trained_once("us", partial(configured, score_parts=True))


def test_the_record_names_the_teachers_data_and_the_source_of_the_scale(trained, data_root):
    project = trained
    record = project.record()
    notes = " ".join(record.record.notes)
    assert "teacher distilled on 10 training images, not ImageNet, 5 steps" in notes
    assert "maps on the scale of 2 held-out normal images" in notes
    assert set(record.metrics.variant.fillna("")) == {
        "", "map=error", "map=variance", "patch_size=17", "patch_size=33"
    }  # fmt: skip
    project.run(f"--ckpt_path={project.checkpoint()}", command="test", name="again")
    again = project.record("again")
    assert " ".join(again.record.notes).count("held-out") == 1
    np.testing.assert_allclose(record.metrics.value, again.metrics.value, atol=1e-6)
    project.run(f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}", command="predict")
    maps = (project.results / "work" / "single" / "first" / "predictions").glob("*.npy")
    assert all(np.isfinite(np.load(path)).all() for path in maps)


@pytest.mark.parametrize(
    "options", [{"holdout": 0.0}, pytest.param({"calibration": "train"}, marks=pytest.mark.program)]
)
def test_without_held_out_images_or_on_demand_the_training_images_give_the_scale_and_the_record_says_so(make, options):
    record = make(**options).fit()
    count = 12 if "holdout" in options else 10
    assert any(f"scale of {count} training images" in note for note in record.record.notes)


def test_students_learn_teachers_stay_and_the_scale_is_that_of_the_last_weights(make):
    project = make()
    losses = project.fit("--trainer.max_epochs=6", "--run.curve_every=2").history
    losses = losses[losses.metric == "train/loss"].value.tolist()
    assert losses[-1] < losses[0]
    weights = project.weights()
    net = US(BackboneConfig(**BACKBONE), image_size=32, patch_sizes=(17, 33), students=2, widths=ARGUMENTS["widths"])
    net.network.load_state_dict({n.removeprefix("network."): v for n, v in weights.items() if n.startswith("network.")})
    assert net.network.has_statistics


def test_a_resumed_training_is_the_uninterrupted_one(make, trained, cut_off):
    project = make(score_parts=True)
    cut_off(project)
    project.run()
    whole, resumed = trained.weights(), project.weights()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert project.record().record.notes == trained.record().record.notes


def test_a_finished_teacher_is_used_as_it_is(make, trained):
    first = trained.weights()
    project = make(teacher={"file": str(trained.checkpoint())})
    record = project.fit(name="second")
    second = project.weights("second")
    descriptors = [n for n in first if n.startswith("network.teachers.") and ".decode." not in n]
    assert descriptors
    assert all(
        torch.equal(first[name], second[name]) for name in [*descriptors, *(n for n in first if ".scales." in n)]
    )
    assert any("teacher from a file" in note and "backbone is not used" in note for note in record.record.notes)


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_trained(make, tmp_path):
    torch.save({"17.conv1.weight": torch.zeros(3)}, tmp_path / "teacher.pth")
    for file, message in (("teacher.pth", "lacks"), ("none.pth", "does not exist")):
        project = make(teacher={"file": str(tmp_path / file)})
        with pytest.raises(SystemExit, match=message):
            project.run(name=file)


def test_teachers_learn_from_a_folder_of_images(make, data_root):
    record = make(teacher={"steps": 2, "batch_size": 4, "images": str(data_root / "disc" / "train")}).fit()
    assert any("teacher distilled on 6 images of a folder" in note for note in record.record.notes)


@pytest.mark.program
def test_the_reimplementations_reading_trains_and_scores(make):
    record = make(
        target="decoded", teacher={"steps": 2, "batch_size": 4, "compactness": "samples", "triplet": 1.0}
    ).fit()
    assert record.metrics.value.notna().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": BackboneConfig(**BACKBONE | {"levels": [3, 4]})}, "one entry"),
        ({"calibration": "test"}, "auto or train"),
        ({"padding": "reflect", "image_size": 16}, "larger than half a patch"),
    ],
)
def test_impossible_options_are_refused(options, message):
    backbone = options.pop("backbone", BackboneConfig(**BACKBONE))
    with pytest.raises(ValueError, match=message):
        US(backbone, **({"image_size": 32} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": "a.pth", "images": "b"}, "one of them"),
        ({"steps": 0}, "at least 1 step"),
        ({"batch_size": 1}, "2 patches"),
        ({"triplet": -1.0}, "negative"),
        ({"compactness": "literal"}, "dims, samples"),
    ],
)
def test_impossible_teachers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**options)


@pytest.mark.program
def test_two_processes_find_the_teachers_targets_and_scale_of_one(make, programs):
    project = make()
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=8"]
    programs.run(project.arguments(*two, name="two"))
    project.run("--data.init_args.batch_size=16", name="one")
    one, other = project.weights("one"), project.weights("two")
    parts = ("network.teachers.", "network.scales.", "network.students.", "network.statistics")
    for part in parts:
        for name in [name for name in one if name.startswith(part)]:
            torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
