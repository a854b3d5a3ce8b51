// A formula within a line that is wider than its paragraph becomes a line of its own, which scrolls (stylesheets/extra.css).
function scrollWideFormulas() {
  for (const formula of document.querySelectorAll("span.arithmatex")) {
    formula.classList.remove("wide");
    const width = formula.firstElementChild?.getBoundingClientRect().width;
    formula.classList.toggle("wide", width > formula.closest("p, li, .md-typeset").clientWidth);
  }
}
window.addEventListener("resize", scrollWideFormulas);

window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
  startup: { pageReady: () => window.MathJax.startup.defaultPageReady().then(scrollWideFormulas) },
};

// Pages that are loaded without a full reload have to be typeset again.
if (typeof document$ !== "undefined") {
  document$.subscribe(() => window.MathJax.typesetPromise?.().then(scrollWideFormulas));
}
