"""A user's own images: a folder, hub parquet or webdataset shards, found out by looking.

`Images` is the spec, `data` of a run with `kind: images`. It reads no disk until it is asked:

1. `Images.with_facts` counts classes or captions (`dumo.data.caption`) that the spec does not say, once, when a run is
   opened. run.yaml records their number and names. Until then there are none, and `names` is None.
2. `Images.open` makes a source to train on: images decoded, in buckets or not, with classes or captions.
3. Others read the same images in other ways: `rows` to encode them, `originals` to compare with, `crops` what buckets
   cut off, `all_captions` and `caption_texts`, `source_images` which captions edit, `unlabelled_store` and `hashes`.

`open_store` looks what lies under a root and opens the store. `errors_of_latents` renames fields in the errors of
images that are a part of latents, by `with_fields_of_latents`.
"""

import os
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from dumo.data.album import Album
from dumo.data.annotation import captions_of
from dumo.data.augment import Edm
from dumo.data.bucket import BucketedStore, Buckets, Crops
from dumo.data.caption import Captioned, CaptionFiles, Captioning, Templates, cached_captions, with_captions
from dumo.data.edit import edit_rows, source_hash
from dumo.data.metadata import TABLES, image_folder
from dumo.data.parquet import Parquet, holds_images
from dumo.data.pixel import Crop, Size, ToSquare
from dumo.data.store import FirstImages, Folder, Store, choose_shards, first_sorted, store_hashes, walk_files
from dumo.data.tar import Tar
from dumo.encoders.caption import Captions
from dumo.io.content import Hashes
from dumo.io.inventory import FileState
from dumo.io.read import user_path
from dumo.io.source import Bucketed
from dumo.io.suffix import IMAGE_SUFFIXES
from dumo.runtime.limits import CLASSES, GIGABYTE, GIGABYTES, PIXELS, ROWS
from dumo.types import FREE, PLACE, Spec, UserError

_FORMAT_OF_SUFFIX = {".parquet": "parquet", ".tar": "tar"}  # and a folder, of the suffixes of images
_OFF_VALUES = {"flip": "false", "buckets": "null", "augment": "null"}  # by which a field leaves images as they are


class NoImagesError(UserError):
    """A place has no file that may hold images."""


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
    # The first of the images alone, in their order, as for a quick try; None: all.
    count: int | None = Field(default=None, ge=1, le=ROWS, exclude_if=lambda count: count is None)
    on_bad: Literal["raise", "skip"] = Field(default="raise", json_schema_extra=FREE)  # an image that cannot be read
    memory: float = Field(default=2.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)  # GB of pixels kept decoded; ours
    captions: Captioning | None = Field(default=None, exclude_if=lambda captions: captions is None)  # for classes
    # 0: none; not given: those that are there. With captions: how many there are of them.
    classes: int = Field(default=None, ge=0, le=CLASSES, validate_default=True)
    names: tuple[str, ...] | None = None  # of the classes; (): they have none; None: not counted yet
    # Where only the number of classes is given: what the files call them. People read it, the training does not.
    titles: tuple[str, ...] = Field(default=(), exclude_if=lambda titles: not titles, json_schema_extra=FREE)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return (3, self.side, self.side)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the buckets, height and width; () where there are none."""
        return self.buckets.sizes(self.side) if self.buckets else ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of samples that are trained on: one for each bucket, or one."""
        return tuple((3, *size) for size in self.sizes) or (self.shape,)

    @property
    def is_counted(self) -> bool:
        """Whether it is known how many classes or captions there are; False before they are counted in the files."""
        return self.names is not None

    @property
    def labels(self) -> int:
        """The number of classes of the images themselves; 0 with captions that were written of each image."""
        if self.captions is None:
            return self.classes
        if isinstance(self.captions, Templates):
            return self.classes // self.captions.num_captions(1)
        return 0

    @field_validator("classes", mode="wrap")
    @classmethod
    def _allow_none(cls, classes: object, validate: Callable[[object], object]) -> object:
        """Let `classes` be None until `_set_names`, which tells "not given" from 0."""
        return None if classes is None else validate(classes)

    @model_validator(mode="after")
    def _set_names(self) -> "Images":
        """Leave `names` None where classes or captions are to be counted. Raises UserError where fields contradict."""
        is_given = self.classes is not None  # pyright: ignore[reportUnnecessaryComparison], it may not be given
        match self.captions:
            case CaptionFiles(digest=digest):
                is_counted = is_given and digest is not None
            case Templates(names=names):
                is_counted = is_given and bool(names or self.names)
            case None:
                is_counted = is_given or self.labelled is False
        # set in place: where `Images(...)` is called, a copy that a validator returns is lost
        object.__setattr__(self, "names", (self.names or ()) if is_counted else None)
        object.__setattr__(self, "classes", self.classes or 0)
        self.require_agreement()
        return self

    def require_agreement(self) -> None:
        """Raise UserError where fields contradict each other."""
        _ = self.sizes  # refuses a step that does not divide the side
        if self.buckets and self.augment:
            raise UserError("buckets bring images to their sizes, and augment is of one size: set augment=null")
        if self.buckets and self.crop == "none":
            raise UserError("buckets bring images to their sizes, and crop is of one size: set crop=adm")
        if self.source:
            for field, off in _OFF_VALUES.items():
                if getattr(self, field):
                    raise UserError(
                        f"captions.source edits images as they are, and {field} changes them: set {field}={off}"
                    )
        if self.count and isinstance(self.captions, CaptionFiles):
            raise UserError("captions are of all images, and count takes the first ones: set count=null")
        if self.names and len(self.names) != self.labels:
            raise UserError(f"names has {len(self.names)} names for classes={self.labels}: remove names")
        if self.titles and self.names is not None and len(self.titles) != self.labels:
            raise UserError(f"titles has {len(self.titles)} names for classes={self.labels}: remove titles")
        if self.labelled is False and self.labels:
            raise UserError(f"classes={self.classes} needs labels: remove labelled=false, or set classes=0")
        if self.augment and self.classes:
            if self.captions is None:
                conditions = "classes: set labelled=false and classes=0"
            else:
                conditions = "captions: set captions=null"
            raise UserError(
                f"augment gives the net numbers as its condition c, but so do the {self.classes} {conditions}, or "
                "augment=null"
            )
        if isinstance(self.captions, Templates) and (self.names or self.captions.names) and self.classes:
            per_class = self.captions.num_captions(1)
            count = len(self.captions.all_captions(self.names or ()))
            if count != self.classes:
                raise UserError(
                    f"captions.templates make {per_class} captions of each of {count // per_class} classes, "
                    f"data.classes says {self.classes}: set data.classes={count}, or leave it out"
                )

    def with_facts(self) -> "Images":
        """The spec with the classes and names, or the captions, that the files have; as it is where no files are there.

        Raises UserError where they contradict what the spec says.
        """
        root = self._root()
        if root is None:
            return self
        if self.is_counted:
            titles = self._find_titles(root)
            return self.model_copy(update={"titles": titles}) if titles else self
        if isinstance(self.captions, CaptionFiles):
            facts = self._count_captions(root, self.captions)
        else:
            facts = self._count_classes(root)
        images = self.model_copy(update=facts)
        images.require_agreement()
        return images

    @property
    def is_here(self) -> bool:
        """Whether there is something where the images are said to be."""
        return self._root() is not None

    def _root(self) -> Path | None:
        """Where the images are; None where they are not there yet."""
        try:
            root = user_path(self.root, "data.root")
        except UserError:
            return None
        return root if root.exists() else None

    def _find_titles(self, root: Path) -> tuple[str, ...]:
        """What tables of parquet call the classes, where only their number is given; () where they do not say.

        Only tables in the root and its folder `data` count: to walk folders of a million images takes minutes.
        """
        is_number_given = self.labels > 0 and not (self.names or self.titles or self.captions)
        if not is_number_given or not (any(root.glob("*.parquet")) or any(root.glob("data/*.parquet"))):
            return ()
        try:
            labels = self._store(root, self.label).labels
        except UserError:  # it is raised again when the images are opened
            return ()
        if labels is None or len(labels.names) != self.labels:
            return ()
        return labels.names

    def _count_classes(self, root: Path) -> dict[str, Any]:
        """The fields `classes` and `names` of the images there are; templates count a class for each caption."""
        store = self._store(root, self.label)
        labels = store.labels
        tables = _tables_of(store)
        if labels is None and tables is not None:
            self._say_without_labels(root, tables)
        per_class = 1
        if isinstance(self.captions, Templates):
            if labels is None:
                raise UserError(f"captions.templates name classes, and {root} has none: set captions.kind=files")
            per_class = self.captions.num_captions(1)
        if labels is None:
            return {"classes": self.classes, "names": ()}
        return {"classes": self.classes or per_class * labels.count, "names": labels.names}

    def _say_without_labels(self, root: Path, tables: Parquet) -> None:
        """Raise UserError where tables lack a column of classes that was named; else warn if they may have another."""
        if self.label != type(self).model_fields["label"].default:
            raise UserError(
                f"{root} has no column '{self.label}' (it has {', '.join(tables.column_names())}): set data.label, or "
                "data.labelled=false"
            )
        whole_numbers = tables.integer_column_names()
        if whole_numbers:
            warnings.warn(
                f"{root} has no column '{self.label}', so its images have no classes. Whole numbers are in "
                f"{', '.join(whole_numbers)}: set `label` of the images to one of these, or labelled=false",
                stacklevel=2,
            )

    def _count_captions(self, root: Path, files: CaptionFiles) -> dict[str, Any]:
        """The fields `classes`, `names` and `captions`, with the captions there are and their digest."""
        captions = self._read_captions(root, files)
        count = len(captions)
        if self.classes not in (0, count):
            raise UserError(f"{root} has {count} captions, data.classes says {self.classes}: leave it out")
        with_digest = files.model_copy(update={"digest": captions.digest()})
        return {"classes": count, "names": (), "captions": with_digest}

    def _read_captions(self, root: Path, files: CaptionFiles) -> Captions:
        """The captions of the images. Until a run has a digest of them, few may lack an image, or images a caption."""
        store = self._store(root, None)
        captions = captions_of(root, store, files.name, files.source, require_pairs=files.digest is None)
        return Captions.from_images(captions)

    @model_serializer(mode="wrap")
    def _dump(self, dump: Callable[["Images"], dict[str, Any]]) -> dict[str, Any]:
        """The fields, without `names` where there are none; `classes` is None where they are still to be counted."""
        fields = dump(self)
        if not self.names:
            fields.pop("names", None)
        if not self.is_counted:
            fields["classes"] = self.classes or None
        return fields

    def open(self) -> Album | Bucketed | Captioned:
        """The images as a source, all decoded if they fit in `memory`, each with its class or a caption.

        Raises UserError where there are no images, files are damaged, classes or captions are not those expected, or an
        image cannot be read.
        """
        rows = self.rows()
        source = rows.open(self.memory * GIGABYTE) if isinstance(rows, BucketedStore) else rows
        return with_captions(source, self.all_captions()) if self.captions else source

    def originals(self) -> Album:
        """The images as squares with their classes, without captions or buckets.

        Raises UserError where there are no images, files are damaged, or classes are not those expected.
        """
        return self._album(class_per_image=False)

    def rows(self) -> Album | BucketedStore:
        """The images to be gone through in order, with their classes; with captions of each image, with their numbers.

        Raises UserError where there are no images, files are damaged, or classes are not those expected.
        """
        class_per_image = isinstance(self.captions, CaptionFiles)
        if not self.buckets:
            return self._album(class_per_image=class_per_image)
        return BucketedStore(
            self._checked_store(),
            self.side,
            self.crop,
            self.buckets,
            flip=self.flip,
            skip=self.on_bad == "skip",
            class_per_image=class_per_image,
        )

    def crops(self) -> Crops | None:
        """What the buckets leave of the images, by their headers; None without buckets. Raises UserError."""
        if not self.buckets:
            return None
        rows = self.rows()
        assert isinstance(rows, BucketedStore), "there are buckets"
        return rows.measure_crops()

    def all_captions(self) -> Captions:
        """The captions by class, or by image where they were written of each image.

        Raises UserError where they are missing, or are not those expected.
        """
        if isinstance(self.captions, Templates):
            return self.captions.all_captions(self.names or ())
        if not isinstance(self.captions, CaptionFiles):
            return Captions.from_images([])
        root = user_path(self.root, "data.root")
        captions = self._read_captions(root, self.captions)
        self.captions.require(captions, str(root))
        return captions

    @property
    def source(self) -> str | None:
        """The column of the image that each caption edits; None: captions are texts alone."""
        return self.captions.source if isinstance(self.captions, CaptionFiles) else None

    def source_images(self) -> dict[str, Path]:
        """The images that captions edit, by their hashes. Raises UserError where one is missing."""
        root = user_path(self.root, "data.root")
        source = self.source or ""
        files_by_hash: dict[str, Path] = {}
        for _, rows in edit_rows(root, self._store(root, None), source):
            for row in rows:
                file = Path(row.values[source])
                files_by_hash[source_hash(file)] = file
        return files_by_hash

    def caption_texts(self) -> tuple[str, ...]:
        """The text of each caption, by its number; () where there are none.

        Raises UserError where they are missing, or are not those expected.
        """
        return cached_captions(self).texts if self.captions else ()  # pyright: ignore[reportArgumentType], specs are frozen

    def unlabelled_store(self) -> Store:
        """The store of the images, without labels. Raises UserError where there are no images."""
        return self._store(user_path(self.root, "data.root"), None)

    def hashes(self) -> Hashes | None:
        """The hashes of the images, as far as they are noted; None where they are not on this machine.

        Raises UserError or OSError where they are, and cannot be opened.
        """
        root = self._root()
        if root is None:
            return None
        try:
            store = self._store_with_classes(root)
        except NoImagesError:  # an empty folder where a disk is not mounted
            return None
        return store_hashes(store)

    def _store_with_classes(self, root: Path) -> Store:
        """The store of the images, with their classes where the run has some."""
        return self._store(root, self.label if self.labelled and self.labels else None)

    def _checked_store(self) -> Store:
        """The store of the images, with the classes that are expected. Raises UserError where they have others."""
        root = user_path(self.root, "data.root")
        store = self._store_with_classes(root)
        self._require_classes(root, store)
        return store

    def _album(self, *, class_per_image: bool) -> Album:
        """The images as squares; `class_per_image`: each image is a class of its own. Raises UserError."""
        return Album(
            self._checked_store(),
            ToSquare(self.side, self.crop),
            flip=self.flip,
            augment=self.augment,
            skip=self.on_bad == "skip",
            memory=self.memory * GIGABYTE,
            class_per_image=class_per_image,
        )

    def _store(self, root: Path, label: str | None) -> Store:
        """The store of the images; `label`: the column of their classes; None: no labels."""
        store = open_store(root, split=self.split, label=label)
        if self.count is None:
            return store
        if self.count > len(store):
            raise UserError(
                f"{root} has {len(store)} images, and count asks for the first {self.count}: leave it out, for all"
            )
        return FirstImages(store, self.count)

    def _require_classes(self, root: Path, store: Store) -> None:
        """Raise UserError for other classes than expected. Where classes have no names, the last may lack images."""
        if not self.is_counted:
            raise UserError(
                f"{root} was not there when the run was opened, so nobody counted its classes: open it again"
            )
        if not self.labels:
            return
        if store.labels is None:
            reason = ""
            tables = _tables_of(store)
            if tables is not None:
                reason = f" (no column '{self.label}' among {', '.join(tables.column_names())})"
            raise UserError(f"{root} has no labels{reason}, data.classes says {self.classes}: set data.classes=0")
        if self.names and store.labels.names != self.names:
            changes: list[str] = []
            missing = set(self.names) - set(store.labels.names)
            added = set(store.labels.names) - set(self.names)
            if missing:
                changes.append(f"without {first_sorted(missing)}")
            if added:
                changes.append(f"with {first_sorted(added)}")
            raise UserError(
                f"{root} has other classes than the run was made with, {'; '.join(changes) or 'in another order'}: "
                "name the folders as they were, or begin a new run"
            )
        count = store.labels.count
        if count > self.labels or (store.labels.names and count < self.labels):
            per_class = self.classes // self.labels
            captions = f" with {per_class} captions each" if self.captions else ""
            raise UserError(
                f"{root} has {count} classes{captions}, data.classes says {self.classes}: set "
                f"data.classes={count * per_class}"
            )


_FIELDS_OF_IMAGES = re.compile(rf"\bdata\.(?={'|'.join(Images.model_fields)})\b")  # in the text of an error


def open_store(root: Path, *, split: str | None = None, label: str | None = "label") -> Store:
    """Look what is under `root`, and open it without decoding. `label`: the column of classes; None: no labels.

    Raises NoImagesError where no file may hold images; UserError where there are no images, or several ways to take
    what is there.
    """
    # "." or a bare name, where a file's path does not begin with its folder
    if root.exists() and image_folder(root) == Path():
        root = root.absolute()
    files = walk_files(root)
    files_by_format = _files_by_format(files)
    if not files_by_format:
        raise NoImagesError(
            f"no images in {root}, where there are {len(files)} files: looked for image files (.jpg, .png, .webp ...), "
            "*.parquet, *.tar, at any depth"
        )
    if len(files_by_format) > 1:
        formats = " and ".join(files_by_format)
        raise UserError(
            f"{root} holds {formats} side by side: set data.root to a folder of one of them, or move the others "
            "elsewhere"
        )
    ((format_name, states),) = files_by_format.items()
    store: Store
    if format_name == "folder":
        store = Folder(root, states, split=split, labelled=label is not None)
    elif format_name == "parquet":
        store = Parquet(choose_shards(root, list(states), split), label=label)
    else:
        store = Tar(choose_shards(root, list(states), split), labelled=label is not None)
    if not len(store):
        raise UserError(f"no images in the {format_name} files of {root}")
    return store


def _files_by_format(files: Mapping[str, FileState]) -> dict[str, dict[str, FileState]]:
    """The files that hold images, with their states, as a "folder", "parquet" or "tar"; other files are left out.

    Next to image files or archives, these are tables without a column of bytes, as of captions. Raises UserError for a
    table that is not whole.
    """
    by_format: dict[str, dict[str, FileState]] = {"folder": {}, "parquet": {}, "tar": {}}
    for file, state in files.items():
        ending = os.path.splitext(file)[1].lower()
        if ending in IMAGE_SUFFIXES:
            by_format["folder"][file] = state
        elif ending in _FORMAT_OF_SUFFIX:
            by_format[_FORMAT_OF_SUFFIX[ending]][file] = state
    if by_format["folder"] or by_format["tar"]:
        tables = by_format["parquet"]
        by_format["parquet"] = {
            file: state for file, state in tables.items() if Path(file).name not in TABLES and holds_images(file)
        }
    return {name: states for name, states in by_format.items() if states}


def _tables_of(store: Store) -> Parquet | None:
    """The tables that a store reads its images from; None: it reads other files."""
    whole_store = store.store if isinstance(store, FirstImages) else store
    return whole_store if isinstance(whole_store, Parquet) else None


@contextmanager
def errors_of_latents() -> Generator[None]:
    """Name fields of images in errors by where a run of latents has them: `data.images.root` for `data.root`."""
    try:
        yield
    except UserError as error:
        raise UserError(with_fields_of_latents(str(error))) from error


def with_fields_of_latents(message: str) -> str:
    """A message on images, with the fields named by where a run of latents has them."""
    return _FIELDS_OF_IMAGES.sub("data.images.", message)
