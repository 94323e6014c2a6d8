"""DeSTSeg's two phases in one training, its anomalies, and what a record says of them."""

import pytest
import torch

from lightning_modules.destseg import DeSTSeg
from models.backbones import BackboneConfig

BACKBONE = {"name": "test_efficientnet.r160_in1k", "levels": [2, 3, 4], "weights": "random", "padding": "default"}
ARGUMENTS = {
    "backbone": BACKBONE,
    "image_size": 64,
    "stem": 8,
    "segmentation_width": 8,
    "optimizer": {"lr": 0.01},
    "student_share": 0.4,
}


@pytest.fixture
def make(tmp_path, data_root, make_project):
    """A project of DeSTSeg with more arguments of its model; 12 training images in batches of 4."""

    def made(anomalies="own", **options):
        data = {"batch_size": 4} | ({"anomalies": {"source": anomalies}} if anomalies else {})
        project = make_project(tmp_path, data_root)
        return project.use("destseg.DeSTSeg", data=data, trainer={"max_epochs": 5}, **ARGUMENTS | options)

    return made


def scores(record) -> dict:
    metrics = record.metrics
    return {tuple(row[:5]): row[5] for row in metrics.itertuples(index=False) if row[5] == row[5]}


def test_the_record_names_the_source_of_the_anomalies(make):
    record = make("textures", score_distances=True).fit()
    assert any("synthetic anomalies: source textures" in note for note in record.record.notes)
    assert set(record.metrics.variant.dropna()) >= {"segmentation=off"}
    history = record.history
    student = history[history.metric == "train/loss_student"]
    segmentation = history[history.metric == "train/loss_segmentation"]
    assert student.epoch.min() == 0
    assert segmentation.epoch.max() == 4


def test_each_phase_leaves_the_other_network_alone_and_a_resumed_training_is_the_uninterrupted_one(
    make, begun, cut_off
):
    project = make()
    cut_off(project, at=3, name="cut")
    # The second phase begins in the middle of training, at step 6 of 15.
    states = {1: begun[1], 2: begun[2], 3: project.weights("cut")}
    project.fit(name="whole")
    project.run(name="cut")
    whole, resumed = project.weights("whole"), project.weights("cut")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert scores(project.record("whole")) == scores(project.record("cut"))

    def changed(one, other, part):
        return [name for name in one if name.startswith(f"network.{part}.") and not torch.equal(one[name], other[name])]

    assert changed(states[1], states[2], "student")
    assert not changed(states[1], states[2], "segmentation")
    assert not changed(states[2], states[3], "student")  # running statistics included
    assert changed(states[2], states[3], "segmentation")


def test_training_without_anomalies_is_refused_with_the_options_to_set(make):
    with pytest.raises(SystemExit, match=r"data\.init_args\.anomalies"):
        make(anomalies=None).run()


def test_a_training_of_a_number_of_steps_ends_there_and_knows_its_epochs(make):
    project = make()
    project.run("--trainer.max_epochs=100", "--trainer.max_steps=7")
    record = project.record()
    assert record.record.provenance["epochs"] == 3  # of 3 steps each
    assert int(record.history.step.max()) == 7


def test_the_defaults_are_the_released_setting(uncalibrated):
    with pytest.warns(UserWarning, match="RANDOM"):
        module = DeSTSeg(BackboneConfig("resnet18.tv_in1k", (2, 3, 4), weights="random"))
    recipe = module.recipe
    assert (recipe.batch_size, recipe.max_steps, recipe.drop_last) == (32, 5000, True)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 32_371_393
    groups = module.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [0.4, 0.1, 0.01]
    assert {(g["momentum"], g["weight_decay"], g["nesterov"]) for g in groups} == {(0.9, 1e-4, False)}
    assert round(module.head.config.top_k_fraction * 256 * 256) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_share": 1.0}, "both phases"),
        ({"segmentation_loss": "l1"}, "segmentation_loss"),
        ({"image_size": 72}, "multiple of 32"),
    ],
)
def test_wrong_options_are_named(options, message):
    backbone = BackboneConfig(**(BACKBONE | {"levels": (2, 3, 4)}))
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="RANDOM"):
        DeSTSeg(**({k: v for k, v in ARGUMENTS.items() if k != "optimizer"} | {"backbone": backbone} | options))
