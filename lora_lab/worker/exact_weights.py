"""Find out which exact weights a trial trains on."""

import contextlib
import hashlib
from pathlib import Path

from lora_lab.base_weights import WEIGHTS, BaseWeights
from lora_lab.config import ModelConfig
from lora_lab.options import ModelSource, Weights
from lora_lab.packages import converted_folder
from lora_lab.reading import Damaged, whole
from lora_lab.worker.checkpoint import weight_files

_DIGESTED = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.model")


def exact_weights(model: ModelConfig, digest: bool) -> BaseWeights:
    """Return which weights a model's are, once they have been loaded.

    Args:
        digest: whether the files of a local folder are read for their sha256: a second per GB or so.

    Raises: OSError.
    """
    if model.weights is Weights.random:
        return BaseWeights(source=Weights.random.value)
    source, remote_code = model.source.value, model.trust_remote_code
    if model.source is ModelSource.package and model.package is not None:
        package = model.package
        return BaseWeights(
            source=source,
            id=model.id or "",
            package=f"{package.name}=={package.version}",
            sha256=package.sha256,
            folder=str(converted_folder(package)),
        )
    if model.source is ModelSource.hub:
        folder = hub_snapshot(model)
        return BaseWeights(
            source=source,
            id=str(model.id),
            commit="" if folder is None else folder.name,
            folder="" if folder is None else str(folder),
            remote_code=remote_code,
            remark="its files are not in the hub's cache" if folder is None else "",
        )
    folder = Path(str(model.path)).resolve()
    files = _sha256_of_files(folder) if digest else {}
    listed = "".join(f"{sha256}  {name}\n" for name, sha256 in files.items())
    return BaseWeights(
        source=source,
        files=files,
        sha256=hashlib.sha256(listed.encode()).hexdigest() if files else "",
        folder=str(folder),
        remote_code=remote_code,
        remark="" if files else "its files are digested in a job only, because that takes time",
    )


def noted_weights(trial: Path) -> BaseWeights | None:
    """Return the weights that a trial's folder notes; None where it notes none, or the note is damaged."""
    with contextlib.suppress(Damaged):
        return whole(BaseWeights, trial / WEIGHTS)
    return None


def hub_snapshot(model: ModelConfig) -> Path | None:
    """Return the folder of a hub model in the cache, whose name is the commit; None where it is not there."""
    files = weight_files(model)
    return files[0].parent if files else None


def _sha256_of_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file that decides what the model computes, by its name, in order."""
    found = {}
    for path in sorted({path for pattern in _DIGESTED for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as opened:
            found[path.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found
