"""Scores photographs with a file of `make export FORMAT=onnx`; needs onnxruntime, numpy and pillow, nothing else."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("photographs", nargs="+", type=Path)
parser.add_argument("--category", help="whose threshold decides; not needed where the file knows one only")
options = parser.parse_args()
session = onnxruntime.InferenceSession(options.model)
about = json.loads(session.get_modelmeta().custom_metadata_map["unirecon"])
(height, width), (rows, columns) = about["image_size"], about["resize_to"]
how, known = about["resize"]["pillow"], about["decision"]["thresholds"]
chosen = options.category or (next(iter(known)) if len(known) == 1 else "")
threshold = known.get(chosen, {}).get("image")

for number, path in enumerate(options.photographs):
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except Exception as error:  # what a broken file raises depends on its format
        raise SystemExit(f"{path} cannot be read as an image: {error}") from None
    if image.mode.startswith(("I", "F")):
        raise SystemExit(f"{path}: scale 16-bit values to 8 bits first (bit_depth of the run: {about['bit_depth']})")
    image, filter_ = image.convert("RGB"), Image.Resampling[how["filter"]]
    if how["call"] == "resize":
        image = image.resize((columns, rows), filter_)
    else:  # bilinear without averaging
        steps = (image.width / columns, 0, 0, 0, image.height / rows, 0)
        image = image.transform((columns, rows), Image.Transform.AFFINE, steps, filter_)
    top, left = round((rows - height) / 2), round((columns - width) / 2)  # the centre, where the run keeps that alone
    pixels = np.asarray(image)[top : top + height, left : left + width]
    *maps, scores = session.run(None, {about["input"]["name"]: pixels[None]})
    verdict = "cannot tell" if threshold is None else "defect" if scores[0] > threshold else "good"
    print(f"{path}: {verdict}, score {scores[0]:.6g}, threshold {threshold} of {chosen or 'no category'}")
    if maps:
        name = f"{number:04d}_{path.stem}"
        np.save(f"{name}.npy", maps[0][0])
        scale = known.get(chosen, {}).get("colour_scale") or (maps[0].min(), maps[0].max())
        Image.fromarray(np.interp(maps[0][0], scale, (0, 255)).astype(np.uint8)).save(f"{name}.png")
