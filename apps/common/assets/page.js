() => {
  const dark = () => document.body.classList.contains("dark");
  const set = (on) => document.body.classList.toggle("dark", on);
  try {
    const kept = localStorage.getItem("nibble-light");
    if (kept && !new URLSearchParams(location.search).has("__theme")) set(kept === "dark");
  } catch { /* a browser without storage follows the system */ }

  document.addEventListener("click", (event) => {
    // The page of the interface opens from Gradio's own footer only, which the sheet hides.
    if (event.target.closest("#nb-api")) document.querySelector("footer:not(.nb-footer) button")?.click();
    if (!event.target.closest("#nb-light")) return;
    set(!dark());
    try { localStorage.setItem("nibble-light", dark() ? "dark" : "light"); } catch { /* not kept */ }
  });

  // Gradio's own multi-line box submits on Shift+Enter; people who write prompts press Ctrl+Enter or Cmd+Enter.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (!event.target.closest("#nb-prompt")) return;
    event.preventDefault();
    const button = document.querySelector("#nb-generate");
    if (button && !button.disabled) { event.target.blur(); button.click(); event.target.focus(); }
  }, true);
}
