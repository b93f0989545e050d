// What the page does beside forms and links: files dropped on a field, and a search's figure while it runs.
"use strict";
(() => {
  function bindDrops() {
    document.querySelectorAll("[data-drop]").forEach((area) => {
      const input = area.querySelector("input[type=file]");
      for (const name of ["dragenter", "dragover"]) {
        area.addEventListener(name, (event) => {
          event.preventDefault();
          area.classList.add("over");
        });
      }
      for (const name of ["dragleave", "drop"]) area.addEventListener(name, () => area.classList.remove("over"));
      area.addEventListener("drop", (event) => {
        event.preventDefault();
        if (event.dataTransfer.files.length) input.files = event.dataTransfer.files;
      });
    });
  }

  // A form that is sent twice asks twice: its button waits.
  document.addEventListener("submit", (event) => {
    if (event.target.method !== "post") return;
    const button = event.target.querySelector("button[type=submit]");
    if (button) setTimeout(() => (button.disabled = true), 0);
  });
  window.addEventListener("pageshow", () => {
    document.querySelectorAll("button[type=submit]").forEach((button) => (button.disabled = false));
  });

  document.addEventListener("htmx:afterSwap", () => {
    const live = document.querySelector("figure[data-live]");
    if (live && window.moeplanDraw) window.moeplanDraw(live);
  });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", bindDrops);
  else bindDrops();
})();
