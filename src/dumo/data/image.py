"""A user's own images: a folder, hub parquet or webdataset shards, found out by looking.

A spec reads no disk. How many classes there are it says, or `found` counts them once, when a run is opened, and its
run.yaml records the number with the names. Until then there are none, and `names` is None. Captions, which may replace
classes (`dumo.data.caption`), are counted in the same way.
"""

import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from dumo.data.album import Album
from dumo.data.augment import Edm
from dumo.data.bucket import Assorted, Buckets, Crops
from dumo.data.caption import Captioned, CaptionFiles, Captioning, Templates, captioned, kept
from dumo.data.parquet import Parquet, columns
from dumo.data.pixel import SUFFIXES, Crop, Frame, Size
from dumo.data.store import Folder, Store, choose, some, walk
from dumo.data.tar import Tar
from dumo.data.written import TABLES, captions_of, edited, hash_of
from dumo.encoders.caption import Captions
from dumo.io.content import Hashes, State
from dumo.io.read import user_path
from dumo.io.source import Bucketed
from dumo.runtime.bound import CLASSES, GIGABYTES, PIXELS
from dumo.types import FREE, PLACE, Spec, UserError

FORMS = {".parquet": "parquet", ".tar": "tar"}
GIGABYTE = 1e9
LEFT = {"flip": "false", "buckets": "null", "augment": "null"}  # what leaves an image as it is


class Images(Spec):
    """Images brought to one size, with a class each or none.

    A folder with a folder per class, or a flat one; parquet with a column `image` of {bytes, path}, as on the Hugging
    Face hub; webdataset tar shards with `.cls` labels.
    """

    kind: Literal["images"] = "images"
    # A folder or a file; may begin with ~ and hold $NAMES of environment variables.
    root: str = Field(json_schema_extra=PLACE)
    side: int = Field(ge=1, le=PIXELS)  # pixels
    # Sizes around the area of `side`, in which images are trained on; None: all are cut to squares of it.
    buckets: Buckets | None = Field(default=None, exclude_if=lambda buckets: buckets is None)
    crop: Crop = "adm"  # adm: as the ImageNet references were made; smaller images are enlarged, bicubically
    flip: bool = False  # mirror half of the images of a batch
    augment: Edm | None = None  # transform the images of a batch; the net reads how, in `net.augment` numbers
    split: str | None = None  # train, test ...: the part of the data, where there are several by their names
    labelled: Literal["auto", False] = "auto"  # false: the labels there are, are not read
    label: str = "label"  # the column of classes in parquet
    on_bad: Literal["raise", "skip"] = Field(default="raise", json_schema_extra=FREE)  # an image that cannot be read
    memory: float = Field(default=2.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)  # GB of pixels kept decoded; ours
    captions: Captioning | None = Field(default=None, exclude_if=lambda captions: captions is None)  # for classes
    # 0: none; not given: those that are there. With captions: how many there are of them.
    classes: int = Field(default=None, ge=0, le=CLASSES, validate_default=True)
    names: tuple[str, ...] | None = None  # of the classes; (): they have none; None: not looked up yet

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return (3, self.side, self.side)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The buckets; () where there are none."""
        return self.buckets.sizes(self.side) if self.buckets else ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of all samples that are trained on."""
        return tuple((3, *size) for size in self.sizes) or (self.shape,)

    @property
    def labels(self) -> int:
        """How many classes images have, captions or not; with captions that were written of each, 0."""
        if self.captions is None:
            return self.classes
        return self.classes // self.captions.count(1) if isinstance(self.captions, Templates) else 0

    @field_validator("classes", mode="wrap")
    @classmethod
    def _to_be_counted(cls, classes: object, count: Callable[[object], object]) -> object:
        return None if classes is None else count(classes)

    @model_validator(mode="after")
    def _agrees(self) -> "Images":
        given = self.classes is not None  # pyright: ignore[reportUnnecessaryComparison], it may not be given
        match self.captions:
            case CaptionFiles(digest=digest):
                known = given and digest is not None
            case Templates(names=names):
                known = given and bool(names or self.names)
            case None:
                known = given or self.labelled is False
        # No copy: it would be lost where `Images(...)` is called.
        object.__setattr__(self, "names", (self.names or ()) if known else None)
        object.__setattr__(self, "classes", self.classes or 0)
        self.require_agreement()
        return self

    def require_agreement(self) -> None:
        """Refuse fields that contradict each other."""
        if wrong := self._contradiction():
            raise UserError(wrong)

    def _contradiction(self) -> str | None:
        """What is wrong between two fields, if anything is."""
        _ = self.sizes  # refuses a step that does not divide the side
        if self.buckets and (self.augment or self.crop == "none"):
            field, way = ("augment", "null") if self.augment else ("crop", "adm")
            return f"buckets bring images to their sizes, and {field} is of one size: set {field}={way}"
        if self.source and (self.flip or self.buckets or self.augment):
            field = next(name for name in ("flip", "buckets", "augment") if getattr(self, name))
            return f"captions.source edits images as they are, and {field} changes them: set {field}={LEFT[field]}"
        if self.names and len(self.names) != self.labels:
            return f"names has {len(self.names)} names for classes={self.labels}: remove names"
        if self.labelled is False and self.labels:
            return f"classes={self.classes} needs labels: remove labelled=false, or set classes=0"
        if self.augment and self.classes:
            ways = ("classes: set labelled=false and classes=0", "captions: set captions=null")
            way = ways[self.captions is not None]
            return (
                f"augment gives the net numbers as its condition c, but so do the {self.classes} {way}, or augment=null"
            )
        if isinstance(self.captions, Templates) and (self.names or self.captions.names) and self.classes:
            each, found = self.captions.count(1), len(self.captions.of(self.names or ()))
            if found != self.classes:
                return (
                    f"captions.templates make {each} captions of each of {found // each} classes, data.classes says "
                    f"{self.classes}: set data.classes={found}, or leave it out"
                )
        return None

    def found(self) -> "Images":
        """The same with the classes and names, or the captions, that the files have; as it is where they are not there.

        Raises UserError where they contradict what is given.
        """
        if self.names is not None or (root := self._root()) is None:
            return self
        values = self._written(root, self.captions) if isinstance(self.captions, CaptionFiles) else self._labelled(root)
        same = self.model_copy(update=values)
        same.require_agreement()
        return same

    def _root(self) -> Path | None:
        """Where the images are; None where they are not there yet."""
        try:
            root = user_path(self.root, "data.root")
        except UserError:
            return None
        return root if root.exists() else None

    def _labelled(self, root: Path) -> dict[str, Any]:
        """The classes there are, each as often as it has captions."""
        labels = self._store(root, self.label).labels
        if isinstance(self.captions, Templates) and labels is None:
            raise UserError(f"captions.templates name classes, and {root} has none: set captions.kind=files")
        each = self.captions.count(1) if isinstance(self.captions, Templates) else 1
        count = each * labels.count if labels else 0
        return {"classes": self.classes or count, "names": labels.names if labels else ()}

    def _written(self, root: Path, files: CaptionFiles) -> dict[str, Any]:
        """The captions there are, and their digest."""
        found = self._read_captions(root, files)
        if self.classes not in (0, len(found)):
            raise UserError(f"{root} has {len(found)} captions, data.classes says {self.classes}: leave it out")
        counted = files.model_copy(update={"digest": found.digest()})
        return {"classes": len(found), "names": (), "captions": counted}

    def _read_captions(self, root: Path, files: CaptionFiles) -> Captions:
        """The captions of the images. Before a run has a digest of them, images and captions must find each other."""
        store = self._store(root, None)
        counted = files.digest is not None
        return Captions.of(captions_of(root, store, files.name, files.source, require_pairs=not counted))

    @model_serializer(mode="wrap")
    def _dump(self, dump: Callable[["Images"], dict[str, Any]]) -> dict[str, Any]:
        """Names where there are some; classes that are not known stay to be counted."""
        tree = dump(self)
        if not self.names:
            tree.pop("names", None)
        return tree if self.names is not None else tree | {"classes": self.classes or None}

    def open(self) -> Album | Bucketed | Captioned:
        """The images as a source, all decoded if they fit in `memory`, each with its class, or a caption of it.

        Raises UserError where there are none, the files are damaged, the classes or captions are not those expected, or
        an image cannot be read.
        """
        rows = self.rows()
        source = rows.open(self.memory * GIGABYTE) if isinstance(rows, Assorted) else rows
        return captioned(source, self.all_captions()) if self.captions else source

    def originals(self) -> Album:
        """The images with their classes, captions and buckets or not: squares. Raises as `open`."""
        return self._album(numbered=False)

    def rows(self) -> Album | Assorted:
        """The images, each with its row of captions (`all_captions`) in place of its class. Raises as `open`."""
        numbered = isinstance(self.captions, CaptionFiles)
        if not self.buckets:
            return self._album(numbered=numbered)
        store, skip = self._checked(), self.on_bad == "skip"
        return Assorted(store, self.side, self.crop, self.buckets, flip=self.flip, skip=skip, numbered=numbered)

    def crops(self) -> Crops | None:
        """What the buckets leave of the images, by their headers; None without buckets. Raises as `open`."""
        rows = self.rows() if self.buckets else None
        return rows.crops() if isinstance(rows, Assorted) else None

    def all_captions(self) -> Captions:
        """The captions, by class, or by image where they were written of each. Raises UserError as `open`."""
        if isinstance(self.captions, Templates):
            return self.captions.of(self.names or ())
        if not isinstance(self.captions, CaptionFiles):
            return Captions.of([])
        root = user_path(self.root, "data.root")
        found = self._read_captions(root, self.captions)
        self.captions.require(found, str(root))
        return found

    @property
    def source(self) -> str | None:
        """The column of the image that each caption edits; None: captions are texts alone."""
        return self.captions.source if isinstance(self.captions, CaptionFiles) else None

    def edited(self) -> dict[str, Path]:
        """The images that are edited, by their hashes. Raises UserError as `open`."""
        root, source = user_path(self.root, "data.root"), self.source or ""
        found = edited(root, self._store(root, None), source)
        files = (Path(row.values[source]) for _, rows in found for row in rows)
        return {hash_of(file): file for file in files}

    def caption_texts(self) -> tuple[str, ...]:
        """All captions by number; () where there are none. Raises UserError as `open`."""
        return kept(self).texts if self.captions else ()  # pyright: ignore[reportArgumentType], specs are frozen

    def undecoded(self) -> Store:
        """The images as they lie there, without labels. Raises UserError where there are none."""
        return self._store(user_path(self.root, "data.root"), None)

    def hashes(self) -> Hashes | None:
        """What is known of the images' content; None where they are not on this machine."""
        if (root := self._root()) is None:
            return None
        try:
            store = self._counted(root)
        except (UserError, OSError):  # an empty folder where a disk is not mounted
            return None
        return Hashes(store.within, store.path, store.read, store.labels and store.labels.c)

    def _counted(self, root: Path) -> Store:
        """The images, with their classes where the run has some."""
        return self._store(root, self.label if self.labelled and self.labels else None)

    def _checked(self) -> Store:
        """The images, with the classes that are expected."""
        root = user_path(self.root, "data.root")
        store = self._counted(root)
        if wrong := self._fault(store):
            raise UserError(f"{root} {wrong}")
        return store

    def _album(self, *, numbered: bool) -> Album:
        return Album(
            self._checked(),
            Frame(self.side, self.crop),
            flip=self.flip,
            augment=self.augment,
            skip=self.on_bad == "skip",
            memory=self.memory * GIGABYTE,
            numbered=numbered,
        )

    def _store(self, root: Path, label: str | None) -> Store:
        """The images, their labels by the column `label`, undecoded."""
        return find(root, split=self.split, label=label)

    def _fault(self, store: Store) -> str | None:
        """What is wrong with the classes, if anything is. Where they have no names, the last ones may lack images."""
        if self.names is None:
            return "was not there when the run was opened, so nobody counted its classes: open it again"
        if not self.labels:
            return None
        if store.labels is None:
            why = f" (no column '{self.label}' among {', '.join(columns(store))})" if isinstance(store, Parquet) else ""
            return f"has no labels{why}, data.classes says {self.classes}: set data.classes=0"
        if self.names and (there := store.labels.names) != self.names:
            new, gone = (some(set(one) - set(other)) for one, other in ((there, self.names), (self.names, there)))
            what = "; ".join(f"{word} {names}" for word, names in (("without", gone), ("with", new)) if names)
            return (
                f"has other classes than the run was made with, {what or 'in another order'}: name the folders as they "
                "were, or begin a new run"
            )
        found, each = store.labels.count, self.classes // self.labels
        if found > self.labels or (store.labels.names and found < self.labels):
            of = f" with {each} captions each" if self.captions else ""
            return f"has {found} classes{of}, data.classes says {self.classes}: set data.classes={found * each}"
        return None


def find(root: Path, *, split: str | None = None, label: str | None = "label") -> Store:
    """Look what is under `root`, and open it without decoding. `label`: the column of classes; None: no labels.

    Raises UserError where there are no images, or several ways to take what is there.
    """
    files = walk(root)
    found: dict[str, dict[str, State]] = {"folder": {}, "parquet": {}, "tar": {}}
    for file, state in files.items():
        ending = os.path.splitext(file)[1]
        if form := "folder" if ending.lower() in SUFFIXES else FORMS.get(ending):
            found[form][file] = state
    if found["folder"]:  # what a table says of them is no table of images
        found["parquet"] = {file: state for file, state in found["parquet"].items() if Path(file).name not in TABLES}
    there = [name for name, listed in found.items() if listed]
    if len(there) == 1:
        store = _store_of(root, there[0], found[there[0]], split, label)
        if len(store):
            return store
        wrong = f"no images in the {there[0]} files of {root}"
    elif there:
        wrong = f"{root} holds {' and '.join(there)} side by side: set data.root to a folder of one of them"
    else:
        looked = "image files (.jpg, .png, .webp ...), *.parquet, *.tar"
        wrong = f"no images in {root}, where there are {len(files)} files: looked for {looked}, at any depth"
    raise UserError(wrong)


def _store_of(root: Path, format: str, files: dict[str, State], split: str | None, label: str | None) -> Store:
    if format == "folder":
        return Folder(root, files, split=split, labelled=label is not None)
    chosen = choose(root, list(files), split)
    return Parquet(chosen, label=label) if format == "parquet" else Tar(chosen, labelled=label is not None)


FIELDS = re.compile(rf"\bdata\.(?={'|'.join(Images.model_fields)})\b")


@contextmanager
def below(where: str) -> Generator[None]:
    """Let errors name fields of images where they stand, such as data.images, in place of data."""
    try:
        yield
    except UserError as error:
        raise UserError(FIELDS.sub(f"{where}.", str(error))) from error
