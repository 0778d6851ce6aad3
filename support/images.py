"""How is an image file read, put on another grid, and how does a mask get back onto the image's own grid?

NIfTI and pictures (PNG, TIFF, JPEG). Everything here is about files and geometry: nothing knows what is
learned from the images. The classes of a label are whole numbers, and 0 is background.
"""

import gzip
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, Int, Integer, Shaped
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import affine_transform, gaussian_filter

from support.files import InputError, one_line

ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".nii", ".nii.gz")
COLOUR = 1 << 24  # added to a colour's red, green and blue bytes, so that no grey value is the same


class Volume(NamedTuple):
    """An image and its label on one grid. `affine` maps voxels to the world in mm (pictures: to the
    pixels of the file)."""

    image: Float[np.ndarray, "*spatial channels"]
    label: Integer[np.ndarray, "*spatial"]
    affine: Float[np.ndarray, "4 4"]

    def spacing(self) -> tuple[float, ...]:
        return tuple(float(s) for s in voxel_sizes(self.affine)[: self.label.ndim])


def times(shape: Iterable) -> str:
    """A size, or a spacing, as it is shown: 480 x 512."""
    return " x ".join(f"{n:g}" for n in shape)


# --- Reading a file -----------------------------------------------------------------------------


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def is_grey(picture: PIL.Image.Image) -> bool:
    return picture.mode in ("L", "I", "F") or picture.mode.startswith("I;16")


def files_in(folder: Path, *endings: str) -> list[Path]:
    """The files with these endings, in the order of their names, without macOS's `._` copies."""
    if not folder.is_dir():
        return []
    paths = (p for p in folder.iterdir() if p.name[0] != "." and p.name.lower().endswith(endings))
    return sorted(paths, key=lambda path: path.name)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever fails inside is the file's fault: a damaged one can raise nearly anything."""
    if not path.exists():
        raise InputError(f"{path}: no such file; every image needs its label, every label its image")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable {kind} ({one_line(error)}); get it again") from error


def check_size(path: Path, shape: Sequence[int], voxel_bytes: int, packed: bool) -> None:
    """Raises an error where a header promises more than its file can hold, before memory is taken for
    it. Deflate packs up to 1032 to 1; up to 64 MB, other packings may do better."""
    size, most = math.prod(map(int, shape)) * voxel_bytes, path.stat().st_size
    if min(shape) < 1 or size > (max(1100 * most, 2**26) if packed else most):
        raise ValueError(f"a file of {most} bytes cannot hold {times(shape)} voxels")


def read_nifti(path: Path, dims: Sequence[int] = (3,)) -> tuple[np.ndarray, np.ndarray]:
    """The values of a NIfTI file, float32, its axes turned to right, anterior, superior, and its affine.
    Raises InputError where it cannot be read, is not in mm, or its dimensions are none of `dims`."""
    with reading(path, "NIfTI file"):
        file = nibabel.load(path)
        # nibabel mends a pixdim of 0 or less on loading, which would hide wrong spacing.
        with nibabel.openers.ImageOpener(path) as raw:
            pixdim = type(file.header).from_fileobj(raw, check=False)["pixdim"][1 : 1 + min(file.ndim, 3)]
        unit, spacing = file.header.get_xyzt_units()[0], voxel_sizes(file.affine)
        if not all(0 < s < np.inf for s in (*pixdim, *spacing)):
            shown = ", ".join(f"{s:g}" for s in (*pixdim, *spacing))
            raise InputError(f"{path}: spacing {shown} must be positive; mend the file's header")
        if unit not in ("mm", "unknown"):
            raise InputError(f"{path}: lengths are in {unit}, mm expected; mend the file's header")
        if max(file.ndim, 3) not in dims:
            wanted = " or ".join(map(str, dims))
            raise InputError(f"{path}: {file.ndim} dimensions, {wanted} expected; split the file")
        kind = file.get_data_dtype()
        if kind.kind not in "iuf":
            raise ValueError(f"its values are {kind}, real numbers are needed")
        check_size(path, file.shape, kind.itemsize, packed=path.name.lower().endswith(".gz"))
        values = np.asanyarray(file.dataobj).astype(np.float32)
        if file.ndim == 2:
            values = values[..., None]
        turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, file.affine))
        return turned.get_fdata(dtype=np.float32), turned.affine


def read_picture(path: Path) -> PIL.Image.Image:
    """A PNG, TIFF or JPEG, upright, grey or coloured. Raises InputError."""
    with reading(path, "picture"):
        picture = PIL.Image.open(path)
        check_size(path, picture.size, len(picture.getbands()), packed=True)
        if (pages := getattr(picture, "n_frames", 1)) > 1:
            raise InputError(f"{path}: {pages} pages; save a volume as NIfTI, with its spacing")
        picture.load()
        picture = PIL.ImageOps.exif_transpose(picture)
        # Two levels become 0 and 255, as others write them; grey loses its alpha.
        return picture.convert("L") if picture.mode in ("1", "LA") else picture


def read_image(path: Path, dims: Sequence[int] = (3,), channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The intensities of a file, spatial axes then channels, and its affine; a coloured picture as 3
    channels, or grey if 1 is asked for. Raises InputError where they are not finite, or all one."""
    if is_nifti(path):
        values, affine = read_nifti(path, dims)
        values = values if values.ndim == 4 else values[..., None]
    else:
        picture = read_picture(path)
        if not is_grey(picture):
            picture = picture.convert("RGB")  # drops alpha, looks colours up
            picture = picture if channels == 3 else picture.convert("L")
        values, affine = np.atleast_3d(np.asarray(picture, np.float32)), np.eye(4)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: the image holds NaN or infinite values; repair it or take it out")
    if values.min() == values.max():
        raise InputError(f"{path}: the image is constant ({values.min():g}); take it out")
    return values, affine


def read_label(path: Path) -> tuple[Int[np.ndarray, "*spatial"], np.ndarray, str]:
    """A label's numbers as they are in the file, its affine, and which kind of file it is: NIfTI's whole
    numbers, a palette's indices, grey values, or colours as COLOUR + 0xRRGGBB. Raises InputError."""
    if is_nifti(path):
        (values, affine), kind = read_nifti(path), "NIfTI"
    else:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            raise InputError(f"{path}: JPEG changes a label's values; save it as PNG")
        picture, affine = read_picture(path), np.eye(4)
        values = np.asarray(picture)
        if picture.mode == "P":
            kind = "palette"
        elif is_grey(picture):
            kind = "grey"
        else:
            red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), np.int32), -1, 0)
            grey = (red == green) & (green == blue)
            kind = "grey in RGB" if grey.all() else "colour"
            values = np.where(grey, red, COLOUR + (red << 16) + (green << 8) + blue)
    most = 2 * COLOUR if kind == "colour" else COLOUR  # up to which float32 counts
    if not ((values == np.rint(values)) & (values >= 0) & (values < most)).all():  # NaN is none of these
        raise InputError(f"{path}: labels must be whole numbers from 0 to {most}; repair it or take it out")
    return values.astype(np.int32), affine, kind


def as_classes(values: Int[np.ndarray, "*spatial"], known: Sequence[int], path: Path) -> np.ndarray:
    """0 for the first of the `known` values (which rise), 1 for the second ... Raises InputError."""
    classes = np.searchsorted(known, values)
    wrong = values[np.asarray(known)[np.minimum(classes, len(known) - 1)] != values]
    if wrong.size:
        raise InputError(
            f"{path}: label {show_value(wrong[0])}, but the classes are {', '.join(map(show_value, known))}; "
            "repair it or take it out"
        )
    return classes.astype(np.uint8)


def show_value(value: int) -> str:
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def read_pair(
    paths: Sequence[Path],
    label_path: Path,
    known: Sequence[int],
    dims: Sequence[int] = (3,),
    channels: int = 1,
) -> Volume:
    """Images, one channel after the other, and their label, whose numbers `known` become classes 0, 1, ...
    Raises InputError where they are not on one grid."""
    label, label_affine, _ = read_label(label_path)
    images = []
    for path in paths:
        image, affine = read_image(path, dims, channels)
        # 0.1 voxel at the corners is what rounding in the header may do.
        corners = np.array([[0, 0, 0], label.shape]) if label.ndim == 3 else np.zeros((1, 3))
        far = apply_affine(affine, corners) - apply_affine(label_affine, corners)
        if image.shape[:-1] != label.shape or np.abs(far).max() > 0.1 * voxel_sizes(affine).min():
            raise InputError(
                f"{path} and {label_path}: not on the same grid (sizes {times(image.shape[:-1])} and "
                f"{times(label.shape)}); resample the label to its image"
            )
        images.append(image)
    return Volume(np.concatenate(images, -1), as_classes(label, known, label_path), affine)


def read_channels(paths: Sequence[Path], channels: int) -> Volume:
    """An image without a label, its channels in one file or one after the other. Raises InputError."""
    images, affines = [], []
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        image, affine = read_image(path, (3, 4), channels)
        images.append(image)
        affines.append(affine)
        if image.shape[:-1] != images[0].shape[:-1] or not np.allclose(affine, affines[0], atol=1e-3):
            raise InputError(f"{paths[0]} and {path}: not on one grid; resample one to the other")
    image = np.concatenate(images, -1)
    return Volume(image, np.zeros(image.shape[:-1], np.uint8), affines[0])


# --- Geometry -----------------------------------------------------------------------------------


def outside_intensity(image: Float[np.ndarray, "*spatial channels"]) -> Float[np.ndarray, "channels"]:
    """Each channel's lowest intensity, which is what lies outside of an image. The first axis goes
    first: numpy is 25 times slower on all at once where the last axis is as short as the channels."""
    return image.min(axis=0).min(axis=tuple(range(image.ndim - 2)))


def box_of(
    values: Shaped[np.ndarray, "*spatial_and_channels"], shape: Sequence[int], start: Sequence[int]
) -> Shaped[np.ndarray, "*box_and_channels"]:
    """The box of a shape from voxel `start` on, which may reach beyond: there an image has each channel's
    lowest intensity, and a label background."""
    cut = values[tuple(slice(max(a, 0), max(a + n, 0)) for a, n in zip(start, shape, strict=True))]
    if cut.shape[: len(shape)] == tuple(shape):
        return cut
    box = np.empty((*shape, *values.shape[len(shape) :]), values.dtype)
    box[:] = 0 if values.ndim == len(shape) else outside_intensity(values)
    box[inside_box(values.shape, shape, start)] = cut
    return box


def inside_box(size: Sequence[int], shape: Sequence[int], start: Sequence[int]) -> tuple[slice, ...]:
    """Which part of such a box an image of this size fills."""
    return tuple(slice(max(-a, 0), min(m - a, n)) for m, n, a in zip(size, shape, start, strict=False))


def centre_start(size: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The voxel from which on a box of a shape lies in the middle of an image."""
    return [(n - m) // 2 for n, m in zip(size, shape, strict=True)]


def crop(volume: Volume, shape: Sequence[int], start: Sequence[int] | None = None) -> Volume:
    """The box of a shape from voxel `start` on, or in the middle."""
    start = start or centre_start(volume.label.shape, shape)
    shift = np.eye(4)
    shift[: len(shape), 3] = start
    image, label = box_of(volume.image, shape, start), box_of(volume.label, shape, start)
    return Volume(image, label, volume.affine @ shift)


def flat(volume: Volume) -> Volume:
    """A volume of one slice as an image in 2D, in mm."""
    if volume.label.ndim != 3 or sum(n > 1 for n in volume.label.shape) != 2:
        return volume
    (thin,) = (axis for axis, n in enumerate(volume.label.shape) if n == 1)
    order = [*(axis for axis in range(3) if axis != thin), thin, 3]
    return Volume(volume.image.squeeze(thin), volume.label.squeeze(thin), volume.affine[:, order])


def resample(volume: Volume, spacing: Sequence[float], path: Path, *, smooth: bool = False) -> Volume:
    """The same field of view in voxels of another size: linear in the image (`smooth`: of what it is where
    it gets coarser, so that speckle does not turn into false structure), nearest in the label. The
    centre stays where it is, and so do the axes' directions; both are in the new affine. Raises
    InputError, with the name `path`, where nothing would be left, or far more than there was."""
    old, size = np.array(volume.spacing()), np.array(volume.label.shape)
    step = np.where(np.isclose(spacing, old, rtol=1e-3), 1, np.divide(spacing, old))
    if (step == 1).all():
        return volume
    voxels = (size / step).prod()
    if (step > 2 * size).any() or voxels > max(100 * size.prod(), 2**27):
        raise InputError(
            f"{path}: from spacing {times(old)} to {times(spacing)} is too far; mend its spacing, or "
            "take it out"
        )
    new_size = np.maximum(1, np.rint(size / step)).astype(int)
    start = (size - 1) / 2 - step * (new_size - 1) / 2  # the first new voxel, in old voxels

    def place(values: np.ndarray, order: int) -> np.ndarray:
        return affine_transform(values, step, start, tuple(new_size), order=order, mode="nearest")

    image, coarser = volume.image, np.maximum(step - 1, 0) / 2
    if smooth and coarser.max() > 0.05:
        image = gaussian_filter(image, (*coarser, 0))
    image = np.stack([place(channel, 1) for channel in np.moveaxis(image, -1, 0)], -1)
    dims, affine = len(size), np.eye(4)
    affine[range(dims), range(dims)] = step
    affine[:dims, 3] = start
    return Volume(image, place(volume.label, 0), volume.affine @ affine)


# --- Back onto the grid of a file ---------------------------------------------------------------


class Grid(NamedTuple):
    """The voxels of an image as it came: their number along three axes (a picture's third is 1), and where
    they are in the world."""

    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]


def grid_of(file: Path, shape: Sequence[int]) -> Grid:
    """The grid of a file that holds an image of this shape."""
    if not is_nifti(file):
        return Grid((*shape, 1), np.eye(4))
    like = nibabel.load(file)
    return Grid((*like.shape, 1)[:3], like.affine)


def on_grid(
    values: Float[np.ndarray, "*spatial"], affine: Float[np.ndarray, "4 4"], grid: Grid, outside: float
) -> Float[np.ndarray, "x y z"]:
    """Values of a prepared image (whose voxels `affine` places in the world) at the voxels of `grid`, linear
    between them, and `outside` where the prepared image does not reach, such as beyond a centre crop."""
    prepared = np.linalg.inv(affine) @ grid.affine  # prepared voxel of a voxel of the grid
    values, turn, shift = np.atleast_3d(values), prepared[:3, :3], prepared[:3, 3]
    placed = affine_transform(values, turn, shift, grid.shape, order=1, mode="nearest")
    # Preparation turns, scales and cuts, so every axis of the grid runs along one of the prepared ones.
    for axis, along in enumerate(np.abs(turn).argmax(axis=0)):
        where = turn[along, axis] * np.arange(grid.shape[axis]) + shift[along]
        # Rounding the size in resampling may move the edge by a quarter of a voxel.
        beyond = (where < -0.76) | (where > values.shape[along] - 0.24)
        placed[(slice(None),) * axis + (beyond,)] = outside
    return placed


def encode_like(values: np.ndarray, file: Path, palette: Sequence[int]) -> tuple[str, bytes]:
    """Values on a file's grid as a file of its kind, and its ending: NIfTI with the same affine; for whole
    numbers a picture with a palette, whose indices are the classes; for others a TIFF with a page per
    class."""
    if is_nifti(file):
        like = nibabel.load(file)
        header = like.header.copy()
        header.set_data_dtype(values.dtype)
        header["cal_min"] = header["cal_max"] = 0
        shape = (*like.shape[:3], *values.shape[3:])
        content = type(like)(values.reshape(shape), like.affine, header).to_bytes()
        zipped = file.name.lower().endswith(".gz")
        return (".nii.gz", gzip.compress(content)) if zipped else (".nii", content)
    buffer = io.BytesIO()
    if values.dtype == np.uint8:
        picture = PIL.Image.fromarray(values[..., 0], "P")
        picture.putpalette(list(palette))
        tiff = file.suffix.lower() in (".tif", ".tiff")
        picture.save(buffer, format="TIFF" if tiff else "PNG")
        return (file.suffix if tiff else ".png"), buffer.getvalue()
    pages = [PIL.Image.fromarray(page) for page in np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)]
    pages[0].save(buffer, format="TIFF", save_all=True, append_images=pages[1:])
    return ".tif", buffer.getvalue()
