"""The part of the schema that names rows: which ones, from where, and how they are laid out."""

from dataclasses import asdict, dataclass

from lora_lab.options import Batching, DataSource, Duplicates, Layout, TrainOn
from lora_lab.settings import setting


@dataclass(kw_only=True, slots=True)
class MapConfig:
    """Names of the columns that hold a row's parts, where they are not the usual ones."""

    messages: str | None = setting(None, "column of a conversation's messages")
    instruction: str | None = setting(None, "column of the question")
    input: str | None = setting(None, "column of an optional context of the question; a row may lack it")
    output: str | None = setting(None, "column of the answer")
    prompt: str | None = setting(None, "column of the text that is only read, before a completion")
    completion: str | None = setting(None, "column of the text that is trained after a prompt")
    text: str | None = setting(None, "column of plain text")

    @property
    def named(self) -> dict[str, str]:
        """Return the parts whose columns are named."""
        return {part: column for part, column in asdict(self).items() if column is not None}


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several files, folders and data sets on the hub that rows are drawn from."""

    path: str | None = setting(None, "a file or folder, as for data.path")
    id: str | None = setting(None, "name of a data set on the hub instead of a path, as for data.id")
    revision: str | None = setting(None, "commit, tag or branch on the hub")
    config: str | None = setting(None, "configuration of a data set on the hub that has several")
    weight: float | None = setting(
        None,
        "its share of the rows, among all weights; without any weight every row is used",
        above=0,
        most=10**9,
    )
    split: str | None = setting(None, "which split of a folder or of a data set on the hub is read")

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return str(self.path if self.id is None else self.id)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The rows to train on and how they are laid out in batches."""

    source: DataSource = setting(DataSource.shipped, "shipped, hub, file or random_tokens")
    id: str | None = setting(None, "name of a data set on the Hugging Face hub")
    revision: str | None = setting(None, "commit, tag or branch on the hub")
    config: str | None = setting(None, "configuration of a data set on the hub that has several")
    split: str | None = setting(
        None,
        "which split of a data set on the hub or of a folder is read; null is train, in a folder also the only one",
    )
    path: str | None = setting(
        None, "a file (jsonl, json, csv, tsv, Parquet or Arrow, gzipped or not), or a folder of such files"
    )
    sources: list[SourceConfig] = setting(
        factory=list,
        help="several sources with weights instead of `path`: [{path: a.jsonl, weight: 0.7}, {id: NAME, weight: 0.3}]",
    )
    heldout_path: str | None = setting(
        None, "a file or folder of the held-out rows, instead of `holdout`; none of them is trained on"
    )
    rows: int | None = setting(
        None, "use only the first rows; for random_tokens, how many rows to make", above=0, most=10**9
    )
    layout: Layout = setting(
        Layout.auto, "kind of row: chat, instruct, completion or text; auto finds it from the columns"
    )
    map: MapConfig = setting(factory=MapConfig)
    train_on: TrainOn = setting(
        TrainOn.answers, "what of a conversation is trained: answers (every one), last_answer or everything"
    )
    holdout: float = setting(
        0.1, "share of the rows that is never trained on; their content decides which, not `seed`", above=0, below=1
    )
    duplicates: Duplicates = setting(
        Duplicates.keep, "keep, or drop rows that are equal to an earlier one (exact) or nearly so (near)"
    )
    min_perplexity: float | None = setting(
        None,
        "drop rows that the model knows before training: their perplexity, per trained token, is below this (3, for "
        "example); takes one pass over all rows",
        least=1,
        most=10**6,
    )
    batching: Batching = setting(Batching.longest, "longest, seq_len or packed")
