"""How does a raw download become a checked HDF5 file? Section 5.2 of Fu et al. (2023).

    python prepare.py build hippocampus_mr --raw Task04_Hippocampus --data-dir data

writes data/hippocampus_mr.h5, whose format data.py describes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data import DatasetWriter, InputError, Sample, check, normalise


def read_volume(path: Path) -> nibabel.Nifti1Image:
    """A 3D NIfTI volume with its axes turned to right, anterior, superior. Raises InputError."""
    try:
        volume = nibabel.as_closest_canonical(nibabel.load(path))
        volume.get_fdata(dtype=np.float32)  # read here, so that a truncated file is found here
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({error}); download it again") from error
    if volume.ndim != 3:
        raise InputError(f"{path}: {volume.ndim} dimensions, 3 expected")
    return volume


def read_labels(path: Path) -> np.ndarray:
    """The labels of a NIfTI file as uint8, also where they are stored as floats. Raises InputError."""
    values = read_volume(path).get_fdata(dtype=np.float32)
    if not np.isfinite(values).all() or (values != np.rint(values)).any() or not values.min() >= 0:
        raise InputError(f"{path}: labels must be whole numbers from 0; repair or remove it")
    if values.max() > 255:
        raise InputError(f"{path}: label {values.max():.0f} is above 255; number the classes from 0")
    return values.astype(np.uint8)


def clip_percentiles(image: Float[np.ndarray, "*spatial channels"]) -> np.ndarray:
    """Intensities cut at the 0.5 and 99.5 percentiles: scanners disagree about the rest."""
    return np.clip(image, *np.percentile(image, [0.5, 99.5]))


def hippocampus_mr(raw: Path) -> Iterator[tuple[str, Sample]]:
    """Medical Segmentation Decathlon, Task 4 (not in the paper): `imagesTr` and `labelsTr`, sizes
    kept. Of every ten cases in the order of their names, seven train, one validates, two test.

    Intensities are not standardised there (a case's highest from 112 to 1.7e6), so every volume is
    clipped at percentiles of its own before it is normalised.
    """
    labels = sorted(path for path in (raw / "labelsTr").glob("*.nii.gz") if path.name[0] != ".")
    if not labels:
        raise InputError(f"{raw}: no labelsTr/*.nii.gz; give the unpacked Task04_Hippocampus folder")
    for i, path in enumerate(tqdm(labels, desc="hippocampus_mr")):
        uid = path.name.removesuffix(".nii.gz")
        volume, label = read_volume(raw / "imagesTr" / path.name), read_volume(path)
        if volume.shape != label.shape or not np.allclose(volume.affine, label.affine, atol=1e-3):
            raise InputError(f"{raw / 'imagesTr' / path.name} and {path}: not the same grid")
        image = volume.get_fdata(dtype=np.float32)[..., None]
        spacing = tuple(float(s) for s in volume.header.get_zooms())
        sample = Sample(image, read_labels(path), spacing, uid, volume.affine)
        sample = check(sample, str(raw / "imagesTr" / path.name), classes=3, channels=1)
        split = ["train", "validation", "test"][np.searchsorted([7, 8], i % 10, side="right")]
        yield split, sample._replace(image=normalise(clip_percentiles(image)))


BUILDERS = {
    "hippocampus_mr": (
        hippocampus_mr,
        {
            "class_names": ["background", "anterior", "posterior"],
            "source": "Medical Segmentation Decathlon, Task04_Hippocampus, CC-BY-SA 4.0",
            "preprocessing": "RAS; clipped to percentiles 0.5 and 99.5; zero mean, unit variance",
            "unit": "mm",
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="raw folder to HDF5")
    command.add_argument("name", choices=list(BUILDERS))
    command.add_argument("--raw", type=Path, required=True, help="the unpacked download")
    command.add_argument("--data-dir", type=Path, default=Path("data"))
    args = parser.parse_args(argv)
    read, facts = BUILDERS[args.name]
    path = args.data_dir / f"{args.name}.h5"
    try:
        with DatasetWriter(path, name=args.name, **facts) as writer:
            for split, sample in read(args.raw):
                writer.add(split, sample)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{path} written; next: python train.py --dataset {args.name}")


if __name__ == "__main__":
    main()
