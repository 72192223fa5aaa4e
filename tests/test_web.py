"""The web page, in a real Chromium where there is one."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

gradio = pytest.importorskip("gradio", reason='needs gradio: pip install ".[demo]"')

from chatglm_int8.apps import cli, loading  # noqa: E402
from chatglm_int8.apps.server import scheduler  # noqa: E402
from chatglm_int8.apps.server.answers import Busy, Failed, Token  # noqa: E402
from chatglm_int8.apps.web import page as web_page  # noqa: E402

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--disable-sync", "--no-first-run"]
EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


class ScriptedAnswer:
    """Says what it is told, a piece every 20 ms."""

    def __init__(self, pieces: list[str]):
        self.pieces = pieces
        self.cancelled = False
        self.finished = False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self):
        for index, piece in enumerate(self.pieces):
            if self.cancelled:
                return
            if piece == "ERROR":
                raise Failed("The server failed to compute an answer.")
            yield Token(index)
            await asyncio.sleep(0.02)
        self.finished = True


class Scripted:
    """A scheduler, model and tokenizer of a script: answers to queries by their first word, which they repeat."""

    max_length = 2048

    def __init__(self):
        self.model = self.tokenizer = self
        self.answers: list[ScriptedAnswer] = []
        self.asked: list[tuple] = []

    def build_inputs(self, tokenizer, query, history, max_length):
        if query == "too long":
            raise ValueError("The query has 9999 tokens.")
        self.asked.append((query, list(history)))
        self.query = query
        return {"input_ids": torch.zeros(1, 3, dtype=torch.long)}

    def submit(self, prompt, samplings):
        if self.query == "busy":
            raise Busy
        self.samplings = samplings
        number = len(self.answers)
        word = self.query.split()[0]
        pieces = {
            "markdown": ["# Title\n\n", "**bold**\n\n- one\n- two\n\n```python\nprint(1)\n```\n\n", EVIL],
            "long": [f"{word}{number} "] * 400,
            "broken": ["partly ", "ERROR"],
        }.get(word, [f"{word}{number} "] * 5)
        self.answers.append(ScriptedAnswer(pieces))
        return [self.answers[-1]]

    def process_response(self, text):
        return text.strip()

    def decode_stream(self):
        answers, mine = self.answers, len(self.answers)
        return type("Stream", (), {"step": lambda _, i: answers[mine].pieces[i], "flush": lambda _: ""})()


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
    options = {"prevent_thread_lock": True, "quiet": True, "server_name": "127.0.0.1", "server_port": free_port()}
    _, url, _ = web_page.launch(web_page.Chat(scripted), **options)
    yield scripted, url
    gradio.close_all(verbose=False)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Page:
    """The demo in a browser tab of its own context; requests to anywhere else are refused and noted."""

    def __init__(self, browser, url: str, locale: str = "en-US"):
        self.context = browser.new_context(locale=locale)
        self.outside: list[str] = []

        def route(route):
            if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
                route.continue_()
            else:
                self.outside.append(route.request.url)
                route.abort()

        self.context.route("**/*", route)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.goto(url)
        self.box = self.page.locator("textarea").first
        self.box.wait_for()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

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


def test_page_under_a_path_of_a_proxy():
    """The page asks for its parts where the proxy shows them, and the proxy drops the path."""
    options = {"prevent_thread_lock": True, "quiet": True, "server_name": "127.0.0.1", "server_port": free_port()}
    try:
        _, url, _ = web_page.launch(web_page.Chat(Scripted()), root_path="/chat", **options)
        proxied = urllib.request.Request(url, headers={"Host": "example.org", "X-Forwarded-Proto": "https"})
        with urllib.request.urlopen(proxied) as response:
            page = response.read().decode()
        assert '"root":"https://example.org/chat"' in page.replace(" ", "")
    finally:
        gradio.close_all(verbose=False)


def test_the_command_gives_its_path_to_the_page(monkeypatch):
    seen = {}
    monkeypatch.setattr(loading, "load", lambda *_: (None, None))
    monkeypatch.setattr(scheduler, "Scheduler", lambda *_, **__: types.SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(web_page, "launch", lambda chat, **options: seen.update(options))
    assert cli.main(["web", "--root-path", "/chat", "--port", "80"]) == 0
    assert seen == {"server_name": "127.0.0.1", "server_port": 80, "root_path": "/chat"}


@pytest.mark.slow
def test_conversation(browser, site):
    """Typed, streamed, answered again, cleared; what was said before goes along."""
    scripted, url = site
    with Page(browser, url) as page:
        page.ask("first question")
        page.wait_for(lambda: page.messages("bot") and page.is_idle())
        assert page.box.input_value() == ""
        assert page.messages("user") == ["first question"]
        (answer,) = page.messages("bot")
        assert re.fullmatch(r"(first\d+ ?){5}", answer)
        page.box.fill("second")
        page.click("send")
        page.wait_for(lambda: len(page.messages("bot")) == 2 and page.is_idle())
        assert scripted.asked[-1] == ("second", [("first question", answer)])
        again = page.messages("bot")[1]
        page.click("again")
        page.wait_for(lambda: page.messages("bot")[1:] not in ([], [again]) and page.is_idle())
        assert scripted.asked[-1] == ("second", [("first question", answer)])
        assert page.messages("user") == ["first question", "second"]
        page.click("clear")
        page.wait_for(lambda: not page.messages("bot"))
        page.ask("third")
        page.wait_for(lambda: page.messages("bot") and page.is_idle())
        assert scripted.asked[-1] == ("third", [])
        assert not page.outside


@pytest.mark.slow
def test_streaming_and_stop(browser, site):
    scripted, url = site
    with Page(browser, url) as page:
        page.ask("long story")
        page.wait_for(lambda: page.messages("bot"))
        first = page.messages("bot")[0]
        page.wait_for(lambda: len(page.messages("bot")[0]) > len(first))
        page.box.fill("next")  # typing goes on meanwhile
        page.click("stop")
        page.wait_for(page.is_idle)
        stopped = page.messages("bot")[0]
        assert scripted.answers[-1].cancelled
        assert not scripted.answers[-1].finished
        page.page.wait_for_timeout(500)
        assert page.messages("bot") == [stopped]
        assert page.box.input_value() == "next"
        page.box.press("Enter")
        page.wait_for(lambda: len(page.messages("bot")) == 2 and page.is_idle())
        ((query, kept),) = scripted.asked[-1][1]
        assert (query, " ".join(kept.split())) == ("long story", stopped)


@pytest.mark.slow
def test_clear_and_reload_in_mid_answer(browser, site):
    """Nothing of it comes back, and its place is free."""
    scripted, url = site
    with Page(browser, url) as page:
        page.ask("long one")
        page.wait_for(lambda: page.messages("bot"))
        page.click("clear")
        page.wait_for(lambda: not page.messages("user"))
        page.page.wait_for_timeout(500)
        assert not page.messages("user") + page.messages("bot")
        assert scripted.answers[-1].cancelled
        page.ask("long two")
        page.wait_for(lambda: page.messages("bot"))
        page.page.reload()
        page.box.wait_for()
        page.wait_for(lambda: scripted.answers[-1].cancelled)
        assert not scripted.answers[-1].finished
        assert not page.messages("user") + page.messages("bot")
        page.ask("three")
        page.wait_for(lambda: page.messages("bot") and page.is_idle())
        assert scripted.asked[-1] == ("three", [])


@pytest.mark.slow
def test_two_people_at_once(browser, site):
    """Neither waits for the other, nor sees anything of them."""
    _, url = site
    with Page(browser, url) as one, Page(browser, url, locale="zh-CN") as two:
        one.ask("long one")
        one.wait_for(lambda: one.messages("bot"))
        two.ask("quick")
        two.wait_for(lambda: two.messages("bot"))
        two.page.wait_for_timeout(300)
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
def test_languages(browser, site):
    _, url = site
    for locale, texts in (("en-US", web_page.TEXTS["en"]), ("zh-CN", web_page.TEXTS["zh-CN"])):
        with Page(browser, url, locale) as page:
            for name in ("send", "stop", "again", "clear"):
                page.page.locator(f"#{name}", has_text=texts[name]).wait_for()
            assert page.box.get_attribute("placeholder") == texts["ask"]


@pytest.mark.slow
def test_markdown_is_rendered_and_html_is_not_run(browser, site):
    _, url = site
    with Page(browser, url) as page:
        page.ask(f"markdown {EVIL}")
        page.wait_for(lambda: page.messages("bot") and page.is_idle())
        bot = page.page.locator('#chat [data-testid="bot"]').first
        assert bot.locator("h1").inner_text() == "Title"
        assert bot.locator("strong").inner_text() == "bold"
        assert bot.locator("li").count() == 2
        assert "print(1)" in bot.locator("pre").inner_text()
        page.page.wait_for_timeout(300)
        assert page.page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_settings_and_troubles(browser, site):
    scripted, url = site
    with Page(browser, url) as page:
        numbers = page.page.locator('input[type="number"]')
        for index, value in enumerate(("500", "0.3", "0")):
            numbers.nth(index).fill(value)
            numbers.nth(index).press("Tab")
        page.ask("hello")
        page.wait_for(lambda: page.messages("bot") and page.is_idle())
        (sampling,) = scripted.samplings
        assert (sampling.max_new_tokens, sampling.top_p, sampling.temperature) == (497, 0.3, 0)
        for query, told in (("too long", "9999"), ("busy", "busy")):
            page.ask(query)
            page.page.get_by_text(told).last.wait_for()
            page.wait_for(lambda query=query: page.is_idle() and page.box.input_value() == query)
            assert page.messages("user") == ["hello"]  # what was refused is no round
        page.ask("broken")
        page.page.get_by_text("failed to compute").last.wait_for()
        page.wait_for(page.is_idle)
        page.ask("next")
        page.wait_for(lambda: len(page.messages("bot")) == 3 and page.is_idle())
        query, rounds = scripted.asked[-1]
        assert query == "next"
        assert [query for query, _ in rounds] == ["hello", "broken"]
        assert rounds[1][1] == "partly"
        count = len(scripted.asked)
        page.ask("   ")
        page.page.wait_for_timeout(500)
        assert len(scripted.asked) == count


@pytest.mark.slow
def test_examples_can_be_clicked(browser, site):
    scripted, url = site
    with Page(browser, url) as page:
        page.page.get_by_text(web_page.EXAMPLES[0], exact=True).click()
        page.wait_for(lambda: page.messages("bot") and page.is_idle())
        assert scripted.asked[-1] == (web_page.EXAMPLES[0], [])


@pytest.mark.slow
def test_command(browser):
    """The command of the README, with the model of this checkout."""
    port = free_port()
    command = [sys.executable, str(ROOT / "examples" / "web_page.py"), "--port", str(port), "--device", "cpu"]
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
            numbers = page.page.locator('input[type="number"]')
            numbers.nth(2).fill("0")
            numbers.nth(2).press("Tab")
            page.ask("你好")
            page.wait_for(lambda: page.messages("bot") and page.is_idle(), 60)
            model, tokenizer = loading.load(str(ROOT), "cpu", "auto")
            assert page.messages("bot") == [model.chat(tokenizer, "你好", do_sample=False)[0]]
            assert not page.outside
    finally:
        process.terminate()
        process.wait()
