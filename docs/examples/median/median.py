"""The middle value of a list. It has a fault, which the README has found and mended."""


def median(values: list[float]) -> float:
    values = sorted(values)
    return values[len(values) // 2]
