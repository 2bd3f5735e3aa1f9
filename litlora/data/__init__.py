"""Training data: sources of records, records to token ids, token ids to batches."""
