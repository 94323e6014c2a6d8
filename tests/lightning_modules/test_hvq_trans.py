"""HVQ-Trans from photographs to a record: classes, codebooks, the backbone that moves, resuming."""

from functools import partial

import pytest
import torch
import yaml

from lightning_modules.running.command_line import main
from models import hvq_trans as network
from results.aggregator.captions import shouts
from results.aggregator.records import LABELS_AT_TEST

ARGUMENTS = {
    "backbone": {"name": "test_efficientnet.r160_in1k", "levels": [2, 3, 4], "weights": "random", "padding": "default"},
    "image_size": 64,
    "d_model": 16,
    "heads": 2,
    "feedforward": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "codes": 12,
    "optimizer": {"lr": 0.001},
}
OPTIONS = {
    "plain": {},
    "moving": {"backbone_mode": "train"},
    "classifier": {"codebook_start": "data", "selector": "classifier"},
    "none": {"selector": "none"},
}


def configured(project, name: str = "plain", **options):
    return project.use("hvq_trans.HVQTrans", **ARGUMENTS | OPTIONS[name] | options)


@pytest.fixture
def make(project):
    """A project of HVQ-Trans with more arguments of its model."""
    return partial(configured, project)


@pytest.fixture
def trained(trained_once):
    return partial(trained_once, configure=configured)


def scores(record) -> dict:
    metrics = record.metrics
    return {tuple(row[:5]): row[5] for row in metrics.itertuples(index=False) if row[5] == row[5]}


def test_a_record_says_before_every_number_that_class_labels_were_given(trained):
    record = trained("plain").record()
    assert any(note.startswith(LABELS_AT_TEST) for note in record.record.notes)
    assert any(LABELS_AT_TEST in shout for shout in shouts([record]))
    history = record.history
    in_use = history[history.metric == "train/codes_in_use"].value
    assert len(in_use) == 2
    assert in_use.between(0, 1).all()
    assert {"train/loss_features", "train/loss_commitment"} <= set(history.metric)


def test_codebooks_start_from_standardised_tokens_where_features_are_standardised(make, monkeypatch):
    seen = []
    original = network.HVQTrans.start_codebooks

    def start(self, features, *others):
        seen.extend(level.transpose(0, 1).flatten(1) for level in features)
        original(self, features, *others)

    monkeypatch.setattr(network.HVQTrans, "start_codebooks", start)
    project = make(codebook_start="data")
    for run, standardised in (("plain", "false"), ("standardised", "true")):
        option = f"--model.init_args.backbone.standardised={standardised}"
        project.run(option, "--trainer.max_epochs=1", name=run)
    plain, standardised = seen
    varying = plain.std(1) > 1e-4
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (plain[varying], standardised[varying])]
    torch.testing.assert_close(z[1], z[0], rtol=1e-3, atol=1e-3)
    assert standardised[varying].std(1).median() == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("selector", ["classifier", "none"])
def test_other_selectors_need_no_label_and_are_not_shouted(trained, selector, data_root):
    project = trained(selector)
    record = project.record()
    assert not any(LABELS_AT_TEST in shout for shout in shouts([record]))
    if selector == "classifier":
        assert any("right on" in note and "of 10 test images" in note for note in record.record.notes)
    project.run(f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}", command="predict")
    assert (project.results / "work" / "single" / "first" / "predictions" / "scores.csv").is_file()


def test_an_image_without_a_class_is_refused_unless_one_is_named(trained, data_root):
    project = trained("plain")
    images = f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"
    with pytest.raises(SystemExit, match="it knows bolt, disc"):
        project.run(images, command="predict")
    project.run(images, "--model.init_args.predicted_class=bolt", command="predict")
    with pytest.raises(SystemExit, match="not trained on images of bolts"):
        project.run(images, "--model.init_args.predicted_class=bolts", command="predict")


@pytest.mark.parametrize(
    "options", ["plain", *(pytest.param(o, marks=pytest.mark.program) for o in ("moving", "classifier"))]
)
def test_a_resumed_training_is_the_uninterrupted_one(project, trained, cut_off, options):
    cut_off(configured(project, options))
    project.run()
    whole, resumed = trained(options).weights(), project.weights()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert scores(trained(options).record()) == scores(project.record())


def test_a_moving_backbone_has_no_feature_cache_and_its_statistics_are_kept(trained, tmp_path):
    project = trained("moving").copied(tmp_path)
    record = project.record()
    statistics = torch.load(project.checkpoint(), weights_only=False)["backbone_statistics"]
    assert all("running_" in name for name in statistics)
    assert any("backbone mode: train" in note for note in record.record.notes)
    entries = [yaml.safe_load(path.read_text()) for path in (project.folder / "cache").glob("*/meta.json")]
    assert all(not entry["spec"]["backbone"] for entry in entries if "spec" in entry)
    file = record.path / "image_scores.csv"  # a few images' AUROCs can stay when every score moves
    before = file.read_text()
    main(["test", f"--config={record.path / 'config.yaml'}", "--trainer.logger=false", "--run.overwrite=true"])
    assert file.read_text() == before


def test_one_training_scores_every_transport_weight(make):
    record = make(score_transport=[20.0]).fit()
    assert {"transport=off", "transport=lowest,weight=20", "transport=all,weight=20"} <= set(record.metrics.variant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_start": "kmeans"}, "released or data"),
        ({"backbone_mode": "frozen"}, "eval or train"),
        ({"selector": "labels"}, "selector"),
        ({"hierarchy": 4}, "hierarchy is 4"),
    ],
)
def test_wrong_options_are_refused_before_any_image_is_read(make, options, message):
    project = make(**options)
    with pytest.raises(SystemExit) as refusal:
        project.run()
    assert message.split()[0] in str(refusal.value)
