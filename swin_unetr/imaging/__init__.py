"""Images and label maps in files (NIfTI, NRRD, MetaImage, DICOM), read and written with their place in space."""

from .volume import BadCase, Source, Volume, find, output_suffix, write

__all__ = ["BadCase", "Source", "Volume", "find", "output_suffix", "write"]
