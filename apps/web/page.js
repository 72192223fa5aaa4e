// The page: one conversation in each tab, kept over a reload.

import { render } from "./markdown.js";

const TEXTS = {
  en: {
    welcome: "Ask something, in Chinese or English. The conversation stays in this tab.",
    ask: "Type a message; Enter sends it, Shift+Enter starts a new line",
    send: "Send", stop: "Stop", again: "Regenerate", clear: "Clear", copy: "Copy", copied: "Copied as Markdown.",
    settings: "Settings", system: "System prompt",
    systemInfo: "Stands before the conversation. The model was not trained on system prompts: it may not follow them.",
    maxTokens: "Longest answer, in tokens", topPInfo: "Of likely tokens", temperature: "Temperature",
    temperatureInfo: "0: greedy", tokens: "tokens", busy: "The server is busy: try again in a moment.",
    lost: "The server can't be reached.", number: "This number is out of its range: ",
  },
  zh: {
    welcome: "可以用中文或英文提问。对话只保存在本标签页中。",
    ask: "输入内容，回车发送，Shift+回车换行",
    send: "发送", stop: "停止", again: "重新生成", clear: "清空", copy: "复制", copied: "已复制为 Markdown。",
    settings: "设置", system: "系统提示词",
    systemInfo: "放在对话之前。模型没有针对系统提示词训练过，不一定会遵守。",
    maxTokens: "回答的最大词元数", topPInfo: "候选词元的累计概率", temperature: "温度",
    temperatureInfo: "0：总是最可能的词元", tokens: "词元", busy: "服务器繁忙，请稍后再试。",
    lost: "无法连接服务器。", number: "数值超出范围：",
  },
};
const EXAMPLES = ["你好", "你能做什么？", "What can you do?", "How do I load the 6B model?"];
const KEPT = "chatglm"; // in the tab's storage
const SETTINGS = ["system", "max_tokens", "top_p", "temperature"];

const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const texts = TEXTS[language];
const part = (id) => document.getElementById(id);
const [chat, query, notice] = ["chat", "query", "notice"].map(part);

let rounds = []; // {query, response, tokens, rate}
let running = null; // the AbortController of the answer that is awaited

function element(name, kind, ...children) {
  const made = document.createElement(name);
  made.className = kind;
  made.append(...children);
  return made;
}

// What is shown

function show() {
  chat.replaceChildren(...(rounds.length ? rounds.flatMap(shownRound) : [welcome()]));
  scroll(true);
  buttons();
}

function shownRound(round) {
  const asked = element("div", "message user", round.query);
  asked.dataset.testid = "user";
  asked.dir = "auto";
  return round.response ? [asked, ...shownAnswer(round)] : [asked];
}

function shownAnswer(round) {
  const answer = element("div", "message bot", render(round.response));
  answer.dataset.testid = "bot";
  answer.dir = "auto";
  const copy = element("button", "plain", texts.copy);
  copy.addEventListener("click", () => toClipboard(round.response));
  const facts = round.tokens ? [`${round.tokens} ${texts.tokens}`, ...(round.rate ? [`${round.rate} ${texts.tokens}/s`] : [])] : [];
  return [answer, element("div", "facts", ...facts.map((fact) => element("span", "fact", fact)), copy)];
}

/** Draws the last answer anew. */
function showAnswer(round) {
  const follow = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
  while (chat.lastChild && chat.lastChild.dataset.testid !== "user") chat.lastChild.remove();
  chat.append(...shownAnswer(round));
  scroll(follow);
}

function scroll(follow) {
  if (follow) chat.scrollTop = chat.scrollHeight;
}

function welcome() {
  const examples = EXAMPLES.map((text) => {
    const made = element("button", "example", text);
    made.addEventListener("click", () => ask(text, rounds));
    return made;
  });
  return element("div", "welcome", element("p", "", texts.welcome), element("div", "examples", ...examples));
}

function buttons() {
  part("send").disabled = Boolean(running);
  part("stop").disabled = !running;
  part("again").disabled = Boolean(running) || !rounds.length;
  part("copy").disabled = !rounds.length;
}

function tell(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

// What is kept

function keep() {
  const settings = Object.fromEntries(SETTINGS.map((name) => [name, part(name).value]));
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ rounds, settings }));
  } catch {
    // No storage, or no room in it: the conversation lives as long as the page.
  }
}

function remember() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT));
    for (const name of SETTINGS) part(name).value = String(kept.settings[name]);
    rounds = kept.rounds
      .filter((round) => round.response)
      .map(({ query, response, tokens, rate }) => ({ query: String(query), response: String(response), tokens, rate }));
  } catch {
    rounds = [];
  }
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers lend the clipboard to pages of https and of this machine alone.
    const box = element("textarea", "", text);
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  tell(texts.copied);
}

function asMarkdown() {
  const quoted = (text) => text.split("\n").map((line) => `> ${line}`).join("\n");
  return rounds.map((round) => `${quoted(round.query)}\n\n${round.response}\n`).join("\n");
}

// Questions and answers

function body(text, earlier) {
  const wrong = SETTINGS.slice(1).map(part).find((input) => !input.checkValidity() || input.value === "");
  if (wrong) throw new Error(`${texts.number}${wrong.parentElement.firstChild.textContent}`);
  const messages = earlier.flatMap((round) => [
    { role: "user", content: round.query },
    { role: "assistant", content: round.response },
  ]);
  if (part("system").value.trim()) messages.unshift({ role: "system", content: part("system").value });
  messages.push({ role: "user", content: text });
  const numbers = Object.fromEntries(SETTINGS.slice(1).map((name) => [name, Number(part(name).value)]));
  const usage = { include_usage: true, continuous_usage_stats: true };
  return JSON.stringify({ messages, ...numbers, stream: true, stream_options: usage });
}

/** The events of a reply, as objects. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const one of parts) if (one.startsWith("data: {")) yield JSON.parse(one.slice(6));
  }
}

/** Answers a question that follows earlier rounds. If it is refused, the conversation stays as it was. */
async function ask(text, earlier) {
  if (running || !text.trim()) return;
  const before = rounds;
  const mine = (running = new AbortController());
  const round = { query: text, response: "" };
  rounds = [...earlier, round];
  tell("");
  show();
  let mistake = "";
  let frame = 0;
  try {
    let begun;
    const request = { method: "POST", headers: { "Content-Type": "application/json" }, signal: mine.signal };
    const reply = await fetch("v1/chat/completions", { ...request, body: body(text, earlier) });
    if (!reply.ok) throw new Error(reply.status === 429 ? texts.busy : (await reply.json()).error.message);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const now = performance.now();
      const count = event.usage?.completion_tokens ?? 0;
      if (count && !begun) begun = { now, count };
      round.tokens = count || round.tokens;
      if (begun && now - begun.now > 100) round.rate = ((1000 * (count - begun.count)) / (now - begun.now)).toFixed(1);
      round.response += event.choices[0]?.delta.content ?? "";
      if (round.response && !frame)
        frame = requestAnimationFrame(() => {
          frame = 0;
          if (running === mine) showAnswer(round);
        });
    }
  } catch (error) {
    if (error.name !== "AbortError") mistake = error instanceof TypeError ? texts.lost : error.message;
  }
  cancelAnimationFrame(frame);
  if (running !== mine) return; // cleared
  running = null;
  if (!round.response) {
    rounds = before;
    if (mistake && before === earlier) query.value ||= text;
  }
  tell(mistake);
  show();
  keep();
}

function submit() {
  const text = query.value;
  if (running || !text.trim()) return;
  query.value = "";
  ask(text, rounds);
}

function clear() {
  running?.abort();
  running = null;
  rounds = [];
  tell("");
  show();
  keep();
}

document.documentElement.lang = language;
for (const made of document.querySelectorAll("[data-text]")) made.textContent = texts[made.dataset.text];
for (const id of ["send", "stop", "again", "copy", "clear"]) part(id).textContent = texts[id];
query.placeholder = texts.ask;
part("settings").open = matchMedia("(min-width: 761px)").matches;
part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
query.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter also ends a Chinese input method's word
  event.preventDefault();
  submit();
});
part("stop").addEventListener("click", () => running?.abort());
part("again").addEventListener("click", () => ask(rounds.at(-1).query, rounds.slice(0, -1)));
part("copy").addEventListener("click", () => toClipboard(asMarkdown()));
part("clear").addEventListener("click", clear);
addEventListener("pagehide", keep);
remember();
show();
