// Draws the curves of the page with uPlot. The numbers come from the JSON block `curves`; nothing is fetched.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("curves").textContent);
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const controls = document.querySelector(".controls");
  const asked = { axis: "step", smooth: controls.querySelector("[name=smooth]").checked, logarithmic: false };
  const axisNames = { step: "optimizer step", epoch: "epoch", tokens: "tokens trained", minutes: "minutes in steps" };
  const dashes = [[], [8, 4], [2, 3], [12, 3, 2, 3]];
  const colours = 8;
  let drawn = [];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function worded(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e");
    return new Intl.NumberFormat("en", { maximumSignificantDigits: 5 }).format(value);
  }

  function shown(series) {
    const values = asked.smooth && series.means.length ? series.means : series.values;
    // a rate of zero has no logarithm
    return asked.logarithmic ? values.map((value) => (value > 0 ? value : null)) : values;
  }

  function joined(chart) {
    const tables = data.runs.flatMap((_, run) => {
      const lines = chart.series.filter((series) => series.run === run);
      return lines.length ? [[data.axes[run][asked.axis], ...lines.map((series) => shown(series))]] : [];
    });
    return tables.length > 1 ? uPlot.join(tables) : tables[0];
  }

  function lines(chart) {
    const several = data.runs.length > 1;
    const seen = new Map();
    return chart.series.map((series, index) => {
      const within = seen.get(series.run) || 0;
      seen.set(series.run, within + 1);
      const number = several ? series.run : index;
      const stroke = series.planned && !several ? colour("--soft") : colour(`--c${number % colours}`);
      const dash = series.planned ? [4, 6] : dashes[(several ? within : Math.floor(index / colours)) % dashes.length];
      return {
        label: several ? `${data.runs[series.run]}: ${series.name}` : series.name,
        stroke,
        dash,
        width: series.planned ? 1 : 1.6,
        spanGaps: true,
        points: series.dots ? { show: true, size: 7, fill: stroke } : series.planned ? { show: false } : undefined,
        value: (_, value) => worded(value) || "–",
      };
    });
  }

  function options(chart, width) {
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid"), width: 1 } };
    const values = (_, splits) => splits.map(worded);
    return {
      width,
      height: width < 480 ? 210 : 260,
      scales: { x: { time: false }, y: { distr: asked.logarithmic ? 3 : 1 } },
      axes: [{ ...axis, values, space: 64, size: 34 }, { ...axis, values, size: 66 }],
      series: [{ label: axisNames[asked.axis], value: (_, value) => worded(value) || "–" }, ...lines(chart)],
      cursor: { sync: { key: "charts" }, focus: { prox: 24 }, drag: { x: true, y: false } },
      focus: { alpha: 0.3 },
      legend: { markers: { dash: (plot, index) => (plot.series[index].dash.length ? "dashed" : "solid") } },
    };
  }

  function draw() {
    drawn.forEach((plot) => plot.destroy());
    drawn = figures.map((figure) => {
      const chart = data.charts[Number(figure.dataset.chart)];
      const place = figure.querySelector(".plot");
      return new uPlot(options(chart, Math.max(200, place.clientWidth)), joined(chart), place);
    });
  }

  function resize() {
    drawn.forEach((plot, index) => {
      const width = figures[index].querySelector(".plot").clientWidth;
      if (width > 0 && width !== plot.width) plot.setSize({ width, height: width < 480 ? 210 : 260 });
    });
  }

  controls.hidden = false;
  controls.addEventListener("change", (event) => {
    const field = event.target;
    asked[field.name] = field.type === "checkbox" ? field.checked : field.value;
    draw();
  });
  draw();
  new ResizeObserver(resize).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
