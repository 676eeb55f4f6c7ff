"use strict";
// What lies under the pointer: explanations (data-tip), and the values of every line at a step (data-chart).
const tip = document.getElementById("tip");
function place(event) {
  const gap = 14, box = tip.getBoundingClientRect();
  const left = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
  const top = event.clientY + gap + box.height > innerHeight ? event.clientY - gap - box.height : event.clientY + gap;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}
function say(text, event) { tip.textContent = text; tip.hidden = false; place(event); }
function hush() { tip.hidden = true; }
for (const element of document.querySelectorAll("[data-tip]")) {
  element.addEventListener("pointermove", event => say(element.dataset.tip, event));
  element.addEventListener("pointerleave", hush);
  element.addEventListener("focus", () => {
    const box = element.getBoundingClientRect();
    say(element.dataset.tip, {clientX: box.left, clientY: box.bottom});
  });
  element.addEventListener("blur", hush);
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}
function cell(row, text) { const made = row.insertCell(); made.textContent = text; return made; }
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), cursor = svg.querySelector(".cursor");
  const [low, high, start, end] = chart.x, width = svg.viewBox.baseVal.width;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), pixel = (event.clientX - box.left) / box.width * width;
    const wanted = low + (Math.min(Math.max(pixel, start), end) - start) / (end - start) * (high - low);
    const lines = chart.series.filter(line => line.xs.length);
    if (!lines.length) return;
    const dense = lines.reduce((a, b) => b.xs.length > a.xs.length ? b : a);
    const step = dense.xs[nearest(dense.xs, wanted)];
    const at = start + (step - low) / (high - low) * (end - start);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.classList.add("on");
    const table = document.createElement("table");
    for (const line of lines) {
      const index = nearest(line.xs, step), row = table.insertRow(), name = cell(row, "");
      const dot = document.createElement("i");
      dot.className = line.colour; name.append(dot, line.name);
      cell(row, line.ys[index] + (line.unit ? " " + line.unit : ""));
      if (line.xs[index] !== step) cell(row, "at " + line.xs[index].toLocaleString("en"));
    }
    tip.replaceChildren(chart.label + " " + step.toLocaleString("en"), table);
    tip.hidden = false; place(event);
  });
  svg.addEventListener("pointerleave", () => { hush(); cursor.classList.remove("on"); });
}
// Videos play while they are in sight, unless the reader asked for less motion.
if (!matchMedia("(prefers-reduced-motion: reduce)").matches && "IntersectionObserver" in window) {
  const watch = new IntersectionObserver(entries => {
    for (const {target, isIntersecting} of entries) {
      if (isIntersecting) target.play().catch(() => {}); else target.pause();
    }
  }, {threshold: 0.4});
  document.querySelectorAll("video").forEach(video => watch.observe(video));
}
