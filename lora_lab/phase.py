"""The phases of a trial."""

from enum import Enum


class Phase(Enum):
    """A worker's phases, in this order. Conversion happens only when weights are used for the first time. A job goes
    from `window` to `evaluation` or `checkpoint` and back, again and again."""

    start = "start"
    matmul_rate = "matmul_rate"
    """Only the first time on a device: how fast it multiplies matrices."""
    conversion = "conversion"
    data = "data"
    model = "model"
    screening = "screening"
    """Only with data.min_perplexity: how well the model knows each row before it is trained."""
    evaluation_before = "evaluation_before"
    compilation = "compilation"
    """Only with engine=compile and graph: a step of each shape is compiled, and recorded."""
    warm_up = "warm_up"
    window = "window"
    evaluation = "evaluation"
    """In a job: the held-out rows, between two steps."""
    checkpoint = "checkpoint"
    """In a job: what is needed to go on from here is saved."""
    profile = "profile"
    """A few steps after the window under torch's profiler: how long the GPU itself works on a step."""
    evaluation_after = "evaluation_after"
    saving = "saving"
    answers = "answers"
    """Held-out prompts are answered, with and without what was trained."""


FIRST_STEP = "first_step"
"""The name of a PhaseMemory that describes the first step of the warm-up."""
