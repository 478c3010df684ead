"""Imported OCI images: skopeo fetches, umoci unpacks, and each is kept as one erofs file, the root that agents see."""
