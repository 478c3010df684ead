"""The routes of `/v1`, by noun. Each module has a list of its endpoints."""
