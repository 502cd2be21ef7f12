"""LLaMA-Board in a real browser (`make browser`; Debian's chromium): the demo, from a recipe to an exported model."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from llamafactory_video.demo.__main__ import prepare
from llamafactory_video.video.contract import FILE, read_contract
from processes import BIN

pytestmark = pytest.mark.browser
REPOSITORY = Path(__file__).parents[1]
MINUTE = 60_000  # milliseconds
PICTURES = os.environ.get("BOARD_PICTURES")  # a folder for pictures of each tab, to look at


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the page works: recipes, and what `make demo` prepares."""
    folder = tmp_path_factory.mktemp("board")
    shutil.copytree(REPOSITORY / "recipes", folder / "recipes")
    prepare(folder / "output" / "demo", 9600, 96)
    return folder


@pytest.fixture(scope="module")
def address(home):
    """The page's, served by the command that people give."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "0"}
    path = {"PATH": f"{BIN}:{os.environ['PATH']}", "BROWSER": "true"}
    with open(home / "webui.log", "wb") as log:
        process = subprocess.Popen(
            [BIN / "llamafactory-cli", "webui"],
            cwd=home,
            env={**os.environ, **own, **path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking", "--autoplay-policy=no-user-gesture-required"]
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(MINUTE)
        page.goto(address)
        page.get_by_label("Model path").wait_for()
        yield page
        chromium.close()


def picture(page, name: str, whole: bool = True) -> None:
    if PICTURES:
        if not whole:  # what lies below the buttons
            page.get_by_role("button", name="Start").locator("visible=true").scroll_into_view_if_needed()
            page.mouse.wheel(0, 600)
            page.wait_for_timeout(500)
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=whole)


def field(page, label: str):
    """The visible field of a label: of a list by its own label, of a text by the one around it."""
    of_list = page.get_by_label(label, exact=True).and_(page.locator("input"))
    around = page.locator("label").filter(has=page.get_by_text(label, exact=True)).locator("input, textarea")
    return of_list.or_(around).locator("visible=true").first


def choose(page, label: str, value: str) -> None:
    """An entry of a list, by what is typed into it."""
    box = field(page, label)
    box.click()
    box.fill(value)
    page.get_by_role("option", name=value, exact=True).first.click()


def enter(page, label: str, value: str) -> None:
    field(page, label).fill(value)


def value_of(page, label: str) -> str:
    return field(page, label).input_value()


def wait_for(page, condition, minutes: float = 1):
    """What becomes true of the page, looked at ten times a second."""
    end = time.monotonic() + 60 * minutes
    while not (found := condition()):
        assert time.monotonic() < end, page.inner_text("body")[-3000:]
        page.wait_for_timeout(100)
    return found


def text_of(page) -> str:
    return page.inner_text("body")


def train(page, home):
    # A model and its template are chosen together, and fields are filled with a recipe's values.
    choose(page, "Model name", "Qwen3-VL-4B-Instruct")
    wait_for(page, lambda: value_of(page, "Chat template") == "qwen3_vl_video")
    wait_for(page, lambda: value_of(page, "Greatest pixels") == "1003520")
    wait_for(page, lambda: "32 frames of 224 × 128, 448 visual tokens" in text_of(page))
    enter(page, "Greatest pixels", "65536")
    enter(page, "Least pixels", "256")
    wait_for(page, lambda: "Fewer than 100 for a whole clip" in text_of(page))
    picture(page, "few_tokens")
    choose(page, "Chat template", "default")
    wait_for(page, lambda: value_of(page, "Greatest pixels") == "256*256")
    assert not page.get_by_text("Frames per second", exact=True).is_visible()

    # A recipe fills the page, and what is shown is what is run.
    choose(page, "Config path", "recipes/demo.yaml")
    page.get_by_role("button", name="Load arguments").click()
    wait_for(page, lambda: "Arguments have been restored. recipes/demo.yaml" in text_of(page))
    wait_for(page, lambda: value_of(page, "Model path") == "output/demo/base")
    page.wait_for_timeout(2000)  # whatever the changes still bring about
    assert value_of(page, "Greatest pixels") == "32768" and value_of(page, "Chat template") == "qwen3_vl_video"
    page.get_by_role("button", name="Preview command").locator("visible=true").click()
    wait_for(page, lambda: "video_max_pixels: 32768" in text_of(page))
    shown = page.locator("pre code").locator("visible=true").last.inner_text()
    picture(page, "train_preview")

    # Training: loss and speed are seen; it is aborted, and goes on.
    start = page.get_by_role("button", name="Start").locator("visible=true")
    start.click()
    progress = re.compile(r"Running (\d+)/600: .* · [\d.]+ clips/s")
    found = wait_for(page, lambda: progress.search(text_of(page)), minutes=3)
    recipe = home / "output" / "demo" / "tuned" / "training_args.yaml"
    assert recipe.read_text(encoding="utf-8").split() == shown.split()
    wait_for(
        page, lambda: page.locator(".plot-container img, img[alt*='plot' i]").count() or page.locator("img").count()
    )
    picture(page, "training", whole=False)
    page.get_by_role("button", name="Abort").locator("visible=true").click()
    wait_for(page, lambda: "Finished." in text_of(page), minutes=2)
    (checkpoint,) = (home / "output" / "demo" / "tuned").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert int(found[1]) <= step < 600
    start.click()
    again = wait_for(page, lambda: progress.search(text_of(page)), minutes=3)
    assert int(again[1]) >= step
    state = home / "output" / "demo" / "tuned" / "trainer_state.json"
    wait_for(page, lambda: json.loads(state.read_text(encoding="utf-8"))["global_step"] == 600, minutes=10)
    wait_for(page, lambda: "Finished." in text_of(page), minutes=2)
    picture(page, "trained", whole=False)


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def evaluate(page, home):
    field(page, "Checkpoint path").click()
    page.get_by_role("option", name="output/demo/tuned", exact=True).click()
    open_tab(page, "Evaluate & Predict")
    enter(page, "Data dir", "output/demo")
    enter(page, "Media dir", "output/demo")
    choose(page, "Dataset", "demo_test")
    page.keyboard.press("Escape")
    enter(page, "Max samples", "16")
    enter(page, "Output dir", "predicted")
    assert page.get_by_label("number input for Temperature").locator("visible=true").input_value() == "0"
    page.get_by_role("button", name="Start").locator("visible=true").click()
    wait_for(page, lambda: "predict_rouge-l" in text_of(page), minutes=3)
    assert "tags.f1" in text_of(page)  # of the answers' own fields
    picture(page, "evaluated", whole=False)
    (file,) = (home / "saves").rglob("generated_predictions.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 16 and sum(line["predict"] == line["label"] for line in lines) >= 14


def chat(page, home):
    (record, *_) = json.loads((home / "output/demo/test.json").read_text(encoding="utf-8"))
    clip = home / "output" / "demo" / record["video"]
    open_tab(page, "Chat")
    page.get_by_role("button", name="Load model", exact=True).click()
    wait_for(page, lambda: page.get_by_role("button", name="Submit").is_visible(), minutes=2)
    page.get_by_role("tab", name="Video").click()
    page.locator("input[type=file][accept*='video']").set_input_files(clip)
    player = page.locator("video").first
    player.wait_for()
    player.evaluate("v => { v.muted = true; return v.play(); }")
    wait_for(page, lambda: player.evaluate("v => v.readyState >= 2 && v.currentTime > 0 && v.videoWidth > 0"))
    page.get_by_placeholder("Input...").fill("描述这个视频并进行打标,使用json输出标签")
    page.get_by_role("button", name="Submit").click()
    label = record["conversations"][-1]["value"]
    wait_for(page, lambda: label["video_description"] in text_of(page), minutes=2)
    picture(page, "chat")


def chat_about_what_is_no_clip(page, home):
    (home / "no.mp4").write_text("this is no clip")
    page.get_by_role("button", name="Clear history").click()
    page.get_by_label("Clear", exact=True).locator("visible=true").last.click()
    page.locator("input[type=file][accept*='video']").set_input_files(home / "no.mp4")
    page.wait_for_timeout(1000)
    page.get_by_placeholder("Input...").fill("这是什么")
    page.get_by_role("button", name="Submit").click()
    wait_for(page, lambda: "❌" in text_of(page))
    picture(page, "chat_error")
    assert "is not a video that can be read" in text_of(page)


def export(page, home):
    open_tab(page, "Export")
    enter(page, "Export dir", "output/exported")
    page.get_by_role("button", name="Export", exact=True).click()
    wait_for(
        page, lambda: "Model exported" in page.locator("textarea").evaluate_all("l => l.map(e => e.value).join()")
    )
    exported, tuned = home / "output" / "exported", home / "output" / "demo" / "tuned"
    assert read_contract(exported / FILE) == read_contract(tuned / FILE)
    picture(page, "exported")


def turn_chinese(page, home):
    choose(page, "Language", "zh")
    open_tab(page, "Train")
    for word in ("视频", "采样方式", "最大像素", "视觉编码器学习率", "个视觉 token"):
        wait_for(page, lambda word=word: word in text_of(page))
    picture(page, "chinese")


def test_the_demo_from_a_recipe_to_an_exported_model(page, home):
    """One page, as a person goes through it."""
    for step in (train, evaluate, chat, chat_about_what_is_no_clip, export, turn_chinese):
        step(page, home)
