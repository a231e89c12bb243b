"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const column = Object.fromEntries(data.columns.map((name, i) => [name, i]));
  const value = (i, name) => (name in column ? data.modules[i][column[name]] : null);

  const make = (tag, words, attributes = {}) => {
    const node = document.createElement(tag);
    if (words !== undefined && words !== null) node.textContent = words;
    for (const [key, held] of Object.entries(attributes)) node.setAttribute(key, held);
    return node;
  };

  // how a column is written; the rest are plain words
  const percent = (v) => `${(100 * v).toPrecision(3)} %`;
  const digits = (v) => String(Number(v.toPrecision(3)));
  const SAY = { error: percent, loss: digits, rtn_loss: digits, gain: (v) => `${digits(v)} ×`, damp: digits, bits: (v) => String(Number(v.toPrecision(4))), seconds: (v) => `${digits(v)} s` };
  const TITLE = { rtn_loss: "loss of RTN", gain: "against RTN", damp: "damping", algo: "algorithm", seconds: "time", bits: "bits" };
  const say = (name, v) => (v === null || v === undefined ? "" : name in SAY && typeof v === "number" ? SAY[name](v) : String(v));

  // hovering
  const tip = find("tip");
  const hide = () => { tip.hidden = true; };
  const show = (words, x, y) => {
    tip.textContent = words;
    tip.hidden = false;
    tip.style.left = "0";
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
  };
  const wordsOf = (node) => (node.dataset.cell !== undefined ? cellWords(data.cells[node.dataset.cell]) : node.dataset.tip);
  const under = (event) => event.target.closest && event.target.closest("[data-tip],[data-cell]");
  document.addEventListener("pointermove", (event) => {
    const node = under(event);
    if (node) show(wordsOf(node), event.clientX, event.clientY);
    else hide();
  });
  document.addEventListener("focusin", (event) => {
    const node = under(event);
    if (!node || !node.matches(":focus-visible")) return;
    const box = node.getBoundingClientRect();
    show(wordsOf(node), box.right - 14, box.bottom - 12);
  });
  document.addEventListener("focusout", hide);
  addEventListener("scroll", hide, { passive: true });

  // the error map
  let measure = data.legends.length ? data.legends[0].key : "";
  const heat = find("heat");
  const boxes = heat ? [...heat.querySelectorAll("[data-cell]")] : [];
  const cellWords = (cell) => {
    const lines = [`layer ${cell.layer} · ${cell.kind}`];
    if (cell.modules.length > 1) lines.push(`${cell.modules.length} modules`);
    for (const legend of data.legends) {
      const held = cell.values[legend.key];
      if (held) lines.push(`${legend.label}: ${held[1]}`);
    }
    const format = value(cell.modules[0], "format");
    if (format) lines.push(format);
    return lines.join("\n");
  };
  const colour = (key) => {
    measure = key;
    const legend = data.legends.find((l) => l.key === key);
    boxes.forEach((box, i) => {
      const cell = data.cells[i];
      const held = cell.values[key];
      const chosen = box.classList.contains("chosen") ? " chosen" : "";
      box.setAttribute("class", (held ? `cell h${held[0]}` : "cell none") + chosen);
      box.setAttribute("aria-label", `layer ${cell.layer} ${cell.kind}: ${held ? held[1] : "not measured"}`);
    });
    find("low").textContent = legend.ends[0];
    find("high").textContent = legend.ends[2] + (legend.log ? ", log scale" : "");
    for (const button of document.querySelectorAll("[data-measure]")) {
      button.setAttribute("aria-pressed", String(button.dataset.measure === key));
    }
  };
  const at = new Map(data.cells.map((cell, i) => [`${cell.kind}\n${cell.layer}`, i]));
  const kinds = [...new Set(data.cells.map((cell) => cell.kind))];
  const layers = [...new Set(data.cells.map((cell) => cell.layer))].sort((a, b) => a - b);
  const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = (i, [down, right]) => {
    let [row, place] = [kinds.indexOf(data.cells[i].kind), layers.indexOf(data.cells[i].layer)];
    for (;;) {
      [row, place] = [row + down, place + right];
      if (row < 0 || row >= kinds.length || place < 0 || place >= layers.length) return;
      const next = at.get(`${kinds[row]}\n${layers[place]}`);
      if (next === undefined) continue;
      boxes[i].setAttribute("tabindex", "-1");
      boxes[next].setAttribute("tabindex", "0");
      boxes[next].focus();
      return;
    }
  };
  if (heat) {
    heat.addEventListener("keydown", (event) => {
      const i = Number(event.target.dataset.cell);
      if (event.key in MOVES) step(i, MOVES[event.key]);
      else if (event.key === "Enter" || event.key === " ") detail(data.cells[i].modules[0], true);
      else return;
      event.preventDefault();
    });
  }

  // one module in detail
  const cellOf = new Map();
  data.cells.forEach((cell, i) => cell.modules.forEach((m) => cellOf.set(m, i)));
  const detail = (i, keep) => {
    const panel = find("detail");
    if (!panel) return;
    const facts = make("dl", null, { class: "facts" });
    for (const name of data.columns) {
      const said = say(name, value(i, name));
      if (name === "name" || !said) continue;
      const row = make("div");
      row.append(make("dt", TITLE[name] || name), make("dd", said));
      facts.append(row);
    }
    panel.replaceChildren(make("h3", value(i, "name"), { class: "mono" }), facts);
    const drawn = [...document.querySelectorAll("[data-distribution]")].find((f) => f.dataset.distribution === value(i, "name"));
    if (drawn) panel.append(drawn.querySelector("svg").cloneNode(true));
    const cell = cellOf.get(i);
    boxes.forEach((box, at) => box.classList.toggle("chosen", at === cell));
    const others = cell === undefined ? [] : data.cells[cell].modules.filter((m) => m !== i);
    if (others.length) panel.append(siblings(others));
    panel.hidden = false;
    if (!keep) find("map").scrollIntoView({ block: "start" });
  };
  const siblings = (others) => {
    const row = make("p", "In the same cell, worst first: ", { class: "others" });
    for (const m of others.slice(0, 12)) {
      row.append(make("button", `${value(m, "name")} ${say("error", value(m, "error"))}`, { type: "button", "data-module": m }));
    }
    if (others.length > 12) row.append(`and ${others.length - 12} more`);
    return row;
  };

  // the list of modules
  const SHOWN = 40;
  const telling = (name) => name === "name" || new Set(data.modules.map((row) => row[column[name]])).size > 1;
  const listed = data.columns.filter((name) => !["rule", "shape", "rtn_loss"].includes(name) && telling(name));
  const state = { by: "error" in column ? "error" : "name", down: "error" in column, words: "", all: false };
  const order = (a, b) => {
    const [x, y] = [value(a, state.by), value(b, state.by)];
    if (x === y) return a - b;
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    const sign = typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
    return state.down ? -sign : sign;
  };
  const list = () => {
    const table = find("module-list");
    if (!table) return;
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const hit = (row) => { const text = row.join(" ").toLowerCase(); return words.every((w) => text.includes(w)); };
    const found = data.modules.map((_, i) => i).filter((i) => hit(data.modules[i])).sort(order);
    const head = make("tr");
    for (const name of listed) {
      const th = make("th", null, { scope: "col", class: name in SAY ? "num" : "" });
      if (name === state.by) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      th.append(make("button", TITLE[name] || name, { type: "button", "data-sort": name }));
      head.append(th);
    }
    const body = make("tbody");
    for (const i of state.all ? found : found.slice(0, SHOWN)) {
      const tr = make("tr", null, { "data-module": i });
      for (const name of listed) {
        const td = make("td", null, { class: name === "name" ? "mono" : name in SAY ? "num" : name });
        td.append(say(name, value(i, name)));
        tr.append(td);
      }
      body.append(tr);
    }
    const thead = make("thead");
    thead.append(head);
    table.replaceChildren(thead, body);
    find("shown").textContent = words.length ? `${found.length} of ${data.modules.length}` : "";
    find("more").hidden = state.all || found.length <= SHOWN;
    find("more").textContent = `Show all ${found.length}`;
  };
  list();
  if (find("filter")) {
    find("filter").addEventListener("input", (event) => { state.words = event.target.value; list(); });
    find("more").addEventListener("click", () => { state.all = true; list(); });
  }

  // copying
  const copy = async (button) => {
    const pre = find(`copy-${button.dataset.copy}`);
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(pre);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    button.classList.add("done");
    setTimeout(() => { button.textContent = "Copy"; button.classList.remove("done"); }, 1600);
  };

  document.addEventListener("click", (event) => {
    const node = event.target.closest("[data-cell],[data-module],[data-measure],[data-sort],[data-copy]");
    if (!node) return;
    const { cell, module, measure: key, sort, copy: wanted } = node.dataset;
    if (wanted) copy(node);
    else if (key) colour(key);
    else if (cell !== undefined) detail(data.cells[cell].modules[0], true);
    else if (sort) {
      state.down = state.by === sort ? !state.down : sort in SAY;
      state.by = sort;
      list();
    } else {
      event.preventDefault();
      detail(Number(module), node.closest("#map") !== null);
    }
  });
})();
