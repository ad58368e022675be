(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const cache = new WeakMap();
  const numbers = (text) => (text ? text.split(" ").map(Number) : []);
  const logprobs = (text) => numbers(text).map((millinats) => -millinats / 1000);
  const data = (box) => {
    if (!cache.has(box)) {
      const d = box.dataset;
      cache.set(box, {
        ids: numbers(d.i), student: logprobs(d.s), teacher: logprobs(d.t), untrained: new Set(numbers(d.m)),
        alternatives: d.k ? JSON.parse(d.k) : [], notes: d.n ? JSON.parse(d.n) : {},
      });
    }
    return cache.get(box);
  };
  const nats = (value) => {
    if (!Number.isFinite(value)) return value > 0 ? "+∞" : "−∞";
    return value.toFixed(3).replace("-", "−");
  };
  const signed = (value) => (value > 0 && Number.isFinite(value) ? "+" : "") + nats(value);
  const probability = (logprob) => {
    const p = 100 * Math.exp(logprob);
    return (p >= 0.1 || p === 0 ? p.toFixed(1) : p.toExponential(1)) + " %";
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
    return node;
  };
  const known = (value) => value !== undefined && !Number.isNaN(value);
  const fill = (token) => {
    const box = token.parentNode;
    const index = Array.prototype.indexOf.call(box.children, token);
    const d = data(box);
    const [s, t] = [d.student[index], d.teacher[index]];
    tip.replaceChildren(element("div", token.textContent.replace(/\n$/, ""), "name"));
    const place = `token ${index + 1} of ${box.children.length}` + (d.ids.length > index ? `, id ${d.ids[index]}` : "");
    tip.append(element("div", place, "dim"));
    const table = document.createElement("table");
    if (known(s)) table.append(row("student", probability(s), nats(s)));
    if (known(t)) table.append(row("teacher", probability(t), nats(t)));
    if (known(s) && known(t)) table.append(row("reverse KL", "", signed(s - t) + " nats"));
    tip.append(table);
    const best = d.alternatives[index] || [];
    if (best.length) {
      tip.append(element("div", "the teacher's choices", "dim"));
      const list = document.createElement("table");
      for (let i = 0; i < best.length; i += 2) list.append(row(best[i], probability(best[i + 1])));
      tip.append(list);
    }
    if (d.notes[index]) tip.append(element("div", d.notes[index]));
    if (d.untrained.has(index)) tip.append(element("div", "does not train", "dim"));
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
    const next = {
      ArrowRight: token.nextElementSibling, ArrowDown: token.nextElementSibling,
      ArrowLeft: token.previousElementSibling, ArrowUp: token.previousElementSibling,
      Home: box.firstElementChild, End: box.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    focus(next);
  });
  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.parentNode.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        // No clipboard on this page: select the text, so that the usual keys copy it.
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
