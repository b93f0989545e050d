// Draws every <figure> that holds data: with Plotly, in the reader's colours, with a table for its numbers.
"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

  function merged(base, own) {
    const result = { ...base };
    for (const [key, value] of Object.entries(own || {})) {
      result[key] = isObject(value) && isObject(result[key]) ? merged(result[key], value) : value;
    }
    return result;
  }

  function themed(layout, width) {
    const text = dark.matches ? "#e6e9ec" : "#1b1f24";
    const line = dark.matches ? "#3a434d" : "#d0d7de";
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line };
    const narrow = width < 480;
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, size: narrow ? 11 : 13, family: "system-ui, Liberation Sans, Arial, sans-serif" },
      margin: { l: 40, r: 12, t: 36, b: 44 },
      xaxis: axis,
      yaxis: axis,
      hoverlabel: { font: { size: 13 } },
      hovermode: "closest",
    };
    const result = merged(base, layout);
    if (narrow && result.coloraxis && result.coloraxis.colorbar) {
      // Beside the plot there is no space for it.
      result.coloraxis = merged(result.coloraxis, {
        colorbar: { orientation: "h", y: 1.02, yanchor: "bottom", thickness: 8, title: { side: "top" } },
      });
      result.coloraxis.colorbar.title.text = result.coloraxis.colorbar.title.text.replace("<br>", " ");
      // With a distance of its own the title is set before the colours have taken their space.
      delete result.xaxis.title.standoff;
      result.height += 60;
      result.margin = merged(result.margin, { b: 60 });
    }
    return result;
  }

  function fillTable(figure, rows, picks) {
    const body = figure.querySelector("table.numbers tbody");
    if (!body) return;
    body.replaceChildren(
      ...rows.map((cells, i) => {
        const row = document.createElement("tr");
        for (const cell of cells) {
          const data = document.createElement("td");
          data.textContent = String(cell);
          if (typeof cell === "number") data.className = "number";
          row.append(data);
        }
        if (picks) {
          row.tabIndex = 0;
          row.addEventListener("click", () => pick(figure, i, false));
          row.addEventListener("keydown", (event) => {
            if (event.key === "Enter" || event.key === " ") {
              event.preventDefault();
              pick(figure, i, false);
            }
          });
        }
        return row;
      }),
    );
  }

  // Marks one point in all lines, and its row.
  function pick(figure, number, openTable) {
    const plot = figure.querySelector(".plot");
    window.Plotly.restyle(plot, { selectedpoints: [[number]] });
    const rows = figure.querySelectorAll("table.numbers tbody tr");
    rows.forEach((row, i) => row.setAttribute("aria-selected", String(i === number)));
    if (openTable) {
      figure.querySelector("details").open = true;
      rows[number].scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
    }
  }

  function draw(figure) {
    const source = figure.querySelector("script.data");
    const plot = figure.querySelector(".plot");
    if (!source || !plot || !window.Plotly) return;
    const content = JSON.parse(source.textContent);
    const chooser = figure.querySelector("select.views");
    const view = content.views[chooser ? chooser.selectedIndex : 0];
    const layout = themed(content.layout, plot.clientWidth);
    // Labels that only a wide screen has space for.
    const data = view.data.filter((trace) => trace.meta !== "wide" || plot.clientWidth >= 480);
    const done = window.Plotly.react(plot, data, layout, CONFIG);
    fillTable(figure, view.rows, content.picks);
    figure.dataset.drawn = "yes";
    if (chooser && !chooser.dataset.bound) {
      chooser.dataset.bound = "yes";
      chooser.addEventListener("change", () => draw(figure));
    }
    if (content.picks && !figure.dataset.picks) {
      figure.dataset.picks = "yes";
      done.then(() => plot.on("plotly_click", (event) => pick(figure, event.points[0].pointNumber, true)));
    }
  }

  const drawAll = () => document.querySelectorAll("figure.drawing").forEach(draw);
  dark.addEventListener("change", drawAll);
  window.moeplanDraw = draw;
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", drawAll);
  else drawAll();
})();
