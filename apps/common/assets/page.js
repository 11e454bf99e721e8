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
    if (event.target.closest("#nb-generate")) press();
  });

  // On a narrow page the results lie below the desk: a press of Generate that was taken leads to them; where each stroke
  // paints, to the page to draw on, right above them.
  let pressed = 0;
  const leadToResults = () => {
    const results = document.querySelector(".nb-at-once .nb-editor") ?? document.querySelector("#nb-results");
    if (!results || Date.now() - pressed > 30000 || innerWidth > 900) return;
    pressed = 0;
    const { top } = results.getBoundingClientRect();
    if (top < 0 || top > innerHeight / 3) results.scrollIntoView({ behavior: "smooth", block: "start" });
  };
  const press = () => { pressed = Date.now(); };

  // Once the page is there: the open app is in sight among the links, and the button tells when a run begins.
  const settle = new MutationObserver(() => {
    const button = document.querySelector("#nb-generate");
    if (!button) return;
    settle.disconnect();
    const here = document.querySelector(".nb-rooms a[aria-current]");
    if (here) here.parentElement.scrollLeft = here.offsetLeft - here.parentElement.offsetLeft - 40;
    new MutationObserver(() => { if (button.disabled) leadToResults(); }).observe(button, { attributes: true });
  });
  settle.observe(document, { childList: true, subtree: true });

  // A page to draw on starts with the brush in hand; Gradio starts with the tool that uploads.
  const takeBrush = new MutationObserver(() => {
    const brush = document.querySelector(".nb-draw-first button[aria-label=Brush]");
    if (!brush) return;
    takeBrush.disconnect();
    brush.click();
  });
  takeBrush.observe(document, { childList: true, subtree: true });
  window.addEventListener("load", () => setTimeout(() => takeBrush.disconnect(), 60000));

  // An editor encodes all of its picture several times over: one of a camera's size is made smaller before it gets there,
  // still larger than any picture that is painted. What cannot be read goes on as it is, and is answered in words.
  const longest = () => Number(document.querySelector("[data-longest]")?.dataset.longest) || 2048;
  const made = new WeakSet();
  let reducing = 0, given = 0;
  const reduced = async (file) => {
    try {
      const picture = await createImageBitmap(file);
      given = Date.now();
      const share = longest() / Math.max(picture.width, picture.height);
      if (share >= 1) return file;
      const page = document.createElement("canvas");
      [page.width, page.height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * share)));
      const brush = page.getContext("2d");
      brush.imageSmoothingQuality = "high";
      brush.drawImage(picture, 0, 0, page.width, page.height);
      const blob = await new Promise((done) => page.toBlob(done, "image/png"));
      return new File([blob], file.name.replace(/\.\w+$/, "") + ".png", { type: "image/png" });
    } catch {
      return file;
    }
  };
  const takeOver = (event, files, again) => {
    const editor = event.target.closest?.(".nb-editor");
    if (made.has(event) || !editor || !files?.length) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    reducing += 1;
    editor.setAttribute("aria-busy", "true");
    Promise.all([...files].map(reduced)).then((smaller) => {
      const held = new DataTransfer();
      smaller.forEach((file) => held.items.add(file));
      const next = again(held);
      made.add(next);
      event.target.dispatchEvent(next);
    }).finally(() => {
      reducing -= 1;
      editor.removeAttribute("aria-busy");
    });
  };
  window.addEventListener("change", (event) => takeOver(event, event.target.type === "file" && event.target.files, (held) => {
    event.target.files = held.files;
    return new Event("change", { bubbles: true });
  }), true);
  window.addEventListener("drop", (event) => takeOver(event, event.dataTransfer?.files, (held) =>
    new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: held })), true);

  // An editor takes a while to send what it shows. A press of Generate waits for it, or it would paint the picture of
  // before. A picture that the browser can read is sent for certain; a touch of the editor may have changed nothing.
  const QUIET = 400, PATIENCE = 20000;
  let touched = 0, sent = 0, sending = 0, released = false;
  const send = window.fetch;
  window.fetch = (...asked) => {
    if (!/\/upload(\?|$)/.test(String(asked[0]?.url ?? asked[0]))) return send(...asked);
    sending += 1;
    return send(...asked).finally(() => {
      sending -= 1;
      sent = Date.now();
    });
  };
  window.addEventListener("pointerup", (event) => {
    if (event.target.closest?.(".nb-editor")) touched = Date.now();
  }, true);
  const hasAll = () => {
    const now = Date.now();
    if (reducing || sending || now - Math.max(touched, sent) < QUIET) return false;
    return sent > given || now - given > PATIENCE;
  };
  window.addEventListener("click", (event) => {
    const button = event.target.closest?.("#nb-generate");
    if (!button || button.disabled || released || hasAll()) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (button.hasAttribute("aria-busy")) return;
    button.setAttribute("aria-busy", "true");
    const pressedAt = Date.now();
    const look = setInterval(() => {
      if (!hasAll() && Date.now() - pressedAt < 3 * PATIENCE) return;
      clearInterval(look);
      button.removeAttribute("aria-busy");
      released = true;
      button.click();
      released = false;
    }, 50);
  }, true);

  // Gradio's own multi-line box submits on Shift+Enter; people who write prompts press Ctrl+Enter or Cmd+Enter.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !event.target.closest("#nb-prompt")) return;
    event.preventDefault();
    const button = document.querySelector("#nb-generate");
    if (button && !button.disabled) button.click();
  }, true);
})();
