"""The files that a run leaves behind besides weights: results, `run.json`, the model card."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras import log
from llamafactory.extras.checkout import git_commit
from llamafactory.extras.files import write_json
from llamafactory.extras.packages import version
from llamafactory.hparams.sharding import configuration_files
from llamafactory.model.method import load_method
from llamafactory.train.output_dir import RECORD_FORMAT
from llamafactory.train.stage import load_stage

if TYPE_CHECKING:
    from llamafactory.hparams.run_config import RunConfig

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        output_dir: its folder.
        metrics: everything that is in `all_results.json`.
        exit_code: 0 done; 130 or 143 stopped by a signal after saving.
        summary: the true last line.
    """

    output_dir: Path
    metrics: Mapping[str, float]
    exit_code: int
    summary: str


def write_results(output_dir: Path, split: str, metrics: Mapping[str, float]) -> None:
    """Writes `<split>_results.json` and adds the same values to `all_results.json`; a damaged one is written anew."""
    write_json(output_dir / f"{split}_results.json", dict(metrics))
    combined = output_dir / "all_results.json"
    write_json(combined, {**_read_results(combined), **metrics})


def _read_results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        log.warn(f"{path} is damaged: it is written anew, with the results of this run alone")
        return {}
    return found


def run_record(
    cfg: RunConfig, *, run_id: str, state: str, plan: Mapping[str, Any], data: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """What is needed to run the same thing again, secrets masked.

    Args:
        cfg: the resolved configuration.
        run_id: of the run.
        state: running, finished, interrupted or failed.
        plan: the model plan.
        data: the data report with its fingerprints.
        **more: further facts, for example trainable parameters.
    """
    return {
        "format": RECORD_FORMAT,
        "run_id": run_id,
        "state": state,
        "config": cfg.flat(mask_secrets=True),
        "given": cfg.given_keys(),
        "files": configuration_files(cfg),
        "plan": dict(plan),
        "data": dict(data),
        "packages": package_versions(),
        "git_commit": git_commit(),
        **more,
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    from llamafactory import __version__

    versions = {"llamafactory": __version__, "python": platform.python_version()}
    versions |= {name: found for name in _PACKAGES if (found := version(name))}
    return versions


def write_model_card(
    output_dir: Path,
    cfg: RunConfig,
    record: Mapping[str, Any],
    metrics: Mapping[str, float],
    readings: Sequence[str] = (),
) -> None:
    """Writes `README.md`: base, method, data, figures, what the curves say, and how to use the result."""
    train, base = cfg.train, str(cfg.model.model_name_or_path)
    is_adapter = load_method(train.finetuning_type).saves_adapter
    tags = ["llama-factory", train.finetuning_type, train.stage]
    front = ["---", f"library_name: {'peft' if is_adapter else 'transformers'}", f"base_model: {_quoted(base)}",
             "tags:", *(f"- {_quoted(tag)}" for tag in tags), "---"]  # fmt: skip
    keys = {"dataset": ", ".join(cfg.data.dataset), "template": cfg.data.template or "auto",
            "cutoff_len": cfg.data.cutoff_len, "learning_rate": train.learning_rate,
            "lr_scheduler_type": train.lr_scheduler_type, "num_train_epochs": train.num_train_epochs,
            "per_device_train_batch_size": train.per_device_train_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps, "seed": train.seed}  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    said = ["", "## What the curves say", "", *(f"- {sentence}" for sentence in readings)] if readings else []
    body = [
        f"# {_line(train.run_name or output_dir.resolve().name)}",
        "",
        f"{train.finetuning_type} fine-tune ({train.stage}) of {_code(base)}, "
        f"{record.get('trainable_parameters', 0):,} trained parameters.",
        "", "## Figures", "", *_table("metric", {name: f"{value:.6g}" for name, value in metrics.items()}), *said,
        "", "## Settings", "", *_table("key", keys),
        "", "The whole configuration, data fingerprints and versions are in `run.json`.",
        "", "## Use", "", "```", _use(cfg, output_dir, is_adapter=is_adapter), "```",
        "", f"Made with {versions}.",
    ]  # fmt: skip
    text = "\n".join([*front, "", *body, ""])
    (output_dir / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _use(cfg: RunConfig, output_dir: Path, *, is_adapter: bool) -> str:
    """A command for a shell that uses the result."""
    words = [f"model_name_or_path={cfg.model.model_name_or_path if is_adapter else output_dir}"]
    if is_adapter:
        words.append(f"adapter_name_or_path={output_dir}")
    scores = load_stage(cfg.train.stage).predicts == "scores"
    if scores:
        words += ["dataset=FILE", f"template={cfg.data.template or 'auto'}"]
    return shlex.join(["llamafactory-cli", "score" if scores else "chat", *words])


def _table(name: str, rows: Mapping[str, Any]) -> list[str]:
    cells = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return [f"| {name} | value |", "|---|---|", *cells]


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _cell(value: object) -> str:
    return _line(value).replace("|", "\\|")


def _code(text: str) -> str:
    """Text in backticks, more of them where it holds some (CommonMark, code spans)."""
    return f"`` {_line(text)} ``" if "`" in text else f"`{_line(text)}`"


def _quoted(text: str) -> str:
    """A string of YAML, whatever characters it has: one of JSON, with what YAML wants escaped besides."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(
        one if one.isprintable() else f"\\u{ord(one):04x}" if one <= "\uffff" else f"\\U{ord(one):08x}"
        for one in quoted
    )
