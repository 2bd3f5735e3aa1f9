"""Training data: sources -> conversations -> examples -> batches.

- `sources.py` reads a data source into conversations;
- `files.py` finds its files, and the records in them;
- `records/` has one file for each form of records;
- `downloads.py` fetches files from the network;
- `conversation.py` is what they have in common, whatever the file looked like;
- `encode.py` turns conversations into token ids, after the very ids that chat asks with;
- `examples.py` fits them to a length, and says what had to be done;
- `batches.py` packs or pads examples into the tensors of a training step.

To add a well-known data set, write a few lines in `litlora/settings/known_sets.py`. To add another
source, write a settings dataclass in `litlora/settings` and a reader of it in READERS in
`sources.py`: a reader returns conversations, and nothing behind it has to change. All but
`batches.py` is torch-free.
"""
