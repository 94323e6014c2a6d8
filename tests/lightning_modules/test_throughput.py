"""The speed that a record states is that of scoring images, backbone included, whatever the cache served."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.callbacks.throughput import Throughput

TRAINER = SimpleNamespace(precision_plugin=SimpleNamespace(test_step_context=contextlib.nullcontext))


class Method:
    """Stands for a method: takes 20 ms where it gets images, and none where features are served."""

    device, image_size = torch.device("cpu"), (8, 12)

    def __init__(self):
        self.batches = []

    def score_batch(self, batch):
        self.batches.append(batch)
        time.sleep(0.02 * ("features" not in batch))


def batch(**more):
    return {"label": torch.zeros(4, dtype=torch.int64), "category": ["a"] * 4, **more}


def test_cached_features_are_not_what_is_timed():
    callback, method = Throughput(), Method()
    callback.on_test_batch_end(TRAINER, method, None, batch(features=[torch.zeros(4, 1)], image=None), 0)
    callback.on_test_batch_end(TRAINER, method, None, batch(features=[torch.zeros(4, 1)], category=["b"] * 4), 1)
    callback.on_test_epoch_end(TRAINER, method)
    assert len(method.batches) == 2  # one to warm up
    for seen in method.batches:
        assert "features" not in seen
        assert seen["image"].shape == (4, 3, 8, 12)
        assert seen["category"] == ["a"] * 4
    assert 0 < callback.images_per_second <= 4 / 0.02


def test_the_timing_draws_from_no_generator_of_the_run():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    callback, method = Throughput(), Method()
    callback.on_test_batch_end(TRAINER, method, None, batch(), 0)
    callback.on_test_epoch_end(TRAINER, method)
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_without_a_test_image_there_is_no_speed():
    callback = Throughput()
    callback.on_test_epoch_end(TRAINER, Method())
    assert callback.images_per_second is None


@pytest.mark.parametrize("batches", [1, 3])
def test_each_test_is_timed_anew(batches):
    callback, method = Throughput(), Method()
    for number in range(batches):
        callback.on_test_batch_end(TRAINER, method, None, batch(), number)
    callback.on_test_epoch_end(TRAINER, method)
    callback.on_test_epoch_end(TRAINER, method)
    assert len(method.batches) == 2
