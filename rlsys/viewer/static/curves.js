// Draws the curves of the overview. The points come from the page itself, or from the server, again while a run goes on.
"use strict";
(function () {
  const box = document.getElementById("curves");
  const inline = document.getElementById("points");
  const REFRESH_MS = 5000, HEIGHT = 150;
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    return ["--run0", "--run1"].map((name) => style.getPropertyValue(name).trim());
  };
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const plots = new Map();
  let points = null;

  // The columns of a curve, from its first point to its last one.
  function series(name) {
    const columns = points.runs.map((curves) => curves[name] || points.x.map(() => null));
    const known = points.x.map((_, place) => columns.some((column) => column[place] !== null));
    const first = known.indexOf(true), last = known.lastIndexOf(true) + 1;
    return [points.x, ...columns].map((column) => column.slice(first, last));
  }

  function range(plot, low, high) {
    if (low === null) { return [0, 1]; }
    if (low === high) { return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * low)]; }
    return uPlot.rangeNum(low, high, 0.1, true);
  }

  function axis(extra) {
    return Object.assign({stroke: ink("--dim"), grid: {stroke: ink("--line"), width: 1}, ticks: {show: false}, font: "11px system-ui"}, extra);
  }

  function draw(figure) {
    const name = figure.dataset.name, place = figure.querySelector(".plot");
    const data = series(name);
    if (plots.has(figure)) { plots.get(figure).setData(data); renew(figure, data); return; }
    const paint = colours();
    const few = data.slice(1).every((values) => values.filter((value) => value !== null).length < 10);
    const width = figure.clientWidth - 16;
    plots.set(figure, new uPlot({
      width: width, height: HEIGHT, legend: {show: false},
      scales: {x: {time: false}, y: {range: range}},
      axes: [axis({size: 26, values: (plot, ticks) => ticks.map(String)}), axis({size: 52})],
      cursor: {sync: {key: "rlsys", scales: ["x", null]}, points: {size: 5}, y: false},
      hooks: {setCursor: [(plot) => show(figure, plot)]},
      series: [{}, ...points.runs.map((_, number) => ({
        stroke: paint[number], width: 1.5, spanGaps: true, points: {show: few, size: 4, fill: paint[number]},
      }))],
    }, data, place));
  }

  function joined(values) {
    return values.filter((value) => value !== null && value !== undefined).map((value) => String(+value.toPrecision(4))).join(" | ");
  }

  // Write the last values of a curve above it, after new points have come.
  function renew(figure, data) {
    const last = figure.querySelector(".last");
    last.dataset.text = joined(data.slice(1).map((column) => column.filter((value) => value !== null).pop()));
    last.textContent = last.dataset.text;
  }

  // Write the values under the pointer above a curve, or its last values without a pointer.
  function show(figure, plot) {
    const last = figure.querySelector(".last"), index = plot.cursor.idx;
    if (!last.dataset.text) { last.dataset.text = last.textContent; }
    if (index === null || index === undefined) { last.textContent = last.dataset.text; return; }
    const values = joined(plot.data.slice(1).map((column) => column[index]));
    last.textContent = values ? values + " at " + Math.round(plot.data[0][index]) : "";
  }

  function drawOpen() {
    if (points === null || !points.x.length) { return; }
    document.querySelectorAll("details.group[open] figure.chart").forEach(draw);
  }

  async function load() {
    try {
      const response = await fetch(box.dataset.source);
      const fresh = await response.json();
      if (points !== null && !points.x.length && fresh.x.length) { location.reload(); return; }
      points = fresh;
      document.querySelectorAll(".place").forEach((place, run) => { place.textContent = points.places[run]; });
      drawOpen();
    } catch (error) { /* the server has ended: the curves stay as they are */ }
    if (points !== null && points.live) { setTimeout(load, REFRESH_MS); }
  }

  document.querySelectorAll("details.group").forEach((details) => details.addEventListener("toggle", drawOpen));
  if (inline) { points = JSON.parse(inline.textContent); drawOpen(); } else { load(); }
})();
