"""What opening attention does to an encoder: on sentences, on words and in retrieval, untrained and trained, row by row."""
