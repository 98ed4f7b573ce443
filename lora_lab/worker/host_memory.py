"""Hold a tensor's content in host memory that the card reads over PCIe, by CUDA's driver.

torch's own pinned memory does not serve: it is rounded up to a power of two, so that 1.1 GiB would take 2. Nor does
memory that is page-locked later (cudaHostRegister): kernels cannot use its address on every platform.
"""

import ctypes
import functools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

_FOR_ALL_CONTEXTS = 1  # CU_MEMHOSTALLOC_PORTABLE
_MEMORY_TYPE, _HOST = 2, 1  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_HOST


class Driver(Protocol):
    """What is needed of CUDA's driver."""

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes of page-locked host memory, the same for host and card.

        Raises: MemoryError with the driver's reason."""

    def free(self, address: int) -> None:
        """Give memory back when the card has done what uses it."""


class _Cuda:
    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def allocate(self, size: int) -> int:
        address = ctypes.c_void_p()
        fault = self._library.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), _FOR_ALL_CONTEXTS)
        if fault or address.value is None:
            reason = ctypes.c_char_p()
            self._library.cuGetErrorString(fault, ctypes.byref(reason))
            raise MemoryError((reason.value or b"no reason").decode())
        return address.value

    def free(self, address: int) -> None:
        self._library.cuCtxSynchronize()
        self._library.cuMemFreeHost(ctypes.c_void_p(address))

    def is_host(self, address: int) -> bool:
        kind = ctypes.c_uint()
        # an address that the driver does not know leaves it at 0
        self._library.cuPointerGetAttribute(ctypes.byref(kind), _MEMORY_TYPE, ctypes.c_uint64(address))
        return kind.value == _HOST


@functools.cache
def _cuda() -> _Cuda:
    return _Cuda()


class HostMemory:
    """Page-locked host memory, which torch takes for the card's. It is freed with the last tensor in it."""

    def __init__(self, size: int, driver: Driver) -> None:
        """Allocate `size` bytes.

        Raises: MemoryError."""
        self.address, self.size = driver.allocate(size), size
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",  # it has no name for bf16
            "data": (self.address, False),
            "version": 3,
        }
        weakref.finalize(self, driver.free, self.address).atexit = False  # a process that ends gives it back

    def on_host(self) -> Tensor:
        """Return the bytes as a tensor of the CPU, which does not keep them alive."""
        memory: Any = (ctypes.c_char * self.size).from_address(self.address)
        return torch.frombuffer(memory, dtype=torch.uint8)


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the card whose memory is the host's. To torch it is on the card all the same.

    Raises: MemoryError when the driver cannot page-lock as much, with its reason."""
    memory = HostMemory(tensor.nbytes, _cuda())
    memory.on_host().view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return _as_on_card(memory, tensor, tensor.shape)


def joined(tensors: list[Tensor]) -> Tensor:
    """Return tensors of one kind one after the other, in the memory that they are in: the card's or the host's.

    Raises: MemoryError when the driver cannot page-lock as much, with its reason."""
    first = tensors[0]
    if not is_in_host_memory(first):
        return torch.cat(tensors)
    memory = HostMemory(sum(tensor.nbytes for tensor in tensors), _cuda())
    whole = _as_on_card(memory, first, (sum(map(len, tensors)), *first.shape[1:]))
    return torch.cat(tensors, out=whole)


def _as_on_card(memory: HostMemory, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.as_tensor(memory, device=like.device).view(like.dtype).view(shape)


def is_in_host_memory(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor that torch takes for the card's is the host's, as the driver says."""
    # its storage may have no memory at the moment: a tensor does not say its address then
    return tensor.is_cuda and _cuda().is_host(tensor.untyped_storage().data_ptr())
