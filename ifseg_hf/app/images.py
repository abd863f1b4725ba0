"""Images that visitors upload, read within limits of memory and with errors in plain sentences."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ifseg_hf.processing.image_reading_ifseg import to_array

__all__ = ["MAX_PIXELS", "READ_PIXELS", "PageError", "UploadedImage", "fit", "megapixels", "read_upload"]

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded."""
READ_PIXELS = 12_000_000
"""Larger images are reduced to at most this number of pixels."""


class PageError(ValueError):
    """An error whose message is one sentence for a visitor of the page."""


@dataclass(frozen=True)
class UploadedImage:
    """An uploaded image, upright and in RGB.

    Attributes:
        image: mode RGB, at most [`READ_PIXELS`] pixels.
        note: a sentence for the visitor if the image was reduced; "" otherwise.
    """

    image: Image.Image
    note: str = ""


def read_upload(path: str | Path) -> UploadedImage:
    """Returns an uploaded image.

    The size is read from the file's header, so that a file that would decode to too many pixels is never decoded.

    Raises:
        [`PageError`]: the file is no image, is damaged, or has more than [`MAX_PIXELS`] pixels.
    """
    name = Path(path).name
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            scale = min(1.0, (READ_PIXELS / max(1, width * height)) ** 0.5)
            size = max(1, int(width * scale)), max(1, int(height * scale))
            if scale < 1:
                image.draft("RGB", size)  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
            image.load()
            if scale < 1 and image.mode in ("RGB", "RGBA", "L"):
                image = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)  # EXIF stays in image.info
            read = Image.fromarray(to_array(image))
    except Image.DecompressionBombError:
        raise PageError(
            f'"{name}" has more than {megapixels(MAX_PIXELS)} megapixels: make the image smaller and try again.'
        ) from None
    except UnidentifiedImageError:
        raise PageError(f'"{name}" is not an image: choose a JPEG, PNG or WebP file.') from None
    except Exception as error:  # decoders raise errors of many kinds for a damaged file
        raise PageError(f'"{name}" cannot be read as an image (is the file damaged?): choose another file.') from error
    if scale == 1:
        return UploadedImage(read)
    read = fit(read, READ_PIXELS)
    return UploadedImage(
        read,
        f"The image has {megapixels(width * height)} megapixels; this page reduced it to {read.width} x {read.height} "
        "pixels.",
    )


def fit(image: Image.Image, pixels: int) -> Image.Image:
    """Returns the image reduced to at most a number of pixels, or the image itself."""
    scale = (pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


def megapixels(pixels: int) -> str:
    """Returns a number of pixels in megapixels, such as "50" or "0.5"."""
    return f"{pixels / 1e6:.0f}" if pixels >= 5e6 else f"{pixels / 1e6:.1f}"
