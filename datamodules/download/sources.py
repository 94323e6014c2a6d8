"""Where the archives of public datasets lie, what they must be, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from datamodules.errors import DataError
from datamodules.readers import get_reader

NON_COMMERCIAL = ("CC BY-NC-SA 4.0: not for commercial use", "https://creativecommons.org/licenses/by-nc-sa/4.0/")
ATTRIBUTION = ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/")


@dataclass(frozen=True)
class Source:
    """A dataset's archive: its reader's name, address, sha256, and the licence's name and text."""

    name: str
    address: str
    sha256: str
    licence: tuple[str, str] = NON_COMMERCIAL

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return PurePosixPath(urlsplit(self.address).path).name

    @property
    def page(self) -> str:
        """Where people fetch it by hand."""
        return get_reader(self.name).homepage


_MVTEC = "https://www.mydrive.ch/shares"
SOURCES = {
    source.name: source
    for source in (
        Source(
            "mvtec_ad",
            f"{_MVTEC}/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/mvtec_anomaly_detection.tar.xz",
            "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        ),
        Source(
            "mvtec_loco",
            f"{_MVTEC}/48237/1b9106ccdfbb09a0c414bd49fe44a14a/download/430647091-1646842701/mvtec_loco_anomaly_detection.tar.xz",
            "9e7c84dba550fd2e59d8e9e231c929c45ba737b6b6a6d3814100f54d63aae687",
        ),
        Source(
            "mvtec_ad_2",
            f"{_MVTEC}/150997/701c90d3aea6588f404936e32a674602/download/466712769-1743429042/mvtec_ad_2.tar.gz",
            "c0ded99ef32bfc8e352d52beb44515e5b292b8598cb963aadfa91ca0763505e4",
        ),
        Source(
            "visa",
            "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
            "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
            ATTRIBUTION,
        ),
        Source(
            "btad",
            "https://avires.dimi.uniud.it/papers/btad/btad.zip",
            "461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        ),
    )
}
"""Reader -> its archive."""


def source_of(name: str) -> Source:
    """The source of a dataset.

    Raises:
        DataError: an unknown name, or a dataset without a public address; says where it is to be had.
    """
    reader = get_reader(name)
    if name in SOURCES:
        return SOURCES[name]
    if reader.default_root is not None:
        raise DataError(f"{name} comes with this repository: nothing has to be fetched.")
    if name == "synthetic":
        raise DataError("synthetic is drawn, not fetched: make synthetic.")
    where = (
        f"It is to be had from {reader.homepage}"
        if reader.homepage
        else "It is what you have: name its folder as DATA_ROOT"
    )
    known = ", ".join(SOURCES)
    raise DataError(
        f"{name} has no public address. {where} (laid out as {reader.layout}). Fetched by name are {known}."
    )
