"""A registry in a folder: blobs, records, and an index of them."""
