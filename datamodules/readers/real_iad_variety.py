"""Real-IAD Variety: 160 categories, each object seen from five sides; the layout of Real-IAD under other names.

The hub's archives are one per category (`realiadvariety_raw/<category>.zip`) and one of split files
(`realiadvariety_jsons.zip`); images that somebody made smaller usually lie in `realiadvariety_1024`. Here a view of a
defective object whose `mask_path` is null shows no defect: it counts as normal, as in Dinomaly2's released code.
"""

from __future__ import annotations

from datamodules.readers.base import register
from datamodules.readers.real_iad import RealIAD

JSONS = "realiadvariety_jsons"


@register
class RealIADVariety(RealIAD):
    name = "real_iad_variety"
    layout = (
        "realiadvariety_<raw|1024>/<category>/.../<view>.jpg with masks, and beside it "
        f"{JSONS}/Real-IAD_Variety_jsons/<category>.json. The root is the folder of both, or that of the images"
    )
    homepage = "https://huggingface.co/datasets/Real-IAD/Real-IAD_Variety"
    totals = None
    splits = (f"{JSONS}/Real-IAD_Variety_jsons", f"{JSONS}/{JSONS}", JSONS, "Real-IAD_Variety_jsons")
    prefix = "realiadvariety_"
    unmasked_is_normal = True
