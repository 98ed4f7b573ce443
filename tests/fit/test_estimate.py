"""What fit says of whole trials, against stored measurements, rules and common sense. No torch, no GPU."""

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fit_error import SETTINGS, config_of
from benchmarks.reports import stored
from lora_lab.composition.validation import faults
from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.fit.__main__ import main
from lora_lab.fit.advice import advise
from lora_lab.fit.beforehand import verdict_of
from lora_lab.fit.check import check
from lora_lab.fit.display import ways
from lora_lab.fit.estimate import DOUBTFUL, FITS, GIB, TOO_LARGE, Estimate, estimate, tape_of
from lora_lab.fit.optimizer import Trained, optimizer_state
from lora_lab.fit.search import Search
from lora_lab.fit.shapes import read_shapes, shapes_of
from lora_lab.fit.step import GRADIENTS
from lora_lab.libraries_cache import note_libraries
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import Attention, Batching, Checkpointing, EngineKind, ModelSource, Quantization


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


ROWS: list[dict[str, Any]] = stored("fit_error")["rows"]
SMALL: dict[str, Any] = {
    "model": "qwen2_5_1_5b",
    "engine": "eager",
    "batch_size": 1,
    "seq_len": 512,
    "checkpointing": "full",
    "optim": "adamw_torch_fused",
    "precision": "bf16",
    "quantised": True,
    "rank": 16,
    "raised": False,
}


def trial(**changed: Any) -> TrialConfig:
    config = config_of(**{**SMALL, **changed})
    return replace(config, data=replace(config.data, rows=256))


def said(config: TrialConfig) -> Estimate:
    return estimate(config, shapes_of(config.model))


@pytest.mark.parametrize("row", ROWS[:: len(ROWS) // 12], ids=lambda row: " ".join(str(row[key]) for key in SETTINGS))
def test_the_stored_errors_are_those_of_this_code(row: dict[str, Any]) -> None:
    found = said(config_of(**{key: row[key] for key in SETTINGS}))
    error = 100 * (found.allocated / GIB / row["allocated_gib"] - 1)
    assert error == pytest.approx(row["allocated_error"], abs=0.1), "python -m benchmarks.fit_error makes it again"
    assert -5 < error < 8


def test_measured_processes_are_within_their_intervals() -> None:
    asked = [row["within"] for row in (*ROWS, *stored("fit_error")["trials"]) if row["within"] is not None]
    assert len(asked) >= 250
    assert sum(asked) >= 0.99 * len(asked)


def test_parts_add_up_and_the_ends_are_in_order() -> None:
    for engine in EngineKind:
        found = said(trial(engine=engine.name))
        assert sum(found.parts.values()) == found.allocated
        # torch asks for room for the whole of a tensor, also where a part of it is cached
        assert found.allocated <= found.least <= found.reserved + max(found.tape.sizes)
        assert found.low < found.card < found.high


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 2048,
    },
}


def mixture(family: str = "mixtral", **changed: Any) -> TrialConfig:
    config = trial(**changed)
    fields = {**(config.model.architecture or {}), "model_type": family, "num_hidden_layers": 3, **MIXTURES[family]}
    fields["vocab_size"] = 8192
    return replace(config, model=replace(config.model, architecture=fields))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixtures_step_ends_every_tensor_that_it_begins_once(family: str) -> None:
    modes = ("none", "full", "offloaded")
    for mode, quantised, raised, often in itertools.product(modes, (True, False), (True, False), (1, 4)):
        config = mixture(family, checkpointing=mode, quantised=quantised, raised=raised)
        tape, _ = tape_of(replace(config, grad_accum_steps=often), shapes_of(config.model))
        live: set[int] = set()
        for number, size in tape.events[tape.loaded :]:
            assert (number in live) == (size < 0)
            live ^= {number}
        assert not live


def test_a_card_must_hold_experts_in_16_bit_while_they_are_loaded() -> None:
    found = said(mixture(seq_len=512))
    in_16_bit = 2 * found.shapes.parameters
    assert found.loading > 0.9 * in_16_bit > found.allocated
    assert found.low > 0.85 * in_16_bit
    assert found.verdict(0.8 * in_16_bit) == TOO_LARGE


def test_what_a_mixture_does_not_run_with_is_neither_answered_nor_advised() -> None:
    config = mixture(seq_len=4096, checkpointing="none")
    shapes = shapes_of(config.model)
    changes = advise(config, shapes, 0.8 * said(config).high)
    assert said(changes[-1].config).verdict(0.8 * said(config).high) == FITS
    assert all(change.config.engine.kind is EngineKind.eager for change in changes)
    for refused in (mixture(engine="graph"), replace(config, method=replace(config.method, use_dora=True))):
        with pytest.raises(InvalidInput):
            check(refused, shapes)
    with pytest.raises(InvalidInput):
        read_shapes({**(config.model.architecture or {}), "mlp_only_layers": [0]})


def test_more_experts_to_a_token_take_more() -> None:
    least = said(mixture(checkpointing="none", seq_len=2048))
    fields = {**(least.config.model.architecture or {}), "num_experts_per_tok": 4}
    more = replace(least.config, model=replace(least.config.model, architecture=fields))
    assert said(more).allocated > least.allocated


@pytest.mark.parametrize("engine", [kind.name for kind in EngineKind])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_step_ends_every_tensor_that_it_begins_once(engine: str, family: str) -> None:
    modes = (Checkpointing.none, Checkpointing.selective, Checkpointing.offloaded)
    settings = itertools.product(modes, (True, False), (True, False), (True, False), (True, False))
    for mode, quantised, raised, padded, plain_loss in settings:
        config = trial(engine=engine, checkpointing=mode.name, quantised=quantised, raised=raised, batch_size=2)
        config.model.architecture = {**(config.model.architecture or {}), "model_type": family, "num_hidden_layers": 3}
        config.data = DataConfig() if padded else config.data
        config.engine.chunked_loss = not plain_loss
        config.method.use_dora = padded and engine == "eager"
        tape, _ = tape_of(config, shapes_of(config.model))
        live: set[int] = set()
        for number, size in tape.events[tape.loaded :]:
            assert (number in live) == (size < 0)
            live ^= {number}
        assert not live


def test_an_estimate_takes_less_than_half_a_second() -> None:
    config = trial(model="llama3_1_8b", batch_size=2, seq_len=4096)
    shapes = shapes_of(config.model)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        found = estimate(config, shapes)
        assert found.low < found.high
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("engine", [kind.name for kind in EngineKind])
def test_more_of_anything_takes_more(engine: str) -> None:
    least = said(trial(engine=engine)).allocated
    for more in ({"rank": 64}, {"seq_len": 2048}, {"batch_size": 4}, {"quantised": False}, {"checkpointing": "none"}):
        assert said(trial(engine=engine, **more)).allocated > least
    offloaded = said(trial(engine=engine, checkpointing="offloaded", seq_len=8192)).allocated
    assert offloaded < said(trial(engine=engine, seq_len=8192)).allocated


def hosted(config: TrialConfig, asked: bool | str = True) -> TrialConfig:
    return replace(config, engine=replace(config.engine, host_embeddings=asked))


@pytest.mark.parametrize("engine", [kind.name for kind in EngineKind])
@pytest.mark.parametrize("raised", [False, True])
def test_embeddings_in_host_memory_are_loaded_and_then_take_nothing(engine: str, raised: bool) -> None:
    config = trial(model="llama3_1_8b", engine=engine, raised=raised)
    table = 128_256 * 4096 * (4 if raised else 2)
    on_card, on_host = said(config), said(hosted(config))
    assert on_card.parts["weights"] - on_host.parts["weights"] == table
    assert on_card.allocated - on_host.allocated == table
    assert on_card.loading - on_host.loading < table
    assert said(hosted(config, "auto")).parts == on_host.parts


def test_embeddings_that_are_the_head_are_counted_on_the_card() -> None:
    config = trial()
    assert said(hosted(config, "auto")).parts == said(config).parts
    with pytest.raises(InvalidInput, match="tie_word_embeddings"):
        check(hosted(config), shapes_of(config.model))


def test_host_memory_for_embeddings_is_advised_where_it_is_enough_and_possible() -> None:
    config = trial(model="llama3_1_8b", engine="graph", seq_len=2048)
    room = said(hosted(config)).enough
    assert said(config).verdict(room) != FITS
    assert [change.override for change in advise(config, shapes_of(config.model), room)] == [
        "engine.host_embeddings=true"
    ]
    tied = trial(engine="graph", seq_len=2048)
    changes = advise(tied, shapes_of(tied.model), 0.9 * said(tied).enough)
    assert changes
    assert all("host_embeddings" not in change.override for change in changes)


def layered(config: TrialConfig, asked: int | str) -> TrialConfig:
    return replace(config, engine=replace(config.engine, host_layers=asked))


@pytest.mark.parametrize("engine", [kind.name for kind in EngineKind])
def test_packed_weights_of_layers_in_host_memory_take_nothing(engine: str) -> None:
    config = trial(model="llama3_1_8b", engine=engine)
    packed = shapes_of(config.model).layers * [sum(each.weights for each in shapes_of(config.model).linears) // 2]
    for asked in (0, 5, "all"):
        gone = sum(packed[: len(packed) if asked == "all" else asked])
        assert said(config).parts["weights"] - said(layered(config, asked)).parts["weights"] == gone
        assert said(config).allocated - said(layered(config, asked)).allocated == gone
    assert said(config).loading - said(layered(config, "all")).loading > 0.95 * sum(packed)


def test_the_fewest_layers_that_are_enough_are_advised() -> None:
    config = trial(model="llama3_1_8b", engine="graph", checkpointing="offloaded", seq_len=2048)
    config = hosted(replace(config, optimizer=replace(config.optimizer, optim="adamw_bnb_8bit")))
    room = said(layered(config, 12)).enough
    changes = [change.override for change in advise(config, shapes_of(config.model), room)]
    assert changes == ["engine.host_layers=12"]
    assert not said(layered(config, 11)).is_enough(room)
    in_16_bit = replace(config, method=replace(config.method, quantization=Quantization.none))
    changes = [change.override for change in advise(in_16_bit, shapes_of(config.model), room)]
    assert changes[-2:] == ["method=qlora", "engine.host_layers=12"]


def test_layers_that_are_not_there_are_refused() -> None:
    config = trial()
    check(layered(config, 28), shapes_of(config.model))
    with pytest.raises(InvalidInput, match="the model has 28 layers"):
        check(layered(config, 29), shapes_of(config.model))


def test_an_accumulated_step_keeps_its_gradients() -> None:
    once, often = (said(replace(trial(), grad_accum_steps=count)) for count in (1, 4))
    assert often.parts[GRADIENTS] == pytest.approx(often.parts["adapters"], rel=0.01)
    assert once.parts[GRADIENTS] < often.parts[GRADIENTS]


@pytest.mark.parametrize(
    ("optim", "total", "paged"),
    [
        # 1,000 in fp32; 4,096 and 100,000 in 8 bit with a scale for 256
        ("adamw_bnb_8bit", 8_000 + 2 * 4096 + 2 * 4 * 16 + 2 * 100_000 + 2 * 4 * 391, 0),
        ("paged_adamw_8bit", 8_000 + 2 * 4096 + 2 * 4 * 16 + 2 * 100_000 + 2 * 4 * 391, 200_000),
        ("paged_adamw_32bit", 8 * 105_096, 800_000),
        ("lion_8bit", 4_000 + 4096 + 4 * 16 + 100_000 + 4 * 391, 0),
        ("adamw_torch_fused", 8 * 105_096, 0),
        ("sgd", 0, 0),
    ],
)
def test_an_optimizers_state_follows_its_own_rule(optim: str, total: int, paged: int) -> None:
    state = optimizer_state(OptimizerConfig(optim=optim), Trained([1_000, 4_096, 100_000], []))
    assert (state.total, state.paged) == (total, paged)


def test_the_state_of_a_measured_trial_is_what_was_measured() -> None:
    found = said(trial(model="llama3_1_8b", seq_len=2048, optim="adamw_bnb_8bit"))
    assert found.optimizer.total / GIB == pytest.approx(0.0793, abs=0.0005)


def test_the_largest_fits_and_a_little_more_does_not() -> None:
    config = trial(engine="graph")
    shapes = shapes_of(config.model)
    search = Search(config, shapes)
    length = search.largest("seq_len", 8 * GIB, certain=True)
    assert length % 64 == 0
    assert said(replace(config, seq_len=length)).verdict(8 * GIB) == FITS
    assert said(replace(config, seq_len=int(1.1 * length))).verdict(8 * GIB) != FITS
    assert search.largest("seq_len", 8 * GIB, certain=False) > length
    rows = search.largest("batch_size", 8 * GIB, certain=True)
    assert rows == pytest.approx(length / 512, rel=0.1)
    assert search.largest("batch_size", GIB, certain=True) == 0


def test_advice_makes_it_fit_and_has_nothing_needless() -> None:
    config = trial(seq_len=2048, batch_size=4, checkpointing="none")
    shapes = shapes_of(config.model)
    assert said(config).verdict(10 * GIB) == TOO_LARGE
    changes = advise(config, shapes, 10 * GIB)
    assert said(changes[-1].config).verdict(10 * GIB) == FITS
    assert len({change.override.partition("=")[0] for change in changes}) == len(changes) > 1
    assert len(advise(config, shapes, 24 * GIB)) == 1


@pytest.mark.parametrize(("gib", "length"), [(9, 2048), (8, 512)])
def test_what_is_learnt_changes_last(gib: int, length: int) -> None:
    config = trial(model="llama3_1_8b", seq_len=length, checkpointing="none", optim="adamw_bnb_8bit")
    changes = advise(config, shapes_of(config.model), gib * GIB)
    assert {change.override.partition("=")[0] for change in changes} <= {
        "engine",
        "engine.chunked_loss",
        "gradient_checkpointing",
    }
    assert said(changes[-1].config).verdict(gib * GIB) == FITS


def test_advice_is_never_refused_by_the_trial() -> None:
    config = trial(model="llama3_1_8b", seq_len=8192, batch_size=2, checkpointing="none")
    config = replace(config, method=replace(config.method, dropout=0.1))
    changed = advise(config, shapes_of(config.model), 12 * GIB)[-1].config
    assert not faults(changed)
    assert said(changed).verdict(12 * GIB) == FITS
    offered = ways(config)
    assert all(not faults(way) for way in offered)
    assert EngineKind.graph in {way.engine.kind for way in offered}
    attention = replace(config, attention=Attention.flash_attention_2)
    assert EngineKind.graph not in {way.engine.kind for way in ways(attention)}


@pytest.mark.nightly
def test_rows_are_shortened_last() -> None:
    config = trial(model="llama3_1_8b", seq_len=131072, engine="graph", checkpointing="offloaded")
    for room, is_hosted in ((9 * GIB, False), (4.5 * GIB, True)):
        changes = advise(config, shapes_of(config.model), room)
        assert changes[-1].override.startswith("seq_len=")
        assert ("host_layers" in " ".join(change.override for change in changes)) is is_hosted
        assert said(changes[-1].config).verdict(room) == FITS


def test_what_was_not_measured_widens_the_interval() -> None:
    usual = said(trial(engine="graph"))
    for changed in (trial(engine="graph", rank=256), trial(engine="graph", checkpointing="selective")):
        wider = said(changed)
        assert wider.errors.reasons
        assert wider.errors.above > usual.errors.above
        assert wider.errors.below > usual.errors.below
    assert usual.errors.reasons == ()


@pytest.mark.parametrize(
    ("setting", "values"), [("rank", (2, 7, 8, 128, 144, 192)), ("seq_len", (64, 511, 512, 32768, 32832))]
)
def test_a_smaller_trial_never_needs_more(setting: str, values: tuple[int, ...]) -> None:
    """Replays of nearly the same sizes differ by some MiB."""
    found = [said(trial(**{setting: value})) for value in values]
    for less, more in itertools.pairwise(found):
        assert less.enough < more.enough + 20 * 2**20
        assert less.high < more.high + 20 * 2**20
        assert less.low < more.low + 20 * 2**20
    assert found[0].errors.above > found[2].errors.above < found[-1].errors.above


def test_long_rows_of_text_are_too_large_only_if_short_ones_are() -> None:
    full = trial(model="llama3_1_8b", seq_len=8192)
    text = replace(full, data=DataConfig())
    padded = replace(full, data=DataConfig(batching=Batching.seq_len))
    for gib, expected in ((12, [TOO_LARGE, DOUBTFUL, TOO_LARGE]), (4, [TOO_LARGE] * 3), (40, [FITS] * 3)):
        assert [verdict_of(said(config), gib * GIB) for config in (full, text, padded)] == expected


def test_limits_do_not_contradict_the_answer() -> None:
    config = trial(model="llama3_1_8b", engine="liger", checkpointing="offloaded", quantised=False, seq_len=2048)
    assert said(config).verdict(20.5 * GIB) == FITS
    for setting, own in (("seq_len", 2048), ("batch_size", 1)):
        search = Search(replace(config, seq_len=64) if setting == "seq_len" else config, shapes_of(config.model))
        assert search.largest(setting, 20.5 * GIB, certain=True) >= own


def test_what_a_trial_measured_on_this_machine_narrows_the_answer() -> None:
    before = said(trial())
    tags = {"device": "a small card", "device.driver": "580", "version.torch": "2.11"}
    note_libraries(trial(), tags, {"vram/other_gib": 0.4})
    here, paged = said(trial()), said(trial(optim="paged_adamw_8bit"))
    assert here.libraries.size == pytest.approx(0.4 * GIB, rel=0.01)
    assert paged.libraries.size == pytest.approx(0.5 * GIB, rel=0.01)  # moved as far as the other
    assert here.high - here.low < before.high - before.low
    note_libraries(trial(), {**tags, "device": "another"}, {"vram/other_gib": 0.6})
    assert said(trial()).libraries.size == pytest.approx(0.6 * GIB, rel=0.01)
    note_libraries(trial(), tags, {"vram/other_gib": -0.1})
    assert said(trial()).libraries.device.startswith("another")


def test_padding_costs_a_mask() -> None:
    even = trial(batch_size=4, seq_len=2048, checkpointing="none")
    padded = replace(even, data=DataConfig())
    assert said(padded).allocated > said(even).allocated + 4 * 2048**2


def test_a_family_that_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidInput, match="model_type=mamba"):
        read_shapes({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("changed", "said_of"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}}, "vision_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": "many"}, "num_attention_heads=many"),
        ({"num_attention_heads": 10**6, "head_dim": None}, "hidden_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"vocab_size": None}, "vocab_size"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
    ],
)
def test_a_config_that_states_no_usable_sizes_is_refused(changed: dict[str, Any], said_of: str) -> None:
    with pytest.raises(InvalidInput, match=said_of):
        read_shapes({**(trial().model.architecture or {}), **changed})


@pytest.mark.parametrize(
    ("typed", "said_of"),
    [
        ("method.target_modules=[q_proj,qkv]", "qkv, which"),
        ("method.target_modules=[q_proj,lm_head]", "lm_head: the memory"),
        ("method.target_modules=[model.embed_tokens]", "embed_tokens: the memory"),
        ("seq_len=4096", "2048 positions"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str, said_of: str
) -> None:
    fields = {**(trial().model.architecture or {}), "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["model=local", f"model.path={tmp_path}", typed]) == 2
    assert said_of in capsys.readouterr().err


def test_a_capacity_is_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model=qwen2_5_1_5b", "batch_size=4", "seq_len=2048"]
    assert main([*command, "capacity=8gib"]) == 1
    assert f"8 GiB: {TOO_LARGE}" in capsys.readouterr().out
    assert main([*command, "capacity=8gib", "--vram", "80"]) == 0
    assert f"80 GiB: {FITS}" in capsys.readouterr().out


def test_the_shapes_of_a_local_model_are_read_from_its_config(tmp_path: Path) -> None:
    config = trial()
    (tmp_path / "config.json").write_text(json.dumps(config.model.architecture))
    model = ModelConfig(source=ModelSource.local, path=str(tmp_path))
    assert shapes_of(model) == shapes_of(config.model)
    with pytest.raises(InvalidInput, match="cannot be read"):
        shapes_of(replace(model, path=str(tmp_path / "missing")))


def test_parameters_are_counted_as_published() -> None:
    assert shapes_of(trial().model).parameters == 1_543_714_304
    assert shapes_of(trial(model="llama3_1_8b").model).parameters == 8_030_261_248


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    command = ["model=qwen2_5_1_5b", "data=random_tokens", "batch_size=4", "seq_len=2048"]
    assert main(["--vram", "24,80", *command]) == 1
    text = capsys.readouterr().out
    assert f"80 GiB: {FITS}" in text
    assert f"24 GiB: {TOO_LARGE}" in text
    assert "engine=graph" in text
    assert "longest rows" not in text
    assert main(["--table", "context", *command]) == 2
    assert main(["--vram", "8", "--table", "context", "model=smollm2_135m", "engine=liger"]) == 0
    table = capsys.readouterr().out
    assert "graph" in table
    assert "compile" in table
