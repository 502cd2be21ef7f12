"""`llamafactory-cli api`, asked by the official client and by others that know no manners."""

import base64
import http.server
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import openai
import processes
import pytest
from conftest import write_clip
from llamafactory_video import Decoding, VideoModel, question
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.serve.media import MediaAccess, RequestError
from llamafactory_video.serve.request import read_request
from PIL import Image

TOKENS = 8
SCHEMA = {
    "type": "object",
    "properties": {"标签": {"type": "array", "items": {"enum": ["凯", "李白"]}}},
    "required": ["标签"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    (folder / "data/王者").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mkv", "c.mov", "d.avi", "王者/荣耀 1.mp4")):
        write_clip(folder / "data" / name, frames=20 + 4 * number, fps=10, size=(96, 128), seed=number)
    write_clip(folder / "secret.mp4", frames=12, fps=10, size=(64, 64))
    (folder / "data/link.mp4").symlink_to(folder / "secret.mp4")
    (folder / "data/text.mp4").write_text("这不是视频")
    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "data/p.png")
    return folder


@pytest.fixture(scope="module")
def server(home):
    """A running server: its port, and the file of its log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = {
        "model_name_or_path": str(home / "model"),
        "template": "qwen3_vl_video",
        "infer_backend": "huggingface",
        "infer_dtype": "float32",
        "do_sample": False,
        "max_new_tokens": TOKENS,
        "video_cache": False,
        "video_sampling": "qwen_finetune",
        "api_max_upload_mb": 2,
        "api_max_visual_tokens": 400,
        "api_allowed_hosts": "127.0.0.0/8",
    }
    (home / "api.yaml").write_text(json.dumps(keys))
    env = {"API_HOST": "127.0.0.1", "API_PORT": str(port), "API_KEY": "k", "SAFE_MEDIA_PATH": str(home / "data")}
    with processes.serving("llamafactory-cli", "api", str(home / "api.yaml"), **env) as process:
        while process.is_alive():
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield port, Path(process.folder)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="k", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(home):
    return VideoModel.load(str(home / "model"), video_cache=False, video_sampling="qwen_finetune", dtype="float32")


def data_url(file, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def clip(url, text="看", **settings):
    """The messages of a question about a clip."""
    content = [{"type": "video_url", "video_url": {"url": url}, **settings}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def create(client, messages, **keys):
    return client.chat.completions.create(model="any", messages=messages, **keys)


def text_of(client, messages, stream=False, **keys):
    answer = create(client, messages, stream=stream, **keys)
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


@pytest.fixture(scope="module")
def web(home):
    """A server of files in one's own network, which also leads on."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[len("/to/") :])
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, *args):
            pass

    with processes.served(partial(Handler, directory=home)) as address:
        yield address


@pytest.mark.parametrize("stream", [False, True])
def test_a_clip_in_every_way_that_it_can_be_named(home, client, model, web, stream):
    data = home / "data"
    expected = model.ask("看", video=data / "a.mp4", decoding=Decoding(max_new_tokens=TOKENS))
    assert expected
    urls = [
        data_url(data / "a.mp4"),
        data_url(data / "a.mp4", "application/octet-stream"),
        str(data / "a.mp4"),
        "a.mp4",
        f"file://{data / 'a.mp4'}",
        f"{web}/data/a.mp4",
        f"{web}/to//data/a.mp4",
    ]
    for url in urls:
        assert text_of(client, clip(url), stream) == expected, url[:60]
    for item in ({"type": "video", "video": "a.mp4"}, {"type": "video_url", "video_url": "a.mp4"}):
        messages = [{"role": "user", "content": [item, {"type": "text", "text": "看"}]}]
        assert text_of(client, messages, stream) == expected
    for name, kind in (("b.mkv", "video/x-matroska"), ("c.mov", "video/quicktime"), ("d.avi", "video/avi")):
        expected = model.ask("看", video=data / name, decoding=Decoding(max_new_tokens=TOKENS))
        assert text_of(client, clip(data_url(data / name, kind)), stream) == expected
    other = data / "王者/荣耀 1.mp4"
    expected = model.ask("看", video=other, decoding=Decoding(max_new_tokens=TOKENS))
    for url in ("王者/荣耀 1.mp4", other.as_uri()):
        assert text_of(client, clip(url), stream) == expected


def test_turns_pictures_and_a_system_message(home, client, model):
    data = home / "data"
    messages = [
        {"role": "system", "content": "只说实话"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(data / "p.png", "image/png")}},
                {"type": "text", "text": "和"},
                {"type": "video_url", "video_url": {"url": "a.mp4"}},
            ],
        },
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "再说"},
    ]
    turns = [{"role": "user", "content": "<image>和<video>"}, *messages[2:]]
    asked = question(turns, str(data / "a.mp4"), str(data / "p.png"), "只说实话")
    expected = model.answer([model.encoder.load(asked)], Decoding(max_new_tokens=TOKENS))[0]
    answer = create(client, messages)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == ("stop" if expected.is_whole else "length")
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.tokens
    *_, last = create(client, messages, stream=True, stream_options={"include_usage": True})
    assert last.usage == answer.usage


def test_a_request_has_its_own_frames_within_limits(home, client, model):
    data = home / "data"
    default = create(client, clip("a.mp4")).usage.prompt_tokens
    for settings in (
        {"fps": 8, "max_frames": 12},
        {"max_pixels": 40960, "min_pixels": 1024},
        {"start": 0.5, "end": 1.3, "fps": 9, "max_frames": 12},
    ):
        expected = len(model.encoder.encode(question("看", {"path": str(data / "a.mp4"), **settings})).ids)
        assert expected != default
        assert create(client, clip("a.mp4", **settings)).usage.prompt_tokens == expected
        inside = [{"type": "video_url", "video_url": {"url": "a.mp4", **settings}}, {"type": "text", "text": "看"}]
        assert create(client, [{"role": "user", "content": inside}]).usage.prompt_tokens == expected
    asked = question("看", {"path": str(data / "a.mp4"), "fps": 8, "max_frames": 12})
    expected = len(model.encoder.encode(asked).ids)
    of_all = {"video_fps": 8, "video_max_frames": 12}
    assert create(client, clip("a.mp4"), extra_body=of_all).usage.prompt_tokens == expected
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, clip("a.mp4", max_pixels=10_000_000, min_pixels=8_000_000))
    assert caught.value.status_code == 413
    assert "visual tokens are more than api_max_visual_tokens, 400" in str(caught.value)


def test_answers_as_they_are_asked_for(client):
    messages = [{"role": "user", "content": "说"}]
    assert create(client, messages, max_completion_tokens=3).usage.completion_tokens == 3
    assert create(client, messages, max_tokens=4).usage.completion_tokens == 4
    several = create(client, messages, n=3, temperature=1.5, seed=1)
    texts = [choice.message.content for choice in several.choices]
    assert len(texts) == 3 and len(set(texts)) > 1
    again = create(client, messages, n=3, temperature=1.5, seed=1)
    assert [choice.message.content for choice in again.choices] == texts
    whole = text_of(client, messages)
    assert text_of(client, messages, temperature=0) == whole
    assert text_of(client, messages, stop=[whole[3:5]]) == whole[: whole.index(whole[3:5])]
    assert text_of(client, messages, True, stop=whole[3:5]) == whole[: whole.index(whole[3:5])]
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA, "strict": True}}
    for stream in (False, True):
        held = text_of(client, messages, stream, response_format=form, max_tokens=60)
        assert set(json.loads(held)["标签"]) <= {"凯", "李白"}
        held = text_of(client, messages, stream, response_format={"type": "json_object"}, max_tokens=60)
        assert isinstance(json.loads(held), dict)


REFUSED = {
    "no video": (clip("text.mp4"), {}, 400, r"the request: .*text\.mp4: is not a video that can be read"),
    "no video sent": (clip("data:video/mp4;base64,aGVsbG8gd29ybGQ="), {}, 400, "the uploaded clip: is not a video"),
    "no base64": (clip("data:video/mp4;base64,!!!!"), {}, 400, "content.0.: its data is not base64"),
    "no data URL": (clip("data:video/mp4,abc"), {}, 400, "a data URL must be data:<type>;base64,<data>"),
    "a pad token": ([{"role": "user", "content": "<|video_pad|>看"}], {}, 400, r"holds <\|video_pad\|>"),
    "a placeholder": ([{"role": "user", "content": "<video>看"}], {}, 400, "give clips and pictures as items"),
    "outside": (clip("/etc/passwd"), {}, 403, "/etc/passwd is outside the folder"),
    "outside by a way round": (clip("../secret.mp4"), {}, 403, "is outside the folder"),
    "outside by a link": (clip("link.mp4"), {}, 403, "is outside the folder"),
    "no file": (clip("gone.mp4"), {}, 400, r"messages.0..content.0.: no file gone\.mp4"),
    "another network": (clip("http://10.1.2.3/a.mp4"), {}, 403, "10.1.2.3 is not public; .* api_allowed_hosts"),
    "no host": (clip("http://no.such.host.invalid/a.mp4"), {}, 400, "is no address that can be found"),
    "another scheme": (clip("ftp://host/a.mp4"), {}, 400, "only http, https, file and data"),
    "audio": (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        {},
        400,
        "type must be text, video_url or image_url; found input_audio",
    ),
    "a setting": (clip("a.mp4", fpz=2), {}, 400, "unknown setting fpz; known are .*fps"),
    "a setting's value": (clip("a.mp4", fps="two"), {}, 400, "fps"),
    "the same twice": ([{"role": "user", "content": "x"}], {"n": 2}, 400, "n is 2, but without a temperature"),
    "too many": (
        [{"role": "user", "content": "x"}],
        {"n": 99, "temperature": 1},
        400,
        "n must be a whole number from 1",
    ),
    "temperature": (
        [{"role": "user", "content": "x"}],
        {"temperature": -1},
        400,
        "temperature must be a number from 0",
    ),
    "two lengths": (
        [{"role": "user", "content": "x"}],
        {"max_tokens": 3, "max_completion_tokens": 4},
        400,
        "max_completion_tokens and max_tokens contradict",
    ),
    "logprobs": ([{"role": "user", "content": "x"}], {"logprobs": True}, 400, "logprobs is not supported"),
    "a misspelt key": (
        [{"role": "user", "content": "x"}],
        {"extra_body": {"temprature": 1}},
        400,
        "unknown parameter temprature; is temperature meant",
    ),
    "a schema": (
        [{"role": "user", "content": "x"}],
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strnig"}}}},
        400,
        "response_format.json_schema.schema: no JSON Schema: type: 'strnig'",
    ),
    "a schema without room": (
        [{"role": "user", "content": "x"}],
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "max_tokens": 2},
        400,
        "max_new_tokens is 2; the shortest answer",
    ),
    "a response format": (
        [{"role": "user", "content": "x"}],
        {"response_format": {"type": "xml"}},
        400,
        "text, json_object or",
    ),
    "an answer last": ([{"role": "assistant", "content": "x"}], {}, 400, "the last message must be the user's"),
    "no message": ([], {}, 400, "messages must be a list"),
    "too long": ([{"role": "user", "content": "x"}], {"max_tokens": 10**8}, 413, "are more than the model takes"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("messages", "keys", "status", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_with_its_reason(client, messages, keys, status, message, stream):
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        create(client, messages, stream=stream, **keys)
    assert caught.value.status_code == status
    error = caught.value.body
    assert error["type"] in ("invalid_request_error", "permission_error")
    assert "Traceback" not in error["message"]


def test_other_ways_to_ask_wrongly(server, client):
    url = f"http://127.0.0.1:{server[0]}/v1/chat/completions"
    for answer, status in (
        (httpx.post(url, content=b"{"), 401),
        (httpx.post(url, content=b"{", headers={"Authorization": "Bearer k"}), 400),
        (httpx.post(url, content=b"[]", headers={"Authorization": "Bearer k"}), 400),
        (httpx.post(url, content=b'{"seed": Infinity}', headers={"Authorization": "Bearer k"}), 400),
        (httpx.post(url, json={"messages": clip("a\0.mp4")}, headers={"Authorization": "Bearer k"}), 400),
        (httpx.post(url, json={"messages": clip("a" * 9999)}, headers={"Authorization": "Bearer k"}), 400),
        (httpx.get(url), 405),
        (httpx.get(f"{url}/gone"), 404),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert client.models.list().data[0].id == "model"


def test_uploads_have_a_limit_and_stay_out_of_the_log(home, server, client):
    large = "A" * (3 << 20)
    with pytest.raises(openai.APIStatusError, match="more than api_max_upload_mb, 2 MiB") as caught:
        create(client, clip(f"data:video/mp4;base64,{large}"))
    assert caught.value.status_code == 413
    sent = data_url(home / "data/a.mp4")
    assert text_of(client, clip(sent))
    log = "".join((server[1] / name).read_text(errors="replace") for name in ("out", "err"))
    assert sent[100:200] not in log
    assert "AAAAAAAA" not in log


def test_sixteen_clients_at_once(home, client):
    names = ["a.mp4", "b.mkv", "c.mov", "d.avi"]
    asked = [clip(names[i % 4], f"第{i}个问题") for i in range(16)]
    alone = [text_of(client, messages) for messages in asked]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: text_of(client, asked[i], i % 2 == 0), range(16)))
    assert together == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(server, client, stream):
    """Its answer would take minutes, and others would wait for it."""
    url = f"http://127.0.0.1:{server[0]}/v1/chat/completions"
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "说"}],
        "max_tokens": 30_000,
        "stream": stream,
    }
    with httpx.Client(headers={"Authorization": "Bearer k"}) as other:
        if stream:
            with other.stream("POST", url, json=body, timeout=60) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                other.post(url, json=body, timeout=2)
    assert text_of(client.with_options(timeout=20), [{"role": "user", "content": "说"}])


# --- The parts alone -------------------------------------------------------------------------------------------------


def test_an_address_that_leads_inside_is_not_followed(web, home):
    access = MediaAccess(hosts=["127.0.0.1"])
    assert access.open(f"{web}/data/a.mp4", "x").read() == (home / "data/a.mp4").read_bytes()
    for url, status, message in (
        (f"{web}/to/http://10.0.0.1/a.mp4", 403, "10.0.0.1 is not public"),
        (f"{web}/to/file:///etc/passwd", 400, "no address"),
        (f"{web}/to//to//to//to//to//to//data/a.mp4", 400, "leads on more than 5 times"),
        (f"{web}/gone.mp4", 400, "answers with status 404"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            access.open(url, "x")
        assert caught.value.status == status
    with pytest.raises(RequestError, match="127.0.0.1 is not public"):
        MediaAccess().open(f"{web}/data/a.mp4", "x")
    with pytest.raises(RequestError, match="more than video_remote_gb") as caught:
        MediaAccess(hosts=["127.0.0.1"], most_bytes=100).open(f"{web}/data/a.mp4", "x")
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="reads no files") as caught:
        MediaAccess().open("a.mp4", "x")
    assert caught.value.status == 403


def test_a_tool_is_offered_and_called_for(model):
    from llamafactory_video.model.decoding import Answer
    from llamafactory_video.serve.app import _message

    tools = [{"type": "function", "function": {"name": "找", "parameters": {}}}]
    asked = read_request({"messages": [{"role": "user", "content": "x"}], "tools": tools}, Decoding(), None)
    assert "找" in model.tokenizer.decode(model.encoder.encode(asked.conversation).ids)
    text = '好的\n<tool_call>\n{"name": "找", "arguments": {"名": "凯"}}\n</tool_call>'
    message, reason = _message(asked, Answer(text, 9, 9, True))
    assert reason == "tool_calls"
    assert message["content"] == "好的"
    assert message["tool_calls"][0]["function"] == {"name": "找", "arguments": '{"名": "凯"}'}
