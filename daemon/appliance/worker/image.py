"""PNG and JPEG pictures to FP32 tensors.

Transparency is flattened onto white. A picture of another size is resized to the manifest's, its aspect ratio not kept,
with Pillow's antialiasing filters. EXIF orientation is ignored, as training pipelines built on Pillow do.
"""

import io
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import ImageSection

#: Named, since Pillow would otherwise try every decoder it has on what a client sent.
FORMATS: Final = ("PNG", "JPEG")

_RESAMPLING: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# The bound is the manifest's max_pixels, checked below before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


class UndecodableImage(Exception):
    """One picture that cannot be used; the message tells the client why."""


class Decoder:
    """Decodes pictures as one manifest wants them. Safe to use from several threads."""

    def __init__(self, section: "ImageSection") -> None:
        channels = section.channels
        per_channel = (channels, 1, 1) if section.layout == "NCHW" else (1, 1, channels)
        self._section = section
        self._mode = "L" if channels == 1 else "RGB"
        self._scale = np.float32(section.scale)
        self._mean = np.broadcast_to(np.asarray(section.mean, dtype=np.float32), channels).reshape(per_channel)
        self._std = np.broadcast_to(np.asarray(section.std, dtype=np.float32), channels).reshape(per_channel)
        size = (section.height, section.width)
        #: Shape of one picture's tensor, without the batch dimension.
        self.shape = (channels, *size) if section.layout == "NCHW" else (*size, channels)

    def decode(self, content: bytes, row: "NDArray[np.float32]") -> None:
        """Write the tensor of one picture to `row`, which has `shape`.

        Raises:
            UndecodableImage: It is no PNG or JPEG, is damaged, or has more pixels than the manifest allows.
        """
        pixels = np.asarray(self._picture(content), dtype=np.float32)
        if pixels.ndim == 2:
            pixels = pixels[:, :, np.newaxis]
        if self._section.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        np.multiply(pixels, self._scale, out=row)
        row -= self._mean
        row /= self._std

    def _picture(self, content: bytes) -> Image.Image:
        section = self._section
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                if picture.width * picture.height > section.max_pixels:
                    raise UndecodableImage(
                        f"cannot decode the image: {picture.width} x {picture.height} pixels are more than the model's "
                        f"bound of {section.max_pixels}"
                    )
                picture.load()
                flat = _flatten(picture, self._mode)
        except UndecodableImage:
            raise
        except UnidentifiedImageError as error:
            raise UndecodableImage("cannot decode the image: it is neither PNG nor JPEG") from error
        except Exception as error:  # a decoder given hostile bytes raises anything from SyntaxError to struct.error
            raise UndecodableImage("cannot decode the image: it is damaged or truncated") from error
        if flat.size == (section.width, section.height):
            return flat
        return flat.resize((section.width, section.height), _RESAMPLING[section.resize])


def _flatten(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` as 8-bit "L" or "RGB" without transparency."""
    if picture.mode.startswith("I"):
        # 16-bit grey, which convert() would clip at 255 where it should scale.
        wide = np.asarray(picture).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert(mode)
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        canvas.alpha_composite(coloured)
        return canvas.convert("RGB").convert(mode)
    return picture.convert(mode)
