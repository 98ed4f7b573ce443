"""An MLP in tiles on a real card: the gradients of the same engine without tiles, and less memory."""

import functools
from pathlib import Path
from typing import Any

import pytest
from test_engine_gpu import apart, losses, of, trial

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
"""torch.compile warns of much that is not ours, and makes an error of it where a warning is one."""

SHAPES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}


def trained_by(kind: str, tile: int | None, is_packed: bool, batch: dict[str, Any]) -> Any:
    """A model in bf16 on the card that trains as an engine does, with checkpoints in host memory."""
    import torch
    from engine_models import adapted, adapters, pack

    from lora_lab.worker.engines.attention_masks import leave_out_masks
    from lora_lab.worker.engines.compiled import compile_layers, decoder_layers
    from lora_lab.worker.engines.dequantize import use_fused_dequantization
    from lora_lab.worker.engines.fused_lora_layers import use_fused_lora
    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
    from lora_lab.worker.engines.offloaded_checkpoints import offload_checkpoints
    from lora_lab.worker.engines.tiled_mlp import mlp_tile_of, tile_mlps

    model = adapted(**SHAPES).to(torch.bfloat16)
    if is_packed:
        pack(model, torch.bfloat16)
    model.to("cuda")
    for parameter in adapters(model).values():
        parameter.data = parameter.data.float()
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
    copies: Any = {}
    if kind != "eager":
        leave_out_masks(model)
    if kind == "graph":
        use_fused_dequantization(model)
        copies = use_fused_lora(model, torch.bfloat16)
        step = GraphStep(model, functools.partial(autocast, cache_enabled=False), copies=copies)
        use_graph_step(model, step)
    if tile is not None:
        tile_mlps(model, tile, kind != "eager", copies, autocast)
    if kind != "eager":
        compile_layers(model, whole=tile is None)
    offload_checkpoints(decoder_layers(model), model.device, kind != "graph", within=tile is None and kind != "eager")
    if kind == "graph":
        step.record(batch)
    else:
        model.forward = autocast()(model.forward)
    assert mlp_tile_of(model) == tile
    return model


@pytest.mark.parametrize("is_packed", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("kind", ["eager", "compile", "graph"])
def test_gradients_are_those_of_the_same_engine_without_tiles(kind: str, is_packed: bool) -> None:
    import torch
    from engine_models import furthest, loss_and_gradients, padded

    torch.compiler.reset()
    first, second = ({n: t.cuda() for n, t in padded([450, 300], 450, seed=seed).items()} for seed in (0, 1))
    whole, tiled = (trained_by(kind, tile, is_packed, first) for tile in (None, 256))
    for batch in (first, second, first):
        loss, expected = loss_and_gradients(whole, batch)
        found, gradients = loss_and_gradients(tiled, batch)
        assert found == pytest.approx(loss, rel=5e-3)
        assert furthest(gradients, expected) < 0.05, "in bf16 each tile's gradients are rounded by themselves"
        assert all(float(gradient.norm()) > 0 for gradient in gradients.values())


def test_tiles_take_less_of_the_card(tmp_path: Path) -> None:
    """Of 8,192 tokens each tensor of the MLP's width is 0.125 GiB here."""
    long = (
        *("model=smollm2_135m", "model.weights=random", "model.architecture.intermediate_size=8192"),
        *("data=random_tokens", "data.rows=32", "batch_size=1", "seq_len=8192", "measure.eval_rows=2"),
        *("measure.warmup_steps=2", "measure.steps=8", "gradient_checkpointing=offloaded", "engine.chunked_loss=true"),
    )
    whole, tiled, eager = (
        trial(
            tmp_path, f"{kind}_{tile}", *long, f"engine={kind}", "engine.chunked_loss=true", f"engine.mlp_tile={tile}"
        )
        for kind, tile in (("graph", "null"), ("graph", "1024"), ("eager", "1024"))
    )
    assert [record["tags"]["ran.mlp_tile"] for record in (whole, tiled, eager)] == ["None", "1024", "1024"]
    peaks = [record["metrics"]["vram/peak_allocated_gib"] for record in (whole, tiled)]
    assert peaks[1] < peaks[0] - 0.3
    for record in (tiled, eager):
        assert record["metrics"]["estimate/allocated_gib"] == pytest.approx(
            record["metrics"]["vram/peak_allocated_gib"], rel=0.06
        )
    assert apart(losses(whole), losses(tiled)) <= 0.01
    assert apart(losses(eager), losses(tiled)) <= 0.02
    [done] = of(tiled, "EngineDone")
    assert (done["unrecorded"], done["compilations"]) == (0, 0)
