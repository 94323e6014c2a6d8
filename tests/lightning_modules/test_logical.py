"""MVTec LOCO's numbers from several processes: those of one, and no map leaves the process that made it."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from lightning_modules.callbacks.logical import LogicalEvaluation
from lightning_modules.metrics.sync import Group

SIZE = 24  # of the masks; maps have half of it and are brought to it
TYPES = ("good", "good", "good", "logical", "logical", "structural", "structural")

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """Two categories of seven test images each, with regions that saturate at some of their pixels."""
    root = tmp_path_factory.mktemp("loco")
    config = [
        {"defect_name": "l", "pixel_value": 200, "saturation_threshold": 20, "relative_saturation": False},
        {"defect_name": "s", "pixel_value": 255, "saturation_threshold": 0.7, "relative_saturation": True},
    ]
    rows = []
    for category in ("anchor", "bolt"):
        for kind in TYPES:
            number, masks = len(rows), ()
            if kind != "good":
                folder = root / category / "ground_truth" / f"{kind}_anomalies" / f"{number:03d}"
                folder.mkdir(parents=True)
                mask = np.zeros((SIZE, SIZE), np.uint8)
                mask[number : number + 7, 5:12] = 200 if kind == "logical" else 255
                Image.fromarray(mask).save(folder / "000.png")
                masks = (str(folder / "000.png"),)
            label = int(kind != "good")
            rows.append((number, "mvtec_loco", category, "test", label, kind, kind, f"{number}.png", masks))
        (root / category / "defects_config.json").write_text(json.dumps(config))
    columns = ["id", "dataset", "category", "split", "label", "defect", "anomaly_type", "image_path", "mask_paths"]
    return pd.DataFrame(rows, columns=columns)


def evaluate(table: pd.DataFrame, images: list[int]) -> pd.DataFrame:
    """The rows from the process that scored these images, three at a time."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(len(table), SIZE // 2, SIZE // 2, generator=generator).mul(8).round() / 8  # ties, signs
    evaluation = LogicalEvaluation(table, list(table["category"]))
    for start in range(0, len(images), 3):
        part = images[start : start + 3]
        for variant in ("", "other"):
            evaluation.update(variant, {"id": torch.tensor(part)}, maps[part], maps[part].amax((1, 2)))
    return evaluation.rows()


def worker(rank: int, world: int, store: str, table: pd.DataFrame, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    sent = []
    gather, gather_objects = Group.gather, Group.gather_objects
    Group.gather = lambda group, array: sent.append(array.nbytes) or gather(group, array)
    Group.gather_objects = lambda group, value: sent.append(len(pickle.dumps(value))) or gather_objects(group, value)
    images = [i % len(table) for i in range(rank, len(table) + 1, world)]  # the first image twice, as samplers pad
    evaluate(table, images).to_pickle(f"{out}/{rank}.pkl")
    assert max(sent) < 4 * SIZE * SIZE / 2, f"{max(sent)} bytes of one process were sent to all"
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_get_the_bits_of_one_and_send_no_map(table, world, tmp_path):
    expected = evaluate(table, list(range(len(table))))
    assert expected[expected.metric == "pixel_auspro_0.3_types"].value.between(0, 1, inclusive="neither").all()
    mp.spawn(worker, args=(world, str(tmp_path / "store"), table, str(tmp_path)), nprocs=world)
    for rank in range(world):
        pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / f"{rank}.pkl"), expected, check_exact=True)
