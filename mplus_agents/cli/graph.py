"""Draws chains of commits that share their beginnings, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def draw_graph(commits: Sequence[tuple[int, int | None]]) -> Iterator[tuple[str, int | None]]:
    """Draw commits, one per line, with lines between them where branches meet.

    Args:
        commits: Each commit's id and its parent's, children before parents.

    Yields:
        A drawing, and the commit whose line it is; None for a line on which a branch joins another.
    """
    columns: list[int] = []  # the commit that each branch comes to next
    for commit_id, parent_id in commits:
        places = [place for place, awaited in enumerate(columns) if awaited == commit_id]
        if not places:
            places = [len(columns)]
            columns.append(commit_id)
        first = places[0]
        for place in reversed(places[1:]):
            # A branch goes over to its place on the left, across those between; those on its right move up.
            between, right = "_|" * (place - first - 1), " /" * (len(columns) - place - 1)
            yield "| " * first + f"|{between}/{right}", None
            del columns[place]
        yield " ".join("*" if place == first else "|" for place in range(len(columns))), commit_id
        if parent_id is None:
            del columns[first]
        else:
            columns[first] = parent_id
