"""Run records for the tests of this room, written by the project's own writer."""

import numpy as np
import pandas as pd
import pytest

from results.aggregator.records import HISTORY_COLUMNS, METRIC_COLUMNS, RunRecord, read_records, write_record

CATEGORIES = ("bolt", "gear", "tile")


class Runs:
    """Writes records below a folder; `add` takes what differs from a plain UniAD run."""

    def __init__(self, root):
        self.root = root

    def add(
        self, sweep="single", cell=None, seed=0, value=0.9, scored=("image_auroc", "pixel_auroc"), values=None,
        categories=CATEGORIES, dataset="synthetic", variants=("",), history=(), config="trainer:\n  max_epochs: 3\n",
        drop=(), undefined=(), run=None, attachments=None, **changes,
    ):  # fmt: skip
        """`values` maps (variant, category, metric) to a fraction; else `value`. `drop`, `undefined`: such keys."""
        cell = dict(cell or {})
        name = run or "-".join([*(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in cell.items()), f"seed{seed}"])
        name = "".join(c if c.isalnum() or c in "._=,+-" else "_" for c in name)
        rows = []
        for variant in variants:
            for metric in scored:
                for category in categories:
                    key = (variant, category, metric)
                    if key in drop:
                        continue
                    number = (values or {}).get(key, value)
                    reason = ""
                    if key in undefined:
                        number, reason = np.nan, "no masks"
                    rows.append((variant, "category", dataset, category, metric, number, 10, reason))
        record = RunRecord(
            **{
                "run": name, "sweep": sweep, "cell": {**cell, "seed_everything": seed} if cell else {},
                "method": "uniad", "profile": "demo", "protocol": "clean", "setting": "unified", "seed": seed,
                "image_size": (64, 64), "resize": "pil_bilinear",
                "backbone": {"name": "tiny", "weights": "imagenet", "sha256": "ab" * 32},
                "datasets": [{"name": dataset, "fingerprint": "f00d" * 16, "categories": list(categories)}],
                "metrics": {"version": "1"}, "parameters": {"trainable": 2_500_000},
                "provenance": {"git_commit": "c0ffee" * 6, "git_dirty": False, "epochs": 3, "wall_seconds": 12.0,
                               "seconds_per_epoch": 2.0 + seed, "peak_memory_bytes": 3 * 2**20},
                **changes,
            }
        )  # fmt: skip
        config = f"seed_everything: {seed}\nrun:\n  name: {name}\n{config}"
        return write_record(
            self.root, record, pd.DataFrame(rows, columns=list(METRIC_COLUMNS)),
            pd.DataFrame(list(history), columns=list(HISTORY_COLUMNS)), config, attachments,
        )  # fmt: skip

    def read(self, sweep=None):
        return list(read_records(self.root, sweep))


@pytest.fixture(scope="session")
def runs_at():
    """Makes the writer for a folder of one's own, for fixtures that live longer than a test."""
    return Runs


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")
