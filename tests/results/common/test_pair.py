"""Categories of one name in two data sets stay apart, and their names stay what they were."""

from __future__ import annotations

import pytest

from results.common.pair import label, plain


@pytest.mark.parametrize("dataset", ["mvtec_ad", "spring", "a/b", ""])
def test_a_label_gives_back_its_category(dataset):
    assert plain(dataset, label(dataset, "wood")) == plain(dataset, "wood") == "wood"


def test_one_name_in_two_data_sets_has_two_labels():
    assert label("spring", "wood") == "spring/wood" != label("autumn", "wood")


def test_a_category_that_begins_like_its_dataset_keeps_its_name():
    assert plain("wood", "wooden") == "wooden"
    assert plain("wood", "wood") == "wood"
