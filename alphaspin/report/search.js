"use strict";
// Find samples by their words; all of the page is there without it.
const box = document.querySelector(".search input");
const found = document.querySelector(".search output");
const samples = [...document.querySelectorAll(".samples table")].map((table) => {
  const copy = table.cloneNode(true);
  copy.querySelectorAll("del").forEach((word) => word.remove());
  return { table, text: copy.textContent.toLowerCase() };
});
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = samples.filter((one) => {
    const hit = words.every((word) => one.text.includes(word));
    one.table.hidden = !hit;
    return hit;
  });
  document.querySelectorAll(".more").forEach((more) => (more.open = words.length > 0));
  found.textContent = words.length ? `${hits.length} of ${samples.length}` : "";
});
box.closest(".search").hidden = false;
