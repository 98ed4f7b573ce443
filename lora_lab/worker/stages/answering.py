"""Answer held-out prompts, and write down what was asked and answered. What was trained is saved by then."""

import time

from lora_lab.events import Answered, Progress
from lora_lab.options import DataSource, PlacementKind
from lora_lab.outcome import says_out_of_memory
from lora_lab.phase import Phase
from lora_lab.quality.answer_rows import ANSWERS, AnswerRow
from lora_lab.quality.exact_match import matches
from lora_lab.quality.rouge import NOT_INSTALLED, rouge_l
from lora_lab.worker.answers import Answer, Question, Writer, answers_asked, most_tokens, questions, why_no_question
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.tokenizer_files import load_tokenizer


def _is_needed(trial: TrialContext) -> bool:
    if not trial.group.is_lead and trial.config.placement.kind is not PlacementKind.fsdp:
        return False  # with shared out weights all are needed for each token
    return answers_asked(trial.config) > 0 and trial.config.data.source is not DataSource.random_tokens


def _answer(trial: TrialContext) -> None:
    asked = questions(trial.examples.heldout, answers_asked(trial.config))
    if not asked:
        trial.warn(why_no_question(trial.config))
        return
    tokenizer = load_tokenizer(trial.config.model)
    writer = Writer(trial.model, tokenizer, trial.config, trial.padding, trial.examples.end_of_turn)
    most = most_tokens(trial.architecture, asked)
    try:
        base, tuned = (_written(trial, writer, asked, most, tuned) for tuned in (False, True))
    except RuntimeError as error:
        if not says_out_of_memory(str(error)):
            raise
        trial.warn("no held-out prompt is answered: the memory does not suffice for it")
        return
    if not trial.group.is_lead:
        return
    texts = [[writer.text(each.ids) for each in side] for side in (base, tuned)]
    gold = [writer.text(each.gold) for each in asked]
    rows = [
        AnswerRow(
            prompt=tokenizer.decode(question.prompt),
            gold=right,
            base=base_text,
            tuned=tuned_text,
            base_ended=one.ended,
            tuned_ended=other.ended,
            base_tokens=len(one.ids),
            tuned_tokens=len(other.ids),
        )
        for question, right, base_text, tuned_text, one, other in zip(asked, gold, *texts, base, tuned, strict=True)
    ]
    try:
        (trial.folder / ANSWERS).write_text("".join(row.encode() + "\n" for row in rows), encoding="utf-8")
    except OSError as error:  # a full disk must not cost the figures
        trial.warn(f"the answers were not saved: {error}")
    try:
        rouge, no_rouge = [rouge_l(side, gold) for side in texts], ""
    except ImportError:
        rouge, no_rouge = [[], []], NOT_INSTALLED
    for is_tuned, answers, written, scores in zip((False, True), (base, tuned), texts, rouge, strict=True):
        trial.emit(
            Answered(
                t=time.monotonic(),
                tuned=is_tuned,
                ended=[each.ended for each in answers],
                tokens=[len(each.ids) for each in answers],
                exact=[matches(text, right) for text, right in zip(written, gold, strict=True)],
                most_tokens=most,
                rouge_l=scores,
                no_rouge_l=no_rouge,
            )
        )


def _written(trial: TrialContext, writer: Writer, asked: list[Question], most: int, tuned: bool) -> list[Answer]:
    def progress(done: int) -> None:
        behind = len(asked) if tuned else 0
        trial.emit(Progress(t=time.monotonic(), done=behind + done, total=2 * len(asked)))

    return writer.write(asked, most, tuned, progress)


STAGE = Stage(Phase.answers, _answer, _is_needed, each_member=True)
