"""Training data: cases of a datalist, preprocessed and kept, and the batches drawn from them."""

from .dataset import Dataset, ValidationCase, open_dataset
from .identity import identify
from .options import Augmentation, Data

__all__ = ["Augmentation", "Data", "Dataset", "ValidationCase", "identify", "open_dataset"]
