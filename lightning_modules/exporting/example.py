"""Scores photographs with a file of `make export FORMAT=onnx`; needs onnxruntime, numpy and pillow, nothing else.

python example.py MODEL.onnx PHOTOGRAPH... [--category NAME]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("photographs", nargs="+", type=Path)
parser.add_argument("--category", default="", help="whose threshold decides")
options = parser.parse_args()

session = onnxruntime.InferenceSession(options.model)
about = json.loads(session.get_modelmeta().custom_metadata_map["unirecon"])
height, width = about["image_size"]
rows, columns = about["resize_to"]  # larger than the image size where the run keeps the centre
how = about["resize"]["pillow"]
chosen = Image.Resampling[how["filter"]]

for path in options.photographs:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if how["call"] == "resize":
        image = image.resize((columns, rows), chosen)
    else:  # without averaging, as OpenCV does it
        steps = (image.width / columns, 0, 0, 0, image.height / rows, 0)
        image = image.transform((columns, rows), Image.Transform.AFFINE, steps, chosen)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    pixels = np.asarray(image)[top : top + height, left : left + width]
    *maps, scores = session.run(None, {about["input"]["name"]: pixels[None]})
    threshold = about["decision"]["thresholds"].get(options.category or "all", {}).get("image")
    verdict = "no threshold" if threshold is None else "defect" if scores[0] > threshold else "good"
    print(f"{path}: score {scores[0]:.6g}, {verdict}")
    if maps:
        low, high = maps[0].min(), maps[0].max()
        grey = (255 * (maps[0][0] - low) / max(high - low, 1e-12)).astype(np.uint8)
        Image.fromarray(grey).save(path.with_suffix(".map.png").name)
