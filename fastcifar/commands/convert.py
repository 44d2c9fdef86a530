"""`fastcifar convert SOURCE OUT`: make a store of your own images."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastcifar.commands.options import parse
from fastcifar.data.arrayfiles import file_content
from fastcifar.data.arrays import Layout
from fastcifar.data.cifar import recognise_cifar
from fastcifar.data.content import Content
from fastcifar.data.datasets import DATASETS
from fastcifar.data.download import Progress
from fastcifar.data.folders import Broken, folder_content
from fastcifar.data.images import Resize
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import make_store
from fastcifar.errors import ConfigError, DataError, StoppedError
from fastcifar.recipes import RECIPES

__all__ = ["ConvertOptions", "run"]

_DESCRIPTION = """Convert images to a store, which train and Loader open by its path.

SOURCE is a folder of class folders (CLASS/IMAGE, or train/CLASS/IMAGE with test and val beside train), an .npz or .npy
file, or CIFAR-10's or CIFAR-100's archive or unpacked folder, in the Python or the binary form.

Examples:
  fastcifar convert pets pets-32 --size 32                  each image cropped to a square and reduced
  fastcifar convert scans scans-store --grey --broken skip  what cannot be read is left out, and listed
  fastcifar convert mnist.npz mnist                         x_train, y_train, x_test, y_test
  fastcifar convert images.npy mine --labels labels.npy
  fastcifar convert cifar-10-binary.tar.gz cifar10-store
  fastcifar train --dataset pets-32                         and what then"""

_SHOWN = 3  # names, of many


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `fastcifar convert`, with the defaults of what they are passed on to."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """What to convert."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the store; nothing may be there yet."""
    size: str | None = None
    """Of the stored images, in pixels: a side, or HxW. Folders only; needed where sizes differ."""
    resize: Resize = "crop"
    """How images get that size: crop scales the shorter side and cuts the longer one evenly, squash scales both.
    Bilinear, with antialiasing."""
    grey: bool = False
    """Make all images grey. Otherwise they are only where all of a folder's are."""
    upright: bool = False
    """Turn images as their EXIF orientation says. By default pixels are taken as they lie, as torchvision does."""
    shuffle: bool = False
    """Store a folder's images in a shuffled order, always the same, not class by class: for the Loader's order block,
    which reads neighbours together."""
    broken: Broken = "refuse"
    """What to do about images that cannot be read: refuse stops at the first, skip leaves them out and lists them in
    the store's manifest.json."""
    workers: int | None = None
    """Processes that decode; by default as many as there are cores, if there is enough to do."""
    classes: tuple[str, ...] = ()
    """Class folders to take, in label order (by default all, sorted); for .npz and .npy the classes' names."""
    labels: Path | None = None
    """The .npy file of labels that belongs to an .npy of images."""
    layout: Layout = "auto"
    """Of the arrays' axes: nhwc or nchw; needed only where both would fit."""
    name: str | None = None
    """Of the data set; by default SOURCE's."""
    allow_unverified: bool = False
    """Accept a CIFAR archive or folder whose checksum is not the published one; the store says so."""


def run(arguments: Sequence[str]) -> int:
    """Convert as the options say."""
    options = parse(ConvertOptions, arguments, prog="fastcifar convert", description=_DESCRIPTION)
    if options.out.exists():  # before anything is read
        raise ConfigError(f"{options.out} exists already: delete it first, or choose another place for the store")
    kind, content = _content(options)
    from fastcifar.console import ConsoleReporter, print_facts  # these wait for torch
    from fastcifar.reporter import TeeReporter
    from fastcifar.signals import stop_at_once

    reporter = TeeReporter(ConsoleReporter())  # whose closed pipe does not end the conversion
    reporter.message(f"{options.source}: {kind}")
    started = time.perf_counter()
    try:
        with (
            stop_at_once("before the store was made; nothing was left behind"),
            reporter.transfer(f"converting {content.name}", "images") as progress,
        ):
            store = _made(options, content, progress)
    except StoppedError:
        if not options.out.exists():
            raise
        store = ArrayStore(options.out)  # it was done when the signal came
    finally:
        reporter.close()
    print_facts(f"{content.name} in {options.out}", _facts(store, str(options.out), time.perf_counter() - started))
    return 0


def _made(options: ConvertOptions, content: Content, progress: Progress) -> ArrayStore:
    try:
        return make_store(options.out, content, progress)
    except DataError as error:  # of a part that is wrong, or of an image: it may not name the source
        told = str(error)
        raise DataError(told if str(options.source) in told else f"{options.source}: {told}") from None


def _content(options: ConvertOptions) -> tuple[str, Content]:
    """What the source is, in words, and what it holds."""
    source = options.source
    if not source.exists():
        raise DataError(f"{source}: does not exist")
    if (source / "manifest.json").is_file():
        raise ConfigError(f"{source} is a store already: train and Loader open it as it is")
    found = recognise_cifar(source)
    if found is not None:
        dataset, form = found
        given = _given(options, "a CIFAR archive", "allow_unverified")
        unverified = bool(given.get("allow_unverified"))
        checked = dataset.find(data=source, home=Path(), allow_unverified=unverified, progress=None)
        return f"{dataset.name}, {form.spec.name} or its folder", checked.content()
    read: Callable[..., Content]
    if source.is_dir():
        what, read = "a folder", folder_content
        given = _given(
            options, what, "size", "resize", "grey", "upright", "shuffle", "broken", "workers", "classes", "name"
        )
    else:
        what, read = "a file of arrays", file_content
        given = _given(options, what, "labels", "layout", "classes", "name")
    content = read(source, **given)
    parts = ", ".join(content.splits["full"])
    classes = f", {len(content.classes)} classes" if content.classes is not None else ""
    return f"{what}: {content.total:,} images{classes}, {parts}", content


def _given(options: ConvertOptions, kind: str, *allowed: str) -> dict[str, Any]:
    """The options that were given, if all may be given with this kind of source."""
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    optional = {name: value for name, value in values.items() if value[1] is not MISSING}
    given = {name: value for name, (value, default) in optional.items() if value != default}
    for name in given:
        if name not in allowed:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing about {options.source}, which is {kind}")
    return given


def _facts(store: ArrayStore, place: str, seconds: float) -> list[tuple[str, str]]:
    """What was made at a place, and how to go on."""
    from fastcifar.nets import check_image_size

    height, width, channels = store.image_shape
    parts = [name for name in store.split_names() if "/" not in name]
    skipped = store.source.get("skipped", [])
    facts = [
        ("images", f"{len(store):,} of {height} x {width}, {'grey' if channels == 1 else 'RGB'}"),
        ("classes", f"{len(store.classes)}: {_some(store.classes)}"),
        ("splits", ", ".join(f"{part} {len(store.split(part)):,}" for part in parts)),
    ]
    if skipped:
        facts.append(("skipped", f"{len(skipped):,}: {_some([f'{path} {reason}' for path, reason in skipped], '; ')}"))
    if not store.verified:
        facts.append(("source", "an unverified copy: its checksum is not the published one"))
    facts += [
        ("size", f"{store.images.nbytes / 1e6:,.1f} MB in {seconds:.1f} s, {len(store) / seconds:,.0f} images/s"),
        ("digest", store.digest),
    ]
    if place in DATASETS:  # not what is known by that name
        place = f"./{place}"
    training = store.split("train")
    unit = ', scaling="unit"' * bool((training.std == 0).any())  # a channel that is always the same has no deviation
    try:
        check_image_size(height, width)
        if "test" in parts and len(training) > 1:
            more = f" --batch-size {min(32, len(training))}" * (len(training) < 4 * RECIPES["fast"].batch_size)
            more += " --change scaling=unit" * bool(unit)
            facts.append(("train", f"fastcifar train --dataset {shlex.quote(place)}{more}"))
        elif "test" in parts:
            facts.append(("train", "needs at least two training images"))
        else:
            facts.append(("train", "needs test images too: in SOURCE/test of a folder, or as test_images in an .npz"))
    except ConfigError as error:
        facts.append(("train", f"{error}{'; --size 32 would do' * ('resize' in store.source)}"))
    facts.append(("load", f"Loader({place!r}{unit})"))
    return facts


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = [f"and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    return between.join([*names[:_SHOWN], *more])
