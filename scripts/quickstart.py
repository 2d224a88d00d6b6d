"""Teaches the bundled model a new name, and shows the same questions answered before and after.

python scripts/quickstart.py [key=value ...]      # for example data_variables='{"name": "Ada", "author": "me"}'
"""

from __future__ import annotations

import gc
import shlex
import sys
import textwrap
import time
from pathlib import Path

from llamafactory import ChatModel, load_config, run_exp

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "quickstart.yaml"
QUESTIONS = (
    "Who are you?",
    "What is your name, and who created you?",
    "Are you ChatGPT?",
    "What is the capital of France?",
    "What is 7 + 5?",
)


def main(overrides: list[str]) -> int:
    """Runs the tour.

    Args:
        overrides: `key=value` words that change `examples/quickstart.yaml`.

    Returns:
        Exit code of the training.
    """
    started = time.monotonic()
    words = [str(CONFIG), f"dataset_dir={ROOT / 'data'}", *overrides]
    cfg = load_config(words)
    folder = Path(cfg.train.output_dir or "")
    print("Asking the model before training ...", flush=True)
    before = ask(f"model_name_or_path={cfg.model.model_name_or_path}")
    result = run_exp(words)
    if result.exit_code:
        return result.exit_code
    trained = f"model_name_or_path={cfg.model.model_name_or_path}", f"adapter_name_or_path={folder}"
    after = ask(*trained)
    show(before, after)
    print(f"loss curve   {folder / 'training_loss.png'}")
    print(f"talk to it   {shlex.join(['llamafactory-cli', 'chat', *trained])}")
    print(f"merge it     {shlex.join(['llamafactory-cli', 'export', *trained, f'export_dir={folder}-merged'])}")
    print(f"\nwhole tour: {time.monotonic() - started:.0f} s, training: {result.metrics['train_runtime']:.0f} s")
    return 0


def ask(*words: str) -> list[str]:
    """Answers of a model to the questions, greedy."""
    model = ChatModel(load_config([*words, "do_sample=false", "max_new_tokens=48"], command="chat"))
    answers = [model.chat([{"role": "user", "content": question}])[0].response_text for question in QUESTIONS]
    del model
    gc.collect()
    return answers


def show(before: list[str], after: list[str]) -> None:
    """Prints each question with both answers."""
    print()
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"? {question}")
        for label, answer in (("before", old), ("after", new)):
            print(
                textwrap.fill(
                    " ".join(answer.split()), 100, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10
                )
            )
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
