"""Which bytes become a sample of a shard as they are, and how other images are turned into such bytes.

As they are: JPEG, PNG and WebP of 8-bit RGB or gray, and PPM as `ppm` writes it. Any other kind of JPEG, PNG, WebP or
PPM and the first frame of the other FORMATS can be converted: to 8-bit RGB (gray stays gray) by Pillow's `convert`, as
torchvision and timm do when they load, so alpha is dropped, Adobe's inverted CMYK is understood and colour profiles are
ignored; 16 bits keep the upper 8, where Pillow would clip gray. A JPEG becomes a JPEG, all else a PNG, which loses
nothing. EXIF orientation is never applied. Bytes that do not decode, or announce too many pixels, cannot be used.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.graph import Decoder

OnBad = Literal["fail", "skip", "reencode"]
Store = Literal["original", "ppm"]
MAX_PIXELS = 64_000_000  # ImageNet's largest training image has 28.5 million
PILLOW_MAX_PIXELS = 178_956_970  # above this Pillow refuses by itself
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG followed by others
# Still images that Pillow decodes from their bytes alone, and the suffixes of their files. The suffix only says that a
# file is an image; its bytes say which. The last are recognised by few bytes and therefore tried last.
FORMATS = {
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "GIF": ".gif",
    "BMP": ".bmp .dib",
    "TIFF": ".tif .tiff",
    "AVIF": ".avif .avifs",  # Pillow 11.3 or newer
    "JPEG2000": ".jp2 .j2k .jpx .jpf .j2c .jpc",
    "QOI": ".qoi",
    "PSD": ".psd",
    "DDS": ".dds",
    "ICO": ".ico",
    "SGI": ".sgi .rgb .rgba .bw",
    "PCX": ".pcx",
    "TGA": ".tga .icb .vda .vst",
}
SUFFIXES = frozenset(" ".join(FORMATS.values()).split())
_PPM = re.compile(rb"P6\n([1-9][0-9]{0,8}) ([1-9][0-9]{0,8})\n255\n")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How images are treated on their way into a shard."""

    on_bad: OnBad = "reencode"  # what is not stored as it is: end the run, leave it out, or convert what can be
    store: Store = "original"  # "ppm": decode everything and store the bare pixels
    resize: int | None = None  # pixels: shrink to this shorter side, bicubic with antialiasing, where it is longer
    quality: int = 90  # of the JPEGs that shrinking and converting write, 1 to 100
    verify: bool = True  # decode every image; False reads headers only
    max_pixels: int = MAX_PIXELS  # images with more, by their header, are never decoded (decompression bombs)

    def __post_init__(self) -> None:
        if self.on_bad not in get_args(OnBad) or self.store not in get_args(Store):
            choices = f"one of {get_args(OnBad)} and one of {get_args(Store)}"
            raise ValueError(f"on_bad and store must be {choices}, not {self.on_bad!r} and {self.store!r}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize must be at least 1 pixel, not {self.resize}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, not {self.quality}")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(f"max_pixels must be 1 to {PILLOW_MAX_PIXELS} (Pillow's own limit), not {self.max_pixels}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as it enters a shard."""

    data: bytes
    extension: str  # "jpg", "png", "webp" or "ppm": what the bytes are, whatever the file was named
    change: str | None = None  # why the bytes are new ("JPEG CMYK", "resized"); None: they are the original ones
    odd: bool = False  # the image could not have been stored as it was


class BadImageError(Exception):
    """An image that cannot be used: `reason` is the kind it is counted under, the message the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def ppm(pixels: bytes, height: int, width: int) -> bytes:
    """Binary PPM of 8-bit RGB pixels in rows: nothing but a header, of one length for one size, and the pixels."""
    return ppm_header(height, width) + pixels


def ppm_header(height: int, width: int) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height)


def ppm_shape(image: bytes) -> tuple[int, int] | None:
    """(height, width) of a PPM as `ppm` writes it, None for anything else."""
    if not (header := _PPM.match(image)):
        return None
    width, height = map(int, header.groups())
    return (height, width) if len(image) == header.end() + 3 * height * width else None


Item = TypeVar("Item")
Content = TypeVar("Content")
Images = dict[int, bytes]  # encoded, by any numbers
AT_ONCE = 16  # images in memory together, for a decoder that takes several at the price of one
NOT_DALI = "not decoded by DALI"  # the reason of an image that Pillow takes, and with which a training would end


def prepare_all(
    images: Iterable[tuple[Item, bytes | BadImageError]], rules: Rules
) -> Iterator[tuple[Item, Prepared | BadImageError]]:
    """Each item with the bytes to store for its image, or why there are none, in order.

    With `rules.verify` the decoder that training uses is asked too: what only Pillow decodes is not stored as it is.
    """

    def attempt(image: bytes | BadImageError, kind: str | None = None) -> Prepared | BadImageError:
        try:
            return image if isinstance(image, BadImageError) else prepare(image, rules, kind)
        except BadImageError as error:
            return error

    refused = _decoder(rules.max_pixels)

    def doubted(results: dict[int, Prepared | BadImageError]) -> dict[int, str]:
        return refused({i: each.data for i, each in results.items() if isinstance(each, Prepared)})

    for part in _parts(images):
        results = [attempt(image) for _, image in part]
        if rules.verify:
            converted = doubted(dict(enumerate(results)))
            for i in converted:
                results[i] = attempt(part[i][1], NOT_DALI)
            for i, complaint in doubted({i: results[i] for i in converted}).items():
                results[i] = BadImageError(NOT_DALI, complaint)
        yield from ((item, result) for (item, _), result in zip(part, results, strict=True))


def check_all(
    images: Iterable[tuple[Item, bytes]], max_pixels: int
) -> Iterator[tuple[Item, bytes, BadImageError | None]]:
    """Each item with its image, which a shard holds as it is, and why training cannot use that, if so, in order."""
    refused, rules = _decoder(max_pixels), Rules(max_pixels=max_pixels)
    for part in _parts(images):
        faults: dict[int, BadImageError] = {}
        for i, (_, image) in enumerate(part):
            try:
                prepare(image, rules)
            except BadImageError as error:
                faults[i] = error
        said = refused({i: image for i, (_, image) in enumerate(part) if i not in faults})
        faults |= {i: BadImageError(NOT_DALI, complaint) for i, complaint in said.items()}
        yield from ((item, image, faults.get(i)) for i, (item, image) in enumerate(part))


def _decoder(max_pixels: int) -> Callable[[Images], dict[int, str]]:
    """What training's decoder, on the CPU, says of each image that it does not decode.

    A PPM of ours is pixels already. DALI takes a second to import, so it is when there is an image for it.
    """
    decoder: Decoder | None = None

    def refused(images: Images) -> dict[int, str]:
        nonlocal decoder
        asked = {i: image for i, image in images.items() if not ppm_shape(image)}
        if not asked:
            return {}
        from pipeline.graph import Decoder, Encoding

        decoder = decoder or Decoder(Encoding(max_pixels=max_pixels))
        numbers = list(asked)
        return {numbers[place]: said for place, said in decoder.refused(list(asked.values())).items()}

    return refused


def _parts(images: Iterable[tuple[Item, Content]]) -> Iterator[list[tuple[Item, Content]]]:
    rest = iter(images)
    while part := list(islice(rest, AT_ONCE)):
        yield part


def prepare(image: bytes, rules: Rules, kind: str | None = None) -> Prepared:
    """The bytes to store for an encoded image. Raises BadImageError.

    kind  why it is nothing to store as it is, where that is known already.
    """
    if not image:
        raise BadImageError("empty", "the file has no bytes")
    if shape := ppm_shape(image):
        _check_pixels(*shape[::-1], rules)
        if not rules.resize or min(shape) <= rules.resize:
            return Prepared(image, "ppm")
    from PIL import Image, UnidentifiedImageError

    try:
        # Warnings are of odd EXIF and the like: the pixels are what counts.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image), formats=_formats()) as picture:
            _check_pixels(*picture.size, rules)
            kind = kind or (None if shape else _odd_kind(picture, image))
            if kind and rules.on_bad != "reencode":
                raise BadImageError(kind, "not stored as it is; reencode would convert it")
            size = _shrunk(picture.size, rules.resize)
            if kind or size or rules.store == "ppm":
                extension, data = _reencode(picture, size, rules)
                return Prepared(data, extension, kind or ("resized" if size else "decoded"), bool(kind))
            if rules.verify:
                # A JPEG is decoded at 1/8 of its size: every entropy-coded byte is still read, so damage shows just
                # the same (1500 damaged ImageNet files, no verdict differed), at 1.6 times the full decode's rate.
                picture.draft(None, (max(1, picture.width // 8), max(1, picture.height // 8)))
                picture.load()
            return Prepared(image, EXTENSIONS[str(picture.format)])
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("no image", f"none of {', '.join(_formats())}; it starts with {image[:16]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImageError("too many pixels", str(error)) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... for bad bytes
        raise BadImageError("does not decode", f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that the Pillow installed here knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_pixels(width: int, height: int, rules: Rules) -> None:
    if width * height > rules.max_pixels:
        raise BadImageError("too many pixels", f"{width}x{height}, more than {rules.max_pixels}")


def _odd_kind(picture: "Image", image: bytes) -> str | None:
    """What an opened image is, where that is nothing to store as it is."""
    if picture.format not in EXTENSIONS:
        return f"{picture.format} {picture.mode}"
    if picture.format == "PNG" and image[24] == 16:  # the header's bit depth; Pillow calls 16-bit RGB just RGB
        return "PNG 16-bit"
    if picture.format == "WEBP" and getattr(picture, "is_animated", False):
        return "WEBP animated"
    return None if picture.mode in ("RGB", "L") else f"{picture.format} {picture.mode}"


def _shrunk(size: tuple[int, int], shorter: int | None) -> tuple[int, int] | None:
    """The size with that shorter side, rounded as torchvision does; None for an image to be left at its size."""
    if shorter is None or min(size) <= shorter:
        return None
    return size[0] * shorter // min(size), size[1] * shorter // min(size)


def _reencode(picture: "Image", size: tuple[int, int] | None, rules: Rules) -> tuple[str, bytes]:
    """(extension, bytes) of an opened image, converted, and shrunk to `size` if that is given."""
    from PIL.Image import Resampling

    lossy = size is not None or picture.format in ("JPEG", "MPO")
    if size:
        picture.draft(None, (2 * size[0], 2 * size[1]))  # a JPEG is decoded at 1/2, 1/4 or 1/8, but not below this
    plain = _eight_bits(picture)
    if size:
        plain = plain.resize(size, Resampling.BICUBIC)
    plain.info.clear()  # else EXIF and colour profiles are written on
    if rules.store == "ppm":
        return "ppm", ppm(plain.convert("RGB").tobytes(), plain.height, plain.width)
    file = io.BytesIO()
    if lossy:
        plain.save(file, "JPEG", quality=rules.quality)
    else:
        plain.save(file, "PNG")
    return "jpg" if lossy else "png", file.getvalue()


def _eight_bits(picture: "Image") -> "Image":
    """8-bit RGB or gray."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        import numpy as np
        from PIL import Image

        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadImageError("no 8-bit form", f"{picture.format} with pixels of mode {picture.mode}, of unknown range")
    return picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB")
