"""From documents to token batches, independent of the parallel layout."""
