"""The former names of `litlora.data.sources`, until their last caller has changed."""

from litlora.data.sources import SAMPLE_FILE as SAMPLE_FILE
from litlora.data.sources import Dataset as Records
from litlora.data.sources import read_dataset as read_records

__all__ = ["SAMPLE_FILE", "Records", "read_records"]
