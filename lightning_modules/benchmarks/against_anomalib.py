"""PatchCore, PaDiM and RD4AD against anomalib's, on the same features: `make bench-anomalib`.

The features are those of a frozen backbone (`--backbone`, packaged weights) on the photographs that come with the project.
Each part of each system runs in a process of its own, in interleaved rounds, and says its seconds and the memory above its
inputs. What comes out is compared: the radius of a coreset (how far the farthest vector is from the bank, smaller is
better), the largest error of distances against float64, the Mahalanobis map.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules.benchmarks.metrics import forget_peak, memory

SYSTEMS = ("ours", "anomalib")
Outcome = tuple[Callable[[], Any], Callable[[Any], dict[str, float]]]
"""What is timed, and what its result says."""


def levels(backbone: str, numbers: list[int], size: int) -> list[Tensor]:
    """Levels (N, C_l, H_l, W_l) of the normal photographs to train on."""
    from datamodules import DatasetConfig, UnifiedDataModule
    from models.backbones import BackboneConfig, FeatureExtractor

    extractor = FeatureExtractor(BackboneConfig(backbone, tuple(numbers), weights="packaged"))
    photos = [DatasetConfig("photos", "datamodules/photos")]
    data = UnifiedDataModule(photos, image_size=size, resize="pil_bilinear", batch_size=16, num_workers=0)
    data.setup("fit")
    data.normalise(extractor.mean, extractor.std)
    found = [extractor(batch["image"]) for batch in data.train_images()]
    return [torch.cat(level) for level in zip(*found, strict=True)]


def embedding(backbone: str, size: int) -> Tensor:
    """PatchCore's vectors by anomalib's rule, float32 (N x H x W, C)."""
    from models.patchcore import PatchCoreNetwork

    maps = levels(backbone, [3, 4], size)
    network = PatchCoreNetwork([m.shape[1] for m in maps], [tuple(m.shape[2:]) for m in maps], rule="anomalib")
    return network.prepare(maps)[0].permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def coreset(system: str, backbone: str, size: int, ratio: float) -> Outcome:
    """Greedy choice of a share of all vectors, projected as anomalib projects them."""
    vectors = embedding(backbone, size)

    def radius(bank: Tensor) -> dict[str, float]:
        from models.layers.nearest import nearest

        return {"bank": len(bank), "radius": nearest(vectors, bank)[0].max().sqrt().item()}

    if system == "ours":
        from models.layers.coreset import CoresetConfig, choose

        def run() -> Tensor:
            config, draw = CoresetConfig(ratio, "sparse", start="random"), torch.Generator().manual_seed(0)
            matrix = config.matrix(vectors.shape[1], len(vectors), draw)
            return vectors[choose(vectors if matrix is None else vectors @ matrix.T, config, draw)]

        return run, radius
    from anomalib.models.components.sampling import KCenterGreedy

    torch.manual_seed(0)
    return lambda: KCenterGreedy(vectors, ratio).sample_coreset(), radius


def search(system: str, backbone: str, size: int, ratio: float) -> Outcome:
    """Distance of every vector to its nearest among some of them."""
    vectors = embedding(backbone, size)
    bank = vectors[:: max(1, round(1 / ratio))].clone()
    queries = vectors[:8192]
    exact = torch.cat([torch.cdist(part.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
                       for part in queries[:512].split(64)])  # fmt: skip

    def error(distances: Tensor) -> dict[str, float]:
        return {"bank": len(bank), "largest error": (distances[:512].double() - exact).abs().max().item()}

    if system == "ours":
        from models.layers.nearest import nearest

        return lambda: nearest(queries, bank)[0][:, 0].sqrt(), error
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=("layer1",), backbone="resnet18", pre_trained=False)
    model.memory_bank = bank
    return lambda: model.nearest_neighbors(queries, 1)[0], error


def padim(system: str, backbone: str, size: int, ratio: float) -> Outcome:
    """A Gaussian at every position, and the distances of all images to them."""
    from models.padim import PaDiMNetwork

    maps = levels(backbone, [2, 3, 4], size)
    channels, sizes = [m.shape[1] for m in maps], [tuple(m.shape[2:]) for m in maps]
    network = PaDiMNetwork(channels, sizes, kept=100, generator=torch.Generator().manual_seed(0))

    def says(distances: Tensor) -> dict[str, float]:
        return {"mean distance": distances.double().mean().item(), "highest": distances.max().item()}

    if system == "ours":

        def run() -> Tensor:
            network.reset()
            for part in zip(*(m.split(16) for m in maps), strict=True):
                network.update(part)
            network.finish()
            return torch.cat([network(list(part)) for part in zip(*(m.split(16) for m in maps), strict=True)])

        return run, says
    from anomalib.models.components import MultiVariateGaussian
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

    vectors = network.embed(maps)
    gaussian = MultiVariateGaussian()

    def theirs() -> Tensor:
        found = gaussian.fit(vectors)
        return torch.cat([AnomalyMapGenerator.compute_distance(part, found) for part in vectors.split(16)])

    return theirs, says


def rd4ad(system: str, backbone: str, size: int, ratio: float) -> Outcome:
    """A training step of eight images on levels shaped like ResNet18's."""
    torch.manual_seed(0)
    maps = [torch.randn(8, 64 * 2**n, size // 4 // 2**n, size // 4 // 2**n) for n in range(3)]
    if system == "ours":
        from models.rd4ad import RD4AD, cosine_loss

        network = RD4AD([m.shape[1] for m in maps], [tuple(m.shape[2:]) for m in maps], block="basic",
                        width_per_group=64, embedding_blocks=2, decoder_blocks=(2, 2, 2))  # fmt: skip
        parameters = list(network.parameters())

        def step() -> Tensor:
            loss = cosine_loss(network(maps))
            loss.backward()
            return loss.detach()
    else:
        from anomalib.models.components.backbone import get_decoder
        from anomalib.models.image.reverse_distillation.components.bottleneck import get_bottleneck_layer
        from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss

        bottleneck, decoder = get_bottleneck_layer("resnet18"), get_decoder("resnet18")
        parameters = [*bottleneck.parameters(), *decoder.parameters()]

        def step() -> Tensor:
            loss = ReverseDistillationLoss()(maps, decoder(bottleneck(maps)))
            loss.backward()
            return loss.detach()

    million = sum(p.numel() for p in parameters) / 1e6
    return lambda: [step() for _ in range(5)][-1], lambda loss: {"M parameters": million, "loss": loss.item()}


PARTS: dict[str, Callable[[str, str, int, float], Outcome]] = {
    "PatchCore, coreset": coreset,
    "PatchCore, search": search,
    "PaDiM, fit and distances": padim,
    "RD4AD, five training steps": rd4ad,
}


def measure(part: str, system: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a second run, memory of the first in MB above the inputs, and what the result says, in this process."""
    torch.set_num_threads(options.threads)
    run, says = PARTS[part](system, options.backbone, options.size, options.ratio)
    before = memory("VmRSS")
    if before is not None:
        forget_peak()
    result = run()
    peak = memory("VmHWM")
    found = says(result)
    if before is not None and peak is not None:
        found["MB"] = peak - before
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start} | found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0.in1k")
    parser.add_argument("--size", type=int, default=256, help="pixels of an image's side")
    parser.add_argument("--ratio", type=float, default=0.01, help="share of the vectors in the memory bank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], options.one[1], options)))
        return 0
    if importlib.util.find_spec("anomalib") is None:
        print("anomalib is not installed: make baselines", file=sys.stderr)
        return 2
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for part in PARTS:
            for system in SYSTEMS:
                command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--one", part, system]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{part}, {system}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    return 1
                found.setdefault((part, system), []).append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"{options.backbone}, {options.size} px, {options.threads} thread, {options.rounds} rounds")
    for heading in ("part", "system", "seconds", "MB", "result"):
        table.add_column(heading, justify="right" if heading in ("seconds", "MB") else "left")
    for (part, system), rounds in found.items():
        seconds = [one["seconds"] for one in rounds]
        rest = ", ".join(f"{name} {value:.6g}" for name, value in rounds[0].items() if name not in ("seconds", "MB"))
        peak = statistics.median(one["MB"] for one in rounds) if "MB" in rounds[0] else float("nan")
        table.add_row(part, system, f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]",
                      f"{peak:.0f}", rest)  # fmt: skip
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
