"""An MLP in tiles: the loss and gradients of plain PyTorch, only its input kept, and no forward more than is needed."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compiles
from engine_models import adapted, adapters, furthest, loss_and_gradients, pack, padded
from tiny_trials import ended, tiny_config
from torch import Tensor, nn

from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.events import Evaluated, Event, Ran, Step
from lora_lab.options import Attention, Checkpointing, DType, EngineKind, Quantization, Weights
from lora_lab.outcome import Unsupported
from lora_lab.worker.attention import AttentionKernels
from lora_lab.worker.engines import dequantize, engine, tiled_mlp
from lora_lab.worker.engines.compiled import (
    check_breaks,
    checkpointing_of,
    compilations,
    decoder_layers,
    graph_breaks,
    is_compiled,
)
from lora_lab.worker.engines.engine import Engine, checkpoints_by_trainer
from lora_lab.worker.engines.tiled_mlp import mlp_tile_of, tile_mlps, tile_tokens
from lora_lab.worker.mlps import mlps_of
from lora_lab.worker.models import check_model, load_architecture
from lora_lab.worker.phases import PhaseClock
from lora_lab.worker.training import checkpointing_arguments
from lora_lab.worker.trial import run_trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.compile's own
]

TILE = 64
ALL_BUT_FULL = [mode for mode in Checkpointing if mode is not Checkpointing.full]
MANY, ONE, FEW = padded([150, 100], 150), padded([32, 30], 32), padded([20, 9], 20)
"""300 tokens, of which the last tile has 44; as many as a tile; and fewer."""


def by_night(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


def plain_autocast() -> Any:
    return torch.autocast("cpu", enabled=False)


def made(kind: str = "llama", mode: Checkpointing = Checkpointing.none, compiled: bool = False, **model: Any) -> Any:
    """A model as the engine and Trainer leave it."""
    config = TrialConfig(gradient_checkpointing=mode)
    config.engine.mlp_tile = TILE
    config.engine.kind = EngineKind.compile if compiled else EngineKind.eager
    config.precision.dtype = DType.fp32
    model = adapted(kind, **{"attention": "eager" if kind == "gemma2" else "sdpa", **model})
    Engine(config, model, [], AttentionKernels(), print, PhaseClock(print))
    if checkpoints_by_trainer(config):
        arguments = dict(checkpointing_arguments(config) or {})
        every = arguments.pop("every_n_layers")
        model.get_base_model().gradient_checkpointing_enable(arguments, every_n_layers=every)
    return model


@pytest.fixture
def calculated(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the tiles that are calculated."""
    counts: Counter[str] = Counter()
    calculate = tiled_mlp._calculated

    def counted(*args: Any) -> Any:
        counts["tiles"] += 1
        return calculate(*args)

    monkeypatch.setattr(tiled_mlp, "_calculated", counted)
    return counts


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_loss_and_gradients_are_plain_pytorchs(kind: str) -> None:
    tiled, plain = made(kind), adapted(kind, attention="eager" if kind == "gemma2" else "sdpa")
    assert (mlp_tile_of(tiled), mlp_tile_of(plain)) == (TILE, None)
    for batch in (MANY, ONE, FEW):
        loss, expected = loss_and_gradients(plain, batch)
        found, gradients = loss_and_gradients(tiled, batch)
        assert found == pytest.approx(loss, rel=1e-6)
        assert furthest(gradients, expected) < 1e-5
    assert all(float(gradient.abs().max()) > 0 for name, gradient in gradients.items() if "mlp" in name)


@pytest.mark.parametrize("mode", list(Checkpointing))
@pytest.mark.parametrize(("kind", "again"), [("llama", 2), ("gemma3_text", 3)])
def test_a_recalculation_ends_before_the_tiles_where_nothing_behind_them_is_kept(
    kind: str, again: int, mode: Checkpointing, calculated: Counter[str]
) -> None:
    tiled = made(kind, mode, num_hidden_layers=4)
    assert checkpointing_of(tiled) is mode
    loss, expected = loss_and_gradients(adapted(kind, num_hidden_layers=4), MANY)
    found, gradients = loss_and_gradients(tiled, MANY)
    assert found == pytest.approx(loss, rel=1e-6)
    assert furthest(gradients, expected) < 1e-5
    layers = {Checkpointing.none: 0, Checkpointing.selective: 2}.get(mode, 4)
    assert calculated["tiles"] == 5 * (2 * 4 + (again - 2) * layers), "five tiles in each layer's forward and backward"


def test_accumulated_gradients_are_the_sum() -> None:
    tiled, plain = made(mode=Checkpointing.full), adapted()
    for model in (tiled, plain):
        for batch in (MANY, FEW, padded([150, 70], 150, seed=1)):
            model(**batch).loss.backward()
    found, expected = ({n: p.grad for n, p in adapters(model).items()} for model in (tiled, plain))
    assert furthest(found, expected) < 1e-5


def test_two_forwards_may_come_before_their_backwards() -> None:
    tiled, plain = made(mode=Checkpointing.full), adapted()
    for model in (tiled, plain):
        first, second = model(**MANY).loss, model(**FEW).loss
        first.backward()
        second.backward()
    found, expected = ({n: p.grad for n, p in adapters(model).items()} for model in (tiled, plain))
    assert furthest(found, expected) < 1e-5


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj"], ["up_proj", "v_proj"]])
def test_some_layers_alone_may_have_adapters(targets: list[str]) -> None:
    """Below the lowest of them nothing needs a gradient."""
    lora = {"target_modules": targets, "layers_to_transform": [1, 2]}
    tiled, plain = (make(num_hidden_layers=3, lora=lora) for make in (made, adapted))
    loss, expected = loss_and_gradients(plain, MANY)
    found, gradients = loss_and_gradients(tiled, MANY)
    assert found == pytest.approx(loss, rel=1e-6)
    assert furthest(gradients, expected) < 1e-5


def test_a_gradient_of_no_adapter_goes_through() -> None:
    """A method may train what it likes: a bias within the MLP, and the layer's norms."""
    tiled, plain = (make(mlp_bias=True) for make in (functools.partial(adapted, "llama"), adapted))
    for model in (tiled, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name or name.endswith("gate_proj.base_layer.bias"))
    tile_mlps(tiled, TILE, False, {}, plain_autocast)
    loss, expected = loss_and_gradients(plain, MANY)
    found, gradients = loss_and_gradients(tiled, MANY)
    assert found == pytest.approx(loss, rel=1e-6)
    assert any(name.endswith("bias") for name in expected)
    assert furthest(gradients, expected) < 1e-5


def test_4_bit_weights_have_the_same_gradients() -> None:
    shapes = {"hidden_size": 128, "intermediate_size": 192}
    tiled, plain = adapted(**shapes), adapted(**shapes)
    for model in (tiled, plain):
        pack(model, torch.float32)
    tile_mlps(tiled, TILE, False, {}, plain_autocast)
    loss, expected = loss_and_gradients(plain, MANY)
    found, gradients = loss_and_gradients(tiled, MANY)
    assert found == pytest.approx(loss, rel=1e-5)
    assert furthest(gradients, expected) < 1e-4


def kept_bytes(model: Any, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """The bytes that a forward keeps for its backward, and the widest tensor among them, without weights."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    widest = [0]

    def pack_(saved: Tensor) -> Tensor:
        place = saved.untyped_storage().data_ptr()
        if place not in own and saved.dim() > 1:
            sizes[place] = saved.untyped_storage().nbytes()
            widest[0] = max(widest[0], saved.shape[-1])
        return saved

    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack_, lambda saved: saved):
        kept.append(model.get_base_model().model(input_ids=MANY["input_ids"]).last_hidden_state)
    return sum(sizes.values()), widest[0]


def test_only_the_mlps_input_is_kept() -> None:
    wide = {"intermediate_size": 1024}
    (plain, widest), (tiled, widest_tiled) = (kept_bytes(make(**wide)) for make in (adapted, made))
    assert (widest, widest_tiled) == (1024, 150), "of the tiled, attention's own is the widest: a row has 150 tokens"
    of_one = 300 * 1024 * 4
    assert plain - tiled > 2 * 4 * of_one, "gate, its activation, up and their product, of two layers"


def test_evaluation_runs_over_tiles_too() -> None:
    tiled, plain = made().eval(), adapted().eval()
    widths: set[int] = set()
    for mlp in mlps_of(tiled):
        mlp.act_fn.register_forward_hook(lambda *args: widths.add(args[2].shape[-2]))
    with torch.no_grad():
        for batch in (MANY, FEW):
            torch.testing.assert_close(tiled(**batch).logits, plain(**batch).logits)
    assert widths == {TILE, 20}, "a tile, and two rows of 20 as they are"


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("mode", [Checkpointing.full, *by_night(*ALL_BUT_FULL)])
def test_compiled_layers_are_left_at_their_mlp_alone(mode: Checkpointing, calculated: Counter[str]) -> None:
    torch.compiler.reset()
    tiled, before, breaks = made(mode=mode, compiled=True, num_hidden_layers=4), compilations(), graph_breaks()
    assert checkpointing_of(tiled) is mode
    assert all(map(is_compiled, decoder_layers(tiled)))
    loss, expected = loss_and_gradients(adapted(num_hidden_layers=4), MANY)
    found, gradients = loss_and_gradients(tiled, MANY)
    assert found == pytest.approx(loss, rel=1e-5)
    assert furthest(gradients, expected) < 1e-3
    assert calculated["tiles"] == 5 * 2 * 4
    check_breaks(graph_breaks() - breaks)
    every = 2 if mode is Checkpointing.selective else 1
    assert compilations() - before <= 3 * every, "before the MLP, a tile, behind the MLP: for all layers and all tiles"


def test_code_that_is_left_elsewhere_is_refused() -> None:
    breaks = graph_breaks()

    def leaves(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(leaves, backend="eager")(torch.ones(2))
    with pytest.raises(Unsupported, match=r"elsewhere than at their MLP.*engine\.mlp_tile=null"):
        check_breaks(graph_breaks() - breaks)


@compiles
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("is_packed", by_night(True, False))
def test_a_recordable_step_uses_its_copies_of_the_adapters(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As engine=graph has it, but for the recording: fused products, compiled layers, gradients in fixed memory."""
    torch.compiler.reset()
    monkeypatch.setattr(dequantize, "_compiled_dequantize", dequantize.dequantize)
    shapes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    tiled, plain = adapted(**shapes), adapted(**shapes)
    for model in (tiled, plain):
        if is_packed:
            pack(model, torch.float32)
    step, before = graph_like(tiled, torch.float32, mode=Checkpointing.offloaded), graph_breaks()
    step.record(MANY)
    check_breaks(graph_breaks() - before)
    made_ready = compilations()
    for seed in (0, 1):
        batch = padded([150, 100], 150, seed)
        loss, expected = loss_and_gradients(plain, batch)
        found, gradients = loss_and_gradients(tiled, batch)
        assert found == pytest.approx(loss, rel=1e-5)
        assert furthest(gradients, expected) < 1e-3
    assert (step.unrecorded, compilations()) == (0, made_ready)


def graph_like(model: Any, dtype: torch.dtype, mode: Checkpointing, tile: int | None = TILE) -> Any:
    from lora_lab.worker.engines.compiled import compile_layers
    from lora_lab.worker.engines.fused_lora_layers import use_fused_lora
    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
    from lora_lab.worker.engines.offloaded_checkpoints import offload_checkpoints

    autocast = functools.partial(torch.autocast, "cpu", dtype, dtype is not torch.float32, cache_enabled=False)
    copies = use_fused_lora(model, dtype)
    step = GraphStep(model, autocast, graphs=False, copies=copies)
    use_graph_step(model, step)
    if tile is not None:
        tile_mlps(model, tile, mode is not Checkpointing.none, copies, autocast)
    if mode is Checkpointing.offloaded:
        compile_layers(model, whole=tile is None)
        offload_checkpoints(decoder_layers(model), torch.device("cpu"), False, within=tile is None)
    return step


def test_many_tiles_round_no_more_than_one() -> None:
    """In bf16, sums over 24 tiles: each step of them in bf16 would lose three bits."""
    batch = padded([800, 760], 800)
    _, exact = loss_and_gradients(adapted(max_position_embeddings=1024), batch)
    apart = {}
    for tile in (None, TILE):
        model = adapted(max_position_embeddings=1024).to(torch.bfloat16)
        for parameter in adapters(model).values():
            parameter.data = parameter.data.float()
        graph_like(model, torch.bfloat16, Checkpointing.none, tile)
        _, gradients = loss_and_gradients(model, batch)
        names = [name for name in exact if "mlp" in name]
        apart[tile] = sum(float((gradients[n] - exact[n]).norm() / exact[n].norm()) for n in names) / len(names)
    assert apart[TILE] < 1.1 * apart[None]


@pytest.mark.parametrize("tile", [64, 100, 4096])
def test_tiles_are_as_few_as_there_must_be_and_of_one_size(tile: int) -> None:
    for tokens in (1, 63, 64, 65, 100, 101, 4096, 4097, 5000, 78475):
        size = tile_tokens(tokens, tile)
        tiles = -(-tokens // size)
        assert size <= tile
        assert tiles == -(-tokens // tile)
        assert tiles == 1 or size % 64 == 0 or size == -(-tokens // tiles)
    assert tile_tokens(5000, 4096) == 2560, "two of 4096 would calculate 3192 tokens too many"


def test_a_trial_trains_evaluates_and_reads_back_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said: dict[int | None, list[Event]] = {None: [], TILE: []}
    for tile, events in said.items():
        config = tiny_config(rank=4)
        config.seq_len, config.gradient_checkpointing, config.grad_accum_steps = 80, Checkpointing.full, 2
        config.data.rows = 12
        config.engine.mlp_tile = tile
        run_trial(config, tmp_path / str(tile), events.append)
        assert ended(events) == ("finished", "")
        assert next(event.facts for event in events if isinstance(event, Ran))["mlp_tile"] == str(tile)
    whole, tiled = ([e.loss for e in events if isinstance(e, (Step, Evaluated))] for events in said.values())
    assert tiled == pytest.approx(whole, abs=1e-4)
    assert tiled[-1] < tiled[0]


@pytest.mark.nightly
def test_a_trial_whose_mlp_is_whole_after_all_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(engine, "tile_mlps", lambda *_: None)
    config, events = tiny_config(rank=4), list[Event]()
    config.engine.mlp_tile = TILE
    run_trial(config, tmp_path, events.append)
    outcome, reason = ended(events)
    assert outcome == "failed"
    assert "mlp_tile: asked for 64, got None" in reason


class Shifting(nn.Module):
    """An MLP in which a token sees the one before it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        shifted: Tensor = self.mlp(x + nn.functional.pad(x, (0, 0, 1, -1)))
        return shifted


def test_an_mlp_that_mixes_tokens_is_refused() -> None:
    model = adapted()
    for layer in decoder_layers(model):
        layer.mlp = Shifting(layer.mlp)
    with pytest.raises(Unsupported, match=r"Shifting does not map each token by itself.*engine\.mlp_tile=null"):
        tile_mlps(model, TILE, False, {}, plain_autocast)
    assert mlp_tile_of(model) is None


def test_a_forward_in_the_place_of_the_tiles_is_seen() -> None:
    model = made()
    [first, *_] = mlps_of(model)
    first.forward = lambda x: x
    assert mlp_tile_of(model) is None


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("mixtral", {"num_local_experts": 4}, "a mixture, which gathers the tokens of each expert"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}, "no module named mlp"),
        ("phi", {"resid_pdrop": 0.1}, ""),
        (
            "gpt_neo",
            {"resid_dropout": 0.1, "num_layers": 2, "attention_types": [[["global"], 2]]},
            "its MLP has dropout",
        ),
    ],
)
def test_models_whose_mlp_cannot_be_taken_apart_are_refused_before_they_are_loaded(
    kind: str, more: dict[str, Any], words: str
) -> None:
    shapes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    architecture = {"model_type": kind, "vocab_size": 272, "bos_token_id": 1, "eos_token_id": 2, **shapes, **more}
    config = TrialConfig(model=ModelConfig(weights=Weights.random, architecture=architecture), seq_len=64)
    config.attention = Attention.eager
    config.method.quantization, config.method.target_modules = Quantization.none, ["q_proj"]
    check_model(config, load_architecture(config.model))
    config.engine.mlp_tile = TILE
    if not words:
        check_model(config, load_architecture(config.model))
        return
    with pytest.raises(InvalidInput, match=words):
        check_model(config, load_architecture(config.model))
