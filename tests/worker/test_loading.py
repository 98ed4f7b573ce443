"""Tokens of many rows: in files instead of lists, and cached. What is trained on is what plain lists give."""

import copy
import hashlib
import json
import os
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.data_config import DataConfig, SourceConfig
from lora_lab.dataset.kept_rows import RowFile
from lora_lab.dataset.row import Conversation, Passage, Row
from lora_lab.dataset.selection import select
from lora_lab.dataset.sources import file_rows, heldout_rows
from lora_lab.dataset.split import split_rows
from lora_lab.options import Batching, DataSource, Duplicates, TrainOn
from lora_lab.worker import loading, token_cache
from lora_lab.worker.data import IGNORED, Example, pack
from lora_lab.worker.examples import Examples
from lora_lab.worker.layouts import Layouts
from lora_lab.worker.loading import load_examples
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.token_rows import TokenWriter

TOKENIZER: Any = tiny_tokenizer()
VOCABULARY = 272
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "é", "日本"]


@pytest.fixture(autouse=True)
def all_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put the few rows of these tests into files and into a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lora_lab.dataset.kept_rows.MOST_IN_MEMORY", 500)
    monkeypatch.setattr("lora_lab.worker.token_rows.MOST_IN_MEMORY", 500)
    monkeypatch.setattr("lora_lab.worker.token_rows._AT_ONCE", 2000)
    monkeypatch.setattr("lora_lab.worker.token_key.LEAST_BYTES", 1)
    monkeypatch.setattr("lora_lab.worker.token_key.LEAST_ROWS", 1)


def text(number: int, words: int = 12) -> str:
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, words)) + f" {number}"


def written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def texts(folder: Path, count: int = 60, name: str = "texts") -> str:
    return written(folder / f"{name}.jsonl", [{"text": text(n, n % 17 + 3)} for n in range(count)])


def completions(folder: Path) -> str:
    rows = [{"prompt": text(n % 40), "completion": " " + text(n)} for n in range(50)]
    return written(folder / "completions.jsonl", [*rows, *rows[:7]])


def conversation(number: int) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be brief."}] * (number % 2)
    for turn in range(4):
        message = {"role": "assistant" if turn % 2 else "user", "content": text(number + turn)}
        turns.append(message | ({"weight": 0} if turn == 1 and number % 3 == 0 else {}))
    return {"messages": turns}


def config_of(seq_len: int = 120, **data: Any) -> TrialConfig:
    config = TrialConfig(seq_len=seq_len, batch_size=2)
    config.data = DataConfig(source=DataSource.file, **data)
    return config


def chats(folder: Path) -> TrialConfig:
    return config_of(300, path=written(folder / "chats.jsonl", [conversation(n) for n in range(40)]))


def last_answers(folder: Path) -> TrialConfig:
    config = chats(folder)
    config.data.train_on = TrainOn.last_answer
    return config


def packed(folder: Path) -> TrialConfig:
    return config_of(path=texts(folder), batching=Batching.packed)


def distinct(folder: Path) -> TrialConfig:
    return config_of(path=completions(folder), duplicates=Duplicates.near)


def of_file(folder: Path) -> TrialConfig:
    apart = [{"prompt": text(n % 40), "completion": " " + text(n)} for n in range(45, 60)]
    return config_of(path=completions(folder), heldout_path=written(folder / "apart.jsonl", apart), seq_len=90)


def weighted(folder: Path) -> TrialConfig:
    sources = [SourceConfig(path=completions(folder), weight=0.7), SourceConfig(path=texts(folder), weight=0.3)]
    return config_of(sources=sources, rows=50)


def plainly(config: TrialConfig) -> tuple[list[Example], list[Example]]:
    """Return the rows to train on and the held-out ones, calculated with lists of rows and of tokens."""
    data = config.data
    chosen = select(data, file_rows(data).rows, heldout_rows(data, lambda row: row) if data.heldout_path else None)
    rows: list[Row] = [*chosen.rows, *chosen.heldout]
    layouts = Layouts(TOKENIZER, VOCABULARY, data.train_on)
    made = []
    for row in rows:
        laid = layouts.lay_out(row)
        trained = {place for start, end in laid.spans for place in range(start, end)}
        labels = [token if place in trained else IGNORED for place, token in enumerate(laid.ids)]
        cut = len(laid.ids) > config.seq_len
        made.append(Example(laid.ids[: config.seq_len], labels[: config.seq_len], truncated=cut))
    usable = [place for place, example in enumerate(made) if example.trained]
    own = sum(place >= len(chosen.rows) for place in usable)
    held = split_rows([rows[place] for place in usable], data.holdout, own).held
    train = [made[place] for number, place in enumerate(usable) if number not in set(held)]
    if data.batching is Batching.packed:
        train = [joined([train[place] for place in row]) for row in first_fit([len(e.ids) for e in train], config)]
    return train, [made[usable[number]] for number in held]


def first_fit(sizes: list[int], config: TrialConfig) -> list[list[int]]:
    rows: list[list[int]] = []
    for place, size in enumerate(sizes):
        fits = (row for row in rows if sum(sizes[each] for each in row) + size <= config.seq_len)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(place)
    return rows


def joined(documents: list[Example]) -> Example:
    starts = [sum(len(each.ids) for each in documents[:number]) for number in range(len(documents))]
    return Example(
        [token for each in documents for token in each.ids],
        [label for each in documents for label in (IGNORED, *each.labels[1:])],
        any(each.truncated for each in documents),
        tuple(starts),
    )


def digest(train: list[Example], heldout: list[Example]) -> str:
    return hashlib.sha256("".join(repr((e.ids, e.labels)) for e in (*train, *heldout)).encode()).hexdigest()


def loaded(config: TrialConfig) -> Examples:
    return load_examples(config, TOKENIZER, VOCABULARY)


def rows_of(examples: Examples) -> tuple[list[Example], list[Example]]:
    return [*examples.train], [*examples.heldout]


@pytest.mark.parametrize("made", [chats, last_answers, packed, distinct, of_file, weighted])
def test_rows_from_files_and_from_the_cache_are_those_of_plain_lists(
    tmp_path: Path, made: Callable[[Path], TrialConfig]
) -> None:
    config = made(tmp_path)
    train, heldout = plainly(config)
    first, second = loaded(config), loaded(config)
    assert (first.from_cache, second.from_cache) == (False, True)
    for examples in (first, second):
        assert rows_of(examples) == (train, heldout)
        assert examples.digest == digest(train, heldout)
    assert first.remarks == second.remarks
    assert first.lengths.tolist() == second.lengths.tolist()


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_documents_are_packed_into_the_first_row_with_room(sizes: list[int]) -> None:
    documents = [Example([0] * size, [0] * size) for size in sizes]
    assert pack(documents, 30).rows == first_fit(sizes, TrialConfig(seq_len=30))


def entries() -> list[Path]:
    return sorted(token_cache.tokens_folder().iterdir())


def test_what_changes_no_token_finds_the_entry_and_what_does_makes_another(tmp_path: Path) -> None:
    config = config_of(path=texts(tmp_path))
    assert not loaded(config).from_cache
    config.batch_size, config.seed, config.data.batching = 3, 5, Batching.packed
    assert loaded(config).from_cache
    config.data.holdout = 0.2
    assert not loaded(config).from_cache
    config.seq_len = 50
    assert not loaded(config).from_cache
    other: Any = tiny_tokenizer()
    other.chat_template = str(other.chat_template) + " "
    assert not load_examples(config, other, VOCABULARY).from_cache
    other = tiny_tokenizer()
    other.init_kwargs["name_or_path"] = "elsewhere"
    assert load_examples(config, other, VOCABULARY).from_cache
    other.init_kwargs["split_special_tokens"] = True
    assert not load_examples(config, other, VOCABULARY).from_cache
    before = Path(str(config.data.path)).stat()
    texts(tmp_path, 61)
    os.utime(str(config.data.path), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not loaded(config).from_cache
    assert len(entries()) == 6
    assert loaded(config_of(path=texts(tmp_path), rows=20)).rows_read == 20


def test_a_tokenizer_of_a_models_own_code_is_not_cached(tmp_path: Path) -> None:
    """Its code may change while its class, template and vocabulary keep their names."""

    class Own(type(TOKENIZER)):  # type: ignore[misc]
        pass

    own = copy.deepcopy(TOKENIZER)
    own.__class__ = Own
    config = config_of(path=texts(tmp_path))
    for _ in range(2):
        assert not load_examples(config, own, VOCABULARY).from_cache
    assert entries() == []


def cut(entry: Path) -> None:
    os.truncate(entry / token_cache.TOKENS, 8)


def without_tables(entry: Path) -> None:
    (entry / "rows.npz").unlink()


def other_tables(entry: Path) -> None:
    (entry / "rows.npz").write_bytes(b"?" * (entry / "rows.npz").stat().st_size)


def half_of_the_facts(entry: Path) -> None:
    content = (entry / "facts.json").read_text()
    (entry / "facts.json").write_text(content[: len(content) // 2])


def flipped(entry: Path) -> None:
    content = bytearray((entry / "rows.npz").read_bytes())
    content[200] ^= 255  # in the first table's values
    (entry / "rows.npz").write_bytes(content)


@pytest.mark.parametrize("tear", [cut, without_tables, other_tables, half_of_the_facts, flipped])
def test_a_torn_entry_is_made_again(tmp_path: Path, tear: Callable[[Path], None]) -> None:
    config = config_of(path=texts(tmp_path))
    expected = rows_of(loaded(config))
    tear(entries()[0])
    again = loaded(config)
    assert (again.from_cache, rows_of(again)) == (False, expected)
    assert loaded(config).from_cache


def test_a_start_that_broke_off_leaves_nothing(tmp_path: Path) -> None:
    config = config_of(path=texts(tmp_path))

    def break_off(done: int, total: int) -> None:
        if total and done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_examples(config, TOKENIZER, VOCABULARY, break_off)
    assert entries() == []
    assert not loaded(config).from_cache


def test_an_entry_can_be_removed_while_it_is_read_and_two_may_make_the_same(tmp_path: Path) -> None:
    config = config_of(path=texts(tmp_path))
    first = loaded(config)
    second = loaded(config)
    state = loading.state_of(config)
    key = str(loading.key_of(config, state, TOKENIZER, VOCABULARY))
    with token_cache.aside() as folder:
        (folder / token_cache.TOKENS).write_bytes(b"")
        token_cache.store(folder, key, {}, {})
    assert loaded(config).digest == first.digest, "the one that was there first stays"
    for entry in entries():
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    assert rows_of(first) == rows_of(second) == plainly(config)


def test_a_file_that_is_cut_while_it_is_read_gives_no_other_tokens(tmp_path: Path) -> None:
    examples = loaded(config_of(path=texts(tmp_path)))
    cut(entries()[0])
    with pytest.raises(OSError, match="was cut while it was used"):
        rows_of(examples)


def test_the_oldest_entries_go_when_there_are_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config_of(path=texts(tmp_path, name=str(number))) for number in range(3)]
    for config in configs[:2]:
        loaded(config)
    by_age = sorted(entries(), key=lambda entry: (entry / "facts.json").stat().st_mtime_ns)
    for age, entry in zip((300, 200), by_age, strict=True):
        for file in entry.iterdir():
            os.utime(file, (time.time() - age, time.time() - age))
    assert loaded(configs[0]).from_cache, "and so it is the one that was used last"
    size = sum(file.stat().st_size for file in entries()[0].iterdir())
    monkeypatch.setattr(token_cache, "MOST_BYTES", int(2.5 * size))
    loaded(configs[2])
    assert [loaded(config).from_cache for config in (configs[0], configs[2])] == [True, True]
    assert len(entries()) == 2
    monkeypatch.setattr(token_cache, "MOST_BYTES", 1)
    loaded(configs[1])
    assert len(entries()) == 1
    assert loaded(configs[1]).from_cache


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """Let no file grow beyond some bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(*_: object, **__: object) -> None:
    raise OSError("No space left on device")


@pytest.mark.parametrize("most_bytes", [100, 3000, 10**6])
def test_a_full_disk_costs_the_cache_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    config = config_of(path=texts(tmp_path))
    with full_disk(most_bytes), monkeypatch.context() as patch:
        if most_bytes == 10**6:  # the tokens fit, and what comes behind them does not
            patch.setattr("numpy.savez", refuse)
        made = loaded(config)
    assert rows_of(made) == plainly(config)
    assert any("not cached for the next trial" in remark for remark in made.remarks)
    assert entries() == []
    assert not loaded(config).from_cache


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    config = config_of(path=texts(tmp_path))
    (tmp_path / "cache").write_text("a file")
    made = loaded(config)
    assert rows_of(made) == plainly(config)
    assert any("not cached for the next trial" in remark for remark in made.remarks)
    assert any("stays in memory" in remark for remark in made.remarks)


def test_files_that_change_while_they_are_read_are_not_cached(tmp_path: Path) -> None:
    config = config_of(path=texts(tmp_path))

    def change(done: int, total: int) -> None:
        if total and done == 5:
            texts(tmp_path, 61)

    assert not load_examples(config, TOKENIZER, VOCABULARY, change).from_cache
    assert entries() == []


def test_an_entry_with_too_few_rows_for_a_step_is_refused_like_its_rows(tmp_path: Path) -> None:
    config = config_of(path=texts(tmp_path, 10))
    loaded(config)
    config.batch_size = 20
    with pytest.raises(InvalidInput, match="one step needs 20"):
        loaded(config)


def test_small_data_and_few_rows_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(path=texts(tmp_path))
    monkeypatch.setattr("lora_lab.worker.token_key.LEAST_ROWS", 100)
    config.data.rows = 50
    loaded(config)
    monkeypatch.setattr("lora_lab.worker.token_key.LEAST_BYTES", 10**6)
    config.data.rows = None
    loaded(config)
    assert not token_cache.tokens_folder().exists() or entries() == []


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(passages=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), given_turns=st.integers(0, 1))
def test_marks_are_equal_when_rows_are(passages: list[tuple[str, str]], given_turns: int) -> None:
    file = RowFile(Path("unused"))
    rows: list[Row] = [Passage(prompt, text) for prompt, text in passages]
    rows += [Conversation(Conversation.of(prompt, text).turns, given_turns) for prompt, text in passages]
    rows += [Conversation.of(prompt, text) for prompt, text in passages]
    kept = [file.keep(row) for row in rows]
    assert [each.row for each in kept] == rows
    assert [[one == other for other in kept] for one in kept] == [[one == other for other in rows] for one in rows]
    assert len(set(kept)) == len(set(rows))


def test_text_and_tokens_of_rows_do_not_stay_in_memory(tmp_path: Path) -> None:
    file, writer = RowFile(tmp_path), TokenWriter(tmp_path / "tokens")
    texts = [f"{number} " * 2000 for number in range(300)]
    tracemalloc.start()
    try:
        kept = [file.keep(Passage("", text)) for text in texts]
        row = Example([*range(4000)], [*range(4000)])
        for _ in range(300):
            writer.append(row, 4000)
        tokens = writer.finished()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert file.fault is None
    assert writer.fault is None
    assert held < 600_000, "of 2.3 MB of text and 4.8 MB of tokens"
    assert [each.row for each in kept] == [Passage("", text) for text in texts]
    assert (len(tokens), tokens[299], tokens.highest) == (300, row, 3999)


def test_what_a_killed_start_left_goes_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".older", 90_000), (".newer", 80_000)):
        folder = token_cache.tokens_folder() / name
        folder.mkdir(parents=True)
        (folder / token_cache.TOKENS).write_bytes(b"left")
        os.utime(folder / token_cache.TOKENS, (time.time() - age, time.time() - age))
    loaded(config_of(path=texts(tmp_path)))
    assert [entry.name for entry in entries() if entry.name.startswith(".")] == [".newer"]


def test_progress_counts_what_is_read_and_then_what_is_tokenised(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_examples(config_of(path=texts(tmp_path)), TOKENIZER, VOCABULARY, lambda *each: seen.append(each))
    assert [done for done, total in seen if not total] == [*range(60)]
    assert [done for done, total in seen if total == 60] == [*range(1, 61)]
