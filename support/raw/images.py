"""How is an image file (NIfTI, PNG, TIFF, JPEG, GIF, BMP) read and put on another grid, and how does a mask
get back onto the image's own grid?

Everything here is about files and geometry: nothing knows what is learned from the images. The classes of a
label are whole numbers, and 0 is background.
"""

import gzip
import io
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import PIL.Image
import PIL.ImageOps
import scipy
from jaxtyping import Float, Integer, Shaped, UInt8
from nibabel.affines import apply_affine, from_matvec, to_matvec, voxel_sizes

from support.disk.files import InputError, one_line

# What Pillow and nibabel doubt in a file is an error here, or does not matter.
warnings.filterwarnings("ignore", module=r"PIL|nibabel|support\.raw\.images")

ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".gif", ".bmp", ".nii", ".nii.gz")
IGNORED = 255  # in a prepared label: a voxel that neither trains nor is scored
POINTERS = {  # how a small text begins that stands in place of a large file, and what gets that file
    b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get",
}  # fmt: skip
SITK = 'python -c "import SimpleITK as s; s.WriteImage(s.ReadImage({old!r}), {new!r})"'
DCM2NIIX = "dcm2niix -z y {folder}"
TO_NIFTI = {".mha": SITK, ".mhd": SITK, ".nrrd": SITK, ".dcm": DCM2NIIX, ".ima": DCM2NIIX}
COLOUR = 1 << 24  # added to a colour's red, green and blue bytes, so that no grey value is the same

Image = Float[np.ndarray, "*spatial channels"]
Label = Integer[np.ndarray, "*spatial"]
Affine = Float[np.ndarray, "4 4"]


class Volume(NamedTuple):
    """An image and its label on one grid. `affine` maps voxels to the world in mm (pictures: to the
    pixels of the file)."""

    image: Image
    label: Label
    affine: Affine

    def spacing(self) -> tuple[float, ...]:
        """The distance between voxels along every spatial axis, in mm or pixels."""
        return tuple(float(s) for s in voxel_sizes(self.affine)[: self.label.ndim])


class Grid(NamedTuple):
    """The voxels of a file: their number along three axes (a picture's third is 1), and their affine."""

    shape: tuple[int, ...]
    affine: Affine


class Reading(NamedTuple):
    """What the user says of files that can be read in several ways."""

    geometry: str = ""  # "sform" or "pixdim": which of them holds in a NIfTI header in which they disagree
    threshold: float = -1.0  # above it, a label is class 1, else background; below 0, numbers are classes


def has_foreground(label: Label) -> bool:
    """Whether a label has a class above background; what is ignored does not count."""
    return bool(((label > 0) & (label != IGNORED)).any())


def times(shape: Iterable) -> str:
    """A size or a spacing as text, such as 480 x 512."""
    return " x ".join(f"{n:g}" for n in shape)


def counted(number: int, what: str) -> str:
    """A number of things as text, such as 1 label or 2 labels."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def plain(text: str | Path) -> str:
    """A name as NFC, since systems encode accents in several ways, and names should match on all of them."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode(errors="replace"))


def stem_of(path: Path) -> str:
    """A file's name without .png, .nii.gz and the like."""
    return plain(re.sub(r"(\.nii)?\.[^.]+$", "", path.name, flags=re.IGNORECASE))


def fullest_slice(label: Label) -> int | None:
    """The place along a volume's last axis that has the most foreground, or the middle if there is none; None
    for a picture."""
    if label.ndim < 3:
        return None
    foreground = ((label > 0) & (label != IGNORED)).sum(axis=(0, 1))
    return int(foreground.argmax()) if foreground.any() else label.shape[2] // 2


def cut(values: Shaped[np.ndarray, "..."], z: int | None) -> Shaped[np.ndarray, "..."]:
    """The z-th axial slice [..., x, y, 1] of volumes; pictures as they are."""
    return values if z is None else values[..., z : z + 1]


# --- Reading a file -----------------------------------------------------------------------------


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def files_in(folder: Path, *endings: str) -> list[Path]:
    """The files with these endings, in the order of their names, without macOS's `._` copies."""
    return sorted(path for path in folder.glob("[!.]*") if path.name.lower().endswith(endings))


def check_kind(path: Path) -> None:
    """Raises InputError, with a command, if a file is of a kind that is made NIfTI first."""
    if how := TO_NIFTI.get(path.suffix.lower()):
        how = how.format(old=path.name, new=path.with_suffix(".nii.gz").name, folder=path.parent)
        raise InputError(f"{path}: convert it to NIfTI first, for example with {how}")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever fails inside into an InputError: a damaged file can raise nearly anything."""
    if not path.is_file():
        why = "no such file; check its name, and that its folder is complete"
        if path.is_symlink():
            why = "is a link to a file that is not here; run git annex get, or copy the file"
        raise InputError(f"{path}: {why}")
    check_kind(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
        for pointer, command in POINTERS.items():
            if begin.startswith(pointer):
                raise InputError(f"{path}: is a pointer, not the file that it stands for; run {command}")
        yield
    except InputError:
        raise
    except Exception as error:
        fix = "cut it into tiles" if isinstance(error, PIL.Image.DecompressionBombError) else "get it again"
        raise InputError(f"{path}: not a readable {kind} ({one_line(error)}); {fix}") from error


def open_nifti(path: Path) -> tuple[nibabel.Nifti1Image, bytes]:
    """A NIfTI file, compressed or not whatever its name says, and its bytes. Raises any exception if it is
    damaged."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(content[: kind.header_class.sizeof_hdr]):
            return kind.from_bytes(content), content
    raise ValueError("it has no header of NIfTI")


def read_nifti(
    path: Path, dims: Sequence[int] = (3,), geometry: str = ""
) -> tuple[Float[np.ndarray, "x y z ..."], Affine, Grid]:
    """The values of a NIfTI file as float32, its axes turned to right, anterior, superior, their affine, and
    the file's own grid. Raises InputError if it cannot be read, its header is wrong, or states two spacings
    and `geometry` does not say which of them holds, or it has a number of dimensions not in `dims`."""
    with reading(path, "NIfTI file"):
        file, content = open_nifti(path)
        # nibabel repairs a pixdim of 0 or less on loading, which would hide wrong spacing.
        header = type(file.header).from_fileobj(io.BytesIO(content), check=False)
        pixdim = header["pixdim"][1 : 1 + min(file.ndim, 3)]
        affine, unit = file.affine, file.header.get_xyzt_units()[0]
        by_affine = voxel_sizes(affine)[: len(pixdim)]
        if not np.isfinite(affine).all():
            raise InputError(f"{path}: its affine holds NaN or infinite values; fix the file's header")
        if not all(0 < s < np.inf for s in (*pixdim, *voxel_sizes(affine))):
            shown = ", ".join(f"{s:g}" for s in (*pixdim, *by_affine))
            raise InputError(f"{path}: spacing {shown} must be positive; fix the file's header")
        if unit not in ("mm", "unknown"):
            raise InputError(f"{path}: lengths are in {unit}, mm expected; fix the file's header")
        disagree = not np.allclose(pixdim, by_affine, rtol=1e-3)
        if disagree and not geometry:
            stated = f"{times(by_affine)} by its sform, but {times(pixdim)} by its pixdim"
            fix = "say which is true by --geometry sform or --geometry pixdim of prepare.py build"
            raise InputError(f"{path}: the spacing is {stated}; {fix}, or repair the file with fslorient")
        if disagree and geometry == "pixdim":
            affine = affine @ np.diag([*pixdim / by_affine, 1, 1, 1][:4])

        shape = file.shape  # of which (x, y, z, 1) is a volume
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if max(len(shape), 3) not in dims:
            wanted = " or ".join(map(str, dims))
            fix = "drop its first axis, which has length 1" if shape[0] == 1 else "split the file"
            raise InputError(f"{path}: {len(shape)} dimensions, {wanted} expected; {fix}")
        kind = file.get_data_dtype()
        if kind.names:
            raise InputError(f"{path}: its voxels are colours; save red, green and blue as a file each")
        if kind.kind not in "iuf" or min(shape) < 1:
            raise ValueError(f"its {times(shape)} values are {kind}, real numbers are needed")
        values = np.atleast_3d(np.asanyarray(file.dataobj).astype(np.float32).reshape(shape))
        return *turned(values, affine), Grid((*file.shape, 1)[:3], affine)


def turned(values: Shaped[np.ndarray, "x y z ..."], affine: Affine) -> tuple[np.ndarray, Affine]:
    """Values whose axes are turned to right, anterior, superior, and their affine."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    return np.asarray(image.dataobj), image.affine


def read_picture(path: Path) -> PIL.Image.Image:
    """A PNG, TIFF, JPEG, GIF or BMP, upright: in grey, with a palette, or else in red, green and blue. Raises
    InputError."""
    with reading(path, "picture"):
        with PIL.Image.open(path) as picture:
            picture.verify()  # the checksums of a PNG, which Pillow does not look at when it reads the pixels
        picture = PIL.Image.open(path)
        if (pages := getattr(picture, "n_frames", 1)) > 1:
            fix = "save each page as a picture, or a volume as NIfTI with its spacing"
            raise InputError(f"{path}: {pages} pages; {fix}")
        if len(picture.getbands()) > 1 and any("16" in str(tile[3]) for tile in picture.tile):
            fix = "save it as grey of 16 bits, or in colours of 8 bits"
            raise InputError(f"{path}: 16 bits per channel, of which Pillow reads 8; {fix}")
        picture.load()
        picture = PIL.ImageOps.exif_transpose(picture)
        if picture.mode in ("L", "I", "F", "P") or picture.mode.startswith("I;16"):
            return picture
        # Two levels become 0 and 255, as other programs write them; opacity is left out.
        return picture.convert("L" if picture.mode in ("1", "LA") else "RGB")


def in_colours(image: Float[np.ndarray, "h w given"], channels: int) -> Float[np.ndarray, "h w found"]:
    """A picture in grey or in red, green and blue, without its opacity: for 3 channels in colours (a grey one
    has three equal ones), for 0 as it is, and otherwise in grey. Raises InputError if colours to be made grey
    are not from 0 to 255."""
    image = image[..., : 1 if image.shape[-1] < 3 else 3]
    if image.shape[-1] == 1:
        return np.repeat(image, 3, -1) if channels == 3 else image
    if channels in (0, 3):
        return image
    if not (image == image.astype(np.uint8)).all():
        raise InputError("image: colours must be whole numbers from 0 to 255; give it in grey")
    grey = PIL.Image.fromarray(image.astype(np.uint8)).convert("L")
    return np.asarray(grey, np.float32)[..., None]


def read_label(path: Path, how: Reading) -> tuple[Label, Affine]:
    """A label's numbers as they are in the file, and its affine. The numbers are those of a NIfTI file, a
    palette's indices (but not in GIF), grey values, or colours as COLOUR + 0xRRGGBB; with a threshold, they
    are 1 above it and 0 elsewhere, in pictures by brightness. Raises InputError if the file cannot be read or
    its numbers are not whole."""
    smooth = how.threshold >= 0
    if path.suffix.lower() in (".jpg", ".jpeg") and not smooth:
        fix = "with one class, use --threshold 127; with several, export it anew as PNG"
        raise InputError(f"{path}: JPEG changes a label's values; {fix}")
    if is_nifti(path):
        values, affine, _ = read_nifti(path, geometry=how.geometry)
    else:
        picture, affine = read_picture(path), np.eye(4)
        if picture.mode == "P" and path.suffix.lower() == ".gif":
            # Every GIF has a palette, which many programs put in the order in which its colours occur.
            picture = picture.convert("RGB")
        if smooth and picture.mode in ("P", "RGB"):
            picture = picture.convert("L")
        values = np.asarray(picture)
        if values.ndim == 3:
            red, green, blue = np.moveaxis(values.astype(np.int32), -1, 0)
            grey = (red == green) & (green == blue)
            return np.where(grey, red, COLOUR + (red << 16) + (green << 8) + blue), affine
    if smooth and np.isfinite(values).all():
        return (values > how.threshold).astype(np.int32), affine
    # COLOUR is also how far float32 counts. NaN fails every comparison.
    if not ((values == np.rint(values)) & (values >= 0) & (values < COLOUR)).all():
        fix = "repair it, or use --threshold 0.5 if it shows how probable one class is"
        raise InputError(f"{path}: labels must be whole numbers from 0 to {COLOUR}; {fix}")
    return values.astype(np.int32), affine


def show_value(value: int) -> str:
    """A label's number as text; a colour as #rrggbb."""
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def check_grid(path: Path, other: Path, shapes: Sequence[tuple], affines: Sequence[Affine]) -> None:
    """Raises InputError unless two files, of these shapes and affines, are on one grid."""
    # 0.1 voxel at the corners is what rounding in a header may do. (A picture's affine is always the same.)
    corners = [*product(*((0, n) for n in (*shapes[0], 0)[:3]))]
    far = np.abs(apply_affine(affines[0], corners) - apply_affine(affines[1], corners)).max()
    if shapes[0] != shapes[1] or far > 0.1 * voxel_sizes(affines[0]).min():
        what, fix = f"sizes {' and '.join(map(times, shapes))}", "resample one to the other"
        if shapes[0] == shapes[1]:
            spacings = " and ".join(times(voxel_sizes(affine)) for affine in affines)
            what = f"spacings {spacings}; corners up to {far:.3g} mm apart"
            if np.array_equal(np.abs(affines[1]), np.eye(4)):
                fix = f"{other.name} has no geometry of its own: give it that of {path.name}"
        raise InputError(f"{path} and {other}: not on the same grid ({what}); {fix}")


def read_channels(paths: Sequence[Path], channels: int, geometry: str = "") -> tuple[Volume, Grid]:
    """An image with an empty label, and the first file's own grid. Its channels are in one file, a picture's
    those of `in_colours`, or each in a file, where pictures are made grey. Raises InputError if a file cannot
    be used, its intensities are not finite, or all the same, or the files are not on one grid."""
    images, affines, grids = [], [], []
    for path in paths:
        if is_nifti(path):
            values, affine, grid = read_nifti(path, (3, 4), geometry)
            values = values if values.ndim == 4 else values[..., None]
        else:
            picture, affine = read_picture(path), np.eye(4)
            picture = picture.convert("RGB") if picture.mode == "P" else picture
            values = np.atleast_3d(np.asarray(picture, np.float32))
            values = in_colours(values, channels if len(paths) == 1 else 1)
            grid = Grid((*values.shape[:2], 1), affine)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: the image holds NaN or infinite values; repair it or take it out")
        if values.min() == values.max():
            raise InputError(f"{path}: the image is constant ({values.min():g}); take it out")
        images.append(values)
        affines.append(affine)
        grids.append(grid)
        check_grid(paths[0], path, (images[0].shape[:-1], values.shape[:-1]), (affines[0], affine))
    image = np.concatenate(images, -1)
    return Volume(image, np.zeros(image.shape[:-1], np.uint8), affines[0]), grids[0]


def as_volume(image: object, spacing: object, dims: int, channels: int, unit: str) -> Volume:
    """An array as a volume with its first voxel at the origin. Raises InputError if it does not
    fit the model."""
    try:
        spacing = tuple(float(s) for s in spacing) or (1.0,) * (dims if unit == "pixel" else 0)
        image = np.asarray(image).astype(np.float32, casting="same_kind")
    except (TypeError, ValueError) as error:
        raise InputError(f"image and spacing must be real numbers ({one_line(error)})") from error
    image = image if image.ndim == dims + 1 else image[..., None]
    if unit == "pixel" and image.ndim == 3 and channels in (1, 3) and image.shape[-1] <= 4:
        image = in_colours(image, channels)
    if (image.ndim, image.shape[-1]) != (dims + 1, channels) or not image.size:
        fix = "give an array of these axes, then channels"
        raise InputError(f"image {image.shape}: {dims} axes and {channels} channels are needed; {fix}")
    if not np.isfinite(image).all():
        raise InputError("image: it holds NaN or infinite values; repair it")
    if len(spacing) != dims or not all(0 < s < np.inf for s in spacing):
        raise InputError(f"spacing {spacing}: {dims} positive numbers are needed, in {unit}")
    affine = np.diag([*spacing, *(1.0,) * (4 - dims)])
    return Volume(image, np.zeros(image.shape[:-1], np.uint8), affine)


# --- Geometry -----------------------------------------------------------------------------------


def box_of(
    values: Shaped[np.ndarray, "..."], shape: Sequence[int], start: Sequence[int] | None = None
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Cuts the box of this shape that begins at voxel `start`, or lies in the middle, out of an image or a
    label. Also returns which part of the box they fill; the rest has each channel's lowest intensity, or
    background."""
    size = values.shape[: len(shape)]
    start = start or [(n - m) // 2 for n, m in zip(size, shape, strict=True)]
    part = values[tuple(slice(max(a, 0), max(a + n, 0)) for a, n in zip(start, shape, strict=True))]
    inside = tuple(slice(max(-a, 0), min(m - a, n)) for m, n, a in zip(size, shape, start, strict=True))
    if part.shape[: len(shape)] == tuple(shape):
        return part, inside
    box = np.zeros((*shape, *values.shape[len(shape) :]), values.dtype)
    if values.ndim > len(shape):
        # In two steps: numpy is 25 times slower in one, where the last axis is as short as the channels.
        box[:] = values.min(axis=0).min(axis=tuple(range(values.ndim - 2)))
    box[inside] = part
    return box, inside


def crop(volume: Volume, shape: Sequence[int], start: Sequence[int] | None = None) -> Volume:
    """The box of this shape that begins at voxel `start`, or lies in the middle."""
    start = start or [(n - m) // 2 for n, m in zip(volume.label.shape, shape, strict=True)]
    image, label = (box_of(values, shape, start)[0] for values in (volume.image, volume.label))
    return Volume(image, label, volume.affine @ from_matvec(np.eye(3), [*start, 0][:3]))


def flat(volume: Volume) -> Volume:
    """A volume of one slice as an image in 2D, still in mm; any other volume as it is."""
    if volume.label.ndim != 3 or sum(n > 1 for n in volume.label.shape) != 2:
        return volume
    thin = volume.label.shape.index(1)
    order = [*np.delete(range(3), thin), thin, 3]
    return Volume(volume.image.squeeze(thin), volume.label.squeeze(thin), volume.affine[:, order])


def first_voxel(size: np.ndarray, new_size: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Where the first of `new_size` voxels lies, `step` old voxels apart, in old voxels, so that both grids
    have the same centre. It moves by up to half an old voxel if new ones would otherwise lie half-way between
    two old ones: each would be rounded to the same side, and the label would move against the image."""
    start = (size - 1) / 2 - step * (new_size - 1) / 2
    for axis, ratio in enumerate(Fraction(float(s)).limit_denominator(16) for s in step):
        q = ratio.denominator  # new voxels lie at multiples of 1 / q from the first one
        alike = abs(step[axis] - float(ratio)) * new_size[axis] < 0.5 / q
        if alike and abs((start[axis] * q - q / 2 + 0.5) % 1 - 0.5) < 0.02:  # rounding may be to either side
            start[axis] -= 0.5 / q
    return start


def resample(volume: Volume, spacing: Sequence[float], path: Path, *, smooth: bool = False) -> Volume:
    """The same field of view and directions, in voxels of another size. The image is linear between voxels;
    the label has the class with the largest share, which is linear between voxels, too. `smooth` blurs an
    image that gets coarser, so that speckle does not turn into false structure. Raises InputError, with the
    name `path`, if nothing would be left, or far more than there was."""
    old, size = np.array(volume.spacing()), np.array(volume.label.shape)
    step = np.where(np.isclose(spacing, old, rtol=1e-3), 1, np.divide(spacing, old))
    if (step == 1).all():
        return volume
    if (step > 2 * size).any() or (size / step).prod() > max(100 * size.prod(), 2**27):
        change = f"from spacing {times(old)} to {times(spacing)}"
        fix = "correct --spacing of prepare.py build, or the file's header, or take the file out"
        raise InputError(f"{path}: {change} is too far; {fix}")
    new_size = np.maximum(1, np.rint(size / step)).astype(int)
    start = first_voxel(size, new_size, step)

    def place(values: np.ndarray) -> np.ndarray:
        return scipy.ndimage.affine_transform(values, step, start, tuple(new_size), order=1, mode="nearest")

    image, coarser = volume.image, np.maximum(step - 1, 0) / 2
    if smooth and coarser.max() > 0.05:
        image = scipy.ndimage.gaussian_filter(image, (*coarser, 0))
    image = np.stack([place(channel) for channel in np.moveaxis(image, -1, 0)], -1)
    shares = ((value, place((volume.label == value).astype(np.float32))) for value in np.unique(volume.label))
    label = largest(shares, new_size.tolist())
    affine = volume.affine @ from_matvec(np.diag([*step, 1][:3]), [*start, 0][:3])
    return Volume(image, label, affine)


def largest(
    shares: Iterable[tuple[int, Float[np.ndarray, "*spatial"]]], shape: Sequence[int]
) -> UInt8[np.ndarray, "*spatial"]:
    """The class with the largest share of each voxel, of classes that come one after the other, to save
    memory. Equal shares, as there are half-way between two voxels, win at every second voxel: if they always
    won, borders would move."""
    label, highest = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    turn = sum(np.indices(shape, sparse=True)) % 2 == 1
    for value, share in shares:
        alike = np.isclose(share, highest, rtol=0, atol=1e-5)
        label[np.where(alike, turn & (share > 0), share > highest)] = value
        highest = np.maximum(highest, share)
    return label


# --- Back onto the grid of a file ---------------------------------------------------------------


def on_grid(
    values: Float[np.ndarray, "*spatial"], affine: Affine, grid: Grid, outside: float
) -> Float[np.ndarray, "x y z"]:
    """Values of a prepared image (whose voxels `affine` places in the world) at the voxels of `grid`, linear
    between them, and `outside` where the prepared image does not reach, such as beyond a centre crop."""
    turn, shift = to_matvec(np.linalg.inv(affine) @ grid.affine)  # from a voxel of the grid to a prepared one
    values = np.atleast_3d(values)
    placed = scipy.ndimage.affine_transform(values, turn, shift, grid.shape, order=1, mode="nearest")
    # Preparation turns, scales and cuts, so every axis of the grid runs along one of the prepared ones.
    for axis, along in enumerate(np.abs(turn).argmax(axis=0)):
        where = turn[along, axis] * np.arange(grid.shape[axis]) + shift[along]
        # Rounding the size in resampling may move the edge by a quarter of a voxel.
        beyond = (where < -0.76) | (where > values.shape[along] - 0.24)
        placed[(slice(None),) * axis + (beyond,)] = outside
    return placed


def classes_on_grid(
    probability: Float[np.ndarray, "*spatial classes"], affine: Affine, grid: Grid
) -> Float[np.ndarray, "x y z classes"]:
    """Probabilities of a prepared image at the voxels of a grid; background beyond it."""
    classes = range(probability.shape[-1])
    return np.stack([on_grid(probability[..., c], affine, grid, float(c == 0)) for c in classes], -1)


def most_probable(
    probability: Float[np.ndarray, "*spatial classes"], affine: Affine, grid: Grid
) -> UInt8[np.ndarray, "x y z"]:
    """The most probable class of a prepared image at the voxels of a grid; background beyond it."""
    classes = range(probability.shape[-1])
    shares = ((c, on_grid(probability[..., c], affine, grid, float(c == 0))) for c in classes)
    return largest(shares, grid.shape)


def encode_like(values: np.ndarray, file: Path, palette: Sequence[int]) -> tuple[str, bytes]:
    """The ending and the bytes of a file that holds values on the grid of another one: NIfTI with the same
    affine; or for whole numbers a picture whose palette indices are the classes, and for other numbers a TIFF
    with a page per class."""
    if is_nifti(file):
        like, _ = open_nifti(file)
        spatial = like.shape[:3] if values.ndim == 3 else (*like.shape, 1)[:3]
        values = values.reshape(*spatial, *values.shape[3:])
        image = type(like)(values, like.affine, like.header, dtype=values.dtype)
        image.header["cal_min"] = image.header["cal_max"] = 0
        zipped, content = file.name.lower().endswith(".gz"), image.to_bytes()
        return (".nii.gz", gzip.compress(content, mtime=0)) if zipped else (".nii", content)
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
