"""The web page: what is served, and what it does in a real Chromium where there is one."""

import argparse
import asyncio
import contextlib
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

fastapi = pytest.importorskip("fastapi", reason='needs fastapi: pip install ".[serve]"')

from chatglm_int8.apps import cli, loading  # noqa: E402
from chatglm_int8.apps.server import Settings, app, http_server  # noqa: E402
from chatglm_int8.apps.server.answers import Answer, Busy, Failed, Token, deliver  # noqa: E402
from chatglm_int8.apps.web import page as web_page  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--disable-sync", "--no-first-run", "--host-resolver-rules=MAP rebound.example 127.0.0.1"]
COVER = "position:fixed;inset:0;z-index:9999;background:red"
HACK = "window.hacked=1"
PAYLOADS = [
    f"<script>{HACK}</script>",
    f"<img src=x onerror='{HACK}'>",
    "<img src=https://evil.example/a.png>",
    f"<svg onload='{HACK}'><circle r=9999 /></svg>",
    f"<svg><script>{HACK}</script></svg>",
    f"<svg><a xlink:href='javascript:{HACK}'><text y=20>x</text></a></svg>",
    f"<svg style='{COVER}'></svg>",
    f"<div style='{COVER}'>Session expired. Password: <input type=password></div>",
    "<style>*{display:none!important}</style>",
    "<style>@import 'https://evil.example/a.css';</style>",
    "<link rel=stylesheet href=https://evil.example/a.css>",
    "<link rel=prefetch href=https://evil.example/p>",
    "<iframe src=https://evil.example/></iframe>",
    f"<iframe srcdoc='<script>parent.{HACK}</script>'></iframe>",
    f"<object data='data:text/html,<script>{HACK}</script>'></object>",
    "<embed src=https://evil.example/a.swf>",
    "<form action=https://evil.example/><button>Log in</button></form>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    f"<video autoplay onloadstart='{HACK}' src=https://evil.example/a.mp4></video>",
    f"<details open ontoggle='{HACK}'>x</details>",
    f"<math><mtext></form><form><mglyph><style></math><img src onerror='{HACK}'>",
    f"<a href='javascript:{HACK}'>x</a>",
    f"[link](javascript:{HACK})",
    f"[link](data:text/html,<script>{HACK}</script>)",
    "![picture](https://evil.example/a.png)",
    "![picture][1]\n\n[1]: https://evil.example/a.png",
    f"<p id=chat class=message style='{COVER}'>x</p>",
    f"```html\n</code></pre><img src=x onerror='{HACK}'>\n```",
    "a" + "\u0301\u0489" * 400,
]
EVIL = PAYLOADS[1] + PAYLOADS[0]


class Scripted:
    """A scheduler, model and tokenizer of a script: answers to queries by their first word, which they repeat."""

    max_length, max_batch, max_queue = 2048, 4, 4
    running = waiting = 0
    healthy = True

    def __init__(self):
        self.model = self.tokenizer = self
        self.scripts: list[list[str]] = []
        self.answers: list[Answer] = []
        self.finished: list[Answer] = []
        self.asked: list[list[tuple[str, str]]] = []  # the messages of each conversation: roles and texts
        self._work: set[asyncio.Task] = set()

    def apply_chat_template(self, messages, **_):
        if messages[-1]["content"] == "too long":
            raise ValueError("The query has 9999 tokens.")
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return [1, 2, 3]

    def room(self, prompt):
        return self.max_length - len(prompt)

    def submit(self, prompt, samplings):
        query = self.asked[-1][-1][1]
        if query == "busy":
            raise Busy
        word, number = query.split()[0], len(self.answers)
        pieces = {
            "markdown": [
                "# Title\n\n",
                "**bold** 2*3*4\n\n- one\n- two\n\n```python\nprint(1)\n```\n\n",
                "|a|b|\n|-|-|\n|1|2|\n",
            ],
            "payloads": [f"{payload}\n\n" for payload in PAYLOADS],
            "long": [f"{word}{number} "] * 400,
            "broken": ["partly ", "ERROR"],
        }.get(word, [f"{word}{number} "] * 5)
        self.samplings = samplings
        self.scripts.append(pieces)
        self.answers.append(Answer(prompt, samplings[0], deadline=0))
        task = asyncio.ensure_future(self._answer(self.answers[-1], pieces))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return [self.answers[-1]]

    async def _answer(self, answer: Answer, pieces: list[str]) -> None:
        """A piece every 20 ms."""
        for index, piece in enumerate(pieces):
            await asyncio.sleep(0.02)
            if answer._cancelled:
                return
            failed = Failed("The server failed to compute an answer.")
            deliver([(answer, failed if piece == "ERROR" else Token(index))])
        deliver([(answer, "stop")])
        self.finished.append(answer)

    def process_response(self, text):
        return text.strip()

    def decode_stream(self):
        pieces = self.scripts[-1]
        return SimpleNamespace(step=lambda index: pieces[index], flush=lambda: "")

    def close(self):
        pass


@contextlib.contextmanager
def served(scripted: Scripted, title: str = "ChatGLM", **settings):
    """The URL of a page of its own."""
    application = app.create_app(Settings(**settings), scripted)
    web_page.add_page(application, scripted, title, "13.1M · INT8 · cpu")
    arguments = argparse.Namespace(host="127.0.0.1", port=free_port(), keep_alive=5)
    server = http_server.HttpServer(http_server.http_config(application, arguments))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.02)
        yield f"http://127.0.0.1:{arguments.port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def site():
    scripted = Scripted()
    with served(scripted) as url:
        yield scripted, url


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Page:
    """The page in a browser tab of its own context; what it asks for is noted, and refused if it is elsewhere."""

    def __init__(self, browser, url: str, locale: str = "en-US", **options):
        self.context = browser.new_context(locale=locale, **options)
        self.requests: list[str] = []

        def route(route):
            self.requests.append(route.request.url)
            if route.request.url.startswith(url):
                route.continue_()
            else:
                route.abort()

        self.url = url
        self.context.route("**/*", route)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.goto(url)
        self.box = self.page.locator("#query")
        self.box.wait_for()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    @property
    def strange(self) -> set[str]:
        """What was asked for beside the page's parts and the API."""
        known = ("", "/", "/page.css", "/page.js", "/markdown.js", "/v1/chat/completions")
        return set(self.requests) - {self.url + path for path in known}

    def ask(self, query: str) -> None:
        self.box.fill(query)
        self.box.press("Enter")

    def click(self, button: str) -> None:
        self.page.locator(f"#{button}").click()

    def messages(self, who: str) -> list[str]:
        texts = self.page.locator(f'#chat [data-testid="{who}"]').all_inner_texts()
        return [" ".join(text.split()) for text in texts]

    def wait_for(self, condition, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.messages("user"), self.messages("bot"))
            self.page.wait_for_timeout(50)

    def is_idle(self) -> bool:
        return self.page.locator("#stop").is_disabled()

    def wait_for_answers(self, count: int) -> None:
        self.wait_for(lambda: len(self.messages("bot")) == count and self.is_idle())

    def layout(self) -> dict:
        """Boxes of the page's parts; of each, whether it is on top at its middle."""
        names = ["header", "#chat", "#query", "#send", "#clear", "#settings"]
        script = """names => Object.fromEntries(names.map(name => {
            const part = document.querySelector(name), {x, y, width, height} = part.getBoundingClientRect();
            const top = document.elementFromPoint(x + width / 2, y + Math.min(height, 40) / 2);
            return [name, [x, y, width, height, part.contains(top)]];
        }))"""
        return self.page.evaluate(script, names)


# What is served


def reply(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> tuple[int, str, dict]:
    """Status, text and headers."""
    request = urllib.request.Request(url, data, headers or {})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


def test_only_the_page_its_parts_and_the_api_are_served(site):
    _, url = site
    for path in ("/", *(f"/{name}" for name in web_page.PARTS)):
        status, text, headers = reply(url + path)
        assert status == 200
        policy = dict(entry.split(" ", 1) for entry in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {*policy.values()} == {"'none'", "'self'"}
        assert not re.search(r"""<script>|<style>| style=| on\w+=["']""", text)
    for path in ("/page.py", "/page.html", "/../page.py", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/docs"):
        assert reply(url + path)[0] == 404
    assert reply(f"{url}/upload", data=b"x")[0] == 404


def page_of(application) -> str:
    (route,) = [route for route in application.routes if route.path == "/"]
    return asyncio.run(route.endpoint()).body.decode()


def test_titles_are_text():
    for payload in PAYLOADS:
        application = fastapi.FastAPI()
        web_page.add_page(application, Scripted(), payload, "")
        (route,) = [
            route for route in application.routes if getattr(route, "path", "") == "/" and "GET" in route.methods
        ]
        text = asyncio.run(route.endpoint()).body.decode()
        assert text.count(f"<title>{html.escape(payload)}</title>") == 1
        assert text.count("<script") == 1


def test_page_under_a_path_of_a_proxy():
    """The page asks for its parts where the proxy shows them, and the proxy drops the path."""
    for given, base in (("", "/"), ("/chat", "/chat/"), ("https://example.org/chat/", "/chat/")):
        application = fastapi.FastAPI()
        web_page.add_page(application, Scripted(), "", "", given)
        (route,) = [
            route for route in application.routes if getattr(route, "path", "") == "/" and "GET" in route.methods
        ]
        assert f'<base href="{base}">' in asyncio.run(route.endpoint()).body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "127.0.0.1.rebound.example:7860"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_pages_of_other_sites_get_nothing(headers, site):
    scripted, url = site
    before = len(scripted.asked)
    question = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    for data in (None, question):
        status, text, _ = reply(f"{url}{'/v1/chat/completions' if data else '/'}", headers, data)
        assert status == 403
        assert "<title>" not in text
    assert len(scripted.asked) == before


def test_allowed_hosts():
    with served(Scripted(), allowed_host=["chat.example.org"]) as url:
        assert reply(url, {"Host": "chat.example.org"})[0] == 200
        assert reply(url, {"Host": "rebound.example"})[0] == 403


def test_the_command(monkeypatch):
    seen = SimpleNamespace()
    weights = torch.nn.Linear(3, 4, bias=False)
    weights.config, weights.dtype, weights.device = SimpleNamespace(quantization_bit=8), torch.half, torch.device("cpu")
    scripted = Scripted()
    scripted.model = weights
    monkeypatch.setattr(app, "load", lambda settings: vars(seen).update(settings=settings) or scripted)
    monkeypatch.setattr(http_server.HttpServer, "run", lambda server: vars(seen).update(config=server.config))
    options = ["--root-path", "/chat", "--port", "80", "--allowed-host", "chat.example.org", "--title", "A title"]
    assert cli.main(["web", *options]) == 0
    assert (seen.config.host, seen.config.port) == ("127.0.0.1", 80)
    assert seen.settings.allowed_host == ["chat.example.org"]
    paths = {route.path for route in seen.config.app.routes if hasattr(route, "path")}
    assert {"/", "/page.js", "/v1/chat/completions"} <= paths


@pytest.mark.parametrize(("folder", "title"), [(str(ROOT), "ChatGLM"), ("models/chatglm-6b-int8/", "chatglm-6b-int8")])
def test_the_title_is_from_the_model(folder, title):
    assert web_page.title_of(folder) == title


# In a browser


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_payloads_are_text(browser, site, width, scheme):
    """In an answer, in a history and in a question: nothing runs, is loaded, moves or covers the page."""
    _, url = site
    with Page(browser, url, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        before = page.layout()
        assert all(top for *_, top in before.values())
        page.ask("payloads " + " ".join(PAYLOADS))
        page.wait_for_answers(1)
        answer = page.page.locator('[data-testid="bot"]').first
        for text in ("<script>", "<iframe", "Session expired", "![picture](https://evil.example/a.png)", "[link](java"):
            assert text in answer.inner_text()
        rounds = [{"query": payload, "response": payload} for payload in PAYLOADS]
        page.page.evaluate("rounds => { window.onpagehide = null; window.kept = JSON.stringify(rounds); }", rounds)
        page.page.evaluate(
            "addEventListener('pagehide', () => { const kept = JSON.parse(sessionStorage.chatglm);"
            "sessionStorage.chatglm = JSON.stringify({...kept, rounds: JSON.parse(window.kept)}); })"
        )
        page.page.reload()
        page.wait_for(lambda: len(page.messages("bot")) == len(PAYLOADS))
        shown = page.page.locator("#chat")
        tags = set(shown.evaluate("chat => [...chat.querySelectorAll('*')].map((part) => part.localName)"))
        assert tags <= {"div", "p", "pre", "code", "br", "span", "button"}
        assert not shown.evaluate("chat => chat.querySelectorAll('[style], [src], [href]').length")
        page.page.wait_for_timeout(300)
        assert page.page.evaluate("window.hacked") is None
        assert page.layout() == before
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        assert not page.strange


@pytest.mark.slow
def test_a_title_of_payloads(browser):
    with served(Scripted(), title=" ".join(PAYLOADS[:-1])) as url, Page(browser, url) as page:
        assert page.page.locator("h1").inner_text().startswith("<script>")
        assert page.page.evaluate("window.hacked") is None
        assert not page.strange


@pytest.mark.slow
def test_a_page_of_another_origin_and_rebinding(browser, site):
    scripted, url = site
    before = len(scripted.asked)
    with served(Scripted()) as other:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{other}/v1/models")  # has no policy of its own
        question = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
        script = """async ([url, body]) => {
            const read = async (mode) => (await fetch(url, {method: "POST", mode, body})).text();
            return [await read("cors").catch(() => ""), await read("no-cors").catch(() => "")];
        }"""
        assert page.evaluate(script, [f"{url}/v1/chat/completions", question]) == ["", ""]
        response = page.goto(url.replace("127.0.0.1", "rebound.example"))
        assert response.status == 403
        assert "ChatGLM" not in page.content()
        context.close()
    assert len(scripted.asked) == before


@pytest.mark.slow
def test_conversation(browser, site):
    """Typed, streamed, answered again, cleared; what was said before goes along."""
    scripted, url = site
    with Page(browser, url) as page:
        page.ask("first question")
        page.wait_for_answers(1)
        assert page.box.input_value() == ""
        assert page.messages("user") == ["first question"]
        (answer,) = page.messages("bot")
        assert re.fullmatch(r"(first\d+ ?){5}", answer)
        page.box.fill("second")
        page.click("send")
        page.wait_for_answers(2)
        asked = [("user", "first question"), ("assistant", answer), ("user", "second")]
        assert scripted.asked[-1] == asked
        again = page.messages("bot")[1]
        page.click("again")
        page.wait_for(lambda: page.messages("bot")[1:] not in ([], [again]) and page.is_idle())
        assert scripted.asked[-1] == asked
        assert page.messages("user") == ["first question", "second"]
        page.click("clear")
        page.wait_for(lambda: not page.messages("bot"))
        page.ask("third")
        page.wait_for_answers(1)
        assert scripted.asked[-1] == [("user", "third")]
        assert not page.strange


@pytest.mark.slow
def test_streaming_and_stop(browser, site):
    scripted, url = site
    with Page(browser, url) as page:
        page.ask("long story")
        page.wait_for(lambda: page.messages("bot"))
        first = page.messages("bot")[0]
        page.wait_for(lambda: len(page.messages("bot")[0]) > len(first))
        page.wait_for(lambda: re.search(r"\d+ tokens\s+\d+\.\d tokens/s", page.page.locator(".facts").inner_text()))
        assert not page.is_idle()
        page.box.fill("next")  # typing goes on meanwhile
        page.click("stop")
        page.wait_for(page.is_idle)
        stopped = page.messages("bot")[0]
        page.wait_for(lambda: scripted.answers[-1]._cancelled)
        page.page.wait_for_timeout(300)
        assert scripted.answers[-1] not in scripted.finished
        assert page.messages("bot") == [stopped]
        assert page.box.input_value() == "next"
        page.box.press("Enter")
        page.wait_for_answers(2)
        (_, query), (_, kept), _ = scripted.asked[-1]
        assert (query, " ".join(kept.split())) == ("long story", stopped)


@pytest.mark.slow
def test_clear_in_mid_answer(browser, site):
    """Nothing of it comes back, and its place is free."""
    scripted, url = site
    with Page(browser, url) as page:
        page.ask("long one")
        page.wait_for(lambda: page.messages("bot"))
        page.click("clear")
        page.wait_for(lambda: not page.messages("user"))
        page.page.wait_for_timeout(300)
        assert not page.messages("user") + page.messages("bot")
        page.wait_for(lambda: scripted.answers[-1]._cancelled)
        page.ask("two")
        page.wait_for_answers(1)
        assert scripted.asked[-1] == [("user", "two")]


@pytest.mark.slow
def test_conversation_and_settings_outlive_a_reload(browser, site):
    """A reload in mid-answer ends the answer; what has come of it stays."""
    scripted, url = site
    with Page(browser, url) as page:
        page.page.locator("#system").fill("Be brief.")
        page.ask("one")
        page.wait_for_answers(1)
        page.ask("long two")
        page.wait_for(lambda: len(page.messages("bot")) == 2)
        page.page.reload()
        page.wait_for(lambda: scripted.answers[-1]._cancelled)
        assert page.messages("user") == ["one", "long two"]
        assert page.messages("bot")[1].startswith("long")
        page.ask("three")
        page.wait_for_answers(3)
        assert scripted.asked[-1][0] == ("system", "Be brief.")
        assert [text for role, text in scripted.asked[-1] if role == "user"] == ["one", "long two", "three"]
    with Page(browser, url) as other:
        assert not other.messages("user")


@pytest.mark.slow
def test_two_people_at_once(browser, site):
    """Neither waits for the other, nor sees anything of them."""
    _, url = site
    with Page(browser, url) as one, Page(browser, url, locale="zh-CN") as two:
        one.ask("long one")
        one.wait_for(lambda: one.messages("bot"))
        two.ask("quick")
        two.wait_for_answers(1)
        assert not one.is_idle()
        assert two.messages("user") == ["quick"]
        assert all(word.startswith("quick") for word in two.messages("bot")[0].split())
        assert all(word.startswith("long") for word in one.messages("bot")[0].split())
        two.click("clear")
        two.wait_for(lambda: not two.messages("user"))
        assert one.messages("user") == ["long one"]
        assert not one.is_idle()
        one.click("stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locale", "send", "ask"),
    [
        ("en-US", "Send", "Type a message; Enter sends it, Shift+Enter starts a new line"),
        ("zh-CN", "发送", "输入内容，回车发送，Shift+回车换行"),
        ("zh-TW", "发送", "输入内容，回车发送，Shift+回车换行"),
    ],
)
def test_languages(browser, site, locale, send, ask):
    _, url = site
    with Page(browser, url, locale) as page:
        assert page.page.locator("#send").inner_text() == send
        assert page.box.get_attribute("placeholder") == ask
        texts = page.page.locator("button, label > span, small, summary").all_inner_texts()
        assert all(texts)
        assert "undefined" not in texts


@pytest.mark.slow
def test_markdown(browser, site):
    _, url = site
    with Page(browser, url) as page:
        page.ask(f"markdown {EVIL}")
        page.wait_for_answers(1)
        bot = page.page.locator('#chat [data-testid="bot"]').first
        assert bot.locator("h1").inner_text() == "Title"
        assert bot.locator("strong").inner_text() == "bold"
        assert "2*3*4" in bot.inner_text()
        assert bot.locator("li").all_inner_texts() == ["one", "two"]
        assert bot.locator("pre code").inner_text() == "print(1)"
        assert bot.locator("th, td").all_inner_texts() == ["a", "b", "1", "2"]
        assert page.messages("user") == [f"markdown {EVIL}"]


MARKDOWN = {
    "*a* **b** `*c*` ~~d~~ 2*3*4 a*b": "<p><em>a</em> <strong>b</strong> <code>*c*</code> <del>d</del> 2*3*4 a*b</p>",
    "[x](https://a.example/b?c=1) [y](ftp://a)": '<p><a href="https://a.example/b?c=1">x</a> [y](ftp://a)</p>',
    "1. a\n2. b\n   - c\n\n3. d": "<ol><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ol>",
    "> a\n> > b\n\nc\nd": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c<br>d</p>",
    "```\n<b>\n# no\n": "<pre><code>&lt;b&gt;\n# no\n</code></pre>",
    "\\*a\\* &amp; <b>": "<p>*a* &amp;amp; &lt;b&gt;</p>",
    "## a #\n***\n#b": "<h2>a</h2><hr><p>#b</p>",
}


@pytest.mark.slow
def test_markdown_forms(browser, site):
    _, url = site
    with Page(browser, url) as page:
        for text, expected in MARKDOWN.items():
            script = """async (text) => {
                const shown = document.createElement("div");
                shown.append((await import("/markdown.js")).render(text));
                return shown.innerHTML.replaceAll(/ (title|target|rel)="[^"]*"/g, "");
            }"""
            assert page.page.evaluate(script, text) == expected
        hostile = [
            "*a" * 20_000,
            "**a" * 20_000,
            "[" * 20_000,
            "`" * 20_001 + "a",
            "> " * 20_000,
            "- " * 20_000,
            "|-" * 20_000,
        ]
        script = """async (texts) => {
            const {render} = await import("/markdown.js");
            return texts.map(render).length;
        }"""
        assert page.page.evaluate(script, hostile) == len(hostile)  # and not after hours


@pytest.mark.slow
def test_settings_and_troubles(browser, site):
    scripted, url = site
    with Page(browser, url) as page:
        for name, value in (("max_tokens", "500"), ("top_p", "0.3"), ("temperature", "0")):
            page.page.locator(f"#{name}").fill(value)
        page.ask("hello")
        page.wait_for_answers(1)
        (sampling,) = scripted.samplings
        assert (sampling.max_new_tokens, sampling.top_p, sampling.temperature) == (500, 0.3, 0)
        for query, told in (("too long", "9999"), ("busy", "busy")):
            page.ask(query)
            page.page.locator("#notice", has_text=told).wait_for()
            page.wait_for(lambda query=query: page.is_idle() and page.box.input_value() == query)
            assert page.messages("user") == ["hello"]  # what was refused is no round
        page.ask("broken")
        page.page.locator("#notice", has_text="failed to compute").wait_for()
        page.wait_for(page.is_idle)
        page.ask("next")
        page.wait_for_answers(3)
        assert [text for _, text in scripted.asked[-1]][0::2] == ["hello", "broken", "next"]
        assert scripted.asked[-1][3] == ("assistant", "partly")
        count = len(scripted.asked)
        page.ask("   ")
        page.box.fill("with a wrong number")
        page.page.locator("#top_p").fill("7")
        page.click("send")
        page.page.locator("#notice", has_text="Top P").wait_for()
        assert page.box.input_value() == "with a wrong number"
        assert len(scripted.asked) == count


@pytest.mark.slow
def test_examples_can_be_clicked(browser, site):
    scripted, url = site
    with Page(browser, url) as page:
        page.page.get_by_text("你好", exact=True).click()
        page.wait_for_answers(1)
        assert scripted.asked[-1] == [("user", "你好")]


@pytest.mark.slow
def test_copies_are_markdown(browser, site):
    _, url = site
    with Page(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.ask("markdown")
        page.wait_for_answers(1)
        page.click("copy")
        page.page.locator("#notice", has_text="Copied").wait_for()
        copied = page.page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith("> markdown\n\n# Title\n\n**bold**")
        page.page.locator(".facts button").click()
        page.wait_for(lambda: page.page.evaluate("navigator.clipboard.readText()").startswith("# Title"))


@pytest.mark.slow
def test_enter_that_ends_a_word_of_an_input_method_sends_nothing(browser, site):
    scripted, url = site
    before = len(scripted.asked)
    with Page(browser, url) as page:
        page.box.fill("ni")
        page.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        page.page.wait_for_timeout(200)
        assert page.box.input_value() == "ni"
        assert len(scripted.asked) == before


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_widths_and_colours(browser, site, width, scheme):
    _, url = site
    with Page(browser, url, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        red = page.page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert (red < 60) == (scheme == "dark")
        assert (page.page.locator("#temperature").is_visible()) == (width == 1280)
        if width == 390:
            page.page.locator("summary").click()
        for name in ("send", "stop", "again", "copy", "clear", "temperature"):
            box = page.page.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert name == "temperature" or box["y"] + box["height"] <= 800


@pytest.mark.slow
def test_command(browser):
    """The command of the README, with the model of this checkout."""
    port = free_port()
    command = [sys.executable, "-m", "chatglm_int8.apps", "web", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < end
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.2)
        with Page(browser, url) as page:
            page.page.locator("#temperature").fill("0")
            page.ask("你好")
            page.wait_for(lambda: page.messages("bot") and page.is_idle(), 60)
            model, tokenizer = loading.load(str(ROOT), "cpu", "auto")
            assert page.messages("bot") == [model.chat(tokenizer, "你好", do_sample=False)[0]]
            assert not page.strange
    finally:
        process.terminate()
        assert process.wait() == 0
