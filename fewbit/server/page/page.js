"use strict";
// The page of a server: chat, figures, and a second server beside it. Everything shown is set as text, never as markup.

const at = (id) => document.getElementById(id);
const state = { info: null, talks: { a: [], b: [] }, last: null, rates: [], abort: null };

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function size(bytes) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (bytes < 1024) return `${bytes.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    bytes /= 1024;
  }
  return `${bytes.toFixed(2)} GiB`;
}

// ---- facts and figures

async function facts() {
  const info = state.info = await (await fetch("info")).json();
  const model = info.model || {};
  at("name").textContent = info.models[0];
  document.title = `${info.models[0]} · fewbit`;
  at("a").querySelector("h2").textContent = info.models[0];
  const short = [model.architecture, model.dialect, model.parameters && `${(model.parameters / 1e6).toFixed(1)}M parameters`,
    model.bytes && size(model.bytes), model.bits_per_weight && `${model.bits_per_weight.toFixed(2)} bits per weight`,
    `context ${info.engine.max_model_len}`];
  at("facts").textContent = short.filter(Boolean).join(" · ");
  const rows = [["formats", (model.formats || []).map((f) => `${f.format}, ${f.modules} modules`).join("; ") || "dense"],
    ["kernels", (model.kernels || []).map((k) => `${k.kernel}: ${k.modules}`).join("; ") || "dense"],
    ["KV cache", `${model.kv || "as computed"}, held as ${model.kv_held || "values"}; scales: ${model.kv_scales || "none"}`],
    ["continuations at once", info.engine.max_num_seqs], ["fewbit", info.version]];
  for (const [name, value] of rows) {
    const row = element("tr");
    row.append(element("td", "", name), element("td", "", String(value)));
    at("model-facts").append(row);
  }
  at("hint").textContent = `--allowed-origins ${location.origin}`;
}

async function figures() {
  try {
    const now = await (await fetch("stats")).json();
    if (state.last) {
      const rate = (now.generated_tokens - state.last.generated_tokens) / Math.max(now.time - state.last.time, 0.001);
      state.rates = [...state.rates, rate].slice(-60);
      at("rate").textContent = rate.toFixed(rate < 10 ? 1 : 0);
      spark();
    }
    state.last = now;
    const share = now.pages_total ? now.pages_used / now.pages_total : 0;
    at("running").textContent = now.running;
    at("waiting").textContent = now.waiting;
    at("cache").value = share;
    at("share").textContent = `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
  } catch {
    at("rate").textContent = "no answer";
  }
  setTimeout(figures, 1000);
}

function spark() {
  const most = Math.max(...state.rates, 1);
  const points = state.rates.map((rate, i) => `${i * 120 / 59},${23 - 22 * rate / most}`);
  at("spark").firstElementChild.setAttribute("points", points.join(" "));
}

// ---- one server's stream of tokens

function body(server, history, chat, compared) {
  const asked = { model: server.model, stream: true, max_tokens: Number(at("tokens").value) || 256,
    temperature: Number(at("temperature").value) };
  if (chat) Object.assign(asked, { messages: history }, compared && { logprobs: true, top_logprobs: 0 });
  else Object.assign(asked, { prompt: history[history.length - 1].content }, compared && { logprobs: 0 });
  return asked;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const found = JSON.parse(line.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

function tokensOf(choice) {
  const rows = choice.logprobs;
  if (rows?.content?.length) return rows.content.map((one) => one.token);
  if (rows?.tokens?.length) return rows.tokens;
  const text = choice.delta ? choice.delta.content : choice.text;
  return text ? [text] : [];
}

async function* tokens(server, history, compared) {
  const chat = server.chat;
  const headers = { "content-type": "application/json" };
  if (server.key) headers.authorization = `Bearer ${server.key}`;
  const response = await fetch(`${server.url}v1/${chat ? "chat/completions" : "completions"}`, {
    method: "POST", headers, body: JSON.stringify(body(server, history, chat, compared)), signal: state.abort.signal });
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new Error(found?.error?.message || `${response.status} ${response.statusText}`);
  }
  for await (const event of events(response)) {
    if (event.choices?.length) {
      const text = event.choices[0].delta ? event.choices[0].delta.content : event.choices[0].text;
      yield { tokens: tokensOf(event.choices[0]), text: text || "" };
    }
  }
}

// ---- the talk

function bubble(pane, kind, text) {
  const made = element("p", `said ${kind}`, text);
  at(pane).querySelector(".talk").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

async function answer(pane, server, question, compared, seen) {
  const history = state.talks[pane];
  history.push({ role: "user", content: question });
  bubble(pane, "user", question);
  const shown = bubble(pane, "assistant", "");
  let text = "", start = performance.now(), count = 0;
  try {
    for await (const piece of tokens(server, history, compared)) {
      text += piece.text;
      count += piece.tokens.length;
      if (compared) seen.add(pane, shown, piece.tokens);
      else shown.append(piece.text);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      shown.classList.add("error");
      shown.append(`${error.message}`);
    }
  }
  history.push({ role: "assistant", content: text });
  const seconds = (performance.now() - start) / 1000;
  at(pane).querySelector(".talk").append(
    element("p", "speed", `${count} pieces in ${seconds.toFixed(2)} s, ${(count / seconds).toFixed(1)} a second`));
}

// Tokens of both sides by place: alike or not, as soon as both are there.
class Agreement {
  constructor() {
    this.sides = { a: [], b: [] };
    this.alike = 0;
    this.first = null;
  }

  add(pane, shown, tokens) {
    for (const token of tokens) {
      const span = element("span", "token", token);
      shown.append(span);
      this.sides[pane].push({ token, span });
      this.judge(this.sides[pane].length - 1);
    }
  }

  judge(place) {
    const a = this.sides.a[place], b = this.sides.b[place];
    if (!a || !b) return;
    const alike = a.token === b.token;
    for (const one of [a, b]) one.span.classList.add(alike ? "same" : "other");
    this.alike += alike;
    if (!alike && this.first === null) this.first = place;
    const both = Math.min(this.sides.a.length, this.sides.b.length);
    at("agreement").textContent = `${this.alike} of ${both} tokens alike` +
      (this.first === null ? "" : `, the first that differs is number ${this.first + 1}`);
  }
}

async function second() {
  const given = at("url").value.trim();
  if (!given) return null;
  const url = new URL(given.endsWith("/") ? given : `${given}/`).href;
  const server = { url, key: at("key").value, model: at("model").value.trim(), chat: state.info.engine.chat_template };
  if (!server.model) {
    const headers = server.key ? { authorization: `Bearer ${server.key}` } : {};
    server.model = (await (await fetch(`${url}v1/models`, { headers })).json()).data[0].id;
  }
  return server;
}

async function ask(question) {
  const here = { url: "", model: state.info.models[0], chat: state.info.engine.chat_template };
  state.abort = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("agreement").textContent = "";
  try {
    const other = at("compare").open ? await second() : null;
    at("b").hidden = !other;
    const seen = new Agreement();
    const work = [answer("a", here, question, Boolean(other), seen)];
    if (other) {
      at("b").querySelector("h2").textContent = `${other.model} at ${other.url}`;
      work.push(answer("b", other, question, true, seen));
    }
    await Promise.all(work);
  } catch (error) {
    at("agreement").textContent = `the second server does not answer: ${error.message}`;
  }
  at("send").disabled = false;
  at("stop").disabled = true;
}

function clear() {
  state.abort?.abort();
  state.talks = { a: [], b: [] };
  for (const pane of ["a", "b"]) at(pane).querySelector(".talk").replaceChildren();
  at("agreement").textContent = "";
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("text").value.trim();
  if (!question || at("send").disabled || !state.info) return;
  at("text").value = "";
  ask(question);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => state.abort?.abort());
at("clear").addEventListener("click", clear);
at("compare").addEventListener("toggle", () => { if (at("compare").open) at("temperature").value = "0"; });
facts();
figures();
