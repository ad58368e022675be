// Tokens on a page: reads the blocks that credit_data.py writes, shows one tooltip, moves by keyboard.
(() => {
  "use strict";
  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
  const [INFINITE, UNKNOWN] = [65534, 65535];
  const CODE_SCALE = 255 / Math.sqrt(-Math.log(5e-4));
  const GAPS = ["", " ", "\n"];
  const LEVELS = 8;

  const bytesOf = (text) => {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
    return bytes;
  };

  // The bytes of a block, however it is packed.
  const unpacked = async ({ packing, bytes }) => {
    if (packing === "none") return bytesOf(bytes);
    const stream = new Blob([bytesOf(bytes)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  // A column from its planes: the first byte of every entry, then the second of every one.
  const fromPlanes = (type, planes) => {
    const bytes = new Uint8Array(planes.length);
    const width = Number(type[1]);
    const entries = planes.length / width;
    for (let k = 0; k < width; k += 1) {
      for (let n = 0; n < entries; n += 1) bytes[n * width + k] = planes[k * entries + n];
    }
    return new TYPES[type](bytes.buffer);
  };

  // One block: numbers of token i of rollout r, and its texts.
  class Store {
    constructor(form, bytes) {
      this.form = form;
      this.columns = {};
      for (const [name, [type, start, entries]] of Object.entries(form.columns)) {
        this.columns[name] = fromPlanes(type, bytes.subarray(start, start + Number(type[1]) * entries));
      }
      const { student, trainer } = this.columns;
      if (student && trainer) student.forEach((own, n) => { trainer[n] += own; });
      this.starts = [0];
      for (const length of form.lengths) this.starts.push(this.starts.at(-1) + length);
      this.offsets = {};
    }
    static now(form) { return new Store(form, bytesOf(form.bytes)); }
    static async later(form) {
      const bytes = await unpacked(form);
      form.bytes = "";
      return new Store(form, bytes);
    }
    has(name) { return name in this.columns; }
    nats(name, n) {
      const column = this.columns[name];
      if (!column || column[n] === UNKNOWN) return NaN;
      return column[n] === INFINITE ? Infinity : column[n] / 1000;
    }
    // Colours: above 0 is what the teacher, or the objective, holds against the token; entropy has one side only.
    measure(name, n) {
      if (name === "reverse_kl") return this.nats("teacher", n) - this.nats("student", n);
      if (name === "advantage") return this.has("advantage") ? -this.columns.advantage[n] : NaN;
      if (name === "teacher_probability") return this.nats("teacher", n);
      if (name === "ratio") return this.nats("trainer", n) - this.nats("student", n);
      return this.nats("entropy", n);
    }
    text(r, i) { return this.form.texts[this.columns.token[this.starts[r] + i]]; }
    gap(r, i) { return this.has("gap") ? GAPS[this.columns.gap[this.starts[r] + i]] : ""; }
    piece(r, i) { return this.form.pieces ? this.form.pieces[r][i] : undefined; }
    shown(r, i) {
      const piece = this.piece(r, i);
      if (piece) return (piece[1] === 1 ? piece[3] : "") + `⟨${piece[1]}/${piece[2]}⟩`;
      return this.shownText(this.columns.token[this.starts[r] + i]);
    }
    shownText(index) { return this.form.shown[index] ?? this.form.texts[index]; }
    // As a name: blanks count, since " yes" and "yes" are two tokens.
    name(shown) { return shown.replace(/\n$/, "").replaceAll(" ", "␣"); }
    // What token i adds to the text: nothing where the text leaves it out.
    plain(r, i) {
      if (this.form.left_out && this.form.left_out[r].includes(i)) return "";
      const piece = this.piece(r, i);
      return this.gap(r, i) + (piece ? (piece[1] === 1 ? piece[0] : "") : this.text(r, i));
    }
    note(r, i) { return this.form.notes ? this.form.notes[r][i] : undefined; }
    trains(r, i) { return !this.has("trains") || this.columns.trains[this.starts[r] + i] === 1; }
    // Alternatives: {index, id, text, logprob}, best first. `name`: "best", the teacher's, or "own", the student's.
    alternatives(name, r, i) {
      if (!this.has(`${name}_count`)) return [];
      const counts = this.columns[`${name}_count`];
      if (!this.offsets[name]) {
        const offsets = new Uint32Array(counts.length + 1);
        for (let n = 0; n < counts.length; n += 1) offsets[n + 1] = offsets[n] + counts[n];
        this.offsets[name] = offsets;
      }
      const n = this.starts[r] + i;
      const found = [];
      for (let k = this.offsets[name][n]; k < this.offsets[name][n + 1]; k += 1) {
        const index = this.columns[`${name}_token`][k];
        let logprob = -((this.columns[`${name}_code`][k] / CODE_SCALE) ** 2);
        // The written token's own probability is known better than by a byte.
        const exact = this.nats(name === "best" ? "teacher" : "student", n);
        if (index === this.columns.token[n] && !Number.isNaN(exact)) logprob = -exact;
        found.push({ index, id: this.form.ids[index], text: this.form.texts[index], logprob });
      }
      return found;
    }
  }

  const boxes = new WeakMap();
  const placeOf = (box) => {
    if (!boxes.has(box) && box.dataset.credit) {
      boxes.set(box, { store: Store.now(JSON.parse(box.dataset.credit)), rollout: 0 });
    }
    return boxes.get(box);
  };

  const nats = (value) => {
    if (!Number.isFinite(value)) return value > 0 ? "+∞" : "−∞";
    return value.toFixed(3).replace("-", "−");
  };
  const signed = (value) => (value > 0 && Number.isFinite(value) ? "+" : "") + nats(value);
  const probability = (logprob, digits = 1) => {
    const p = 100 * Math.exp(logprob);
    if (p !== 0 && p < 0.1) {
      const raised = (_, digits_) => "×10⁻" + [...digits_].map((one) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[one]).join("");
      return p.toExponential(1).replace(/e-(\d+)$/, raised) + " %";
    }
    return (digits || p < 10 ? p.toFixed(1) : p.toFixed(0)) + " %";
  };
  const element = (name, text, css) => {
    const node = document.createElement(name);
    node.textContent = text;
    if (css) node.className = css;
    return node;
  };
  const row = (...cells) => {
    const node = document.createElement("tr");
    node.append(...cells.map((cell) => element("td", cell)));
    node.firstChild.dir = "auto";
    return node;
  };
  const table = (rows) => {
    const node = document.createElement("table");
    node.append(...rows);
    return node;
  };

  const tip = document.getElementById("tip");
  const numbers = (store, n) => {
    const rows = [];
    for (const [name, column] of [["student", "student"], ["teacher", "teacher"], ["student, as trained", "trainer"]]) {
      const value = store.nats(column, n);
      if (!Number.isNaN(value)) rows.push(row(name, probability(-value), nats(-value)));
    }
    const kl = store.measure("reverse_kl", n);
    if (!Number.isNaN(kl)) rows.push(row("reverse KL", "", `${signed(kl)} nats`));
    const ratio = store.measure("ratio", n);
    if (!Number.isNaN(ratio)) rows.push(row("importance ratio", "", Math.exp(-ratio).toPrecision(4)));
    const advantage = store.measure("advantage", n);
    if (!Number.isNaN(advantage)) rows.push(row("advantage", "", signed(-advantage)));
    for (const [name, column] of [["entropy, student", "entropy"], ["entropy, teacher", "teacher_entropy"]]) {
      const value = store.nats(column, n);
      if (!Number.isNaN(value)) rows.push(row(name, "", `${nats(value)} nats`));
    }
    return table(rows);
  };
  const fill = (token) => {
    const box = token.parentNode;
    const { store, rollout } = placeOf(box);
    const index = Array.prototype.indexOf.call(box.children, token);
    const n = store.starts[rollout] + index;
    const name = element("div", store.name(store.shown(rollout, index)), "name");
    name.dir = "auto";
    const id = store.form.ids[store.columns.token[n]];
    const place = `token ${index + 1} of ${store.form.lengths[rollout]}, position ${index}`;
    tip.replaceChildren(name, element("div", place + (id === null ? "" : `, id ${id}`), "dim"));
    const piece = store.piece(rollout, index);
    if (piece) tip.append(element("div", `bytes ${piece[1]} of ${piece[2]} of ${piece[3]}`, "dim"));
    tip.append(numbers(store, n));
    for (const [who, words] of [["best", "the teacher would have said"], ["own", "the student's own choices"]]) {
      const found = store.alternatives(who, rollout, index);
      if (!found.length) continue;
      tip.append(element("div", words, "dim"));
      const texts = found.map((one) => store.name(store.shownText(one.index)));
      tip.append(table(found.map((one, k) => row(texts[k], probability(one.logprob, 0)))));
    }
    const note = store.note(rollout, index);
    if (note) tip.append(element("div", note));
    if (!store.trains(rollout, index)) tip.append(element("div", "does not train", "dim"));
  };
  const show = (token) => {
    fill(token);
    tip.hidden = false;
    const at = token.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
    const above = at.top - tip.offsetHeight - 6;
    const below = at.bottom + 6;
    const top = below + tip.offsetHeight > innerHeight && above > 0 ? above : below;
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  };
  const hide = () => { tip.hidden = true; };
  const tokenOf = (target) => (target.closest ? target.closest(".tokens > b") : null);
  const focus = (token) => {
    for (const other of token.parentNode.querySelectorAll("[tabindex]")) other.tabIndex = -1;
    token.tabIndex = 0;
    token.focus();
  };
  const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;

  document.addEventListener("pointerover", (event) => {
    const token = tokenOf(event.target);
    if (token) show(token); else hide();
  });
  document.addEventListener("click", (event) => {
    const token = tokenOf(event.target);
    if (token) focus(token);
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event.target);
    if (!token) return hide();
    token.setAttribute("aria-describedby", "tip");
    show(token);
  });
  document.addEventListener("focusout", hide);
  // Focus scrolls its token into view, and the tooltip follows; a tooltip under the pointer would be left behind.
  document.addEventListener("scroll", () => {
    const token = tokenOf(document.activeElement);
    if (token && !tip.hidden) show(token); else hide();
  }, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const token = tokenOf(event.target);
    if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
    const box = token.parentNode;
    let [left, right] = [token.previousElementSibling, token.nextElementSibling];
    if (RIGHT_TO_LEFT.test(token.textContent)) [left, right] = [right, left];
    const next = {
      ArrowRight: right, ArrowLeft: left, ArrowDown: token.nextElementSibling, ArrowUp: token.previousElementSibling,
      Home: box.firstElementChild, End: box.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    focus(next);
  });

  const copy = async (text, button) => {
    const words = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // No clipboard on this page: the older way, from a field of its own.
      const field = element("textarea", text);
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 1500);
  };
  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button.parentNode.querySelector("code").textContent, button));
  }

  window.understudy = { Store, LEVELS, boxes, copy, element, focus, nats, unpacked };
})();
