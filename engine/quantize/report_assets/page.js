// The page reads without this; it adds the slider over a picture, and sorting and filtering of the long table.
for (const slider of document.querySelectorAll(".compare input")) {
  const frame = slider.parentElement.querySelector(".frame");
  slider.addEventListener("input", () => {
    frame.style.setProperty("--cut", `${slider.value}%`);
    frame.style.setProperty("--line", slider.value > 0 && slider.value < 100 ? 1 : 0);
  });
}
const table = document.querySelector("#all tbody");
for (const button of document.querySelectorAll("[data-sort]")) {
  const key = button.dataset.sort, sign = key === "error" ? -1 : 1;
  button.addEventListener("click", () => {
    const rows = [...table.querySelectorAll("tr[data-index]")];
    rows.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
    table.append(...rows);
  });
}
document.querySelector(".tools input")?.addEventListener("input", (event) => {
  const wanted = event.target.value.trim().toLowerCase();
  for (const row of table.querySelectorAll("tr[data-index]")) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
});
