// Charts read themselves out: a line and the numbers at the nearest place, under the pointer or the arrow keys.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const tip = document.createElement("div");
  tip.id = "chart-tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // its text is the chart's own value
  document.querySelector("main").append(tip);

  const element = (name, text, css) => {
    const node = document.createElement(name);
    node.textContent = text;
    if (css) node.className = css;
    return node;
  };
  const clear = (chart) => {
    for (const node of chart.querySelectorAll(".reading")) node.remove();
    tip.hidden = true;
  };
  const shape = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    node.setAttribute("class", "reading");
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const place = (data, at) => (data.label ? `${data.label} ` : "") + data.x[at];
  const values = (data, at) => data.rows.filter((row) => row.values[at] !== null);
  const happened = (data, at) => data.marks.filter(([index]) => index === at).map(([, words]) => words);
  const inWords = (data, at) => [
    place(data, at), ...values(data, at).map((row) => `${row.name} ${row.values[at]}`), ...happened(data, at),
  ].join("; ");

  const fill = (data, at) => {
    const table = document.createElement("table");
    for (const row of values(data, at)) {
      const line = document.createElement("tr");
      line.append(element("td", row.name), element("td", row.values[at]));
      table.append(line);
    }
    tip.replaceChildren(element("div", place(data, at), "name"), table);
    for (const words of [...data.references, ...happened(data, at)]) tip.append(element("div", words, "dim"));
  };
  const show = (plot, at) => {
    const { chart, data } = plot;
    clear(chart);
    plot.at = at;
    plot.box.setAttribute("aria-valuenow", String(at));
    plot.box.setAttribute("aria-valuetext", inWords(data, at));
    const x = data.at[at];
    chart.append(shape("line", { x1: x, x2: x, y1: data.top, y2: data.bottom }));
    for (const row of data.rows) if (row.y[at] !== null) chart.append(shape("circle", { cx: x, cy: row.y[at], r: 4 }));
    fill(data, at);
    tip.hidden = false;
    const area = chart.getBoundingClientRect();
    const scale = area.width / chart.viewBox.baseVal.width;
    const beside = area.left + x * scale;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const right = beside + 12;
    tip.style.left = `${Math.max(8, right > room ? Math.min(beside - tip.offsetWidth - 12, room) : right)}px`;
    const top = area.top + data.top * scale;
    tip.style.top = `${Math.max(8, Math.min(top, innerHeight - tip.offsetHeight - 8))}px`;
  };
  const nearest = (data, x) => {
    let found = 0;
    for (let i = 1; i < data.at.length; i += 1) if (Math.abs(data.at[i] - x) < Math.abs(data.at[found] - x)) found = i;
    return found;
  };

  const plots = new Map();
  const hide = (plot) => clear(plot.chart);
  const under = (plot, event) => {
    const area = plot.chart.getBoundingClientRect();
    show(plot, nearest(plot.data, ((event.clientX - area.left) / area.width) * plot.chart.viewBox.baseVal.width));
  };
  const step = (plot, event) => {
    const last = plot.data.at.length - 1;
    const far = Math.max(1, Math.round(last / 10));
    const next = {
      ArrowRight: plot.at + 1, ArrowUp: plot.at + 1, ArrowLeft: plot.at - 1, ArrowDown: plot.at - 1,
      PageUp: plot.at + far, PageDown: plot.at - far, Home: 0, End: last,
    }[event.key];
    if (event.key === "Escape") return hide(plot);
    if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(plot, Math.max(0, Math.min(last, next)));
  };

  for (const chart of document.querySelectorAll("svg.chart[data-chart]")) {
    const data = JSON.parse(chart.dataset.chart);
    const box = document.createElement("div");
    const last = data.at.length - 1;
    const about = {
      class: "plot", tabindex: "0", role: "slider", "aria-label": chart.getAttribute("aria-label"),
      "aria-valuemin": "0", "aria-valuemax": String(last), "aria-valuenow": String(last),
      "aria-valuetext": inWords(data, last),
    };
    for (const [name, value] of Object.entries(about)) box.setAttribute(name, value);
    chart.replaceWith(box);
    chart.setAttribute("role", "presentation");
    chart.removeAttribute("aria-label");
    box.append(chart);
    const plot = { box, chart, data, at: last };
    plots.set(box, plot);
    box.addEventListener("pointermove", (event) => under(plot, event));
    box.addEventListener("pointerdown", (event) => under(plot, event));
    box.addEventListener("pointerleave", () => { if (document.activeElement !== box) hide(plot); });
    box.addEventListener("focus", () => show(plot, plot.at));
    box.addEventListener("blur", () => hide(plot));
    box.addEventListener("keydown", (event) => step(plot, event));
  }
  document.addEventListener("scroll", () => {
    for (const plot of plots.values()) {
      if (document.activeElement === plot.box && !tip.hidden) show(plot, plot.at); else if (plot.chart.querySelector(".reading")) hide(plot);
    }
  }, { capture: true, passive: true });

  // Nothing that is folded is missing on paper.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
    for (const plot of plots.values()) hide(plot);
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
})();
