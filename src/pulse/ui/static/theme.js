"use strict";
// Before the first paint, so that a page that is kept dark never flashes.
(() => {
  const kept = localStorage.getItem("pulse-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
