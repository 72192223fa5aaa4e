"""The page: one conversation in each tab, in Chinese or English as the browser is."""

import asyncio

import gradio as gr

from ..server.answer_text import AnswerText
from ..server.answers import Answer, Busy, Failed, Sampling, TimeLimit
from ..server.scheduler import Scheduler

TEXTS = {
    "en": {
        "welcome": "### Ask something\nChinese or English. The conversation stays in this tab.",
        "ask": "Type a message; Enter sends it, Shift+Enter starts a new line",
        "send": "Send",
        "stop": "Stop",
        "again": "Regenerate",
        "clear": "Clear",
        "settings": "### Settings",
        "max_length": "Length",
        "max_length_info": "Tokens in all",
        "top_p_info": "Of likely tokens",
        "temperature": "Temperature",
        "temperature_info": "0: greedy",
    },
    "zh-CN": {
        "welcome": "### 开始对话\n可以用中文或英文提问。对话只保存在本页面中。",
        "ask": "输入内容，回车发送，Shift+回车换行",
        "send": "发送",
        "stop": "停止",
        "again": "重新生成",
        "clear": "清空",
        "settings": "### 设置",
        "max_length": "最大长度",
        "max_length_info": "词元数，包括对话历史",
        "top_p_info": "候选词元的累计概率",
        "temperature": "温度",
        "temperature_info": "0：总是最可能的词元",
    },
}
BUSY = "服务器繁忙，请稍后再试。The server is busy: try again in a moment."
EXAMPLES = ["你好", "你能做什么？", "What can you do?", "How do I load the 6B model?"]
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.5rem; margin: 0; }
#title p { margin: 2px 0 0; opacity: 0.65; }
#chat { height: calc(100vh - 240px) !important; min-height: 320px; }
#chat .placeholder { text-align: center; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: 10px; }
#send { height: 62px; }
footer { display: none !important; }
"""

Round = tuple[str, str]  # what was asked, and the answer


def as_messages(rounds: list[Round]) -> list[dict]:
    """A conversation as Gradio's chatbot shows it; without a message where there is no answer yet."""
    messages = []
    for query, response in rounds:
        messages.append({"role": "user", "content": query})
        if response:
            messages.append({"role": "assistant", "content": response})
    return messages


class Turn:
    """An answer that a tab waits for, from before it is submitted."""

    def __init__(self):
        self.answer: Answer | None = None
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        if self.answer is not None:
            self.answer.cancel()


class Chat:
    """Conversations with one model. The turn that each tab waits for is all that is kept here."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self._turns: dict[str, Turn] = {}

    def stop(self, request: gr.Request) -> None:
        """End the answer of this tab where it is."""
        if turn := self._turns.get(request.session_hash):
            turn.stop()

    def leave(self, request: gr.Request) -> None:
        """End the answer of this tab and forget it."""
        if turn := self._turns.pop(request.session_hash, None):
            turn.stop()

    async def send(
        self, query: str, rounds: list[Round], max_length: int, top_p: float, temperature: float, request: gr.Request
    ):
        """Answer a query. Yields what the page shows: text box, messages, rounds and buttons."""
        if query.strip():
            async for step in self._answer(query, rounds, rounds, max_length, top_p, temperature, request):
                yield step

    async def again(self, rounds: list[Round], max_length: int, top_p: float, temperature: float, request: gr.Request):
        """Answer the last query anew. Yields as `send` does, but for the text box."""
        if rounds:
            query, earlier = rounds[-1][0], rounds[:-1]
            async for _, *step in self._answer(query, earlier, rounds, max_length, top_p, temperature, request):
                yield step

    async def _answer(self, query, rounds: list[Round], before: list[Round], max_length, top_p, temperature, request):
        """Yields as `send`. A query that is refused goes back into the text box, and `before` is shown: as a round
        without an answer it would only take room from the others."""
        tab = request.session_hash
        if tab in self._turns:
            return  # one at a time
        turn = self._turns[tab] = Turn()
        model, tokenizer = self.scheduler.model, self.scheduler.tokenizer
        text, response, refused = AnswerText(tokenizer, model.process_response), "", False
        limit = min(int(max_length), self.scheduler.max_length)
        try:
            yield "", as_messages([*rounds, (query, "")]), [*rounds, (query, "")], *_buttons(running=True)
            inputs = await asyncio.to_thread(model.build_inputs, tokenizer, query, rounds, limit)
            prompt = inputs["input_ids"][0].tolist()
            sampling = Sampling(limit - len(prompt), temperature=temperature, top_p=top_p)
            (turn.answer,) = self.scheduler.submit(prompt, [sampling])
            if turn.stopped:
                turn.answer.cancel()
            async for token in turn.answer:
                if new := text.step(token.id):
                    response += new
                    longer = [*rounds, (query, response)]
                    if self._turns.get(tab) is turn:  # something new may be in the text box by now
                        yield gr.skip(), as_messages(longer), longer, *_buttons(running=True)
        except (Busy, ValueError, TimeLimit, Failed) as error:
            gr.Warning(BUSY if isinstance(error, Busy) else str(error))
            refused = not response
        finally:
            turn.stop()
            shown = self._turns.get(tab) is turn  # else the conversation was cleared meanwhile
            if shown:
                del self._turns[tab]
        if shown:
            longer = before if refused else [*rounds, (query, response + text.finish())]
            yield query if refused else gr.skip(), as_messages(longer), longer, *_buttons(running=False)


def _buttons(running: bool) -> tuple[gr.Button, gr.Button, gr.Button]:
    """Send, stop and regenerate."""
    return gr.Button(interactive=not running), gr.Button(interactive=running), gr.Button(interactive=not running)


def build(chat: Chat) -> gr.Blocks:
    """The page."""
    i18n = gr.I18n(**TEXTS)
    limit = chat.scheduler.max_length
    with gr.Blocks(title="ChatGLM", fill_width=True, analytics_enabled=False) as page:
        rounds = gr.State([])
        gr.Markdown("# ChatGLM\n开源双语对话模型 · An open bilingual dialogue model", elem_id="title")
        with gr.Row():
            with gr.Column(scale=4, min_width=420):
                chatbot = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    layout="bubble",
                    buttons=["copy"],
                    placeholder=i18n("welcome"),
                    examples=[{"text": text} for text in EXAMPLES],
                    feedback_options=None,
                )
                with gr.Row():
                    query = gr.Textbox(
                        placeholder=i18n("ask"), show_label=False, lines=1, max_lines=8, autofocus=True, scale=8
                    )
                    send = gr.Button(i18n("send"), variant="primary", scale=1, min_width=90, elem_id="send")
                with gr.Row():
                    stop = gr.Button(i18n("stop"), variant="stop", size="sm", interactive=False, elem_id="stop")
                    again = gr.Button(i18n("again"), size="sm", elem_id="again")
                    clear = gr.Button(i18n("clear"), size="sm", elem_id="clear")
            with gr.Column(scale=1, min_width=260):
                gr.Markdown(i18n("settings"))
                max_length = gr.Slider(16, limit, limit, step=1, label=i18n("max_length"), info=i18n("max_length_info"))
                top_p = gr.Slider(0, 1, 0.7, step=0.01, label="Top P", info=i18n("top_p_info"))
                temperature = gr.Slider(0, 2, 0.95, step=0.01, label=i18n("temperature"), info=i18n("temperature_info"))
        settings = [max_length, top_p, temperature]
        shown = [chatbot, rounds, send, stop, again]
        options = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        asked = gr.on([query.submit, send.click], chat.send, [query, rounds, *settings], [query, *shown], **options)

        def example(chosen: gr.SelectData) -> str:
            return chosen.value["text"]

        chosen = chatbot.example_select(example, None, query, **options).then(
            chat.send, [query, rounds, *settings], [query, *shown], **options
        )
        repeated = again.click(chat.again, [rounds, *settings], shown, **options)
        stop.click(chat.stop, None, None, queue=False, **options)
        # The page, too, has to stop listening: what is on its way would come back.
        answers = [asked, chosen, repeated]
        left = gr.on([clear.click, chatbot.clear], chat.leave, None, None, queue=False, cancels=answers, **options)
        left.then(lambda: ([], [], *_buttons(running=False)), None, shown, **options)
        page.unload(chat.leave)
    page.queue(default_concurrency_limit=None)
    return page


def launch(chat: Chat, **options):
    """Serve the page; options of Gradio's `launch`, which returns what it does."""
    fonts = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "sans-serif"]
    return build(chat).launch(
        theme=gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        i18n=gr.I18n(**TEXTS),
        footer_links=[],
        ssr_mode=False,
        **options,
    )
