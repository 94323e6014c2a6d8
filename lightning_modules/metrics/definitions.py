"""What every number means. The text is written into each run record next to the numbers it describes.

`VERSION` changes whenever a definition, a tie rule or the treatment of a special case changes: numbers of different
versions must not share a table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

VERSION = "1"

_PIXELS = "over all pixels of all test images that have a mask (normal images have the empty mask)"
_DICE = (
    "mean over images of 2|P&G| / (|P| + |G|), P = pixels with score >= t, G = mask; "
    "an image whose mask is empty counts 1 if P is empty, else 0"
)
_IOU = _DICE.replace("2|P&G| / (|P| + |G|)", "|P&G| / |P or G|")
_UNIAS = "t* = the score with the highest precision + recall on the pixel PR curve, the lowest such score (UniAS rule)"

IMAGE_DEFINITIONS: dict[str, str] = {
    "image_auroc": "area under the ROC curve of the image scores; tied scores count one half",
    "image_ap": "average precision of the image scores, step-wise: sum (R_k - R_k-1) P_k over all distinct scores",
    "image_f1max": "highest F1 over all distinct image scores used as threshold (score >= t is anomalous)",
}
PIXEL_DEFINITIONS: dict[str, str] = {
    "pixel_auroc": f"area under the ROC curve {_PIXELS}; tied scores count one half",
    "pixel_ap": f"average precision {_PIXELS}, step-wise: sum (R_k - R_k-1) P_k over all distinct scores",
    "pixel_f1max": f"highest F1 over all distinct scores used as threshold, {_PIXELS}",
    "pixel_aupro": (
        "area under the mean recall of the ground-truth regions as a function of the FPR over the normal pixels of all "
        "images, from FPR 0 to the limit, divided by the limit; regions are connected components of the mask at map "
        "size; one step per distinct score, ties and the limit interpolated linearly"
    ),
    "dsc": f"{_DICE}; t = {_UNIAS}",
    "dsc_threshold": "t*, the threshold that dsc and iou use (a score, not a fraction; not averaged)",
    "dsc_precision": "pixel precision at t*",
    "dsc_recall": "pixel recall at t*",
    "dsc_floor_nothing": "dsc of predicting nothing: the fraction of images with an empty mask",
    "dsc_floor_all": "dsc of predicting every pixel",
    "dsc_f1max": f"{_DICE}; t = the threshold of pixel_f1max (the lowest one)",
    "dsc_anomalous": "dsc over the images with a mask that is not empty only",
    "iou": f"{_IOU}; t = {_UNIAS}",
    "iou_floor_nothing": "iou of predicting nothing: the fraction of images with an empty mask",
    "iou_floor_all": "iou of predicting every pixel",
    "iou_f1max": f"{_IOU}; t = the threshold of pixel_f1max (the lowest one)",
    "iou_anomalous": "iou over the images with a mask that is not empty only",
}
IMAGE_METRICS = tuple(IMAGE_DEFINITIONS)
PIXEL_METRICS = tuple(PIXEL_DEFINITIONS)
METRICS = IMAGE_METRICS + PIXEL_METRICS
OVERLAP_METRICS = tuple(name for name in PIXEL_METRICS if name.startswith(("dsc", "iou")))
NOT_AVERAGED = frozenset({"dsc_threshold", "seg_f1_threshold"})

SCOPES: dict[str, str] = {
    "scope category": "one category, all its test images",
    "scope mean": "unweighted mean over the categories in which the metric is defined; n = how many those are",
    "scope pooled": "one ranking (and one threshold) over the images and pixels of all categories together",
}


def aupro_name(limit: float) -> str:
    """Name of the AUPRO up to an FPR limit: `pixel_aupro` for 0.3, `pixel_aupro_0.05` for 0.05."""
    return "pixel_aupro" if limit == 0.3 else f"pixel_aupro_{limit:g}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The part of a message that names the nearest known name; only the full stop if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def select_metrics(names: Iterable[str] | None, fpr_limits: tuple[float, ...]) -> tuple[str, ...]:
    """Check metric names and put them in the fixed order. None selects all.

    Raises ValueError for an unknown name (with the nearest known one) and for an empty selection.
    """
    limits = tuple(aupro_name(limit) for limit in fpr_limits)
    known: list[str] = []
    for name in METRICS:
        known.extend(limits if name == "pixel_aupro" else [name])
    if names is None:
        return tuple(known)
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown metric {name!r}{did_you_mean(name, known)} Known metrics: {', '.join(known)}")
    if not wanted:
        raise ValueError(f"no metric selected. Known metrics: {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def describe(metrics: tuple[str, ...], fpr_limits: tuple[float, ...], connectivity: int) -> dict[str, str]:
    """Definition text of each selected metric and of the scopes, with the parameters filled in."""
    texts = IMAGE_DEFINITIONS | PIXEL_DEFINITIONS
    for limit in fpr_limits:
        suffix = f"; FPR limit {limit:g}, {connectivity}-connected regions"
        texts[aupro_name(limit)] = PIXEL_DEFINITIONS["pixel_aupro"] + suffix
    return {name: texts[name] for name in metrics} | SCOPES
