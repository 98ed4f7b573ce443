"""Several adapters on one base: what each learns is what it learns alone."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tiny_trials import tiny_config
from torch import Tensor

from lora_lab.config import TrialConfig
from lora_lab.outcome import Unsupported
from lora_lab.worker.engines import compiled
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.compiled import compile_layers
from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
from lora_lab.worker.members import Members, MembersLora
from lora_lab.worker.models import load_architecture, load_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RANKS, RATES = (4, 8, 2), (1e-2, 3e-2, 1e-3)
CPU = torch.device("cpu")
STEPS = 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configs(**model: Any) -> list[TrialConfig]:
    base = tiny_config()
    shapes = {**(base.model.architecture or {}), **model}
    base = replace(base, model=replace(base.model, architecture=shapes))
    return [replace(base, method=replace(base.method, rank=rank)) for rank in RANKS]


def loaded(config: TrialConfig, trained: MembersLora | None = None) -> Any:
    transformers.set_seed(config.seed)
    model = load_model(config, load_architecture(config.model), CPU, trained=trained)
    return model.train()


def together(asked: Sequence[TrialConfig], apart: bool = True, chunked: bool = False) -> tuple[Any, Members]:
    trained = MembersLora(asked)
    model = loaded(asked[0], trained)
    found = Members(model, trained.names)
    if chunked:
        use_chunked_loss(model)
    found.join(apart)
    return model, found


def batch(step: int, rows: int = 2, width: int = 13) -> dict[str, Tensor]:
    """Rows of unequal lengths, whose number of tokens suits no kernel."""
    ids = torch.randint(3, 200, (rows, width), generator=torch.Generator().manual_seed(step))
    seen = torch.ones_like(ids)
    seen[-1, -4:] = 0
    labels = ids.masked_fill(seen == 0, -100)
    return {"input_ids": ids, "attention_mask": seen, "labels": labels, "num_items_in_batch": (labels != -100).sum()}


def stepped(model: Any, groups: list[tuple[list[Tensor], float]], losses: Any) -> list[Any]:
    """Train, each group of parameters with its rate and clipped by itself. Return what `losses` says of each step."""
    optimizer = torch.optim.AdamW([{"params": own, "lr": rate} for own, rate in groups])
    said = []
    for step in range(STEPS):
        output = model(**batch(step))
        said.append(losses(output))
        output.loss.backward()
        for own, _ in groups:
            torch.nn.utils.clip_grad_norm_(own, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return said


def alone(config: TrialConfig, rate: float, chunked: bool = False) -> tuple[list[float], list[Tensor]]:
    model = loaded(config)
    if chunked:
        use_chunked_loss(model)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return stepped(model, [(own, rate)], lambda output: output.loss.item()), own


def gradients_of(members: Members) -> list[Any]:
    return [parameter.grad for own in members.parameters for parameter in own]


@pytest.mark.parametrize(("kind", "chunked"), [("llama", False), ("qwen2", True)], ids=["llama", "qwen2 in chunks"])
def test_each_adapter_learns_bit_for_bit_what_it_learns_alone(kind: str, chunked: bool) -> None:
    asked = configs(model_type=kind)
    model, members = together(asked, chunked=chunked)
    groups = list(zip(members.parameters, RATES, strict=True))
    said = stepped(model, groups, lambda _: members.losses.tolist())
    for number, (config, rate) in enumerate(zip(asked, RATES, strict=True)):
        losses, weights = alone(config, rate, chunked)
        assert [step[number] for step in said] == losses
        assert all(torch.equal(*pair) for pair in zip(members.parameters[number], weights, strict=True))
    assert len({tuple(column) for column in zip(*said, strict=True)}) == len(asked), "they differ from one another"


def test_one_product_for_all_gives_the_same_gradients_up_to_rounding() -> None:
    gradients = []
    for apart in (True, False):
        model, members = together(configs(), apart)
        with torch.no_grad():
            for own in members.parameters:
                for number, parameter in enumerate(own):
                    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                    parameter.copy_(0.05 * drawn)
        model(**batch(0)).loss.backward()
        gradients.append(gradients_of(members))
    for exact, quick in zip(*gradients, strict=True):
        torch.testing.assert_close(quick, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
        assert exact.abs().max() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own code, while it compiles
@pytest.mark.parametrize("compiles", [False, True])
def test_gradients_lie_as_their_weights_do_so_that_they_are_copied_together(compiles: bool) -> None:
    model, members = together(configs(), False)
    if compiles:
        torch.compiler.reset()
        compile_layers(model)
    trained = [weight for own in members.parameters for weight in own]
    for weight, gradient in zip(trained, torch.autograd.grad(model(**batch(0)).loss, trained), strict=True):
        assert gradient.stride() == weight.stride()


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "in one product"])
def test_what_goes_wrong_in_one_adapter_stays_there(apart: bool) -> None:
    said = []
    for is_broken in (False, True):
        model, members = together(configs(), apart)
        if is_broken:
            with torch.no_grad():
                members.parameters[1][0][0, 0] = float("nan")
        groups = list(zip(members.parameters, RATES, strict=True))
        said.append(stepped(model, groups, lambda _, members=members: members.losses.tolist()))
    for well, broken in zip(*said, strict=True):
        assert (broken[0], broken[2]) == (well[0], well[2])
        assert broken[1] != broken[1], "it is not a number"


def test_within_only_the_model_is_that_of_one_adapter_and_afterwards_all_train_again() -> None:
    asked = configs()
    model, members = together(asked)
    before = model(**batch(0)).loss
    for number, config in enumerate(asked):
        single = loaded(config)
        with members.only(number):
            assert [name for name, _ in model.named_parameters()] == [name for name, _ in single.named_parameters()]
            assert {name: part.r for name, part in model.peft_config.items()} == {"default": RANKS[number]}
            assert model(**batch(0)).loss.item() == single(**batch(0)).loss.item()
    assert torch.equal(model(**batch(0)).loss, before)


def test_a_model_that_keeps_its_loss_to_itself_is_not_supported() -> None:
    trained = MembersLora(configs())
    model = loaded(configs()[0], trained)
    causal = model.get_base_model()
    own = type(causal).forward

    def by_itself(*args: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        output = own(causal, *args, **inputs)
        output.loss = output.logits.sum()
        return output

    causal.forward = by_itself
    Members(model, trained.names).join(apart=True)
    with pytest.raises(Unsupported, match="cotrain"):
        model(**batch(0))


def test_a_step_over_fixed_memory_gives_each_the_same_losses_and_gradients() -> None:
    model, members = together(configs())
    model(**batch(0)).loss.backward()
    wanted, losses = gradients_of(members), members.losses.clone()
    model.zero_grad()
    place = members.losses
    step = GraphStep(model, nullcontext, graphs=False)
    use_graph_step(model, step)
    step.record(batch(1))
    model(**batch(0)).loss.backward()
    assert step.replays == 1
    assert members.losses is place, "a replay writes where the recording did"
    assert torch.equal(place, losses)
    assert all(torch.equal(*pair) for pair in zip(gradients_of(members), wanted, strict=True))


def test_each_is_clipped_by_its_own_norm_and_one_that_is_no_number_spoils_no_other() -> None:
    model, members = together(configs())
    model(**batch(0)).loss.backward()
    for number, parameter in enumerate(members.parameters[1]):
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan") if number == 0 else 1.0)
    for norm in (float("inf"), 1e-3):
        members.clip(None, norm)
        for own in (members.parameters[0], members.parameters[2]):
            length = torch.nn.utils.get_total_norm([part.grad for part in own])
            assert 0 < length <= 1.001 * norm
    assert length == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.nightly
def test_layers_that_are_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself would take minutes for a model of many layers, and be refused as too many compilations."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    trained = MembersLora(configs())
    model = loaded(configs()[0], trained)
    members = Members(model, trained.names)
    compiled.compile_layers(model)
    members.join(apart=False)
    before = compiled.compilations()
    model(**batch(0)).loss.backward()
    assert compiled.compilations() - before == 1
    assert len(compiled.decoder_layers(model)) == 2
