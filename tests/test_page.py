"""The page of `lmf-video eval` in a real browser (`make browser`; Debian's chromium)."""

import json
import random
import shutil

import numpy as np
import pytest
from llamafactory_video.evaluate.page import BUDGET, bytes_for_each, make_strip, write_page
from llamafactory_video.evaluate.report import Example, make_report

TAGS = ["团战", "推塔", "打龙", "击杀", "对线", "回城", "偷塔", "越塔"]
ABOUT = "凯从侧面切入后排，连续收下了三个人头，随后带队推掉了中路的一座防御塔，双方回城补给。"


def picture_like(number: int, frames: int = 16, height: int = 180, width: int = 320) -> np.ndarray:
    """Frames that are as hard to pack as those of a game: soft shades, edges and a little noise, (T, H, W, 3)."""
    random_ = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    base = np.stack([np.sin(x / (9 + number % 7) + k) + np.cos(y / (7 + number % 5) - k) for k in range(3)], axis=-1)
    out = []
    for i in range(frames):
        frame = 110 + 45 * np.roll(base, 6 * i, axis=1) + random_.normal(0, 6, (height, width, 3))
        frame[60:100, 10 * i : 10 * i + 40] = (230, 60, 40)
        out.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(out)


def make_page(path, count, pictures):
    """A report on so many clips, of two models of which the second is better."""
    draw = random.Random(0)
    examples, base, tuned = [], [], []
    for i in range(count):
        label = {"video_description": ABOUT, "tags": draw.sample(TAGS, 3), "won": i % 2 == 0}
        examples.append(
            Example(f"test.json, record {i + 1}", (f"match{i // 4}/{i}.mp4",), label, "<video>描述这个视频")
        )
        base.append("不知道" if i % 5 == 0 else json.dumps({"tags": draw.sample(TAGS, 3)}, ensure_ascii=False))
        tags = [tag if draw.random() < 0.8 else draw.choice(TAGS) for tag in label["tags"]]
        said = {"video_description": ABOUT.replace("三个", "两个"), "tags": tags, "won": True, "新": 1}
        tuned.append(json.dumps(said, ensure_ascii=False) if i % 50 else None)
    report = make_report(examples, {"base": base, "tuned": tuned}, source="folder", by="tags")
    records = [
        {
            "source": e.source,
            "clips": list(e.clips),
            "prompt": e.prompt,
            "label": e.label,
            "answers": {"base": base[i], "tuned": tuned[i]},
            "scores": {name: float(one.scores[i]) for name, one in report.scored.items()},
        }
        for i, e in enumerate(examples)
    ]
    most = bytes_for_each(count)
    made = [make_strip(picture_like(n), [0.25 * i for i in range(16)], most) for n in range(pictures)]
    write_page(path, report.value, records, [[made[i % pictures]] for i in range(count)])
    return report.value, records


def test_pictures_are_as_fine_as_there_is_room_for():
    frames = picture_like(0)
    fine, poor = (make_strip(frames, [None] * 16, most) for most in (1 << 20, 6000))
    assert (fine.height, fine.width) == (112, 199) and poor.height < fine.height
    assert len(poor.image) * 3 / 4 < 6200 < len(fine.image)
    assert bytes_for_each(1000) * 1000 <= BUDGET and bytes_for_each(10**6) == 3072
    long = make_strip(np.zeros((768, 32, 32, 3), np.uint8), [0.0] * 768, 1 << 20)
    assert long.width * 768 <= 16383


def test_the_page_is_one_file_that_nothing_in_it_can_break_out_of(tmp_path):
    examples = [Example("x", ("</script><script>alert(1)</script>.mp4",), {"a": "</script>"}, "<b>")]
    report = make_report(examples, {"m": ['{"a": "<img src=x onerror=alert(2)>"}']})
    record = {"source": "x", "clips": list(examples[0].clips), "prompt": "<b>", "label": examples[0].label}
    write_page(tmp_path / "p.html", report.value, [{**record, "answers": {"m": "</script>"}, "scores": {"m": 0}}])
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and "http" not in page.replace("http-equiv", "")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "no chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.mark.browser
def test_a_page_of_a_thousand_clips(browser, tmp_path):
    """Under 30 MB; opens by itself, in English and Chinese; is searched, sorted and scrolled; fits a phone."""
    path = tmp_path / "report.html"
    _, records = make_page(path, 1000, 40)
    assert path.stat().st_size < 30 << 20
    for locale, first, other in (
        ("en-US", "tuned is better than base: score ", "中文"),
        ("zh-CN", "tuned 优于 base：得分 ", "English"),
    ):
        context = browser.new_context(locale=locale, viewport={"width": 1200, "height": 900})
        page, asked, errors = context.new_page(), [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.on("console", lambda message, errors=errors: message.type == "error" and errors.append(message.text))
        page.goto(path.as_uri())
        assert page.inner_text("#verdict").startswith(first) and page.inner_text("#lang") == other
        page.screenshot(path=str(tmp_path / f"{locale}.png"))
        # The greatest gain comes first; few records are drawn, more as the reader comes near.
        gains = sorted((r["scores"]["tuned"] - r["scores"]["base"] for r in records), reverse=True)
        shown = page.locator("article").first.inner_text()
        best = next(r for r in records if r["clips"][0] in shown)
        assert best["scores"]["tuned"] - best["scores"]["base"] == pytest.approx(gains[0])
        assert page.locator("article").count() < 100
        page.locator("article").last.scroll_into_view_if_needed()
        page.wait_for_function("document.querySelectorAll('article').length >= 40")
        assert page.locator("article figure").count() >= 40 * 16
        page.locator(".tools").scroll_into_view_if_needed()
        page.screenshot(path=str(tmp_path / f"{locale} records.png"))
        page.select_option("#sort", "order")
        page.fill("#search", "match7/30.mp4")
        assert page.locator("article").count() == 1
        article = page.locator("article").first
        assert "7.2" not in article.inner_text() and "3.8" in article.inner_text()  # the time of the last frame
        wanted, said = set(records[30]["label"]["tags"]), json.loads(records[30]["answers"]["tuned"])["tags"]
        assert set(article.locator(".tag.hit").last.all_inner_texts()) <= wanted | set(said)
        assert article.locator("del, ins").count() >= 2  # 三 and 两 are marked
        page.fill("#search", "")
        page.select_option("#tag", "打龙")
        count = sum("打龙" in r["label"]["tags"] for r in records)
        assert str(count) in page.inner_text("#count")
        page.click("#lang")
        assert not page.inner_text("#verdict").startswith(first) and page.inner_text("#lang") != other
        assert asked == [path.as_uri()] or all(url.startswith(("data:", "file:")) for url in asked)
        assert not errors
        context.close()
    phone = browser.new_context(viewport={"width": 390, "height": 800}, is_mobile=True, has_touch=True)
    page = phone.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=str(tmp_path / "phone.png"))
