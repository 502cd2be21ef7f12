"""README and docs: every link leads somewhere, every command runs or is accepted, and both languages say the same."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import processes
import pytest
import yaml
from conftest import write_clip
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.model.loading import load_encoder
from llamafactory_video.model.servers import SERVERS
from llamafactory_video.records.parse import parse_record

ROOT = Path(__file__).parents[1]
ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [ROOT / "README_zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
PAGES = [*ENGLISH, *CHINESE, ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """Commands in blocks without a language, in words, without variables set before them."""
    found = []
    for text in blocks(page, ""):
        for line in text.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ ").split(" #")[0])
            except ValueError:  # what a command printed
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and words[0] in PROGRAMS:
                found.append(words)
    return found


CLIENTS = [f"{server}_client.py" for server in SERVERS]  # which `lmf-video export` writes
PROGRAMS = (
    "make",
    "lmf-video",
    "llamafactory-cli",
    "python",
    "python3.11",
    "pip",
    ".venv/bin/pytest",
    ".venv/bin/ruff",
)
ALL = [pytest.param(words, id=" ".join(words)) for words in {tuple(c): c for p in PAGES for c in commands(p)}.values()]


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target
    for target in re.findall(r"`((?:recipes|tests|docs|benchmarks|dataset_info)/[\w./]+)`", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(("page", "other"), zip(ENGLISH, CHINESE, strict=True), ids=page_id)
def test_both_languages_have_the_same_commands_and_tables(page, other):
    assert commands(page) == commands(other)
    assert [len(blocks(page, kind)) for kind in ("json", "python", "")] == [
        len(blocks(other, kind)) for kind in ("json", "python", "")
    ]
    rows = [len(re.findall(r"^\|", p.read_text(encoding="utf-8"), re.MULTILINE)) for p in (page, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("page", [ROOT / "docs/architecture.md", ROOT / "docs/zh/architecture.md"], ids=page_id)
def test_every_file_of_the_plugin_has_its_row(page):
    package = ROOT / "plugin/llamafactory_video"
    files = {str(file.relative_to(package)) for file in package.rglob("*.py")}
    expected = {name for name in files if not name.startswith("demo/") and not name.endswith("/__init__.py")}
    assert set(re.findall(r"^\| `([\w/]+\.py)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)) == expected


def test_the_readme_is_a_page():
    for name in ("README.md", "README_zh.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 200


def test_all_records_of_the_docs_are_right():
    examples = [text for page in PAGES if page.name == "records.md" for text in blocks(page, "json")]
    examples += [text for page in (ROOT / "README.md", ROOT / "README_zh.md") for text in blocks(page, "json")[:1]]
    assert len(examples) > 10
    for text in examples:
        value = json.loads(text)
        for record in value if isinstance(value, list) else [value]:
            problems = parse_record(record, lambda path: path)[1]
            assert not problems, (text, [str(problem) for problem in problems])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as a user's clone, with a small model under every name that the docs give."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "dataset_info"):
        shutil.copytree(ROOT / name, folder / name)
    save_tiny_model(folder / "tiny", hidden_size=32, layers=1, heads=2)
    (folder / "output").mkdir()
    for name in ("wzry_full", "wzry_full_1gpu", "wzry_lora"):
        (folder / "output" / name).symlink_to(folder / "tiny")
    # A whole model that tells how its clips are sampled.
    shutil.copytree(folder / "tiny", folder / "output/wzry_lora_merged")
    keys = {"video_sampling": "qwen_finetune", "video_min_pixels": 4096, "video_max_pixels": 65536}
    load_encoder(str(folder / "tiny"), **keys).processor.save_pretrained(folder / "output/wzry_lora_merged")
    (folder / "Qwen").mkdir()
    (folder / "Qwen/Qwen3-VL-4B-Instruct").symlink_to(folder / "tiny")
    turns = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    (folder / "data").mkdir()
    for name in ("wzry", "wzry_eval", "theirs"):
        (folder / "data" / f"{name}.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    clips = folder / "data/wzry/4"
    clips.mkdir(parents=True)
    for number in (1, 2):
        write_clip(clips / f"{number}.mp4", frames=20, fps=10, size=(64, 64), seed=number)
    demo = folder / "output/demo"
    (demo / "clips").mkdir(parents=True)
    (demo / "clips/06311.mp4").symlink_to(clips / "1.mp4")
    for name in ("base", "tuned"):
        (demo / name).symlink_to(folder / "tiny")
    (folder / "train_qwen.sh").write_text(
        "torchrun train_qwen.py --model_name_or_path m --video_fps 4", encoding="utf-8"
    )
    (folder / "message.json").write_text('{"type": "video", "video": "a.mp4", "fps": 2}', encoding="utf-8")
    return folder


@pytest.mark.parametrize("words", ALL)
def test_commands_run_or_are_accepted(home, openai_server, tmp_path, monkeypatch, words):
    """`lmf-video` runs. LLaMA-Factory's commands are parsed, as far as this machine can; of others, their options exist."""
    monkeypatch.chdir(home)
    program, *rest = [word.replace("http://127.0.0.1:8000", openai_server[0]) for word in words]
    if program == "lmf-video":
        if rest[0] in ("check", "cache") and any(word.endswith(".yaml") for word in rest):
            rest += ["model_name_or_path=tiny", f"video_cache_dir={tmp_path}", "deepspeed=null"]
        if rest[0] in ("infer", "eval"):
            rest += ["--max-new-tokens", "4"]
        if "--gate" in rest:  # a report that an earlier command of the same page has made
            run = processes.run(
                "lmf-video", *rest[: rest.index("--gate")], "--max-new-tokens", "4", XDG_CACHE_HOME=str(tmp_path)
            )
            assert run.returncode == 0, run.stderr[-2000:]
        run = processes.run("lmf-video", *rest, XDG_CACHE_HOME=str(tmp_path))
        assert run.returncode == 0, run.stderr[-2000:]
    elif program == "llamafactory-cli" and len(rest) > 1:
        action, recipe, *overrides = rest
        keys = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        for word in overrides:
            key, _, value = word.partition("=")
            assert key in keys or key in KNOWN, f"{word} is no key that this recipe or LLaMA-Factory has"
            keys[key] = yaml.safe_load(value)
        for key in ("deepspeed", "fsdp_config"):
            if isinstance(keys.get(key), str):
                assert Path(keys[key]).is_file()
        keys["model_name_or_path"] = "tiny"
        if action == "train":
            on_gpu = (
                "deepspeed",
                "bf16",
                "tf32",
                "fsdp",
                "fsdp_config",
                "quantization_bit",
                "ray_num_workers",
                "pure_bf16",
            )
            keys = {key: value for key, value in keys.items() if key not in on_gpu and not key.startswith("ray_")}
            get_train_args({**keys, "use_cpu": True, "output_dir": str(tmp_path)})
        else:
            assert action in ("chat", "api", "export")
            get_infer_args({**keys, "adapter_name_or_path": None, "finetuning_type": "full"})
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        sources = [file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py")]
        assert (ROOT / rest[0]).is_file() or Path(rest[0]).name in CLIENTS
        assert all(any(f'"{word}"' in source for source in sources) for word in rest if word.startswith("--"))
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(found in extras for word in rest for found in re.findall(r"\[(\w+)\]", word))


KNOWN = (
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "ray_num_workers",
    "model_name_or_path",
    "adapter_name_or_path",
    "finetuning_type",
)


def test_what_map_prints_is_what_the_docs_show(tmp_path):
    (shown,) = (text for text in blocks(ROOT / "docs" / "sampling.md", "") if text.startswith("$ lmf-video map"))
    command, _, expected = shown.partition("\n")
    run = processes.run(*shlex.split(command.removeprefix("$ ")))
    assert run.stdout == expected
