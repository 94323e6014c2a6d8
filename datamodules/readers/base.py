"""What a dataset reader is, and the register that finds one by name."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import ClassVar

from datamodules.errors import DataError
from datamodules.problems import ERROR, WARNING, Problem, describe, number_of
from datamodules.sample_table import GOOD, Sample, SampleTable, build_table
from datamodules.tree import is_category, list_folders
from results.common.did_you_mean import did_you_mean


@dataclass(frozen=True)
class Counts:
    """Images of one category as the dataset's authors published them."""

    train: int
    test_good: int
    structural: int
    logical: int = 0
    val: int = 0


class DatasetReader(abc.ABC):
    """Turns one dataset, in the layout its users download, into samples. One subclass per file in this package."""

    name: ClassVar[str]
    layout: ClassVar[str]
    """One line for error messages: what the root must hold."""
    homepage: ClassVar[str] = ""
    counts: ClassVar[Mapping[str, Counts]] = {}
    """Public counts per category; empty where there are none."""
    default_root: ClassVar[Path | None] = None
    """Where the dataset lies if nobody names a root; None for all that does not come with the project."""
    mask_threshold: ClassVar[int] = 0
    """Mask values above it are defective, at native resolution."""
    fpr_limits: ClassVar[tuple[float, ...]] = (0.3,)
    """False-positive rates up to which AU-PRO is integrated, unless a run says otherwise."""
    segmentation: ClassVar[bool] = False
    """Whether runs are also measured by SegF1, see `lightning_modules.metrics.segmentation`."""
    holdout: ClassVar[float] = 0.0
    """Share of each category's normal training images that is held out for thresholds, unless a run says otherwise."""
    totals: ClassVar[tuple[int, Counts] | None] = None
    """(number of categories, public counts over all of them), where the authors give only these."""

    def locate(self, root: Path) -> Path:
        """The folder that holds the categories, given what the user named; override where archives add a level."""
        return root

    def categories(self, root: Path) -> list[str]:
        """Names of the categories under `root`, sorted; empty if the layout is not there."""
        return [folder.name for folder in list_folders(root) if is_category(folder)]

    def condition(self, image_path: str) -> str:
        """Under what a test image was taken, as `name=value`: metrics are also told apart by it. "" for nothing known."""
        return ""

    def unread(self, root: Path) -> list[Problem]:
        """What looks like a category under the root, but cannot be read as one."""
        return []

    @abc.abstractmethod
    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        """Samples of one category; findings are appended to `problems`."""


READERS: dict[str, DatasetReader] = {}


def register(reader: type[DatasetReader]) -> type[DatasetReader]:
    """Class decorator: make a reader available under its name."""
    READERS[reader.name] = reader()
    return reader


def load_readers() -> dict[str, DatasetReader]:
    """All readers by name; imports every module beside this one, so that a new dataset is one new file."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    return READERS


def get_reader(name: str) -> DatasetReader:
    """The reader of a dataset; an unknown name raises DataError with the nearest one."""
    readers = load_readers()
    if name not in readers:
        raise DataError(
            f"Unknown dataset {name!r}. {did_you_mean(name, readers)} Your own images are read by 'folder'."
        )
    return readers[name]


def has_own_root(name: str) -> bool:
    """Whether a dataset comes with the project, so that nobody needs to name its root; False for an unknown one."""
    reader = load_readers().get(name)
    return reader is not None and reader.default_root is not None


@dataclass(frozen=True)
class Listing:
    """A dataset as found on disk, before any image is opened."""

    reader: DatasetReader
    root: Path
    table: SampleTable
    problems: tuple[Problem, ...]
    available: tuple[str, ...]
    """Every category under the root, whether asked for or not."""


def find_dataset(
    name: str, root: str | Path | None, categories: Sequence[str] | None = None
) -> tuple[DatasetReader, Path, list[str], list[str]]:
    """Reader of a dataset, folder of its categories, all of them, and the chosen ones; see `list_dataset`."""
    reader = get_reader(name)
    given = Path(root).expanduser() if root else reader.default_root
    if given is None:
        raise DataError(f"{name}: no root is named, the folder of the dataset. {_how_to_get(reader)}")
    if not given.is_dir():
        raise DataError(f"{name}: the root {given} is not a folder. {_how_to_get(reader)}")
    base = reader.locate(given)
    available = reader.categories(base)
    if not available:
        raise DataError(f"{name}: no category under {given}. {_what_is_there(given)} {_how_to_get(reader)}")
    chosen = available if categories is None else sorted(set(categories))
    if not chosen:
        raise DataError(f"{name}: the list of categories is empty; leave it out to use all: {', '.join(available)}.")
    for category in chosen:
        if category not in available:
            raise DataError(f"{name}: no category {category!r} under {base}. {did_you_mean(category, available)}")
    return reader, base, available, chosen


def list_dataset(
    name: str, root: str | Path | None, categories: Sequence[str] | None = None, label: str | None = None
) -> Listing:
    """Read a dataset's file names, without opening images.

    Args:
        name: reader, e.g. mvtec_ad.
        root: folder of the dataset; None or "" for the one of a dataset that comes with the project.
        categories: subset to read, None for all. The result is ordered by name, whatever order is asked for.
        label: name of the dataset in the table, default `name`.

    Raises:
        DataError: unknown dataset or category, or a root without the dataset's layout.
    """
    reader, base, available, chosen = find_dataset(name, root, categories)
    problems: list[Problem] = [] if categories else reader.unread(base)
    samples: list[Sample] = []
    for category in chosen:
        found = reader.read_category(base, category, problems)
        if not any(sample.split == "train" for sample in found):
            what = f"no normal training image under {base}; the layout is: {reader.layout}"
            problems.append(Problem(ERROR, "category without normals", category, what, (str(base),)))
        kinds = {sample.anomaly_type == GOOD for sample in found if sample.split == "test"}
        if found and len(kinds) < 2:
            lacking = "anomalous " if kinds == {True} else "normal " if kinds == {False} else ""
            what = f"no {lacking}test image, so most scores of this category are undefined"
            problems.append(Problem(WARNING, "one-sided test set", category, what, (str(base),)))
        problems.extend(_names_that_cannot_be_written(category, found))
        samples.extend(found)
    return Listing(reader, base, build_table(label or name, samples), tuple(problems), tuple(available))


def _names_that_cannot_be_written(category: str, samples: Sequence[Sample]) -> list[Problem]:
    """Names that are not UTF-8 would end a run when its record, full of names, is written."""
    names = [name for sample in samples for name in (sample.image_path, *sample.mask_paths)]
    try:
        "".join(names).encode()
        return []
    except UnicodeEncodeError:
        bad = tuple(name for name in names if any("\ud800" <= character <= "\udfff" for character in name))
    what = (
        f"{number_of(len(bad), 'name')} not in UTF-8: rename them, for example by convmv -f latin1 -t utf8 -r --notest"
    )
    return [Problem(ERROR, "unreadable name", category, what, bad)]


def raise_on_errors(listing: Listing) -> None:
    """Raise DataError with every error of the listing, if it has any."""
    errors = [problem for problem in listing.problems if problem.severity == ERROR]
    if errors:
        raise DataError(
            f"{listing.reader.name} in {listing.root} cannot be used as it is:\n{describe(errors)}\n"
            "To list everything: "
            f"python -m datamodules check --dataset {listing.reader.name} --data-root {listing.root}"
        )


def _how_to_get(reader: DatasetReader) -> str:
    from datamodules.download.sources import SOURCES  # late: it asks for readers itself

    source = f" It is available from {reader.homepage}" if reader.homepage else ""
    source += f", or by make data DATASET={reader.name} DATA_ROOT=<folder>" if reader.name in SOURCES else ""
    return f"{reader.name} is laid out as: {reader.layout}.{source}"


def _what_is_there(root: Path) -> str:
    if is_category(root):
        return (
            f"The root itself is laid out like one category: name its parent folder and categories={root.name}, "
            "or use the dataset 'folder'."
        )
    folders = list_folders(root)
    for folder in folders:
        if any(is_category(inner) for inner in list_folders(folder)):
            return f"Its folder {folder.name} holds categories: did you mean {folder}?"
    for part in (part for folder in (root, *folders) for part in list_folders(folder)):
        if part.name.casefold() in ("train", "training"):
            return f"{part} has to be called train."
    names = ", ".join(folder.name for folder in folders[:8]) or "no folder"
    return f"It holds {names}."
