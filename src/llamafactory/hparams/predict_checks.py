"""Rules of predictions: which stages write them, what beside them cannot be, and the packages that score texts."""

from __future__ import annotations

from collections.abc import Iterator

from llamafactory.extras.errors import Problem
from llamafactory.extras.packages import install_hint, is_installed
from llamafactory.hparams.run_config import RunConfig

_PREDICTS = {"sft": "answers", "rm": "scores"}
"""Stage -> what it predicts. Stages from elsewhere say so themselves, in their `Stage`."""
_SCORERS = ("jieba", "nltk", "rouge_score")


def check_prediction_stage(config: RunConfig) -> Iterator[Problem]:
    """Only some stages have something to predict."""
    train = config.train
    if config.command != "train" or "." in train.stage:
        return
    if train.do_predict and train.stage not in _PREDICTS:
        yield Problem(
            key="do_predict",
            message=f"stage {train.stage} has nothing to predict",
            allowed="stage sft, which writes answers, or rm, which writes scores",
            fix="do_predict: false; or stage: sft with the trained model, to write its answers",
        )
    if train.predict_with_generate and train.stage != "sft":
        yield Problem(
            key="predict_with_generate", message=f"only for stage sft, not {train.stage}", fix="remove this key"
        )
    if train.do_predict and train.stage == "sft" and not train.predict_with_generate:
        yield Problem(
            key="do_predict",
            message="stage sft predicts answers, and predict_with_generate, which writes them, is off",
            fix="predict_with_generate: true",
        )


def check_predicted_weights(config: RunConfig) -> Problem | None:
    """Predictions are made by the weights in memory, which are the last ones."""
    train = config.train
    if not (config.command == "train" and train.do_train and train.do_predict and train.load_best_model_at_end):
        return None
    return Problem(
        key="do_predict",
        message="would use the last weights, and load_best_model_at_end keeps the best ones",
        fix="predict in a run of its own, from the output_dir of this one; or load_best_model_at_end: false",
    )


def check_generated_answers(config: RunConfig) -> Iterator[Problem]:
    """What cannot be together with answers that are generated in bulk."""
    if config.command != "train" or not config.train.predict_with_generate:
        return
    if getattr(config.stage_options, "compute_accuracy", False):
        yield Problem(
            key="predict_with_generate",
            message="cannot be combined with compute_accuracy, which looks at the tokens of the rows",
            fix="remove one of the two",
        )
    if config.generation.num_beams > 1:
        yield Problem(key="num_beams", message="predictions are made without beams", fix="num_beams: 1")
    if config.generation.repetition_penalty != 1.0:
        yield Problem(
            key="repetition_penalty",
            message="not known to the generator of predictions",
            fix="repetition_penalty: 1.0, or chat with the model",
        )
    if config.data.streaming and config.data.val_size:
        yield Problem(
            key="predict_with_generate",
            message="rows that are held out of a stream are not there to be answered",
            fix="name them as eval_dataset instead of val_size",
        )
    if not (config.data.dataset or config.data.eval_dataset):
        yield Problem(
            key="predict_with_generate",
            message="tokenised rows alone have no prompts to answer",
            fix="set eval_dataset",
        )


def check_scorers(config: RunConfig) -> Iterator[Problem]:
    """Scores of texts need their packages."""
    if config.command != "train" or not config.train.predict_with_generate:
        return
    missing = [name for name in _SCORERS if not is_installed(name)]
    if missing:
        yield Problem(
            key="predict_with_generate",
            message=f"ROUGE and BLEU need {', '.join(missing)}",
            fix=install_hint("metrics"),
        )


PREDICT_CHECKS = (check_prediction_stage, check_predicted_weights, check_generated_answers, check_scorers)
