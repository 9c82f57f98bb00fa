// The gallery of the report. Text of models enters the page through textContent only.
"use strict";
(() => {
  const CARD_HEIGHT = 122, GAP = 12, CARD_WIDTH = 330, MARGIN = 600;
  const $ = (id) => document.getElementById(id);
  const gallery = $("gallery"), dialog = $("dialog"), detail = $("detail");
  const images = $("data-images").textContent, packed = $("data-completions").textContent;
  const chunks = new Map();
  let data, groups = [], shown = [], cards = new Map(), columns = 1, active = 0, opened = -1;

  // An element with classes, children that are elements or plain text, and properties.
  function make(tag, css, ...children) {
    const node = document.createElement(tag);
    if (css) node.className = css;
    for (const child of children) {
      if (child !== null && child !== undefined) node.append(child); // strings become text nodes
    }
    return node;
  }
  const isolated = (text) => { const b = make("bdi", "", text); b.dir = "auto"; return b; };
  const readable = (name) => name.replaceAll("_", " ");
  const css = (code) => data.rungs[code].replaceAll("_", "-");
  const fixed = (v, sign) => v === null ? "–" : (sign && v > 0 ? "+" : "") + v.toFixed(2);

  async function inflate(text) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function completionsOf(row) {
    const number = Math.floor(row / data.chunk_rows);
    if (!chunks.has(number)) {
      chunks.set(number, inflate(packed.slice(data.chunks[number], data.chunks[number + 1])));
    }
    return chunks.get(number).then((texts) => texts[row % data.chunk_rows]);
  }

  // Groups -----------------------------------------------------------------------------------

  const score = (g) => {
    let sum = 0, n = 0;
    for (let r = g.first; r < g.first + g.size; r++) {
      const code = +data.codes[r];
      if (code < 7) { sum += code; n++; }
    }
    return n ? sum / n : null;
  };

  function buildGroups() {
    const base = new Map();
    let first = 0;
    data.group_stage.forEach((stage, i) => {
      const image = data.group_image[i];
      const g = { stage, image, step: data.group_step[i], first, size: data.group_size[i], change: null };
      g.run = data.stages[stage][0];
      g.name = data.strings[data.stages[stage][1]];
      g.truth = data.strings[data.image_truth[image]];
      g.dataset = data.image_dataset[image];
      g.score = score(g);
      first += g.size;
      if (g.name === "base") base.set(g.run + " " + image, g);
      groups.push(g);
    });
    for (const g of groups) {
      const b = base.get(g.run + " " + g.image);
      if (b && b !== g && b.score !== null && g.score !== null) { g.change = g.score - b.score; g.base = b; }
      let words = g.truth;
      for (let r = g.first; r < g.first + g.size; r++) {
        if (data.prediction[r] >= 0) words += "\n" + data.strings[data.prediction[r]];
      }
      g.words = words.toLowerCase();
    }
  }

  function stageLabel(g) {
    const name = readable(g.name) + (g.step >= 0 ? " step " + g.step : "");
    return data.runs.length > 1 ? data.runs[g.run] + " · " + name : name;
  }

  // Filters ----------------------------------------------------------------------------------

  function option(select, value, text) {
    const o = make("option", "", text);
    o.value = value;
    select.append(o);
  }

  function fillFilters() {
    option($("stage"), "", "everything");
    data.stages.forEach(([run, name], i) => {
      const text = readable(data.strings[name]);
      option($("stage"), i, data.runs.length > 1 ? data.runs[run] + " · " + text : text);
    });
    option($("dataset"), "", "all");
    for (const d of [...new Set(data.image_dataset)]) option($("dataset"), d, readable(data.strings[d]));
    const hasChange = groups.some((g) => g.change !== null);
    if (hasChange) {
      option($("sort"), "gain", "most improved since base");
      option($("sort"), "loss", "most worsened since base");
    }
    option($("sort"), "order", "as written");
    option($("sort"), "best", "best answers first");
    option($("sort"), "worst", "worst answers first");
    const last = data.stages.findLastIndex(([, name]) => data.strings[name] === "trained");
    if (last >= 0) $("stage").value = data.stages.findIndex(([, name]) => data.strings[name] === "trained");
  }

  const ORDERS = {
    order: null,
    gain: (a, b) => (b.change ?? -99) - (a.change ?? -99),
    loss: (a, b) => (a.change ?? 99) - (b.change ?? 99),
    best: (a, b) => (b.score ?? -1) - (a.score ?? -1),
    worst: (a, b) => (a.score ?? 99) - (b.score ?? 99),
  };

  function apply() {
    const stage = $("stage").value, dataset = $("dataset").value, find = $("find").value.trim().toLowerCase();
    const pressed = [...document.querySelectorAll(".chip[aria-pressed=true]")].map((c) => c.dataset.code);
    const counts = new Array(data.rungs.length).fill(0);
    let rows = 0;
    shown = groups.filter((g) => {
      if (stage !== "" && g.stage !== +stage) return false;
      if (dataset !== "" && g.dataset !== +dataset) return false;
      if (find && !g.words.includes(find)) return false;
      const codes = data.codes.slice(g.first, g.first + g.size);
      for (const c of codes) counts[+c]++;
      if (pressed.length && !pressed.some((c) => codes.includes(c))) return false;
      rows += g.size;
      return true;
    });
    const order = ORDERS[$("sort").value];
    if (order) shown.sort(order);
    for (const chip of document.querySelectorAll(".chip")) {
      const n = counts[+chip.dataset.code];
      chip.querySelector("output").textContent = n.toLocaleString("en");
      chip.hidden = n === 0 && chip.getAttribute("aria-pressed") === "false";
    }
    const images = new Set(shown.map((g) => g.image)).size;
    const n = (v) => v.toLocaleString("en");
    $("status").textContent = shown.length
      ? `${n(rows)} answers to ${n(images)} images. Arrow keys move, Enter opens.`
      : "Nothing matches these filters.";
    active = 0;
    layout();
  }

  // Virtual list: only cards near the window exist ---------------------------------------------

  function layout() {
    columns = Math.max(1, Math.floor((gallery.clientWidth + GAP) / (CARD_WIDTH + GAP)));
    gallery.style.height = Math.ceil(shown.length / columns) * (CARD_HEIGHT + GAP) + "px";
    for (const card of cards.values()) card.remove();
    cards.clear();
    draw();
  }

  function draw() {
    const top = gallery.getBoundingClientRect().top, pitch = CARD_HEIGHT + GAP;
    const from = Math.max(0, Math.floor((-top - MARGIN) / pitch)) * columns;
    const to = Math.min(shown.length, (Math.ceil((-top + innerHeight + MARGIN) / pitch) + 1) * columns);
    const focused = document.activeElement;
    for (const [i, card] of cards) {
      if ((i < from || i >= to) && card !== focused) { card.remove(); cards.delete(i); }
    }
    const width = (gallery.clientWidth - GAP * (columns - 1)) / columns;
    for (let i = from; i < to; i++) {
      if (cards.has(i)) continue;
      const card = makeCard(shown[i], i);
      card.style.cssText = `width:${width}px;height:${CARD_HEIGHT}px;left:${(i % columns) * (width + GAP)}px;` +
        `top:${Math.floor(i / columns) * pitch}px`;
      cards.set(i, card);
      gallery.append(card);
    }
  }

  function thumb(image, alt) {
    const start = data.thumbs[2 * image], length = data.thumbs[2 * image + 1];
    if (!length) return make("span", "thumb");
    const img = make("img", "thumb");
    img.alt = alt;
    img.decoding = "async";
    img.src = "data:image/jpeg;base64," + images.slice(start, start + length);
    return img;
  }

  const said = (row) => data.prediction[row] < 0 ? "no answer" : data.strings[data.prediction[row]];

  function bestRow(g) {
    let best = g.first;
    for (let r = g.first; r < g.first + g.size; r++) {
      const a = +data.codes[r] % 7, b = +data.codes[best] % 7; // 7, no label, ranks lowest
      if (a > b) best = r;
    }
    return best;
  }

  function answerLine(row) {
    return make("span", "line", make("i", "dot " + css(+data.codes[row])), " ", isolated(said(row)));
  }

  function makeCard(g, i) {
    const text = make("span", "");
    const truth = make("span", "line truth", isolated(g.truth));
    text.append(truth);
    if (g.size > 1) {
      const bar = make("span", "bar");
      for (let r = g.first; r < g.first + g.size; r++) bar.append(make("i", css(+data.codes[r])));
      text.append(bar);
    }
    text.append(answerLine(bestRow(g)));
    if (g.base) {
      const before = answerLine(bestRow(g.base));
      before.classList.add("small");
      before.prepend("was ");
      text.append(before);
    }
    const foot = make("span", "line small", isolated(readable(data.strings[g.dataset]) + " · " + stageLabel(g)));
    if (g.change) {
      const up = g.change > 0;
      foot.prepend(make("span", "change " + (up ? "up" : "down"), (up ? "▲ " : "▼ ") + Math.abs(g.change).toFixed(1)), "  ");
    }
    text.append(foot);
    const card = make("button", "card", thumb(g.image, ""), text);
    card.type = "button";
    card.tabIndex = i === active ? 0 : -1;
    card.setAttribute("aria-posinset", i + 1);
    card.setAttribute("aria-setsize", shown.length);
    card.setAttribute("role", "listitem");
    card.setAttribute("aria-label", `${g.truth}: ${said(bestRow(g))}, ${readable(data.rungs[+data.codes[bestRow(g)]])}`);
    card.addEventListener("click", () => open(i));
    card.addEventListener("focus", () => { active = i; });
    return card;
  }

  function focusCard(i) {
    active = Math.max(0, Math.min(shown.length - 1, i));
    const y = Math.floor(active / columns) * (CARD_HEIGHT + GAP) + gallery.getBoundingClientRect().top;
    if (y < 70) scrollBy({ top: y - 90, behavior: "instant" });
    if (y + CARD_HEIGHT > innerHeight) scrollBy({ top: y + CARD_HEIGHT - innerHeight + 20, behavior: "instant" });
    draw();
    const card = cards.get(active);
    if (card) { card.tabIndex = 0; card.focus({ preventScroll: true }); }
  }

  // One image -----------------------------------------------------------------------------------

  function answer(row, isOpen) {
    const code = +data.codes[row];
    const box = make("article", "answer " + css(code));
    const text = make("span", "said", isolated(said(row)));
    const facts = make("span", "facts", make("span", "", readable(data.rungs[code])));
    if (data.reward[row] !== null) facts.append(make("span", "", "reward " + fixed(data.reward[row])));
    if (data.advantage[row] !== null) facts.append(make("span", "", "advantage " + fixed(data.advantage[row], true)));
    box.append(text, facts);
    if (data.failure[row] >= 0) box.append(make("span", "small", isolated(data.strings[data.failure[row]])));
    const more = make("details", "", make("summary", "", "whole completion"));
    const body = make("p", "text");
    body.dir = "auto";
    const load = () => completionsOf(row).then((text) => {
      const parts = text.split(/(<\/?(?:think|answer)>)/);
      body.replaceChildren(...parts.map((p, i) => i % 2 ? make("span", "tag", ` ${p} `) : make("span", "", p)));
    });
    more.addEventListener("toggle", () => { if (more.open && !body.textContent) load(); });
    more.append(body);
    if (isOpen) { more.open = true; load(); }
    box.append(more);
    return box;
  }

  function column(g, isFirst) {
    const best = bestRow(g);
    const list = make("section", "", make("h4", "", isolated(stageLabel(g))));
    for (let r = g.first; r < g.first + g.size; r++) list.append(answer(r, isFirst && r === best));
    return list;
  }

  function button(text, label, action) {
    const b = make("button", "", text);
    b.type = "button";
    b.setAttribute("aria-label", label);
    b.addEventListener("click", action);
    return b;
  }

  function open(i) {
    opened = active = i;
    const g = shown[i];
    const id = data.strings[data.image_id[g.image]];
    const others = groups.filter((o) => o !== g && o.image === g.image).slice(0, 11);
    const together = [g, ...others].sort((a, b) => a.stage - b.stage || a.step - b.step);
    const tools = make("div", "tools", button("←", "previous", () => step(-1)), button("→", "next", () => step(1)),
      button("Close", "close", () => dialog.close()));
    const head = make("div", "", make("h3", "", isolated(g.truth)),
      make("p", "small", isolated(readable(data.strings[g.dataset])), " · ", isolated(id)));
    detail.replaceChildren(make("div", "top", thumb(g.image, ""), head, tools),
      make("div", "columns", ...together.map((o) => column(o, o === g))));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }

  function step(by) {
    const next = opened + by;
    if (next >= 0 && next < shown.length) open(next);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
      return;
    }
    const inField = event.target.closest("input, select");
    if (event.key === "/" && !inField) { event.preventDefault(); $("find").focus(); return; }
    if (!event.target.closest(".card")) return;
    const page = columns * Math.max(1, Math.floor(innerHeight / (CARD_HEIGHT + GAP)) - 1);
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page,
      PageDown: page, Home: -shown.length, End: shown.length };
    if (event.key in moves) { event.preventDefault(); focusCard(active + moves[event.key]); }
  }

  function listen() {
    let pending = 0;
    const soon = (fn) => () => { if (!pending) pending = requestAnimationFrame(() => { pending = 0; fn(); }); };
    addEventListener("scroll", soon(draw), { passive: true });
    let width = 0;
    new ResizeObserver(() => { if (gallery.clientWidth !== width) { width = gallery.clientWidth; layout(); } }).observe(gallery);
    for (const id of ["stage", "dataset", "sort"]) $(id).addEventListener("change", apply);
    $("find").addEventListener("input", apply);
    $("filters").addEventListener("submit", (e) => e.preventDefault());
    for (const chip of document.querySelectorAll(".chip")) {
      chip.addEventListener("click", () => {
        chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
        apply();
      });
    }
    addEventListener("keydown", onKey);
    dialog.addEventListener("click", (e) => { if (e.target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => { if (opened >= 0) focusCard(opened); });
  }

  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });

  if (typeof DecompressionStream === "undefined") {
    $("status").textContent = "This browser is too old for the gallery (it lacks DecompressionStream).";
    return;
  }
  inflate($("data-index").textContent).then((index) => {
    data = index;
    buildGroups();
    fillFilters();
    listen();
    apply();
    document.documentElement.dataset.ready = Math.round(performance.now());
  });
})();
