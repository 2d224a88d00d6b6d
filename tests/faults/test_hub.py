"""A hub that breaks: nothing is asked of it after the first step, a copy on this machine is enough, nothing hangs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.faults.cells import DATASETS
from tests.faults.conftest import write_place
from tests.faults.harness import Outcome, Place, zygote
from tests.faults.hub import COMMIT, Hub
from transformers import AutoModelForCausalLM

OTHERS = ("hang", "500", "403", "404")
SECONDS = "2"
"""Patience of the hub's clients; by itself it is 10 s."""


@pytest.fixture(scope="module")
def hub(faults_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Models `tiny/...`, adapters for them `tuned/...`, data sets `rows/...` and `pairs/...`."""
    folder = tmp_path_factory.mktemp("hub")
    write_place(folder, faults_model, 14)
    for name in ("rows", "pairs"):
        (folder / name).mkdir()
        (folder / f"{name}.json").rename(folder / name / "train.json")
    (folder / "adapter").mkdir()
    models = {"tiny": faults_model, "tuned": folder / "adapter"}
    one = Hub({"models": models, "datasets": {name: folder / name for name in ("rows", "pairs")}})
    yield one
    one.close()


@pytest.fixture(scope="module")
def runner(hub: Hub, faults_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs that know this hub, with a cache of their own."""
    folder = tmp_path_factory.mktemp("hub")
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1",
        "HF_HUB_ETAG_TIMEOUT": SECONDS, "HF_HUB_DOWNLOAD_TIMEOUT": SECONDS, "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    with zygote(**environment) as one:
        words = write_place(folder, faults_model, num_rows=4, val_size="2", max_steps="1", finetuning_type="lora")
        assert one.ask({"warm": ["train", *words, f"output_dir={folder / 'out'}"]})["code"] == 0
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / "out" / name, hub.owners["models"]["tuned"] / name)
        yield one


def words_of(folder: Path, model: Path, name: str) -> tuple[str, ...]:
    """Model, adapter and rows come from repositories of this name."""
    words = write_place(
        folder, model, 14, val_size="4", eval_strategy="steps", eval_steps="2", save_total_limit="99",
        model_name_or_path=f"tiny/{name}", adapter_name_or_path=f"tuned/{name}", dataset="rows of the hub",
    )  # fmt: skip
    entries = json.loads((folder / "dataset_info.json").read_text())
    for key in ("rows", "pairs"):
        rest = {option: value for option, value in DATASETS[key].items() if option != "file_name"}
        entries[f"{key} of the hub"] = {**rest, "hf_hub_url": f"{key}/{name}"}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return words


@pytest.fixture
def place(runner: Any, tmp_path: Path, faults_model: Path, request: pytest.FixtureRequest) -> Place:
    """A place with this test's own repositories, which nothing has cached."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:80].strip("-")
    return Place(zygote=runner, folder=tmp_path, words=words_of(tmp_path, faults_model, name))


WORDS = {
    "sft": (),
    "dpo": ("stage=dpo", "dataset=pairs of the hub", "ref_model=tiny/reference", "adapter_name_or_path=null"),
}


@pytest.mark.parametrize(("stage", "state"), [("sft", "hang"), pytest.param("dpo", "500", marks=pytest.mark.long)])
def test_nothing_is_asked_of_the_hub_after_the_first_step(place: Place, hub: Hub, stage: str, state: str) -> None:
    run = place.begin("out", *WORDS[stage], fault="step:2:sleep=1")
    run.reach_fault()
    with hub.failing(state):
        num_asked = len(hub.asked)
        assert num_asked
        assert not any("telemetry" in asked.path or "agent" in asked.path for asked in hub.asked)
        assert run.wait() == 0, run.text[-3000:]
        assert hub.asked[num_asked:] == []
    names = {path.name for path in (place.folder / "out").iterdir()}
    assert names >= {"README.md", "adapter_model.safetensors", "eval_results.json", "checkpoint-6", "tokenizer.json"}
    config = json.loads((place.folder / "out" / "adapter_config.json").read_text())
    assert stage == "sft" or f"model_name_or_path={config['base_model_name_or_path']}" in place.words


@pytest.fixture(scope="module")
def reference(runner: Any, faults_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What every run of the configuration must come to."""
    folder = tmp_path_factory.mktemp("reference")
    return Place(zygote=runner, folder=folder, words=words_of(folder, faults_model, "reference")).finish("out")


@pytest.mark.parametrize("state", ["down", *(pytest.param(one, marks=pytest.mark.long) for one in OTHERS)])
def test_a_run_goes_on_with_the_copies_on_this_machine(place: Place, hub: Hub, reference: Outcome, state: str) -> None:
    assert place.begin("out", fault="step:5:kill").wait() == -9
    with hub.failing(state):
        run = place.begin("out")
        assert run.wait() == 0, run.text[-3000:]
    assert run.text.count("The copy on this machine is used") == 3  # of model, adapter and rows
    assert place.outcome("out") == reference


def test_a_run_goes_on_with_the_models_that_it_began_with(
    place: Place, hub: Hub, reference: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody uploads other weights while it is down."""
    assert place.begin("out", fault="step:5:kill").wait() == -9
    models = dict(hub.owners["models"])
    other = shutil.copytree(models["tiny"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(hub, "owners", {**hub.owners, "models": {**models, "tiny": other}})
    monkeypatch.setattr(hub, "commits", [*hub.commits, "f" * 40])
    assert place.finish("out") == reference
    revisions = json.loads((place.folder / "out" / "run.json").read_text())["revisions"]
    assert list(revisions.values()) == [COMMIT, COMMIT]  # model and adapter
    assert place.finish("new").weights != reference.weights


def test_the_value_head_of_a_reward_model_on_the_hub_is_trained_on(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new head in its place would begin with other losses."""
    judge = ("stage=rm", "finetuning_type=full", "dataset=pairs", "adapter_name_or_path=null")
    place.finish("judge", *judge)
    monkeypatch.setattr(hub, "owners", {**hub.owners, "models": {"judge": place.folder / "judge"}})
    local = place.finish("local", *judge, f"model_name_or_path={place.folder / 'judge'}")
    remote = place.finish("remote", *judge, "model_name_or_path=judge/one", "overwrite_cache=true")
    assert (remote.losses, remote.weights) == (local.losses, local.weights)


def test_of_a_model_only_what_is_read_is_downloaded_and_that_is_enough_offline(
    place: Place, hub: Hub, faults_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in several files, beside others that nobody reads."""
    folder = shutil.copytree(faults_model, tmp_path / "parts")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    AutoModelForCausalLM.from_pretrained(faults_model).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 1
    (folder / "pytorch_model.bin").write_bytes(b"never")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "owners", {**hub.owners, "models": {"tiny": folder}})
    words = ("adapter_name_or_path=null", "dataset=rows", "max_steps=2")
    online, num_asked = place.finish("online", *words), len(hub.asked)
    names = [asked.path.rsplit("/", 1)[-1] for asked in hub.asked]
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(names)
    assert not any("onnx" in asked.path for asked in hub.asked)
    assert place.finish("offline", *words, "offline=true") == online
    assert hub.asked[num_asked:] == []


ERRORS = {
    "404": ("has no such repository, or a private one (404)", "HF_TOKEN"),
    "403": ("its owner gives access on request only", "ask for it at http"),
    "401": ("refuses access (401)", "HF_TOKEN"),
    "500": ("gives no answer (status 500)", "check the network"),
    "hang": ("gives no answer (ReadTimeout", "check the network"),
    "down": ("gives no answer (ConnectError", "check the network"),
}


@pytest.mark.parametrize(
    ("what", "state"),
    [
        *(("model", state) for state in ERRORS),
        *(pytest.param("adapter", state, marks=pytest.mark.long) for state in ERRORS),
        *(pytest.param("rows", state, marks=pytest.mark.long) for state in ERRORS),
    ],
)
def test_what_cannot_be_downloaded_ends_in_one_error(
    place: Place, hub: Hub, faults_model: Path, what: str, state: str
) -> None:
    model = f"model_name_or_path={faults_model}"
    local = {"model": (), "adapter": (model, "dataset=rows"), "rows": (model, "adapter_name_or_path=null")}
    with hub.failing(state):
        run = place.begin("out", *local[what])
        code = run.wait()
    assert (code, "Traceback" in run.text) == (3 if what == "rows" else 1, False), run.text[-3000:]
    for fragment in ERRORS[state]:
        assert fragment in run.text[run.text.index("error: ") :]


@pytest.mark.long
@pytest.mark.parametrize(("file", "state"), [("model.safetensors", "hang"), ("train.json", "500")])
def test_a_download_that_breaks_off_ends_in_one_error(place: Place, hub: Hub, file: str, state: str) -> None:
    with hub.failing(state, only=f"/{file}"):
        run = place.begin("out")
        code = run.wait()
    assert (code, "Traceback" in run.text) == (3 if file == "train.json" else 1, False), run.text[-3000:]
    assert "from the hub" in run.text[run.text.index("error: ") :]
    assert "gives no answer" in run.text[run.text.index("error: ") :]
    place.finish("out")
