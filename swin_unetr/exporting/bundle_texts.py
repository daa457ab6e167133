"""Texts for people in the files of a bundle."""

README = """# {name}

Swin UNETR, trained and exported with swin-kernels: sliding windows of {roi} voxels over images that
`configs/inference.json` reorients, resamples and scales, and label maps in the geometry of the image.

| value | label |
|--:|---|
{labels}

## Use

    pip install "monai[fire,ignite,nibabel,einops]>=1.5"
    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
        --bundle_root . --dataset_dir /folder/of/nifti/images --output_dir /folder/for/label/maps

For MONAI Label, put this folder into `model/` of its app `monaibundle`, and start it with
`--conf models {name}`.
"""

PORTABLE = """
## Network

`network_def` builds `{network}`: MONAI alone runs this bundle. The weights fit
`{own_network}` as they are, which computes the same on fused kernels. To switch, install swin-kernels and add

    --network_def#_target_ {own_network}

to the command above, or write it as `_target_` of `network_def` into `configs/inference.json` for MONAI Label.
"""

LEGACY = """
## Network

`network_def` builds `{network}`, and swin-kernels has to be installed. The weights were trained with the order of
patch merging that MONAI had before 1.5 (`merging_legacy`). MONAI's own class, from 1.5 on, would load them without an
error and compute something else.
"""

LICENSE = """The files in configs/ and docs/ were written by swin-kernels and are under the Apache License, Version 2.0:
https://www.apache.org/licenses/LICENSE-2.0

The weights in models/ are under the terms of those who trained them, and of the data they were trained on. This file
does not grant any rights to them: whoever passes the bundle on states those terms here.
"""
