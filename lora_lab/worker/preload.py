"""Import libraries once in the forkserver, with the GPUs hidden; every worker starts with them.

transformers.trainer and peft import bitsandbytes, which picks its CPU or CUDA library while being
imported, for good. Here no GPU is to be seen, so it must wait for the worker, which sees one.
"""

import signal

# Ctrl-C goes to the whole process group; the parent ends its workers itself. Workers inherit this.
signal.signal(signal.SIGINT, signal.SIG_IGN)

import gc  # noqa: E402
import importlib.machinery  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from types import ModuleType  # noqa: E402


class _Later:
    """A finder that makes `import bitsandbytes` fail, while find_spec still says that it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == "bitsandbytes" else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        raise ImportError("bitsandbytes waits for the worker, which sees the GPU")

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError("bitsandbytes waits for the worker, which sees the GPU")


# An error here ends the server, and the next one leaves the import to the worker, whose log then has it.
sys.excepthook = lambda *_: None
_later = _Later()
sys.meta_path.insert(0, _later)
try:
    import torch._inductor.compile_fx  # noqa: F401  # bitsandbytes applies torch.compile while being imported
    import tqdm
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import lora_lab.worker.trial  # noqa: F401
finally:
    sys.meta_path.remove(_later)
sys.excepthook = sys.__excepthook__
# tqdm's own lock is a semaphore of the system's, which a killed worker would leave behind
tqdm.tqdm.set_lock(threading.RLock())
gc.collect()
gc.freeze()
