window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};

// Pages that are loaded without a full reload have to be typeset again.
if (typeof document$ !== "undefined") {
  document$.subscribe(() => window.MathJax.typesetPromise?.());
}
