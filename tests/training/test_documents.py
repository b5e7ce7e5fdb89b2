from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mplus_agents.errors import ConfigError, InvalidInputError
from mplus_agents.training.document_sources import FolderSource, HubSource, Shard, TextSource, split_by_weight
from mplus_agents.training.documents import DocumentMixture, SourceConfig

NUM_TEXTS = 10


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def write_folder(folder: Path) -> set[str]:
    """Ten documents: one .txt, one .md in a subfolder, and eight lines of two .jsonl files."""
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("text 0")
    (folder / "deep" / "b.md").write_text("text 1")
    (folder / "ignored.csv").write_text("text 99")
    write_lines(folder / "c.jsonl", [f"text {i}" for i in range(2, 7)])
    write_lines(folder / "d.jsonl", [f"text {i}" for i in range(7, NUM_TEXTS)], end="\n\n  \n")
    return {f"text {i}" for i in range(NUM_TEXTS)}


def write_lines(path: Path, texts: Iterable[str], key: str = "text", end: str = "\n") -> None:
    path.write_text("\n".join(json.dumps({key: text}) for text in texts) + end)


def hub_source(folder: Path, shard: Shard | None = None, block: int = 1) -> HubSource:
    files = {"data_files": sorted(map(str, folder.glob("*.jsonl")))}
    return HubSource("json", shard=shard, shuffle_block=block, options=files)


def read(source: TextSource, num_texts: int) -> list[str]:
    return [next(source) for _ in range(num_texts)]


def read_epoch(source: TextSource) -> list[str]:
    """Read up to the start of the second epoch."""
    texts: list[str] = []
    while True:
        text = next(source)
        if source.epoch:
            return texts
        texts.append(text)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Twelve documents in three files."""
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", [f"text {4 * number + i}" for i in range(4)])
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_read_disjoint_documents_that_are_all_documents(world_size: int, tmp_path: Path) -> None:
    texts = write_folder(tmp_path)
    read_by = [read_epoch(FolderSource(tmp_path, shard=Shard(rank, world_size))) for rank in range(world_size)]
    together = [text for part in read_by for text in part]
    assert len(together) == NUM_TEXTS
    assert set(together) == texts


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("skip", "take"), [(0, None), (3, None), (2, 7)])
def test_ranks_read_disjoint_documents_of_a_stream(world_size: int, skip: int, take: int | None, lines: Path) -> None:
    read_by = [read_epoch(hub_source(lines, Shard(r, world_size, skip, take), block=3)) for r in range(world_size)]
    together = [text for part in read_by for text in part]
    wanted = range(skip, 12 if take is None else skip + take)
    assert sorted(together) == sorted(f"text {number}" for number in wanted)


def test_stages_that_skip_what_an_earlier_one_took_read_other_documents(tmp_path: Path) -> None:
    texts = write_folder(tmp_path)
    first = {text for r in (0, 1) for text in read_epoch(FolderSource(tmp_path, shard=Shard(r, 2, take=4)))}
    rest = {text for r in (0, 1, 2) for text in read_epoch(FolderSource(tmp_path, shard=Shard(r, 3, skip=4, seed=9)))}
    assert (len(first), len(rest)) == (4, 6)
    assert first | rest == texts


def test_every_epoch_has_its_own_order_and_every_seed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    source = FolderSource(tmp_path, shard=Shard(seed=1))
    first, second = read(source, NUM_TEXTS), read(source, NUM_TEXTS)
    assert sorted(first) == sorted(second)
    assert first != second
    assert read(FolderSource(tmp_path, shard=Shard(seed=1)), NUM_TEXTS) == first
    assert read(FolderSource(tmp_path, shard=Shard(seed=2)), NUM_TEXTS) != first


def test_a_block_of_a_stream_is_shuffled_and_no_more(lines: Path) -> None:
    texts = read(hub_source(lines, block=4), 12)
    for number in range(3):
        assert sorted(texts[4 * number : 4 * number + 4]) == sorted(f"text {4 * number + i}" for i in range(4))
    assert texts != [f"text {i}" for i in range(12)]
    assert read(hub_source(lines), 13) == [f"text {i % 12}" for i in range(13)]


@pytest.mark.parametrize("num_read", [0, 1, 3, 4, 5, 9, 14])
@pytest.mark.parametrize("kind", ["folder", "stream", "stream_part"])
def test_a_position_is_gone_on_from_exactly(num_read: int, kind: str, lines: Path) -> None:
    def source() -> TextSource:
        if kind == "folder":
            return FolderSource(lines, shard=Shard(0, 2, seed=5))
        shard = Shard(0, 2) if kind == "stream" else Shard(1, 2, skip=1, take=9)
        return hub_source(lines, shard, block=3)

    uninterrupted = source()
    read(uninterrupted, num_read)
    state = json.loads(json.dumps(uninterrupted.state_dict()))  # plain values
    expected = read(uninterrupted, 15)
    again = source()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert read(again, 15) == expected
    assert again.epoch == uninterrupted.epoch


def test_a_folder_that_changed_is_not_gone_on_with(lines: Path) -> None:
    state = FolderSource(lines).state_dict()
    write_lines(lines / "9.jsonl", ["more"])
    with pytest.raises(ConfigError, match="had 12 documents when training stopped, and has 13 now"):
        FolderSource(lines).load_state_dict(state)


@pytest.mark.parametrize("line", ["no json", '"text"', '{"other": "text"}', '{"text": 3}', '{"text": null}'])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    source = FolderSource(tmp_path)
    with pytest.raises(InvalidInputError, match=r"bad\.jsonl, line 3 is .*; allowed: a JSON object with a text"):
        read(source, 3)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidInputError, match=r"latin\.txt is .*; allowed: UTF-8 text"):
        next(FolderSource(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InvalidInputError, match=r"empty\.txt is 'an empty file'"):
        FolderSource(tmp_path)
    (tmp_path / "empty.txt").unlink()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InvalidInputError, match=r"empty\.jsonl is 'no lines'"):
        FolderSource(tmp_path)


def test_nothing_to_read_is_an_error(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        FolderSource(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="has no documents"):
        FolderSource(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has 12 documents .* none for rank 12 of 13"):
        FolderSource(lines, shard=Shard(12, 13))
    with pytest.raises(ConfigError, match="after the first 40"):
        FolderSource(lines, shard=Shard(skip=40))
    with pytest.raises(ConfigError, match="no documents for rank 0 of 1"):
        next(hub_source(lines, Shard(skip=40)))
    with pytest.raises(ConfigError, match="cannot be opened"):
        hub_source(tmp_path / "none")
    with pytest.raises(InvalidInputError, match="document 0"):
        next(HubSource("json", "body", options={"data_files": [str(lines / "0.jsonl")]}))
    with pytest.raises(ConfigError, match="no source of documents"):
        DocumentMixture([], words)


def test_sources_are_drawn_by_weight_and_filtered_by_length(tmp_path: Path) -> None:
    for name, sizes in {"short": (1, 2, 3), "mixed": (4, 9, 12, 30)}.items():
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "a.jsonl", ["w " * size for size in sizes])
    configs = [
        SourceConfig(str(tmp_path / "short"), name="short", weight=3.0),
        SourceConfig(str(tmp_path / "mixed"), name="middle", weight=1.0, min_tokens=9, max_tokens=30, is_long=True),
    ]
    mixture = DocumentMixture(configs, words)
    found = list(islice(mixture, 800))
    counts = Counter(document.source for document in found)
    assert abs(counts["short"] - 600) < 4 * (800 * 0.75 * 0.25) ** 0.5
    assert {len(document.ids) for document in found if document.source == "middle"} == {9, 12}
    assert all(document.is_long == (document.source == "middle") for document in found)
    passed_over = mixture.num_passed_over
    assert passed_over["short"] == 0
    assert abs(passed_over["middle"] - counts["middle"]) <= 2  # two of four


def test_a_mixture_goes_on_exactly_and_its_ranks_are_disjoint(lines: Path) -> None:
    def mixture(rank: int = 0) -> DocumentMixture:
        halves = [SourceConfig(str(lines), take=6), SourceConfig(str(lines), skip=6)]
        return DocumentMixture(halves, lambda text: [int(text.split()[1])], seed=3, rank=rank, world_size=2)

    first = mixture()
    list(islice(first, 7))
    state = first.state_dict()
    again = mixture()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert list(islice(again, 20)) == list(islice(first, 20))
    parts = [{document.ids[0] for document in islice(mixture(rank), 60)} for rank in (0, 1)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(12))
    with pytest.raises(ConfigError, match="had 2 sources, and has 1 now"):
        DocumentMixture([SourceConfig(str(lines))], words).load_state_dict(state)


def test_a_source_without_a_document_of_the_wanted_length_is_an_error(lines: Path) -> None:
    mixture = DocumentMixture([SourceConfig(str(lines), name="short", min_tokens=50)], words)
    with pytest.raises(ConfigError, match="'short' has no document of at least 50 tokens"):
        next(mixture)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"location": "x", "wieght": 1}, "unknown key 'wieght'"),
        ({"kind": "hub"}, "'location' is missing"),
        ({"location": "x", "kind": "ftp"}, "kind is 'ftp'"),
        ({"location": "x", "weight": 0}, "weight is 0"),
        ({"location": "x", "weight": True}, "weight is True"),
        ({"location": "x", "min_tokens": 5, "max_tokens": 5}, "max_tokens is 5"),
        ({"location": "x", "skip": -1}, "skip is -1"),
        ({"location": "x", "take": 0}, "take is 0"),
        ({"location": "x", "subset": "y"}, "subset is 'y'"),
        ({"location": ""}, "location is ''"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceConfig.from_dict(values)


def test_shares_of_a_whole() -> None:
    assert [split_by_weight([1, 0, 3], draw) for draw in (0.0, 0.24, 0.26, 0.999999)] == [0, 0, 2, 2]
    assert split_by_weight([1, 0], 1.0) == 0
