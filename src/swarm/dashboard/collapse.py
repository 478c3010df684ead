"""Large workflows drawn as few boxes: steps that are alike, chains, and at last stretches of the graph become one box
each. A box that is opened shows its own steps, collapsed again if they are too many; so a picture is always small."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MOST_BOXES: Final = 60
_MOST_EDGES: Final = 300
_ALIKE: Final = 3  # so many steps that are alike become a box
_PASSES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One step, or several: ``members`` are ids, in the order in which they can run. ``key``: the first of them."""

    key: str
    members: tuple[str, ...]
    needs: tuple[str, ...]  # keys of boxes

    @property
    def is_group(self) -> bool:
        return len(self.members) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """``hidden``: so many needs are not drawn, because others imply them or there are too many."""

    boxes: tuple[Box, ...]
    hidden: int


def opened(needs: Mapping[str, Sequence[str]], keys: Sequence[str], most: int = MOST_BOXES) -> Picture:
    """``needs``: of each step. ``keys``: the boxes that were opened, one within the other; unknown ones are ignored."""
    picture = collapse(needs, most)
    for key in keys:
        box = next((one for one in picture.boxes if one.key == key and one.is_group), None)
        if box is None:
            break
        inside = set(box.members)
        picture = collapse({one: [need for need in needs[one] if need in inside] for one in box.members}, most)
    return picture


def collapse(needs: Mapping[str, Sequence[str]], most: int = MOST_BOXES) -> Picture:
    order = _in_order(needs)
    owner = {one: one for one in order}
    edges = {one: set(needs[one]) for one in order}
    for _ in range(_PASSES):
        before = len(edges)
        for merge in (_alike, _chains):
            if len(edges) > most:
                merged = merge(edges)
                if len(set(merged.values())) > 1:
                    owner, edges = _merged(owner, edges, merged)
        if len(edges) == before or len(edges) <= most:
            break
    if len(edges) > most:
        keys = _in_order(edges)
        size = -(-len(keys) // most)
        owner, edges = _merged(owner, edges, {key: keys[i - i % size] for i, key in enumerate(keys)})
    members: dict[str, list[str]] = {}
    for one in order:
        members.setdefault(owner[one], []).append(one)
    whole = sum(map(len, edges.values()))
    if whole > 2 * len(edges) or whole > _MOST_EDGES:
        edges = _reduced(edges)
    shown = _few(edges)
    names = {key: some[0] for key, some in members.items()}
    boxes = tuple(
        Box(key=names[key], members=tuple(some), needs=tuple(names[need] for need in sorted(shown[key], key=names.get)))  # type: ignore[arg-type]
        for key, some in members.items()
    )
    return Picture(boxes=boxes, hidden=whole - sum(map(len, shown.values())))


def _in_order(needs: Mapping[str, Collection[str]]) -> list[str]:
    """Each after those that it needs; steps of one layer together."""
    left = {one: sum(need in needs for need in some) for one, some in needs.items()}
    after = _after(needs)
    queue = deque(one for one, count in left.items() if not count)
    found = []
    while queue:
        one = queue.popleft()
        found.append(one)
        for other in after[one]:
            left[other] -= 1
            if not left[other]:
                queue.append(other)
    return found


def _after(needs: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    after: dict[str, list[str]] = {one: [] for one in needs}
    for one, some in needs.items():
        for need in some:
            if need in after:
                after[need].append(one)
    return after


def _alike(edges: Mapping[str, set[str]]) -> dict[str, str]:
    """Those that need the same and are needed by the same, by the first of them."""
    after = _after(edges)
    classes: dict[tuple[frozenset[str], frozenset[str]], list[str]] = {}
    for one, needs in edges.items():
        classes.setdefault((frozenset(needs), frozenset(after[one])), []).append(one)
    return {one: some[0] if len(some) >= _ALIKE else one for some in classes.values() for one in some}


def _chains(edges: Mapping[str, set[str]]) -> dict[str, str]:
    """Those that follow one another with nothing beside them, by the first of them."""
    after = _after(edges)
    first: dict[str, str] = {}
    for one in _in_order(edges):
        [before, *others] = edges[one] or {""}
        first[one] = first[before] if before and not others and len(after[before]) == 1 else one
    return first


def _merged(
    owner: Mapping[str, str], edges: Mapping[str, set[str]], merged: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, set[str]]]:
    joined: dict[str, set[str]] = {key: set() for key in dict.fromkeys(merged.values())}
    for one, needs in edges.items():
        into = merged[one]
        joined[into].update(target for need in needs if (target := merged[need]) != into)
    return {one: merged[key] for one, key in owner.items()}, joined


def _reduced(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Without needs that others imply."""
    place = {one: 1 << number for number, one in enumerate(edges)}
    above: dict[str, int] = {}  # all that come before it, as bits
    found: dict[str, set[str]] = {}
    for one in _in_order(edges):
        implied = 0
        for need in edges[one]:
            implied |= above[need]
        found[one] = {need for need in edges[one] if not implied & place[need]}
        above[one] = implied | sum(place[need] for need in edges[one])
    return {one: found[one] for one in edges}


def _few(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """At most `_MOST_EDGES`, and each keeps one that has any."""
    if sum(map(len, edges.values())) <= _MOST_EDGES:
        return dict(edges)
    most = max(1, _MOST_EDGES // max(len(edges), 1))
    place = {one: number for number, one in enumerate(_in_order(edges))}
    return {one: set(sorted(needs, key=lambda need: -place[need])[:most]) for one, needs in edges.items()}
