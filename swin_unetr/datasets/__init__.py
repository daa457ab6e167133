"""Training data: cases of a datalist, preprocessed and kept, and the batches drawn from them."""

from typing import TYPE_CHECKING

from .. import lazily
from .options import Augmentation, Data

if TYPE_CHECKING:
    from .dataset import Dataset, ValidationCase, open_dataset
    from .identity import identify

__all__ = ["Augmentation", "Data", "Dataset", "ValidationCase", "identify", "open_dataset"]

__getattr__ = lazily.names(
    __name__,
    {"Dataset": "dataset", "ValidationCase": "dataset", "identify": "identity", "open_dataset": "dataset"},
)
