() => {
  // Runs once Gradio has followed the system's setting: a visitor's own choice of light goes before it.
  if (new URLSearchParams(location.search).has("__theme")) return;
  try {
    const kept = localStorage.getItem("nibble-light");
    if (kept) document.body.classList.toggle("dark", kept === "dark");
  } catch { /* a browser without storage follows the system */ }
}
