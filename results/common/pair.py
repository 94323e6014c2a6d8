"""Dataset and category are a pair; they are joined only where they are shown or one word has to stand for both."""

from __future__ import annotations


def label(dataset: str, category: str) -> str:
    """The pair as one word, `dataset/category`; the category alone if the dataset is not named."""
    return f"{dataset}/{category}" if dataset else category


def plain(dataset: str, text: str) -> str:
    """The category of a text that is either the category or `label` of this dataset and it."""
    return text.removeprefix(f"{dataset}/") if dataset else text
