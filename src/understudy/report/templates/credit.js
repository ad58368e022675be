// The page of token credit: rollouts are written when they come near the screen, from the block at the page's end.
(async () => {
  "use strict";
  const { Store, LEVELS, boxes, copy, element, focus, unpacked } = window.understudy;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const byId = (id) => document.getElementById(id);
  const { rollouts, prompts } = JSON.parse(new TextDecoder().decode(await unpacked(read("rollouts"))));
  const ROWS_AT_FIRST = 100;
  // Pages of fewer tokens are written whole, so that a browser's own search finds everything.
  const WHOLE = 10000;
  // Steps of the scale, in nats (advantages: in their own unit).
  const SCALES = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20];
  const MEASURES = {
    reverse_kl: {
      columns: ["student", "teacher"], low: "Teacher finds the token more likely", high: "Teacher finds it less likely",
      unit: "reverse KL per token in nats; no colour: both agree",
    },
    advantage: {
      columns: ["advantage"], low: "Made more likely (advantage above 0)", high: "Made less likely (advantage below 0)",
      unit: "minus the advantage; no colour: no credit",
    },
    teacher_probability: {
      columns: ["teacher"], high: "Teacher finds it unlikely",
      unit: "minus the teacher's log-probability in nats; no colour: certain",
    },
    entropy: {
      columns: ["entropy"], high: "Student could have gone on in many ways", hue: "e",
      unit: "entropy of the student's next token in nats; no colour: one way only",
    },
    ratio: {
      columns: ["trainer", "student"], low: "More likely as trained than as sampled (ratio above 1)",
      high: "Less likely as trained (ratio below 1)", unit: "minus the log of the importance ratio",
    },
  };
  const state = { measure: "reverse_kl", scales: {}, sort: null, down: true, query: "", allRows: false };
  const selected = new Set();
  const filled = new Set();
  const texts = new Map();
  const boxOf = new Map();
  const store = await Store.later(read("credit-data"));

  // --- colours

  const available = Object.keys(MEASURES).filter((name) => MEASURES[name].columns.every((one) => store.has(one)));
  const widest = (measure) => {
    const total = store.starts.at(-1);
    const stride = Math.max(1, Math.floor(total / 20000));
    const sizes = [];
    for (let n = 0; n < total; n += stride) {
      const size = Math.abs(store.measure(measure, n));
      if (Number.isFinite(size)) sizes.push(size);
    }
    sizes.sort((a, b) => a - b);
    return sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(0.95 * sizes.length))] : 2;
  };
  const scaleOf = (measure) => {
    if (!(measure in state.scales)) {
      const index = SCALES.findIndex((scale) => scale >= widest(measure));
      // Below half a nat, shades would tell differences apart that mean nothing (ratios live there); ten nats are a
      // factor of 22,000, and more is no worse.
      const least = measure === "ratio" ? 0 : SCALES.indexOf(0.5);
      state.scales[measure] = index < 0 ? SCALES.indexOf(10) : Math.min(SCALES.indexOf(10), Math.max(index, least));
    }
    return SCALES[state.scales[measure]];
  };
  const shade = (n) => {
    const value = store.measure(state.measure, n);
    if (Number.isNaN(value)) return "";
    const level = Math.round(Math.max(-1, Math.min(1, value / scaleOf(state.measure))) * LEVELS);
    if (level === 0) return "";
    return level < 0 ? `n${-level}` : `${MEASURES[state.measure].hue || "p"}${level}`;
  };
  const NOTES = { "false step": "u1", "inherited error": "u2" };
  const classesOf = (r, i) => {
    const text = store.text(r, i);
    const note = store.note(r, i);
    return [
      shade(store.starts[r] + i), note ? NOTES[note] || "u3" : "", text.trim() === "" ? "w" : "",
    ].filter(Boolean).join(" ");
  };
  const paint = (r) => {
    const box = boxOf.get(r);
    const hits = hitsOf(r);
    Array.prototype.forEach.call(box.children, (token, i) => {
      token.className = classesOf(r, i) + (hits.has(i) ? " hit" : "");
    });
  };
  const legend = () => {
    const { low, high, unit, hue } = MEASURES[state.measure];
    const scale = scaleOf(state.measure);
    const shades = element("span", "", "shades");
    shades.setAttribute("aria-hidden", "true");
    const steps = [...Array(LEVELS).keys()].map((i) => i + 1);
    const cells = (names) => names.map((name) => element("b", "", name));
    if (low) shades.append(element("i", `−${scale}`), ...cells(steps.toReversed().map((i) => `n${i}`)));
    else shades.append(element("i", "0"));
    shades.append(...cells(["p0", ...steps.map((i) => `${hue || "p"}${i}`)]), element("i", `+${scale}`));
    byId("legend").replaceChildren(
      element("span", low || ""), shades, element("span", high), element("span", `Colour: ${unit}.`, "unit"));
    byId("scale").value = state.scales[state.measure];
    byId("scale").setAttribute("aria-valuetext", `${scale}`);
    byId("scale-value").textContent = `±${scale}`;
  };
  const repaint = () => { legend(); for (const r of filled) paint(r); };

  // --- text

  const promptOf = (r) => prompts[rollouts[r].prompt].prompt_text || "";
  const textOf = (r) => {
    if (!texts.has(r)) {
      let text = "";
      for (let i = 0; i < store.form.lengths[r]; i += 1) text += store.plain(r, i);
      texts.set(r, text);
    }
    return texts.get(r);
  };
  const hitsOf = (r) => {
    const hits = new Set();
    if (!state.query) return hits;
    const text = textOf(r).toLowerCase();
    const ends = [];
    let end = 0;
    for (let i = 0; i < store.form.lengths[r]; i += 1) ends.push(end += store.plain(r, i).length);
    for (let at = text.indexOf(state.query), i = 0; at >= 0; at = text.indexOf(state.query, at + 1)) {
      while (i < ends.length && ends[i] <= at) i += 1;
      for (let k = i; k < ends.length && (k ? ends[k - 1] : 0) < at + state.query.length; k += 1) hits.add(k);
    }
    return hits;
  };
  const matches = (r) => !state.query || textOf(r).toLowerCase().includes(state.query) ||
    promptOf(r).toLowerCase().includes(state.query);

  // --- rollouts: a shell per unit (one rollout, or the same prompt before and after), filled when it comes near

  const units = new Map();
  rollouts.forEach((one, r) => {
    if (!units.has(one.unit)) units.set(one.unit, { members: [], shell: element("section", "", "shell") });
    units.get(one.unit).members.push(r);
  });
  const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));
  const facts = (one, r) => [
    `${store.form.lengths[r]} tokens`,
    one.kl === null ? "" : `reverse KL ${number(one.kl)} nats per token`,
    one.reward === null ? "" : `reward ${number(one.reward, 2)}`,
    one.finish === "length" ? "cut at the length cap" : "",
  ].filter(Boolean).join(" · ");
  const button = (words, act) => {
    const node = element("button", words);
    node.type = "button";
    node.addEventListener("click", () => act(node));
    return node;
  };
  const checkbox = (r) => {
    const label = element("label", "", "pick");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.dataset.pick = r;
    box.checked = selected.has(r);
    label.append(box, element("span", "select"));
    return label;
  };
  const card = (r) => {
    const one = rollouts[r];
    const node = element("article", "", "rollout");
    node.id = `r${r}`;
    node.tabIndex = -1;
    const head = element("h4", "");
    const link = element("a", `r${r}`);
    link.href = `#r${r}`;
    head.append(link, element("span", one.label ? ` ${one.label}` : ""));
    const box = element("p", "", "tokens");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Completion r${r}, one element per token. Arrow keys move between tokens.`);
    boxes.set(box, { store, rollout: r });
    boxOf.set(r, box);
    const hits = hitsOf(r);
    for (let i = 0; i < store.form.lengths[r]; i += 1) {
      const token = element("b", store.shown(r, i), classesOf(r, i) + (hits.has(i) ? " hit" : ""));
      // One tab stop per rollout; arrow keys move on from there.
      if (i === 0) token.tabIndex = 0;
      box.append(store.gap(r, i), token);
    }
    if (!store.form.lengths[r]) box.append("(no tokens)");
    const actions = element("p", "", "actions");
    actions.append(checkbox(r), button("Copy text", (self) => copy(textOf(r), self)));
    node.append(head, element("p", facts(one, r), "facts"), box, actions);
    return node;
  };
  const fill = (unit) => {
    const { members, shell } = unit;
    if (filled.has(members[0])) return;
    observer.unobserve(shell);
    const one = rollouts[members[0]];
    const prompt = element("div", promptOf(members[0]), "prompt");
    prompt.dir = "auto";
    prompt.tabIndex = 0;
    prompt.setAttribute("role", "group");
    prompt.setAttribute("aria-label", "Prompt");
    const pair = element("div", "", "pair");
    for (const r of members) { pair.append(card(r)); filled.add(r); }
    shell.replaceChildren(element("h3", one.heading));
    if (promptOf(members[0])) shell.append(prompt);
    shell.append(pair);
    shell.classList.add("filled");
  };
  const unitOf = new Map([...units.values()].map((unit) => [unit.shell, unit]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) fill(unitOf.get(entry.target));
  }, { rootMargin: "600px" });

  // --- table: sorting, search, selection

  const KEYS = {
    rollout: (r) => r, kl: (r) => rollouts[r].kl, length: (r) => store.form.lengths[r],
    reward: (r) => rollouts[r].reward, finish: (r) => rollouts[r].finish,
  };
  const compare = (a, b) => {
    const [x, y] = [KEYS[state.sort](a), KEYS[state.sort](b)];
    if (x === y) return a - b;
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : 1) * (state.down ? -1 : 1);
  };
  const listed = () => {
    const shown = rollouts.map((_, r) => r).filter(matches);
    return state.sort ? shown.sort(compare) : shown;
  };
  const tableRow = (r) => {
    const one = rollouts[r];
    const node = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    const link = element("a", `r${r}`);
    link.href = `#r${r}`;
    head.append(link, element("span", one.label ? ` ${one.label}` : ""));
    const pick = document.createElement("td");
    pick.append(checkbox(r));
    const values = [number(one.kl), `${store.form.lengths[r]}`, number(one.reward, 2)];
    node.append(pick, head, element("td", one.heading), ...values.map((value) => element("td", value, "num")),
      element("td", one.finish || "–"));
    return node;
  };
  let order = [];
  const list = () => {
    order = listed();
    const shown = state.allRows ? order : order.slice(0, ROWS_AT_FIRST);
    byId("rows").replaceChildren(...shown.map(tableRow));
    byId("more-rows").hidden = shown.length === order.length;
    byId("more-rows").textContent = `Show all ${order.length} rows`;
    const seen = new Set(order.map((r) => rollouts[r].unit));
    const shells = [...seen].map((unit) => units.get(unit).shell);
    byId("rollout-list").replaceChildren(...shells);
    const whole = store.starts.at(-1) <= WHOLE;
    for (const shell of shells.filter((one) => !one.classList.contains("filled"))) {
      if (whole) fill(unitOf.get(shell)); else observer.observe(shell);
    }
    for (const header of document.querySelectorAll("th[data-key]")) {
      const own = header.dataset.key === state.sort;
      header.setAttribute("aria-sort", own ? (state.down ? "descending" : "ascending") : "none");
    }
    count();
  };
  const count = () => {
    const found = order.length === rollouts.length ? `${rollouts.length} rollouts` :
      `${order.length} of ${rollouts.length} rollouts`;
    byId("count").textContent = selected.size ? `${found}, ${selected.size} selected` : found;
  };
  const chosen = () => (selected.size ? [...selected].sort((a, b) => a - b) : order);

  // --- what leaves the page

  const column = (name, r, turn = -1) => {
    if (!store.has(name)) return undefined;
    const values = [];
    for (let n = store.starts[r]; n < store.starts[r + 1]; n += 1) {
      const value = turn * store.nats(name, n);
      values.push(Number.isFinite(value) ? value + 0 : null);
    }
    return values;
  };
  const topk = (name, r) => {
    if (!store.has(`${name}_count`)) return undefined;
    const rows = Array.from({ length: store.form.lengths[r] }, (_, i) => store.alternatives(name, r, i));
    return {
      ids: rows.map((row) => row.map((one) => one.id)), tokens: rows.map((row) => row.map((one) => one.text)),
      logprobs: rows.map((row) => row.map((one) => Math.round(1000 * one.logprob) / 1000 + 0)),
    };
  };
  const record = (r) => {
    const one = rollouts[r];
    const indices = Array.from(store.columns.token.slice(store.starts[r], store.starts[r + 1]));
    const ids = indices.map((index) => store.form.ids[index]);
    const advantages = store.has("advantage") ?
      Array.from(store.columns.advantage.slice(store.starts[r], store.starts[r + 1]), (v) => (Number.isNaN(v) ? null : v)) :
      undefined;
    return {
      ...one.record, ...prompts[one.prompt], completion_text: textOf(r), finish_reason: one.finish,
      reward: one.reward, completion_ids: ids.includes(null) ? undefined : ids,
      completion_tokens: indices.map((index) => store.form.texts[index]), sampler_logprobs: column("student", r),
      teacher_logprobs: column("teacher", r), trainer_logprobs: column("trainer", r), advantages,
      loss_mask: indices.map((_, i) => store.trains(r, i)), student_entropy: column("entropy", r, 1),
      teacher_entropy: column("teacher_entropy", r, 1), teacher_topk: topk("best", r), student_topk: topk("own", r),
    };
  };
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // --- addresses: #r12 and #r12t57

  const go = () => {
    const place = /^#r(\d+)(?:t(\d+))?$/.exec(location.hash);
    if (!place || !rollouts[place[1]]) return;
    const unit = units.get(rollouts[place[1]].unit);
    if (!unit.shell.isConnected) {
      byId("search").value = state.query = "";
      list();
    }
    fill(unit);
    const node = byId(`r${place[1]}`);
    const token = place[2] === undefined ? undefined : node.querySelector(".tokens").children[place[2]];
    (token || node).scrollIntoView({ block: token ? "center" : "start" });
    // What lies between is sized by guess until it has been on screen once.
    requestAnimationFrame(() => {
      (token || node).scrollIntoView({ block: token ? "center" : "start" });
      if (token) focus(token); else node.focus({ preventScroll: true });
    });
  };
  document.addEventListener("focusin", (event) => {
    const token = event.target.closest ? event.target.closest("#rollout-list .tokens > b") : null;
    if (!token) return;
    const index = Array.prototype.indexOf.call(token.parentNode.children, token);
    history.replaceState(null, "", `#r${boxes.get(token.parentNode).rollout}t${index}`);
  });
  window.addEventListener("hashchange", go);
  // A link to where the address already points says nothing to hashchange.
  document.addEventListener("click", (event) => {
    const link = event.target.closest ? event.target.closest('a[href^="#r"]') : null;
    if (link && link.hash === location.hash) go();
  });

  // --- controls

  const measure = byId("measure");
  for (const option of measure.options) {
    option.disabled = !available.includes(option.value);
    if (option.disabled) option.textContent += " (not in this data)";
  }
  state.measure = available[0] || "reverse_kl";
  measure.value = state.measure;
  measure.addEventListener("change", () => { state.measure = measure.value; scaleOf(state.measure); repaint(); });
  byId("scale").max = SCALES.length - 1;
  byId("scale").addEventListener("input", (event) => {
    state.scales[state.measure] = Number(event.target.value);
    repaint();
  });
  let waiting = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.query = event.target.value.trim().toLowerCase();
      list();
      for (const r of filled) paint(r);
    }, 120);
  });
  for (const header of document.querySelectorAll("th[data-key] button")) {
    header.addEventListener("click", () => {
      const key = header.parentNode.dataset.key;
      state.down = state.sort === key ? !state.down : !["rollout", "finish"].includes(key);
      state.sort = key;
      list();
    });
  }
  document.addEventListener("change", (event) => {
    if (event.target.dataset.pick === undefined) return;
    const r = Number(event.target.dataset.pick);
    if (event.target.checked) selected.add(r); else selected.delete(r);
    for (const box of document.querySelectorAll(`[data-pick="${r}"]`)) box.checked = selected.has(r);
    count();
  });
  byId("more-rows").addEventListener("click", () => { state.allRows = true; list(); });
  byId("copy").addEventListener("click", (event) => copy(chosen().map(textOf).join("\n\n"), event.currentTarget));
  byId("export").addEventListener("click", () => save("credit.json", JSON.stringify(chosen().map(record), null, 1)));
  window.addEventListener("beforeprint", () => { for (const r of order) fill(units.get(rollouts[r].unit)); });

  scaleOf(state.measure);
  legend();
  list();
  byId("controls").hidden = false;
  byId("table").hidden = false;
  go();
  document.documentElement.dataset.ready = "";
})();
