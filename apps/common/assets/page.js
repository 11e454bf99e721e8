// Listens from the first moment on, before Gradio has built the page.
(() => {
  const isDark = () => document.body.classList.contains("dark");

  const openInterface = () => {
    // The page of the interface opens from Gradio's own footer only, which the sheet hides.
    document.querySelector("footer:not(.nb-footer) button")?.click();
  };

  const switchLight = () => {
    document.body.classList.toggle("dark");
    try { localStorage.setItem("nibble-light", isDark() ? "dark" : "light"); } catch { /* a browser without storage */ }
  };

  document.addEventListener("click", (event) => {
    if (event.target.closest("#nb-api")) openInterface();
    if (event.target.closest("#nb-light")) switchLight();
  });

  // A page to draw on starts with the brush in hand; Gradio starts with the tool that uploads.
  const takeBrush = new MutationObserver(() => {
    const brush = document.querySelector(".nb-draw-first button[aria-label=Brush]");
    if (!brush) return;
    takeBrush.disconnect();
    brush.click();
  });
  takeBrush.observe(document, { childList: true, subtree: true });
  window.addEventListener("load", () => setTimeout(() => takeBrush.disconnect(), 60000));

  // Gradio's own multi-line box submits on Shift+Enter; people who write prompts press Ctrl+Enter or Cmd+Enter.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !event.target.closest("#nb-prompt")) return;
    event.preventDefault();
    const button = document.querySelector("#nb-generate");
    if (button && !button.disabled) button.click();
  }, true);
})();
