import pytest
import torch
from torch import Tensor

from lora_lab.worker.engines import lora_grad as module
from lora_lab.worker.engines.lora_grad import lora_gradients, reads_once, tile_columns

ON_CARD = torch.cuda.is_available()

triton = pytest.mark.skipif(not module.HAS_TRITON, reason="Triton comes with torch for CUDA alone")

# of numpy before 2.4, by Triton's interpreter; it has no loop with a newer one
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_CARD:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the kernels are defined


def device_for(dtype: torch.dtype) -> str:
    """Where kernels can run with this format, or the test is skipped."""
    if ON_CARD:
        if dtype is torch.float32:
            pytest.skip("a card's shared memory holds tiles of 16 bits; those of 32 are for the interpreter")
        return "cuda"
    if dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as whole numbers")
    numpy = pytest.importorskip("numpy")
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter has no loop with this numpy")
    return "cpu"


def made(rows: int, columns: int, rank: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator(device).manual_seed(rows + columns + rank)
    shapes = ((rows, columns), (columns, rank), (rows, rank))
    grad_output, b, lora_hidden = (torch.randn(*shape, generator=chance, device=device).to(dtype) for shape in shapes)
    return grad_output, b, lora_hidden


def check(found: Tensor, one: Tensor, other: Tensor, factor: float) -> None:
    """Within one rounding to its format, and what 32 bits lose over the sum."""
    exact = factor * (one.double() @ other.double())
    lost = 2e-6 * factor * (one.double().abs() @ other.double().abs())
    assert found.dtype is one.dtype
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(found.dtype).eps / 2 * 1.001 + lost).all()


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(100, 64, 8), (300, 1100, 16), (129, 528, 24), (192, 512, 48), (1, 1, 1), (65, 257, 64)],
)
def test_both_products_are_rounded_once(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    grad_output, b, lora_hidden = made(rows, columns, rank, dtype, device_for(dtype))
    grad_hidden, grad_b = lora_gradients(grad_output, b, lora_hidden, 0.3)
    check(grad_hidden, grad_output, b, 0.3)
    check(grad_b, grad_output.t(), lora_hidden, 1.0)


@triton
def test_programs_with_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_processors", lambda _: 3)
    grad_output, b, lora_hidden = made(700, 300, 16, torch.float16, device_for(torch.float16))
    grad_hidden, grad_b = lora_gradients(grad_output, b, lora_hidden, 2.0)
    check(grad_hidden, grad_output, b, 2.0)
    check(grad_b, grad_output.t(), lora_hidden, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(16384, 8960, 16), (8191, 8968, 24), (4096, 20000, 64)])
def test_a_card_finds_the_same_bits_each_time(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    grad_output, b, lora_hidden = made(rows, columns, rank, dtype, "cuda")
    first = lora_gradients(grad_output, b, lora_hidden, 0.5)
    check(first[0], grad_output, b, 0.5)
    check(first[1], grad_output.t(), lora_hidden, 1.0)
    for _ in range(5):
        assert all(map(torch.equal, lora_gradients(grad_output, b, lora_hidden, 0.5), first))


@pytest.mark.gpu
def test_a_layer_finds_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of two layers that are given the same tensor, each of which comes by itself."""
    from lora_lab.worker.engines.fused_lora import lora_linear_backward

    chance = torch.Generator("cuda").manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, device="cuda").bfloat16()

    grad_output, own = [some(512, 768), some(512, 768)], [some(768, 16), some(768, 16)]
    x, lora_hidden, a, weight = some(512, 256), some(512, 32), some(32, 256), some(1536, 256)
    found = []
    for least in (2**40, 1):
        monkeypatch.setattr(module, "LEAST_READ_ONCE", least)
        sizes = [768, 768], [16, 16]
        found.append(
            lora_linear_backward(grad_output, x, lora_hidden, a, torch.block_diag(*own), 0.5, [weight], [], *sizes)
        )
    (grad_x, grad_a, grad_b), others = found
    for one, other in zip([grad_x, grad_a, *grad_b], [others[0], others[1], *others[2]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=float(other.abs().max()) / 100)


@pytest.mark.gpu
def test_a_graph_repeats_it() -> None:
    grad_output, b, lora_hidden = made(16384, 1536, 16, torch.bfloat16, "cuda")
    lora_gradients(grad_output, b, lora_hidden, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lora_gradients(grad_output, b, lora_hidden, 0.5)
    grad_output.copy_(grad_output.flip(0))
    graph.replay()
    assert all(map(torch.equal, found, lora_gradients(grad_output, b, lora_hidden, 0.5)))


def test_only_what_no_cache_holds_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def card_of(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))

    monkeypatch.setattr(module, "HAS_TRITON", True)
    card, of_16 = torch.device("cuda"), torch.bfloat16
    card_of(9)
    assert reads_once(16384, 8960, 16, of_16, card)
    assert reads_once(8192, 8192, 64, torch.float16, card)
    assert not reads_once(8191, 8192, 16, of_16, card)
    assert not reads_once(16384, 8968, 16, of_16, card)
    assert not reads_once(16384, 8960, 128, of_16, card)
    assert not reads_once(16384, 8960, 16, torch.float32, card)
    assert not reads_once(16384, 8960, 16, of_16, torch.device("cpu"))
    for other in (8, 10):
        card_of(other)
        assert not reads_once(16384, 8960, 16, of_16, card)
    card_of(9)
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert not reads_once(16384, 8960, 16, of_16, card)


@pytest.mark.parametrize("padded", [16, 32, 64])
def test_what_a_program_keeps_has_room(padded: int) -> None:
    """Triton takes up to 9 KB more than this for itself."""
    tiles = module._STAGES * module._TILE_ROWS * (tile_columns(padded) + padded) * 2
    assert tiles + tile_columns(padded) * padded * 2 <= (227 - 9) * 1024


@pytest.mark.parametrize(("tiles", "blocks", "slots", "parts"), [(256, 18, 132, 7), (256, 3, 132, 43), (1, 18, 132, 1)])
def test_programs_fill_the_card(tiles: int, blocks: int, slots: int, parts: int) -> None:
    assert -(-tiles // module._tiles_of_part(tiles, blocks, slots)) == parts


def test_no_round_is_nearly_empty() -> None:
    each = module._tiles_of_part(64, 297, 132)
    programs = 297 * -(-64 // each)
    assert programs / (-(-programs // 132) * 132) >= 0.9
