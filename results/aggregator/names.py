"""How things are called in tables: metrics, data sets, methods, categories, and which categories belong together."""

from __future__ import annotations

import re

METRICS = {
    "image_auroc": "I-AUROC", "image_ap": "I-AP", "image_f1max": "I-F1max",
    "pixel_auroc": "P-AUROC", "pixel_ap": "P-AP", "pixel_f1max": "P-F1max", "pixel_aupro": "AUPRO",
    "dsc": "DSC", "dsc_threshold": "threshold", "dsc_precision": "precision", "dsc_recall": "recall",
    "dsc_floor_nothing": "DSC floor (nothing)", "dsc_floor_all": "DSC floor (all)",
    "dsc_f1max": "DSC at F1max", "dsc_anomalous": "DSC (anomalous)",
    "iou": "IoU", "iou_f1max": "IoU at F1max", "iou_anomalous": "IoU (anomalous)", "iou_max": "IoUmax",
    "anomaly_ratio": "AR", "unlabelled": "(unlabelled)", "mean_of_seven": "mAD",
}  # fmt: skip
#: Columns that come from the record itself: (label, unit, digits).
COSTS = {
    "parameters": ("Parameters", "M", 2),
    "seconds_per_epoch": ("Time per epoch", "s", 2),
    "wall_seconds": ("Total time", "s", 0),
    "train_seconds": ("Training", "s", 1),
    "images_per_second": ("Speed", "images/s", 1),
    "peak_memory": ("Peak memory", "MiB", 0),
}
TIMES = ("seconds_per_epoch", "wall_seconds", "train_seconds", "images_per_second")
DATASETS = {
    "mvtec_ad": "MVTec AD", "mvtec_loco": "MVTec LOCO", "mvtec_3d": "MVTec 3D", "visa": "VisA", "btad": "BTAD",
    "mpdd": "MPDD", "real_iad": "Real-IAD", "real_iad_sv": "Real-IAD (single view)",
    "real_iad_variety": "Real-IAD Variety", "adnet": "ADNet", "mvtec_ad_2": "MVTec AD 2", "synthetic": "synthetic",
    "photos": "photographs",
}  # fmt: skip
METHODS = {
    "uniad": "UniAD", "unias": "UniAS", "rlr": "RLR", "ulsad": "ULSAD", "dfr": "DFR", "hvq_trans": "HVQ-Trans",
    "us": "US", "patch_svdd": "PSVDD", "padim": "PaDiM", "cutpaste": "CutPaste", "fcdd": "FCDD", "mkd": "MKD",
    "draem": "DRAEM", "patchcore": "PatchCore", "destseg": "DeSTSeg", "rd4ad": "RD4AD", "cflow": "CFLOW",
    "fastflow": "FastFlow", "efficientad": "EfficientAD", "simplenet": "SimpleNet", "realnet": "RealNet", "cfa": "CFA",
    "pyramidalflow": "PyramidalFlow", "diad": "DiAD", "vitad": "ViTAD", "invad": "InvAD", "invad_lite": "InvAD-lite",
    "mambaad": "MambaAD", "rdpp": "RD++", "recontrast": "ReContrast", "omiad": "OmiAD", "dinomaly_b": "Dinomaly-B",
    "dinomaly_l_dinov3": "Dinomaly-L (DINOv3)", "dinomaly_costfilter": "Dinomaly + CostFilter",
    "inp_former": "INP-Former", "rad_training_free_dinov3": "RAD (training-free, DINOv3)", "dinomaly2": "Dinomaly2",
    "dinomaly": "Dinomaly", "noisy_bottleneck": "Noisy bottleneck", "anomaly_dino": "AnomalyDINO", "rad": "RAD",
    "nearest_neighbours": "Nearest neighbours", "identical_shortcut": "Identical shortcut", "onenip": "OneNIP",
    "uninet": "UniNet", "dataset": "",
}  # fmt: skip
#: Families of methods in the order of the papers' tables. A method that stands in none comes last.
FAMILIES = {
    "Memory bank, density": ("nearest_neighbours", "patchcore", "padim", "anomaly_dino", "rad", "cfa"),
    "Image reconstruction": ("draem", "realnet", "diad", "omiad"),
    "Feature reconstruction": (
        "uniad", "unias", "hvq_trans", "rlr", "ulsad", "dfr", "identical_shortcut", "noisy_bottleneck", "onenip", "vitad",
        "invad", "mambaad", "dinomaly", "dinomaly2", "inp_former",
    ),
    "Distillation": ("us", "mkd", "rd4ad", "rdpp", "recontrast", "destseg", "efficientad", "uninet"),
    "Flow": ("cflow", "fastflow", "pyramidalflow"),
    "One-class": ("patch_svdd", "cutpaste", "fcdd", "simplenet"),
}  # fmt: skip
OTHER_FAMILY = "Other"
#: Published names of a method that several sizes share: (method, what the backbone's name holds, published name).
_SIZES = (
    ("dinomaly", ("vit_large", "dinov3"), "dinomaly_l_dinov3"),
    ("dinomaly", ("vit_large",), "dinomaly_l"),
    ("dinomaly", ("vit_base",), "dinomaly_b"),
    ("dinomaly", ("vit_small",), "dinomaly_s"),
    ("rad", ("dinov3",), "rad_training_free_dinov3"),
)
CATEGORIES = {
    "mean": "Mean",
    "mean_objects": "Mean of objects",
    "mean_textures": "Mean of textures",
    "pooled": "Pooled",
}

_MVTEC_OBJECTS = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper",
)  # fmt: skip
_MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
_REAL_IAD = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
    "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base", "sim_card_set",
    "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block", "usb", "usb_adaptor",
    "vcpill", "wooden_beads", "woodstick", "zipper",
)  # fmt: skip
#: The full list of categories of the public data sets; a mean over fewer is not that data set's mean.
DATASET_CATEGORIES = {
    "mvtec_ad": _MVTEC_OBJECTS + _MVTEC_TEXTURES,
    "mvtec_loco": ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
    "visa": (
        "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4",
        "pipe_fryum",
    ),
    "btad": ("01", "02", "03"),
    "mvtec_ad_2": ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
    "real_iad": _REAL_IAD,
    "real_iad_sv": _REAL_IAD,
    "mpdd": ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"),
}  # fmt: skip
#: Rows that average a named part of a data set.
PARTIAL_MEANS = {
    ("mvtec_ad", "mean_objects"): _MVTEC_OBJECTS,
    ("mvtec_ad", "mean_textures"): _MVTEC_TEXTURES,
}

# Shown, but not better when higher: operating points, floors, properties of the data.
_NOT_RANKED = re.compile(r"threshold|precision|recall|floor|ratio|unlabelled")


#: Sweeps whose cells stand as controls beside the tables of all others that were run on the same features.
CONTROLS = ("nearest_neighbours",)


def is_ranked(metric: str) -> bool:
    """Whether best and second best make sense for the metric (then higher is better)."""
    return metric not in COSTS and not _NOT_RANKED.search(metric)


def is_percent(metric: str) -> bool:
    """Whether tables print the metric times one hundred; thresholds are scores in the map's own unit."""
    return not metric.endswith("threshold")


def metric_label(metric: str) -> str:
    """Table heading of a metric or cost."""
    if metric in COSTS:
        label, unit, _ = COSTS[metric]
        return f"{label} [{unit}]"
    if metric.startswith("pixel_aupro_"):
        return f"AUPRO (FPR {metric.removeprefix('pixel_aupro_')})"
    return METRICS.get(metric, metric.replace("_", " "))


def dataset_label(name: str) -> str:
    """Table heading of a data set."""
    return DATASETS.get(name, name)


def method_label(name: str) -> str:
    """Table heading of a method."""
    return METHODS.get(name, name)


def family(method: str) -> str:
    """The family that a method belongs to."""
    return next((name for name, members in FAMILIES.items() if method in members), OTHER_FAMILY)


def published_name(method: str, backbone: str) -> str:
    """A method's name in the published tables, where its size decides it: Dinomaly on a ViT-B is `dinomaly_b`."""
    for known, parts, name in _SIZES:
        if known == method and all(part in backbone for part in parts):
            return name
    return method


def category_label(name: str) -> str:
    """Table heading of a category or of a kind of mean."""
    return CATEGORIES.get(name, name.replace("_", " "))


def label(axis: str, name: str) -> str:
    """Table heading of a value on one of the axes metric, dataset, method, category; others are shown as they are."""
    makers = {"metric": metric_label, "dataset": dataset_label, "method": method_label, "category": category_label}
    return makers[axis](name) if axis in makers else str(name)
