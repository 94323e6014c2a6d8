"""Batches of the unified data module."""

from __future__ import annotations

import time
import warnings
from collections import Counter

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import DataError, DatasetConfig, UnifiedDataModule
from datamodules.dataset import Batch
from datamodules.unified import IMAGENET_MEAN, IMAGENET_STD


def module(*configs, **options):
    chosen = {"image_size": 16, "resize": "pil_bilinear", "batch_size": 4, "num_workers": 0} | options
    made = UnifiedDataModule(list(configs), **chosen)
    made.setup()
    return made


@pytest.fixture
def root(make, tmp_path):
    make.mvtec(tmp_path, "bottle", train=10)
    make.mvtec(tmp_path, "cable", train=6, normal=3)
    return tmp_path


def test_a_batch_has_the_agreed_fields(root):
    data = module(DatasetConfig("mvtec_ad", str(root)), eval_batch_size=5)
    batch = next(iter(data.test_dataloader()))
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items() if torch.is_tensor(value)}
    assert shapes == {
        "image": ((5, 3, 16, 16), torch.float32),
        "mask": ((5, 1, 16, 16), torch.bool),
        "has_mask": ((5,), torch.bool),
        "label": ((5,), torch.int64),
        "id": ((5,), torch.int64),
    }
    assert batch["category"] == ["bottle"] * 4 + ["cable"]
    assert batch["dataset"] == ["mvtec_ad"] * 5
    assert batch["anomaly_type"] == ["good", "good", "structural", "structural", "good"]
    assert batch["label"].tolist() == [0, 0, 1, 1, 0]
    assert batch["mask"].flatten(1).any(1).tolist() == [False, False, True, True, False]
    assert data.table.set_index("id").loc[batch["id"].tolist(), "image_path"].tolist() == batch["path"]
    assert data.categories == ["bottle", "cable"]
    assert data.image_size == (16, 16)


def test_pixels_are_resized_and_normalised_like_the_paper_says(root):
    data = module(DatasetConfig("mvtec_ad", str(root)), image_size=(14, 18), resize="pil_lanczos")
    batch = next(iter(data.test_dataloader()))
    image = Image.open(batch["path"][2]).convert("RGB").resize((18, 14), Image.LANCZOS)
    expected = (np.asarray(image, np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(batch["image"][2].permute(1, 2, 0), expected, atol=1e-6)


def test_a_normalisation_for_the_backbone_holds_unless_one_was_given(root):
    given = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    for options, expected in (({}, ((0.5,) * 3, (0.25,) * 3)), (given, tuple(given.values()))):
        data = module(DatasetConfig("mvtec_ad", str(root)), **options)
        data.normalise((0.5,) * 3, (0.25,) * 3)
        batch = next(iter(data.test_dataloader()))
        image = Image.open(batch["path"][0]).convert("RGB").resize((16, 16), Image.BILINEAR)
        pixels = (np.asarray(image, np.float64) / 255 - expected[0]) / expected[1]
        np.testing.assert_allclose(batch["image"][0].permute(1, 2, 0), pixels, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "give both or neither"),
        ({"std": (0.5, 0.5, 0.5)}, "give both or neither"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)}, "std positive"),
    ],
)
def test_half_a_normalisation_is_refused(root, options, message):
    with pytest.raises(DataError, match=message):
        module(DatasetConfig("mvtec_ad", str(root)), **options)


def test_an_anomalous_image_without_a_mask_is_marked_and_stays(make, tmp_path):
    make.mvtec(tmp_path, "nut")
    (tmp_path / "nut/ground_truth/broken/001_mask.png").unlink()
    with pytest.warns(UserWarning, match="missing mask"):
        data = module(DatasetConfig("folder", str(tmp_path)))
    batch = next(iter(data.test_dataloader()))
    assert batch["has_mask"].tolist() == [True, True, True, False]
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert not batch["mask"][3].any()


@pytest.mark.parametrize("augmentation", ["none", "unias_mvtec"])
def test_batches_do_not_depend_on_the_number_of_workers(root, augmentation):
    batches = []
    for workers in (0, 2):
        data = module(DatasetConfig("mvtec_ad", str(root)), num_workers=workers, augmentation=augmentation, seed=3)
        loader = data.train_dataloader()
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches.append([(b["id"].tolist(), b["image"]) for b in loader])
    for one, two in zip(batches[:2], batches[2:], strict=True):
        assert [ids for ids, _ in one] == [ids for ids, _ in two]
        for (_, left), (_, right) in zip(one, two, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert batches[0][0][0] != batches[1][0][0]


def test_loading_data_leaves_the_global_generator_alone(root):
    data = module(DatasetConfig("mvtec_ad", str(root)))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        list(loader)
    torch.testing.assert_close(torch.rand(3), expected)


def test_cached_images_are_not_spoilt_by_augmentation_or_batches(root):
    data = module(DatasetConfig("mvtec_ad", str(root)), augmentation="unias_mvtec", cache_mb=64)
    first = {i: x.clone() for b in data.test_dataloader() for i, x in zip(b["id"].tolist(), b["mask"], strict=True)}
    for batch in data.test_dataloader():
        batch["mask"][:] = True
        batch["image"][:] = 0
    list(data.train_dataloader())
    for batch in data.test_dataloader():
        for i, x in zip(batch["id"].tolist(), batch["mask"], strict=True):
            assert torch.equal(x, first[i])


def test_held_out_images_are_normal_and_leave_training(root):
    data = module(DatasetConfig("mvtec_ad", str(root)), holdout=0.2)
    held = [path for batch in data.val_dataloader() for path in batch["path"]]
    trained = [path for batch in data.train_dataloader() for path in batch["path"]]
    assert (len(held), len(trained)) == (3, 13)
    assert not set(held) & set(trained)
    assert all(label == 0 for batch in data.val_dataloader() for label in batch["label"])
    assert module(DatasetConfig("mvtec_ad", str(root))).val_dataloader() == []


def test_fingerprint_is_of_the_data_not_of_the_holdout(root):
    whole = module(DatasetConfig("mvtec_ad", str(root)))
    assert module(DatasetConfig("mvtec_ad", str(root)), holdout=0.2).fingerprint == whole.fingerprint
    part = module(DatasetConfig("mvtec_ad", str(root), ("cable",)))
    assert part.fingerprint != whole.fingerprint
    assert whole.fingerprints == {"mvtec_ad": whole.fingerprint}


def test_images_that_are_held_out_are_not_taken_for_changed_data(root):
    data = module(DatasetConfig("mvtec_ad", str(root)), holdout=0.2)
    assert (data.table["split"] == "val").any()
    assert data.changed_since(time.time()) == []


def test_order_of_categories_asked_for_does_not_matter(root):
    orders = [module(DatasetConfig("mvtec_ad", str(root), names)) for names in ("cable,bottle", ("bottle", "cable"))]
    assert orders[0].categories == orders[1].categories == ["bottle", "cable"]
    assert orders[0].fingerprint == orders[1].fingerprint


def test_several_datasets_in_one_model(make, root, tmp_path):
    loco = make.loco(tmp_path / "loco")
    data = module(
        DatasetConfig("mvtec_ad", str(root), "bottle"),
        DatasetConfig("mvtec_loco", str(loco)),
        DatasetConfig("mvtec_ad", str(root), "cable", label="more"),
        sampling="balanced_datasets",
        holdout=0.1,
    )
    assert data.categories == ["mvtec_ad/bottle", "mvtec_loco/pushpins", "more/cable"]
    drawn = Counter(name for batch in data.train_dataloader() for name in batch["dataset"])
    assert max(drawn.values()) - min(drawn.values()) <= 1
    assert (data.table["split"] == "val").sum() == 1 + 2 + 1
    assert data.fingerprints.keys() == {"mvtec_ad", "mvtec_loco", "more"}


def test_the_same_dataset_twice_needs_a_label(root):
    with pytest.raises(DataError, match="label"):
        module(DatasetConfig("mvtec_ad", str(root), "bottle"), DatasetConfig("mvtec_ad", str(root), "cable"))


def test_predict_takes_any_folder(make, root, tmp_path):
    make.image(tmp_path / "new" / "b" / "2.jpg")
    make.image(tmp_path / "new" / "1.png")
    data = UnifiedDataModule([], 16, "opencv_bilinear", 2, predict_root=str(tmp_path / "new"), num_workers=0)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert [path.rpartition("/")[2] for path in batch["path"]] == ["1.png", "2.jpg"]
    assert batch["label"].tolist() == [-1, -1]
    assert batch["has_mask"].tolist() == [False, False]
    with pytest.raises(DataError, match="predict_root"):
        module(DatasetConfig("mvtec_ad", str(root))).predict_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": None}, "image_size is None"),
        ({"resize": None}, "resize is None"),
        ({"batch_size": None}, "batch_size is None"),
        ({"resize": "pil_bilinar"}, "Did you mean 'pil_bilinear'"),
        ({"sampling": "balancd"}, "Did you mean 'balanced'"),
        ({"holdout": 1.5}, "0 <= holdout < 1"),
        ({"bit_depth": 9}, "bit_depth must be one of"),
        ({"batch_size": 0}, "at least 1"),
        ({"image_size": 0}, "image_size is a positive side"),
    ],
)
def test_bad_options_are_named(root, options, message):
    with pytest.raises(DataError, match=message):
        module(DatasetConfig("mvtec_ad", str(root)), **options)


def test_data_with_errors_stops_before_training(root):
    (root / "bottle/ground_truth/broken/000_mask.png").unlink()
    with pytest.raises(DataError, match=r"missing mask.*\n.*000\.png"):
        module(DatasetConfig("mvtec_ad", str(root)))
    with pytest.raises(DataError, match="No dataset"):
        module()


def test_corrupt_image_names_its_file_also_from_a_worker(root):
    path = root / "bottle" / "train" / "good" / "003.png"
    path.write_bytes(path.read_bytes()[:60])
    for workers in (0, 1):
        data = module(DatasetConfig("mvtec_ad", str(root)), num_workers=workers)
        with pytest.raises(DataError, match=r"good/003\.png: the file is truncated"):
            list(data.train_dataloader())


def test_mask_of_another_size_stops_with_both_names(make, root):
    make.mask(root / "bottle/ground_truth/broken/000_mask.png", size=(30, 30))
    data = module(DatasetConfig("mvtec_ad", str(root)))
    with pytest.raises(DataError, match=r"000_mask\.png: mask is 30 x 30.*000\.png is 48 x 40"):
        list(data.test_dataloader())


def test_odd_image_modes_warn_once_per_dataset(make, root):
    for number in range(3):
        deep = np.full((40, 48), 1000 + 900 * number, np.uint16)
        cv2.imwrite(str(root / "bottle/train/good" / f"{number:03d}.png"), deep)
    Image.new("RGBA", (48, 40), (10, 20, 30, 0)).save(root / "cable/test/good/000.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = module(DatasetConfig("mvtec_ad", str(root)))
    texts = [str(w.message) for w in caught if "mvtec_ad" in str(w.message)]
    assert len(texts) == 1
    assert "3 images of mode 16-bit" in texts[0]
    assert "read as 12 bits (inferred" in texts[0]
    assert "1 image of mode RGB with alpha" in texts[0]
    brightest = max(
        b["image"][i, 0].max()
        for b in data.train_dataloader()
        for i, p in enumerate(b["path"])
        if p.endswith("bottle/train/good/002.png")
    )
    np.testing.assert_allclose(brightest, (round(2800 * 255 / 4095) / 255 - 0.485) / 0.229, atol=1e-5)


def test_a_resumed_training_sees_the_images_that_an_uninterrupted_one_sees(root, tmp_path):
    class Recorder(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen = {}

        def training_step(self, batch, index):
            self.seen.setdefault(self.current_epoch, []).extend(batch["id"].tolist())
            return self.layer(batch["image"].mean().reshape(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def train(epochs, resume=None):
        recorder = Recorder()
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        data = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root))], 16, "pil_bilinear", 4, num_workers=0)
        trainer.fit(recorder, data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return recorder.seen

    whole = train(4)
    train(2)
    resumed = train(4, str(tmp_path / "last.ckpt"))
    assert len({tuple(ids) for ids in whole.values()}) == 4, "each epoch has an order of its own"
    assert resumed == {epoch: whole[epoch] for epoch in (2, 3)}


def test_a_batch_moves_all_its_tensors_and_no_text():
    batch = Batch(
        image=torch.zeros(2, 3), features=[torch.zeros(2, 1), torch.ones(2, 2)], category=["a", "b"], empty=[]
    )
    moved = batch.to("meta")
    assert moved["image"].device.type == moved["features"][0].device.type == moved["features"][1].device.type == "meta"
    assert moved["category"] is batch["category"]
    assert batch["image"].device.type == "cpu"
    assert moved.keys() == batch.keys()
