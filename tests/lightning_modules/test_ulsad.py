"""ULSAD and DFR through the command line's parts, on a few drawn images and a small random backbone."""

from __future__ import annotations

import json
import shutil
from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.optim import Adam

from datamodules import UnifiedDataModule
from datamodules.sample_table import Sample, build_table
from datamodules.subset import left_out
from datamodules.unified import DatasetConfig
from lightning_modules.callbacks.curve import EvaluationCurve
from lightning_modules.callbacks.history import History
from lightning_modules.callbacks.scoring import Evaluation
from lightning_modules.dfr import DFR
from lightning_modules.pictures import reconstructions
from lightning_modules.running.command_line import main
from lightning_modules.ulsad import ULSAD, QuantileConfig
from models.backbones import BackboneConfig
from results.aggregator.records import read_record

BACKBONE = BackboneConfig("resnet10t", (2, 3), weights="random")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def picture(rng: np.random.Generator, base: int) -> np.ndarray:
    return np.clip(rng.normal(base, 20, (64, 64, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def loco(tmp_path_factory):
    """Two categories in the layout of MVTec LOCO: 6 training, 3 validation, 3 good, 2 logical, 2 structural images."""
    root = tmp_path_factory.mktemp("loco")
    rng = np.random.default_rng(0)
    for number, category in enumerate(("anchor", "bolt")):
        base = 90 + 60 * number
        for split, count in (("train/good", 6), ("validation/good", 3), ("test/good", 3)):
            (root / category / split).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(rng, base)).save(root / category / split / f"{i:03d}.png")
        for kind, value in (("logical", 200), ("structural", 255)):
            images = root / category / "test" / f"{kind}_anomalies"
            images.mkdir(parents=True)
            for i in range(2):
                image, mask = picture(rng, base), np.zeros((64, 64), np.uint8)
                image[10:30, 10:30] = 255 - base
                mask[10:30, 10:30] = value
                Image.fromarray(image).save(images / f"{i:03d}.png")
                folder = root / category / "ground_truth" / f"{kind}_anomalies" / f"{i:03d}"
                folder.mkdir(parents=True)
                Image.fromarray(mask).save(folder / "000.png")
        config = [
            {"defect_name": "l", "pixel_value": 200, "saturation_threshold": 50, "relative_saturation": False},
            {"defect_name": "s", "pixel_value": 255, "saturation_threshold": 1.0, "relative_saturation": True},
        ]
        (root / category / "defects_config.json").write_text(json.dumps(config))
    return root


def data(root, **options) -> UnifiedDataModule:
    datasets = options.pop("datasets", [DatasetConfig("mvtec_loco", str(root))])
    options = {"image_size": 64, "resize": "opencv_bilinear", "batch_size": 4, "num_workers": 0, **options}
    return UnifiedDataModule(datasets, **options)


def trainer(tmp_path, epochs=1, callbacks=()) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        default_root_dir=tmp_path,
    )  # fmt: skip


def ulsad(**options) -> ULSAD:
    torch.manual_seed(0)
    options = {"optimizer": partial(Adam, lr=1e-3), "image_size": 64, "pooled_channels": 8, **options}
    return ULSAD(BACKBONE, **options)


def fitted(root, tmp_path, epochs=1, callbacks=(), protocol=("clean", "last"), options=None, **model):
    module, source, runner = ulsad(**model), data(root, **(options or {})), trainer(tmp_path, epochs, callbacks)
    module.set_protocol(*protocol)
    runner.fit(module, datamodule=source)
    return module, source, runner


@pytest.fixture(scope="module")
def usual(loco, tmp_path_factory):
    """The module, data and trainer of one epoch with the usual options; not to be trained on."""
    return fitted(loco, tmp_path_factory.mktemp("usual"))


def pixels_of(module, loader, labels=(0,)) -> list[torch.Tensor]:
    """Each branch's smoothed maps at image size of the images with these labels, without any scaling."""
    found = []
    module.eval()
    with torch.no_grad():
        for batch in loader:
            maps = module.network.branch_maps(module.reconstruct(batch))
            keep = torch.tensor([label in labels for label in batch["label"].tolist()])
            full = [module.head.score(list(maps.unbind(1)), module.image_size, selection=[b]).maps for b in (0, 1)]
            found.append(torch.stack(full)[:, keep])
    return list(torch.cat(found, dim=1))


# --- what is estimated from data --------------------------------------------------------------------------------------


def test_training_features_are_standardised_and_quantiles_are_those_of_the_held_out_images(usual):
    module, source, _ = usual
    assert module.network.statistics.groups == ("mvtec_loco",)
    features = torch.cat([module.features(b)[0] for b in source.train_images()])
    assert len(features) == 12
    z = module.network.statistics(features).double()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(8, dtype=torch.float64), rtol=1e-5, atol=0)

    quantiles = module.network.quantiles.get()["mvtec_loco"]
    for branch, maps in zip(("local", "global"), pixels_of(module, source.val_dataloader()), strict=True):
        assert maps.shape == (6, 64, 64)
        expected = torch.quantile(maps.double(), torch.tensor([0.9, 0.995], dtype=torch.float64))
        assert list(quantiles[branch].values()) == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_scored_map_is_the_mean_of_the_rescaled_branches(loco, tmp_path):
    module, source, _ = fitted(
        loco, tmp_path, quantiles=QuantileConfig(alphas=(0.5,), betas=(0.95,)), score_branches=True
    )
    batch = source.image_batch([0, 1, 20])
    scored = module.eval().evaluate(batch)
    assert list(scored) == ["", "alpha=0.5,beta=0.95", "quantiles=none", "map=local", "map=global"]
    local, whole = (scored[f"map={name}"].maps for name in ("local", "global"))
    torch.testing.assert_close(scored["quantiles=none"].maps, (local + whole) / 2)
    values = module.network.quantiles.get()["mvtec_loco"]
    for name, alpha, beta in (("", 0.9, 0.995), ("alpha=0.5,beta=0.95", 0.5, 0.95)):
        parts = [
            0.1 * (maps - values[b][alpha]) / (values[b][beta] - values[b][alpha])
            for b, maps in (("local", local), ("global", whole))
        ]
        torch.testing.assert_close(scored[name].maps, sum(parts) / 2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scored[name].image_scores, scored[name].maps.flatten(1).amax(1))


def test_two_datasets_keep_their_own_statistics_and_quantiles_under_their_names(loco, tmp_path):
    datasets = [
        DatasetConfig("mvtec_loco", str(loco), ("anchor",), label="plant_a"),
        DatasetConfig("mvtec_loco", str(loco), ("bolt",), label="plant_b"),
    ]
    module, source, _ = fitted(loco, tmp_path, options={"datasets": datasets})
    assert module.network.statistics.groups == module.network.quantiles.groups == ("plant_a", "plant_b")
    for batch in source.train_images():
        z = module.network.statistics(module.features(batch)[0], batch["dataset"])
        for name in set(batch["dataset"]):
            rows = [i for i, dataset in enumerate(batch["dataset"]) if dataset == name]
            torch.testing.assert_close(z[rows].mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    assert "plant_a, plant_b" in " ".join(module.record_notes())
    with pytest.raises(ValueError, match="which dataset"):
        module(batch["image"])


def test_without_held_out_images_training_is_refused_before_it_starts(loco, tmp_path):
    source = data(loco)
    source.setup()
    source.table = source.table[source.table.split != "val"]
    module = ulsad()
    module.set_protocol("clean", "last")
    with pytest.raises(ValueError, match=r"holdout"):
        trainer(tmp_path).fit(module, datamodule=source)
    module = ulsad(quantiles=QuantileConfig(source="train"))
    module.set_protocol("clean", "last")
    trainer(tmp_path).fit(module, datamodule=source)
    assert module.network.quantiles.groups == ("mvtec_loco",)


def test_a_checkpoint_brings_statistics_and_quantiles_and_scores_the_same(usual, tmp_path):
    module, source, runner = usual
    runner.save_checkpoint(tmp_path / "last.ckpt")
    other = ulsad()
    other.set_protocol("clean", "last")
    trainer(tmp_path).validate(
        other, datamodule=source, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=False
    )
    batch = source.image_batch([3, 20])
    assert torch.equal(other.eval().evaluate(batch)[""].maps, module.eval().evaluate(batch)[""].maps)


# --- protocols --------------------------------------------------------------------------------------------------------


def released(root, tmp_path, tie, epochs):
    curve = EvaluationCurve(History(), 1, "image_auroc", tie)
    protocol = ("as_released", "best_on_test")
    module, source, _ = fitted(root, tmp_path, epochs=epochs, callbacks=[curve], protocol=protocol)
    return module, source, curve


@pytest.mark.program
def test_as_released_keeps_quantiles_only_if_the_last_epoch_is_the_best(loco, tmp_path, monkeypatch):
    for values, expected, has_quantiles in (
        ([0.5, 0.9, 0.7], 1, False),
        ([0.6, 0.7], 1, True),
        ([0.8, 0.8], 0, False),
    ):
        means = iter(values)
        monkeypatch.setattr(EvaluationCurve, "_is_best", _scripted(EvaluationCurve._is_best, means))
        module, _, curve = released(loco, tmp_path, "first", len(values))
        assert curve.best[1] == expected
        assert bool(module.network.quantiles.groups) == has_quantiles
        monkeypatch.undo()


def _scripted(original, values):
    def is_best(self, value):
        value = next(values)
        better = original(self, value)
        if better:  # what the callback stores is the true value; let it remember the scripted one
            self.__dict__["_scripted"] = value
        return better

    def wrapped(self, value):
        if self.best is not None and "_scripted" in self.__dict__:
            self.best = (self.__dict__["_scripted"], *self.best[1:])
        return is_best(self, value)

    return wrapped


def test_as_released_takes_the_quantiles_from_good_test_images(loco, tmp_path):
    module, source, _ = fitted(loco, tmp_path, protocol=("as_released", "last"))
    quantiles = module.network.quantiles.get()["mvtec_loco"]
    for branch, maps in zip(("local", "global"), pixels_of(module, source.test_dataloader()), strict=True):
        assert maps.shape == (6, 64, 64)
        assert quantiles[branch][0.9] == pytest.approx(float(torch.quantile(maps.double(), 0.9)), rel=1e-6)


def test_the_clean_protocol_refuses_to_look_at_the_test_set():
    with pytest.raises(ValueError, match="as_released"):
        ulsad(quantiles=QuantileConfig(source="test_good")).set_protocol("clean", "last")


@pytest.mark.parametrize(
    ("dataset", "counts", "kept"),
    [
        # dataset, {folder: images of it in path order}, (anomalous, good) that the released loaders evaluate
        ("mvtec bottle", {"broken_large": 20, "broken_small": 22, "contamination": 21, "good": 20}, (63, 1)),
        ("mvtec leather", {"color": 19, "cut": 19, "fold": 17, "glue": 19, "good": 32, "poke": 18}, (74, 22)),
        ("mvtec zipper", {"broken_teeth": 19, "combined": 16, "fabric_border": 17, "fabric_interior": 16, "good": 32,
                          "rough": 17, "split_teeth": 18, "squeezed_teeth": 16}, (96, 32)),
        ("mpdd connector", {"good": 30, "parts_mismatch": 14}, (2, 30)),
        ("mpdd bracket_white", {"defective_painting": 13, "good": 30, "scratches": 17}, (13, 19)),
        ("btad 01", {"ko": 49, "ok": 21}, (49, 15)),
        ("loco breakfast_box", {"good": 102, "logical_anomalies": 83, "structural_anomalies": 90}, (154, 102)),
        ("loco pushpins", {"good": 138, "logical_anomalies": 91, "structural_anomalies": 81}, (150, 138)),
        ("visa cashew", {"bad": 100, "good": 50}, (100, 28)),
        ("visa capsules", {"bad": 100, "good": 60}, (100, 60)),
    ],
)  # fmt: skip
def test_dropping_the_last_batch_keeps_exactly_the_images_that_the_released_code_evaluates(dataset, counts, kept):
    samples = [
        Sample("c", "test", name, "structural", f"/d/c/test/{name}/{i:03d}.png")
        if name not in ("good", "ok")
        else Sample("c", "test", "good", "good", f"/d/c/test/{name}/{i:03d}.png")
        for name, count in counts.items()
        for i in range(count)
    ]  # fmt: skip
    table = build_table("d", samples)
    rows = table[~table.id.isin(left_out(table, "drop_last_32"))]
    assert (int((rows.label == 1).sum()), int((rows.label == 0).sum())) == kept
    assert left_out(table, "full") == frozenset()


# --- logical anomalies ------------------------------------------------------------------------------------------------


def test_logical_and_structural_anomalies_are_scored_apart_against_all_good_images(usual, tmp_path):
    evaluation = Evaluation()
    module, source, _ = usual
    trainer(tmp_path, callbacks=[evaluation]).test(module, datamodule=source, verbose=False)
    scores, table = evaluation.image_scores, evaluation.result.table
    for category in ("anchor", "bolt"):
        own = scores[scores.category == category]
        good = own[own.label == 0].image_score.to_numpy()
        for kind in ("logical", "structural"):
            bad = own[own.anomaly_type == kind].image_score.to_numpy()
            pairs = (bad[:, None] > good).mean() + (bad[:, None] == good).mean() / 2
            row = table[(table.category == category) & (table.metric == f"image_auroc_{kind}")]
            assert row.value.item() == pytest.approx(pairs)
            assert row.n.item() == len(good) + len(bad)
    means = table[(table.scope == "mean") & (table.dataset == "")].set_index("metric").value
    assert means["image_auroc_types"] == pytest.approx(
        (means["image_auroc_logical"] + means["image_auroc_structural"]) / 2
    )
    for metric in ("pixel_auspro_logical", "pixel_auspro_structural", "pixel_auspro_0.3_types"):
        assert 0 <= means[metric] <= 1
        assert metric in evaluation.result.definitions


def test_a_map_equal_to_the_masks_has_auspro_1(loco):
    from lightning_modules.callbacks.logical import LogicalEvaluation

    source = data(loco)
    source.setup()
    evaluation = LogicalEvaluation(source.table, source.table.category)
    for batch in source.test_dataloader():
        evaluation.update("", batch, batch["mask"][:, 0].float(), batch["label"].float())
    values = evaluation.rows().set_index(["scope", "metric"]).value
    for metric in ("pixel_auspro_logical", "pixel_auspro_0.3_structural", "image_auroc_types"):
        assert values["category", metric].tolist() == pytest.approx([1.0, 1.0])


# --- the command line -------------------------------------------------------------------------------------------------


def run(loco, tmp_path, *arguments):
    main(
        [
            "fit",
            "--model=lightning_modules.ulsad.ULSAD",
            "--model.init_args.backbone.name=resnet10t",
            "--model.init_args.backbone.levels=[2, 3]",
            "--model.init_args.backbone.weights=random",
            "--model.init_args.image_size=64",
            "--model.init_args.pooled_channels=8",
            f"--data.init_args.datasets=[{{'name': 'mvtec_loco', 'root': '{loco}'}}]",
            "--data.init_args.batch_size=4",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            f"--run.results={tmp_path}",
            "--run.name=x",
            f"--cache.root={tmp_path}/cache",
            *arguments,
        ]
    )
    return read_record(tmp_path / "runs" / "single" / "x")


def test_the_recipe_fills_in_the_paper_and_the_record_names_the_statistics(loco, tmp_path):
    stored = run(loco, tmp_path, "--model.init_args.lambda_l=0.25")
    assert stored.record.method == "ulsad"
    assert stored.record.setting == "unified"
    assert stored.record.resize == "opencv_bilinear"
    assert "channel statistics per dataset: mvtec_loco" in stored.record.notes
    assert "quantiles held_out of mvtec_loco" in stored.record.notes
    assert "drop_last: true" in (stored.path / "config.yaml").read_text()
    assert {"train/loss", "train/loss_pl", "train/loss_pg", "train/loss_lg"} <= set(stored.history.metric)
    ranks = pd.read_csv(stored.path / "heatmaps" / "index.csv")
    assert set(ranks.defect) >= {"logical_anomalies", "structural_anomalies"}


def test_without_held_out_images_the_quantiles_are_refused_in_plain_words(tmp_path, write_data):
    root = write_data(tmp_path / "data")
    with pytest.raises(SystemExit, match=r"error: No normal image is held out.*data\.init_args\.holdout"):
        run(root, tmp_path, f"--data.init_args.datasets=[{{'name': 'mvtec_ad', 'root': '{root}'}}]")


def test_one_model_per_category_gives_one_record_with_the_means_and_resumes(loco, tmp_path, monkeypatch):
    setting = "--data.init_args.setting=per_category"
    import lightning_modules.running.per_category as per_category

    original, calls = per_category.read_record, []

    def interrupt_once(folder):
        calls.append(folder.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(folder)

    monkeypatch.setattr(per_category, "read_record", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        run(loco, tmp_path, setting)
    first = tmp_path / "work" / "single" / "x" / "runs" / "categories" / "anchor" / "record.json"
    written = first.stat().st_mtime_ns
    stored = run(loco, tmp_path, setting)
    assert first.stat().st_mtime_ns == written, "the finished category was trained again"
    assert stored.record.setting == "per_category"
    assert stored.record.category_keys == [("mvtec_loco", "anchor"), ("mvtec_loco", "bolt")]
    table = stored.metrics
    assert "pooled" not in set(table.scope)
    own = table[(table.scope == "category") & (table.metric == "image_auroc")].value
    mean = table[(table.scope == "mean") & (table.dataset == "") & (table.metric == "image_auroc")]
    assert mean.value.item() == pytest.approx(own.mean())
    assert mean.n.item() == 2
    assert {"heatmaps/anchor.jpg", "heatmaps/bolt.jpg"} <= {
        p.relative_to(stored.path).as_posix() for p in stored.path.rglob("*.jpg")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.init_args.test_subset=drop_last_32"], "as_released"),
        (["--model.init_args.quantiles.source=test_good"], "as_released"),
        (["--run.selection=best_on_test"], "as_released"),
    ],
)
def test_switches_that_look_at_the_test_set_need_the_released_protocol(loco, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as refusal:
        run(loco, tmp_path, *arguments)
    assert message in f"{refusal.value} {capsys.readouterr().err}"


# --- DFR --------------------------------------------------------------------------------------------------------------


def test_dfr_finds_its_latent_size_in_the_first_training_images_and_learns(loco, tmp_path):
    torch.manual_seed(0)
    module = DFR(BACKBONE, optimizer=partial(Adam, lr=1e-3), image_size=64, pca_images=2)
    source = data(loco, resize="pil_nearest")
    runner = trainer(tmp_path, epochs=2)
    runner.fit(module, datamodule=source)
    train = source.table[source.table.split == "train"]
    first = [i for c in ("anchor", "bolt") for i in train[train.category == c].sort_values("image_path").id[:2]]
    vectors = torch.cat(
        [f.permute(0, 2, 3, 1).flatten(0, 2) for f in module.extract(source.image_batch(first)["image"])]
    )
    variance = torch.linalg.svdvals(vectors.double() - vectors.double().mean(0)).square()
    expected = int((variance.cumsum(0) / variance.sum() <= 0.9).sum()) + 1
    assert module.network.latent == expected
    batch = source.image_batch([0, 25])
    scored = module.eval().evaluate(batch)[""]
    (pair,) = module.reconstruct(batch)
    error = (pair.target - pair.reconstruction).square().mean(1, keepdim=True)
    expected_map = torch.nn.functional.interpolate(error, (64, 64), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(scored.maps, expected_map)
    torch.testing.assert_close(scored.image_scores, expected_map.flatten(1).amax(1))

    runner.save_checkpoint(tmp_path / "dfr.ckpt")
    other = DFR(BACKBONE, image_size=64)
    trainer(tmp_path).validate(
        other, datamodule=source, ckpt_path=tmp_path / "dfr.ckpt", verbose=False, weights_only=False
    )
    assert torch.equal(other.eval().evaluate(batch)[""].maps, scored.maps)
    with pytest.raises(ValueError, match="latent size"):
        trainer(tmp_path).validate(DFR(BACKBONE, image_size=64), datamodule=source, verbose=False)


@pytest.mark.program
def test_a_model_of_two_datasets_predicts_and_is_pictured(loco, tmp_path):
    for name, category in (("a", "anchor"), ("b", "bolt")):
        shutil.copytree(loco / category, tmp_path / name / category)
    roots = [{"name": "mvtec_loco", "root": str(tmp_path / name), "label": name} for name in ("a", "b")]
    record = run(loco, tmp_path, f"--data.init_args.datasets={json.dumps(roots)}", "--run.heatmaps=false").path
    scores = tmp_path / "work" / "single" / "x" / "predictions" / "scores.csv"

    def predict(images, *arguments) -> pd.DataFrame:
        main(["predict", f"--config={record}/config.yaml", f"--data.init_args.predict_root={images}", *arguments])
        return pd.read_csv(scores).image_score

    tested = pd.read_csv(record / "image_scores.csv")
    found = predict(tmp_path / "b" / "bolt" / "test" / "good")
    assert found.tolist() == pytest.approx(tested[tested.path.str.contains("/b/bolt/test/good/")].image_score.tolist())
    shutil.copytree(tmp_path / "b" / "bolt" / "test" / "good", tmp_path / "new")
    with pytest.raises(SystemExit, match=r"per dataset \(a, b\).*predict_dataset"):
        predict(tmp_path / "new")
    assert predict(tmp_path / "new", "--data.init_args.predict_dataset=b").tolist() == found.tolist()
    reconstructions.main([str(record), "--epochs=1", "--width=16"])
    assert (tmp_path / "work" / "single" / "x" / "reconstructions.jpg").is_file()
