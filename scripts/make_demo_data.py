"""Make the two small CTs and label maps that ship in `swin_unetr/data` from the full-size scans.

    python scripts/make_demo_data.py FOLDER_WITH_THE_NRRD_FILES [--out swin_unetr/data]

The folder is `data/` of the source distribution pyradiomics 3.1.0. The labels are made by a rule, not by
an expert: 0 background, 1 body (everything inside the skin that is not lung), 2 lung. Each function
below states its part of the rule; `swin_unetr/data/README.md` states the whole.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import SimpleITK as sitk

SOURCES = {
    "lung1_image.nrrd": "379fa48bf34cfa961e6f5ec19c0c38757a30b9aa884212ef28dc29b5061c64ed",
    "lung1_label.nrrd": "e9d9a88054d7bc1d3034193ff907ce6b8c6ba28a7bc3a16f23728982d1b6b50a",
    "lung2_image.nrrd": "aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651",
    "lung2_label.nrrd": "cef52738dc51aab69a48fe30639da956d2b911b1c2920439c091fab84727657a",
}
SPACING = (3.0, 3.0, 5.0)  # mm, x y z
AIR = -400  # HU; below it lies air or aerated lung
OUTSIDE_SCAN = -1024  # HU


def check_sources(folder: Path) -> None:
    """Raise unless `folder` holds the source files, byte for byte.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file has another SHA-256.
    """
    for name, expected in SOURCES.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{folder / name} has SHA-256 {found}; accepted is {expected}")


def body_mask(ct: sitk.Image) -> sitk.Image:
    """Everything inside the skin: uint8 0/1 on the grid of `ct` (HU).

    Everything denser than air, opened by 6 mm to detach table, blankets and cables; of that the
    largest component, with the holes of every axial slice filled.
    """
    dense = sitk.BinaryMorphologicalOpening(ct > AIR, _flat_radius(ct, 6.0))
    return _fill_slices(_components_by_size(dense) == 1)


def airway_mask(air: sitk.Image) -> sitk.Image:
    """Trachea and main bronchi: the parts of `air` (uint8 0/1) that are followed down its axial slices.

    This starts with all air of the top slice, and takes from each slice below the parts smaller than
    500 mm² that lie within 5 mm of the airway above. A bronchus ends where it opens into the lung, since
    there it is no longer a separate part.
    """
    airway = air[:, :, air.GetSize()[2] - 1]
    slices = [airway]
    for z in reversed(range(air.GetSize()[2] - 1)):
        parts = air[:, :, z]
        small = sitk.And(parts, sitk.Not(_components_by_size(parts, at_least=500.0) > 0))
        near = sitk.BinaryDilate(airway, _flat_radius(airway, 5.0))
        airway = sitk.BinaryReconstructionByDilation(sitk.And(small, near), small)
        slices.append(airway)
    return _stack(slices[::-1], air)


def lung_mask(ct: sitk.Image, body: sitk.Image, lesion: sitk.Image) -> sitk.Image:
    """Both lungs, including vessels and `lesion`, without trachea and main bronchi: uint8 0/1.

    Air inside `body` without the airway; of that the two largest components, the lungs (bowel gas is
    smaller). Then, in each axial slice, each lung with its lesion is closed by 6 mm, separately from
    the other lung so that the tissue between them stays out, and holes below 150 mm² are filled: those
    of vessels and bronchi, but not the dome of the diaphragm.
    """
    air = sitk.And(ct < AIR, body)
    by_size = _components_by_size(sitk.And(air, sitk.Not(airway_mask(air))))
    lungs = lesion
    for component in (1, 2):
        lung = sitk.Or(by_size == component, lesion)
        lungs = sitk.Or(lungs, sitk.BinaryMorphologicalClosing(lung, _flat_radius(ct, 6.0)))
    return sitk.And(_fill_slices(lungs, 150.0), body)


def label_map(ct: sitk.Image, lesion: sitk.Image) -> sitk.Image:
    """0 background, 1 body, 2 lung: uint8 on the grid of `ct` (HU); `lesion` is a uint8 0/1 mask."""
    body = body_mask(ct)
    return sitk.Add(body, lung_mask(ct, body, lesion))


def resample(ct: sitk.Image, labels: sitk.Image) -> tuple[sitk.Image, sitk.Image]:
    """`ct` as int16 and `labels` as uint8 at `SPACING`, over the same field of view.

    The CT is smoothed against aliasing on the axes where the new spacing is coarser. Each label is
    interpolated linearly, and the largest wins.
    """
    old = ct.GetSpacing()
    size = [max(1, round(n * a / b)) for n, a, b in zip(ct.GetSize(), old, SPACING, strict=True)]
    # Both grids begin at the same corner, so the centre of the first voxel moves with the spacing.
    first = ct.TransformContinuousIndexToPhysicalPoint([b / a / 2 - 0.5 for a, b in zip(old, SPACING, strict=True)])
    # A standard deviation of half a new voxel leaves little above the new Nyquist frequency.
    variance = [(b / 2) ** 2 if b > a else 0.0 for a, b in zip(old, SPACING, strict=True)]
    smooth = sitk.DiscreteGaussian(sitk.Cast(ct, sitk.sitkFloat32), variance)

    def onto_grid(image: sitk.Image, interpolator: int, outside: float) -> sitk.Image:
        return sitk.Resample(
            image, size, sitk.Transform(), interpolator, first, SPACING, ct.GetDirection(), outside, image.GetPixelID()
        )

    return (
        sitk.Cast(sitk.Round(onto_grid(smooth, sitk.sitkLinear, OUTSIDE_SCAN)), sitk.sitkInt16),
        onto_grid(labels, sitk.sitkLabelLinear, 0),
    )


def _flat_radius(image: sitk.Image, millimetres: float) -> list[int]:
    """`millimetres` in pixels of the axial plane, and none across slices."""
    in_plane = [max(1, round(millimetres / spacing)) for spacing in image.GetSpacing()[:2]]
    return in_plane + [0] * (image.GetDimension() - 2)


def _components_by_size(mask: sitk.Image, at_least: float = 0.0) -> sitk.Image:
    """Connected components of `mask` of `at_least` mm² (mm³ in 3D), numbered from 1 by falling size."""
    voxels = math.ceil(at_least / math.prod(mask.GetSpacing()))
    return sitk.RelabelComponent(sitk.ConnectedComponent(mask), minimumObjectSize=voxels)


def _fill_slices(mask: sitk.Image, below: float = math.inf) -> sitk.Image:
    """`mask` with the holes below `below` mm² of every axial slice filled."""
    slices = []
    for z in range(mask.GetSize()[2]):
        filled = sitk.BinaryFillhole(mask[:, :, z], foregroundValue=1)
        if below < math.inf:
            holes = sitk.And(filled, sitk.Not(mask[:, :, z]))
            filled = sitk.And(filled, sitk.Not(_components_by_size(holes, at_least=below) > 0))
        slices.append(filled)
    return _stack(slices, mask)


def _stack(slices: list[sitk.Image], like: sitk.Image) -> sitk.Image:
    """Axial slices as one image in the geometry of `like`."""
    stack = sitk.JoinSeries(slices)
    stack.CopyInformation(like)
    return stack


def main() -> None:
    default_out = Path(__file__).parents[1] / "swin_unetr" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the .nrrd files (data/ of pyradiomics 3.1.0)")
    parser.add_argument("--out", type=Path, default=default_out, help="where to write (default: %(default)s)")
    args = parser.parse_args()

    check_sources(args.folder)
    for patient in (1, 2):
        ct = sitk.ReadImage(args.folder / f"lung{patient}_image.nrrd", sitk.sitkInt16)
        lesion = sitk.ReadImage(args.folder / f"lung{patient}_label.nrrd", sitk.sitkUInt8)
        for kind, image in zip(("ct", "labels"), resample(ct, label_map(ct, lesion)), strict=True):
            path = args.out / f"patient{patient}_{kind}.nii.gz"
            for key in image.GetMetaDataKeys():
                image.EraseMetaData(key)
            sitk.WriteImage(image, path, useCompression=True, compressionLevel=9)
            print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
