"""Parts of a test set that released code evaluates, for numbers that are to be compared with its own."""

from __future__ import annotations

from datamodules.errors import DataError
from datamodules.sample_table import SampleTable, category_keys
from results.common.did_you_mean import did_you_mean

FULL = "full"
DROP_LAST_32 = "drop_last_32"
TEST_SUBSETS = (FULL, DROP_LAST_32)


def left_out(table: SampleTable, subset: str) -> frozenset[int]:
    """Ids of the test images that `subset` does not evaluate.

    full: none. drop_last_32: of every category, the last n mod 32 test images in the order of their paths, because the
    released ULSAD (and its anomalib fork) evaluates in batches of 32 with drop_last. The paths decide which ones: in
    MVTec AD whole defect types are lost, in LOCO only structural anomalies, in VisA only normal images.

    Raises:
        DataError: an unknown name, or a category of fewer than 32 test images, of which nothing would be left.
    """
    if subset not in TEST_SUBSETS:
        raise DataError(f"Unknown test_subset {subset!r}. {did_you_mean(subset, TEST_SUBSETS)}")
    if subset == FULL:
        return frozenset()
    out: list[int] = []
    test = table.assign(key=category_keys(table))[table["split"] == "test"]
    for key, rows in test.groupby("key", sort=False):
        if len(rows) < 32:
            raise DataError(
                f"test_subset {DROP_LAST_32}: {key} has {len(rows)} test images, less than one batch of 32, so nothing "
                "would be evaluated. Use test_subset full."
            )
        ordered = rows.sort_values("image_path")["id"].tolist()
        out += ordered[len(ordered) - len(ordered) % 32 :]
    return frozenset(out)
