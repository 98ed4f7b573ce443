"""CUDA graphs on a real card: replayed training is the training that eager has."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import lab_in

from lora_lab.composition.compose import CONF
from lora_lab.config import InvalidInput, PackageConfig
from lora_lab.packages import locate

pytestmark = pytest.mark.gpu

# shared, since these tests have a context on the card themselves
SHORT = (
    "seq_len=256",
    "batch_size=2",
    "tracking=none",
    "measure.idle_seconds=0",
    "cooldown_celsius=95",
    "share_device=true",
)


def model() -> str:
    """SmolLM2 where its package is there."""
    import yaml

    stated = yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text())
    try:
        locate(PackageConfig(**stated["package"]))
    except InvalidInput:
        return "model=tiny"
    return "model=smollm2_135m"


def trial(folder: Path, name: str, *changes: str) -> dict[str, Any]:
    """The record of a finished trial, with its events under `events`."""
    home = folder / name
    home.mkdir()
    said = lab_in(home, real=True)(model(), *SHORT, *changes)
    assert said.code == 0, said.text
    [place] = home.glob("multirun/*/*/record.json")
    record: dict[str, Any] = json.loads(place.read_text())
    lines = (place.parent / "events.jsonl").read_text().splitlines()
    record["events"] = [json.loads(line) for line in lines]
    return record


def of(record: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in record["events"] if event["event"] == kind]


def losses(record: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in of(record, "Step")]


def apart(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_hundred_replayed_steps_follow_eagers(tmp_path: Path, method: str) -> None:
    long = (f"method={method}", "measure.warmup_steps=10", "measure.steps=90", "measure.eval_rows=16")
    eager = trial(tmp_path, "eager", *long, "engine=eager")
    other_kernel = trial(tmp_path, "kernel", *long, "engine=eager", "attention=eager")
    graph = trial(tmp_path, "graph", *long, "engine=graph")
    assert len(losses(graph)) == 100
    spread = apart(losses(eager), losses(other_kernel))
    assert apart(losses(eager), losses(graph)) <= max(3 * spread, 0.02)
    held = [record["metrics"]["loss/eval"] for record in (eager, other_kernel, graph)]
    assert abs(held[0] - held[2]) <= max(3 * abs(held[0] - held[1]), 0.02)
    assert graph["metrics"]["loss/eval"] < graph["metrics"]["loss/eval_before"]
    [done] = of(graph, "EngineDone")
    assert (done["unrecorded"], done["compilations"]) == (0, 0)
    assert done["replays"] >= 100
    [made] = of(graph, "Compiled")
    assert made["graphs"] is True
    assert made["working_bytes"] > 0


def test_four_micro_batches_and_checkpointing_follow_eagers(tmp_path: Path) -> None:
    long = ("measure.steps=20", "grad_accum_steps=4", "gradient_checkpointing=selective", "data.batching=packed")
    eager, graph = (trial(tmp_path, kind, *long, f"engine={kind}") for kind in ("eager", "graph"))
    assert apart(losses(eager), losses(graph)) <= 0.05
    assert of(graph, "EngineDone")[0]["unrecorded"] == 0


def test_fp16_overflows_at_the_start_and_recovers(tmp_path: Path) -> None:
    """A GradScaler begins at 65536: gradients of an fp16 backward overflow there or not, in both engines alike."""
    long = ("precision=fp16", "measure.warmup_steps=10", "measure.steps=40", "measure.eval_rows=16")
    eager, graph = (trial(tmp_path, kind, *long, f"engine={kind}") for kind in ("eager", "graph"))
    assert graph["tags"]["ran.grad_scaler"] == "True"
    skipped = [[step["step"] for step in of(record, "Step") if step["skipped"]] for record in (eager, graph)]
    assert skipped[0] == skipped[1]
    assert apart(losses(eager), losses(graph)) <= 0.05
    assert graph["metrics"]["loss/eval"] < graph["metrics"]["loss/eval_before"]


def test_a_replayed_overflow_is_skipped_and_the_scale_falls() -> None:
    """Such a scale overflows for certain: it halves, step by step, until gradients are numbers again."""
    import functools

    import torch
    from engine_models import adapted, adapters, padded

    from lora_lab.worker.engines.chunked_loss import use_chunked_loss
    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step

    made = adapted().to("cuda")
    use_chunked_loss(made)
    autocast = functools.partial(torch.autocast, "cuda", torch.float16, cache_enabled=False)
    step = GraphStep(made, autocast, graphs=True)
    use_graph_step(made, step)
    batch = {name: tensor.cuda() for name, tensor in padded([64, 50], 64).items()}
    step.record(batch)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, growth_interval=10**6)
    step.use_scaler(scaler)
    optimizer = torch.optim.AdamW(list(adapters(made).values()), lr=1e-3, fused=True)
    start = {name: parameter.detach().clone() for name, parameter in adapters(made).items()}
    scales: list[float] = []
    found: list[float] = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = made(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if not scales:
            assert all(torch.equal(start[name], p) for name, p in adapters(made).items()), "the first is skipped"
        scales.append(scaler.get_scale())
        found.append(float(loss.detach()))
    assert scales[0] < 2.0**60
    assert scales[-1] == scales[-2] < 2.0**40, "it has settled"
    assert all(later in (before, before / 2) for before, later in pairwise(scales))
    assert found[-1] < found[0]
    assert all(bool(parameter.isfinite().all()) for parameter in adapters(made).values())
    assert (step.replays, step.unrecorded) == (60, 0)


def test_each_replay_drops_others(tmp_path: Path) -> None:
    import functools

    import torch
    from engine_models import adapted, padded

    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step

    made = adapted(lora={"lora_dropout": 0.5}).to("cuda")
    step = GraphStep(made, functools.partial(torch.autocast, "cuda", enabled=False), graphs=True)
    use_graph_step(made, step)
    batch = {name: tensor.cuda() for name, tensor in padded([64, 50], 64).items()}
    step.record(batch)
    assert len({float(made(**batch).loss.detach()) for _ in range(8)}) == 8
    assert (step.replays, step.unrecorded) == (8, 0)
    dropping = trial(tmp_path, "trial", "engine=graph", "method.dropout=0.1", "measure.steps=10")
    assert of(dropping, "EngineDone")[0]["unrecorded"] == 0


def test_replayed_gradients_are_those_of_the_recorded_operations() -> None:
    """Of several widths that share their memory, in any order."""
    import functools

    import torch
    from engine_models import adapted, loss_and_gradients, padded

    from lora_lab.worker.engines.attention_masks import leave_out_masks
    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step

    graphed, plain = adapted().to("cuda"), adapted().to("cuda")
    leave_out_masks(graphed)
    step = GraphStep(graphed, functools.partial(torch.autocast, "cuda", enabled=False), graphs=True)
    use_graph_step(graphed, step)
    for width in (128, 96, 64):
        step.record({name: tensor.cuda() for name, tensor in padded([width, width], width).items()})
    for seed, width in enumerate((64, 128, 96, 128, 64, 96)):
        batch = {name: tensor.cuda() for name, tensor in padded([width, 10 + seed], width, seed=seed).items()}
        loss, expected = loss_and_gradients(plain, batch)
        found, gradients = loss_and_gradients(graphed, batch)
        assert found == pytest.approx(loss, rel=1e-4)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-2, atol=1e-4)
    assert (step.replays, step.unrecorded) == (6, 0)


def test_replays_with_checkpoints_in_host_memory_have_the_same_gradients() -> None:
    import functools

    import torch
    from engine_models import adapted, loss_and_gradients, padded

    from lora_lab.worker.engines.attention_masks import leave_out_masks
    from lora_lab.worker.engines.compiled import decoder_layers
    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
    from lora_lab.worker.engines.offloaded_checkpoints import offload_checkpoints

    replayed, stepped, plain = (adapted(num_hidden_layers=4, hidden_size=256).to("cuda") for _ in range(3))
    for model in (replayed, stepped):
        leave_out_masks(model)
        offload_checkpoints(decoder_layers(model), torch.device("cuda"), model is stepped, within=False)
    step = GraphStep(replayed, functools.partial(torch.autocast, "cuda", enabled=False), graphs=True)
    use_graph_step(replayed, step)
    for width in (512, 256, 64):
        step.record({name: tensor.cuda() for name, tensor in padded([width] * 8, width).items()})
    for seed, width in enumerate((64, 512, 256, 512, 64, 256)):
        batch = {name: tensor.cuda() for name, tensor in padded([width, 10 + seed] * 4, width, seed=seed).items()}
        loss, expected = loss_and_gradients(plain, batch)
        for made in (replayed, stepped):
            found, gradients = loss_and_gradients(made, batch)
            assert found == pytest.approx(loss, rel=1e-4)
            for name in expected:
                torch.testing.assert_close(gradients[name], expected[name], rtol=1e-2, atol=1e-4)
    assert (step.replays, step.unrecorded) == (6, 0)


def test_offloaded_checkpoints_take_less_of_the_card(tmp_path: Path) -> None:
    """30 layers' inputs of 4096 tokens are 0.13 GiB."""
    long = (
        *("model=smollm2_135m", "model.weights=random", "data=random_tokens", "data.rows=64", "measure.eval_rows=0"),
        *("batch_size=4", "seq_len=1024", "measure.steps=10"),
    )
    on_card, graph, eager = (
        trial(tmp_path, f"{kind}_{where}", *long, f"engine={kind}", f"gradient_checkpointing={where}")
        for kind, where in (("graph", "full"), ("graph", "offloaded"), ("eager", "offloaded"))
    )
    assert [record["tags"]["ran.gradient_checkpointing"] for record in (graph, eager)] == ["offloaded"] * 2
    peaks = [record["metrics"]["vram/peak_allocated_gib"] for record in (on_card, graph)]
    assert peaks[1] < peaks[0] - 0.08
    assert apart(losses(on_card), losses(graph)) <= 0.01
    assert apart(losses(eager), losses(graph)) <= 0.02
    assert of(graph, "EngineDone")[0]["unrecorded"] == 0


def test_the_memory_of_replays_is_not_left_out(tmp_path: Path) -> None:
    same = ("measure.steps=10", "data.batching=seq_len", "batch_size=4")
    compiled, graph = (trial(tmp_path, kind, *same, f"engine={kind}") for kind in ("compile", "graph"))
    peaks = [record["metrics"]["vram/peak_allocated_gib"] for record in (compiled, graph)]
    assert peaks[1] >= 0.9 * peaks[0]
    assert graph["metrics"]["vram/peak_device_gib"] >= peaks[1]


def test_evaluation_after_replays_sees_what_was_learned(tmp_path: Path) -> None:
    """In bf16 accelerate's wrapper is taken off the forward that replays."""
    for precision in ("bf16", "fp32"):
        record = trial(tmp_path, precision, "engine=graph", f"precision={precision}", "measure.steps=10")
        assert record["metrics"]["loss/eval"] < record["metrics"]["loss/eval_before"]


@pytest.mark.parametrize("count", [3 * 257, 4095])
def test_the_share_of_a_step_is_not_rounded_on_a_card(count: int) -> None:
    """There, unlike on a CPU, a lone number does not raise the format of what it is multiplied with."""
    import torch

    from lora_lab.worker.engines.chunked_loss import chunked_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(400, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(60, 32, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(60, (400,), device="cuda")
    (chunked_cross_entropy(hidden, weight, labels) / torch.tensor(count, device="cuda")).backward()
    assert hidden.grad is not None
    exact = hidden.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(exact @ weight.double().t(), labels, reduction="sum") / count).backward()
    assert exact.grad is not None
    along = float((hidden.grad.double() * exact.grad).sum() / (exact.grad * exact.grad).sum())
    assert along == pytest.approx(1, abs=5e-4)
